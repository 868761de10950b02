// The sum of the parts of a tile: what combine_kernel and the CTAs of a cluster do alike.
//
// A part has O_c = sum_j exp(S_j - max_c) V_j and sum_c = sum_j exp(S_j - max_c) of a row:
//
//   max = max_c max_c,   O = sum_c exp(max_c - max) O_c / sum_c exp(max_c - max) sum_c
//
// and a sink joins the sum as one more key. Who adds does so in an order that depends on the number of parts alone.
#pragma once

#include "params.h"
#include "sm90/decode/decode_rows.cuh"
#include "sm90/decode/decode_schedule.cuh"
#include "sm90/hopper/fragment.cuh"
#include "sm90/hopper/softmax.cuh"

namespace flashmla::sm90 {

// Four columns of a row.
struct SumOfParts {
  float row_max, scale_log2;  // of all parts; the scale of scores in base 2
  float sum = 0.0f;
  float4 x{0.0f, 0.0f, 0.0f, 0.0f};

  __device__ SumOfParts(Problem const& problem, float row_max) : row_max(row_max) {
    bool const has_transform = problem.softcap > 0.0f || problem.scale <= 0.0f;
    scale_log2 = has_transform ? kLog2e : problem.scale * kLog2e;
  }

  // `part` is (maximum of the scores, sum of exponentials).
  __device__ void add(float2 part, float4 const& y) {
    float const weight = part.x == -INFINITY ? 0.0f : exp2f((part.x - row_max) * scale_log2);
    sum += part.y * weight;
    x = {x.x + y.x * weight, x.y + y.y * weight, x.z + y.z * weight, x.w + y.w * weight};
  }

  // Writes columns column ... column + 3 of the row if `has_out`, and its lse if `has_lse`.
  template <class Element>
  __device__ void write(DecodeArguments const& arguments, int32_t batch, TileRow const& row, int32_t column,
                        bool has_keys, bool has_out, bool has_lse) const {
    DecodeParams const& params = arguments.params;
    float const* const sinks = params.problem.sinks;
    float lse;
    float factor = finish_row(row_max == -INFINITY ? -INFINITY : row_max * scale_log2, sum,
                              sinks == nullptr ? nullptr : sinks + row.head, lse);
    if (!has_keys) factor = 0.0f;  // of no weight at all, a sink of NaN makes nothing
    if (has_out) {
      *reinterpret_cast<uint2*>(row_pointer<Element>(params.out, batch, row) + column) = {
          pack<Element>(x.x * factor, x.y * factor), pack<Element>(x.z * factor, x.w * factor)};
    }
    if (has_lse && params.lse.data != nullptr) {
      params.lse.data[batch * params.lse.stride_batch + row.head * params.lse.stride_heads + row.query] = lse;
    }
  }
};

}  // namespace flashmla::sm90
