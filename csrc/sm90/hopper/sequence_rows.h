// How TMA reads rows of one sequence, and zeros past its end.
//
// The copy engine clips a box at the tensor's extents alone, and a packed tensor's sequences lie behind each other: a
// box at a sequence's end would bring rows of the next one, and 0 * NaN is NaN in a product. So a descriptor of packed
// rows has three dimensions for the row, of which the first ends where the sequence does, for whatever sequence. With
// rows `stride` bytes apart, row r of a sequence [offset, offset + length) is at
//
//   dimension      extent        stride                       coordinate
//   row            kRowExtent    stride                       kRowExtent - length + r     outside from r = length on
//   end            kAnyExtent    stride                       offset + length
//   outer          kAnyExtent    -stride (modulo 2^34)        kRowExtent
//
// and kRowExtent * 2^34 = 2^64, so that the sum of addresses is (offset + r) * stride: addresses wrap around. A dense
// batch has dimensions (rows, 1, batch) in their places and coordinates (r, 0, batch).
//
// Source: the ragged descriptors of Triton (python/triton/tools/ragged_tma.py).
#pragma once

#include <cstdint>

namespace flashmla::sm90 {

constexpr int64_t kRowExtent = int64_t{1} << 30;
constexpr int64_t kAnyExtent = 0x7fff0000;
constexpr int64_t kWrapBytes = int64_t{1} << 34;  // kRowExtent of them are 2^64

struct RowCoordinates {
  int32_t row, end, outer;
};

// Of row 0; boxes further on add to `row`.
__device__ inline RowCoordinates row_coordinates(bool is_packed, int32_t offset, int32_t length, int32_t batch) {
  if (!is_packed) return {0, 0, batch};
  return {static_cast<int32_t>(kRowExtent) - length, offset + length, static_cast<int32_t>(kRowExtent)};
}

}  // namespace flashmla::sm90
