// Which head-dim row runs a call: the first that is wide enough. What the call lacks of the row's width arrives as
// zeros from TMA and is not stored.
#include "sm90/launch.h"
#include "sm90/schedule.h"
#include "sm90/tiles.h"

namespace flashmla::sm90 {

// Defined by one file of instantiations/ each.
template <int kHeadDimQK, int kHeadDimV>
const char* launch_forward_row(ForwardParams const& params, void* workspace, cudaStream_t stream);
template <int kHeadDimQK, int kHeadDimV>
int64_t backward_workspace_row(BackwardParams const& params);
template <int kHeadDimQK, int kHeadDimV>
const char* launch_backward_row(BackwardParams const& params, void* workspace, cudaStream_t stream);

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

struct BackwardRow {
  int64_t head_dim_qk, head_dim_v;
  bool has_softcap;
  int64_t (*workspace)(BackwardParams const& params);
  const char* (*launch)(BackwardParams const& params, void* workspace, cudaStream_t stream);
};

template <int kHeadDimQK, int kHeadDimV>
constexpr BackwardRow kBackwardRow = {kHeadDimQK, kHeadDimV, BackwardTiles<kHeadDimQK, kHeadDimV>::kHasSoftcap,
                                      backward_workspace_row<kHeadDimQK, kHeadDimV>,
                                      launch_backward_row<kHeadDimQK, kHeadDimV>};

constexpr BackwardRow kBackwardRows[] = {kBackwardRow<64, 64>, kBackwardRow<128, 128>, kBackwardRow<192, 128>,
                                         kBackwardRow<192, 192>, kBackwardRow<256, 256>};

BackwardRow const& backward_row_of(Problem const& problem) {
  BackwardRow const* row = kBackwardRows;
  while (problem.head_dim_qk > row->head_dim_qk || problem.head_dim_v > row->head_dim_v ||
         (problem.softcap > 0.0f && !row->has_softcap)) {
    ++row;
  }
  return *row;
}

}  // namespace

int64_t forward_workspace(ForwardParams const& params) {
  return forward_schedule_bytes(params.problem, row_of(params.problem).block_q);
}

const char* launch_forward(ForwardParams const& params, void* workspace, cudaStream_t stream) {
  return row_of(params.problem).launch_forward(params, workspace, stream);
}

int64_t backward_workspace(BackwardParams const& params) {
  return backward_row_of(params.problem).workspace(params);
}

const char* launch_backward(BackwardParams const& params, void* workspace, cudaStream_t stream) {
  return backward_row_of(params.problem).launch(params, workspace, stream);
}

}  // namespace flashmla::sm90
