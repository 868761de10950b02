// Which head-dim row runs a call: the first that is wide enough. What the call lacks of the row's width arrives as
// zeros from TMA and is not stored.
#include "sm90/launch.h"
#include "sm90/schedule.h"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Defined by one file of instantiations/ each.
template <int kHeadDimQK, int kHeadDimV>
const char* launch_forward_row(ForwardParams const& params, void* workspace, cudaStream_t stream);

namespace {

struct Row {
  int64_t head_dim_qk, head_dim_v;
  int block_q;
  const char* (*launch_forward)(ForwardParams const& params, void* workspace, cudaStream_t stream);
};

template <int kHeadDimQK, int kHeadDimV>
constexpr Row kRow = {kHeadDimQK, kHeadDimV, ForwardTiles<kHeadDimQK, kHeadDimV, MaskKind::kNone>::kBlockQ,
                      launch_forward_row<kHeadDimQK, kHeadDimV>};

constexpr Row kRows[] = {kRow<64, 64>, kRow<96, 96>, kRow<128, 128>, kRow<192, 128>, kRow<192, 192>, kRow<256, 256>};

// The host has checked that no head dim is larger than the last row's.
Row const& row_of(Problem const& problem) {
  Row const* row = kRows;
  while (problem.head_dim_qk > row->head_dim_qk || problem.head_dim_v > row->head_dim_v) ++row;
  return *row;
}

}  // namespace

int64_t forward_workspace(ForwardParams const& params) {
  return schedule_bytes(params.problem, row_of(params.problem).block_q);
}

const char* launch_forward(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return row_of(params.problem).launch_forward(params, workspace, stream);
}

}  // namespace flashmla::sm90
