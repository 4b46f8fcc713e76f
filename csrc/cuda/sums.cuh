// The second stage of every sum over rows: it adds partial sums in a fixed order.
//
//   add_groups   A block owns 32 columns of partial sums (groups, columns), fp32. It reads them once and writes their totals.
//
// A lane owns a column. Each of the eight warps of a block adds every eighth row, in order; the first warp then adds the eight
// results. If one thread added all rows of a column, it would wait for some hundred loads, one after another.
#pragma once

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int GROUP_WARPS = 8;
constexpr int GROUP_THREADS = GROUP_WARPS * WARP;
constexpr int GROUP_BYTES = GROUP_THREADS * sizeof(float);

// Adds the totals of all warps, lane by lane, to those of the first warp. The other warps' totals stay as they are.
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

// The rows of a chunk, and the number of chunks.
struct Chunks {
  int64_t rows, count;
};

// Cuts `length` rows into chunks of a multiple of `multiple` rows: chunks times `others` are about `blocks`, with at most one chunk
// for every `shortest` rows. The cut depends on shapes alone, so the same inputs give the same bits.
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
