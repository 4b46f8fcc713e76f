// The second stage of every sum over rows: partial sums become totals, in a fixed order.
//
//   add_groups   a block owns 32 columns of partial sums (groups, columns) and writes their totals.
//
// A lane has a column: each warp of a block adds every eighth row, in order, and the first adds up what they have. A thread that walked
// through all rows alone would wait for some hundred loads one after another.
#pragma once

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int GROUP_WARPS = 8;
constexpr int GROUP_THREADS = GROUP_WARPS * WARP;
constexpr int GROUP_BYTES = GROUP_THREADS * sizeof(float);

// The first warp's sums become those of all warps, lane by lane.
template <int COUNT>
__device__ __forceinline__ void add_warps(float (&totals)[COUNT]) {
  const Shared<float> parts{0};
  UNROLL for (int i = 0; i < COUNT; ++i) parts.write(i * GROUP_THREADS + threadIdx.x, totals[i]);
  __syncthreads();
  if (threadIdx.x >= WARP) return;
  UNROLL for (int warp = 1; warp < GROUP_WARPS; ++warp) UNROLL for (int i = 0; i < COUNT; ++i) {
    totals[i] += parts.read(i * GROUP_THREADS + warp * WARP + threadIdx.x);
  }
}

struct Groups {
  Tokens<float> partial;
  Vector total;
  int64_t groups, size;
};

__global__ void __launch_bounds__(GROUP_THREADS) add_groups(const Groups a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x % WARP;
  float total[1] = {};
  const int64_t groups = element < a.size ? a.groups : 0;
  UNROLL_BY(8) for (int64_t group = threadIdx.x / WARP; group < groups; group += GROUP_WARPS) {
    total[0] += load_one(a.partial, 0, group, element);
  }
  add_warps(total);
  if (threadIdx.x < WARP && element < a.size) store_one(a.total, 0, element, total[0]);
}

// Writes `total` (columns,) from partial sums (groups, columns).
inline void sum_groups(const char* op, const char* name, const Tensor& partial, const Tensor& total) {
  const Groups a{matrix<float>("partial", partial), vector(name, total), partial.size(0), total.numel()};
  launch<add_groups, GROUP_THREADS, GROUP_BYTES>(op, ceil_div(a.size, WARP), total, a);
}

// How the rows of each of `others` samples are cut into chunks, a block each.
struct Chunks {
  int64_t rows, count;
};

// About `blocks` chunks in all, none shorter than `shortest`, of a multiple of `multiple` rows. From shapes alone: same inputs, same
// bits.
inline Chunks cut(int64_t length, int64_t others, int64_t blocks, int64_t shortest, int64_t multiple) {
  int64_t wanted = ceil_div(blocks, others > 0 ? others : 1);
  const int64_t most = ceil_div(length, shortest);
  if (wanted > most) wanted = most;
  if (wanted < 1) wanted = 1;
  const int64_t rows = round_up(ceil_div(length > 0 ? length : 1, wanted), multiple);
  return {rows, ceil_div(length, rows)};
}

}  // namespace
}  // namespace ditkernels
