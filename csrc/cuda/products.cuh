// Matrix products of a warp, in tiles of 16 rows by 8 columns. One step adds 32 indices of the inner dimension.
//
// With r = lane / 4 and q = lane % 4, a lane holds rows r (`low`) and r + 8 (`high`) of the left operand and column r of the right
// operand. Of each it holds inner indices 8q to 8q + 7, which are contiguous in memory. Of the result it holds, in this order, the
// elements (r, 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1).
//
// Products of bf16 and fp16 run on the tensor cores. Products of fp32 run as shuffles and fused multiply-adds, never in TF32. The
// tests' emulation runs the latter for all three dtypes.
#pragma once

#include "common.cuh"

namespace ditkernels {

constexpr int DEPTH = 32;
constexpr int TILE_ROWS = 16;

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int lane_quarter() { return threadIdx.x % 4; }

// The output column that column r of this tile computes. With it, a lane's results in four tiles are eight contiguous columns.
__device__ __forceinline__ int spread_column(int tile) { return lane_row() / 2 * UNIT + tile * 2 + lane_row() % 2; }

// The eight contiguous results of a lane in four such tiles, in row r (half = 0) or r + 8 (half = 1).
__device__ __forceinline__ Unit sums_of(const float (&sums)[4][4], int half) {
  Unit unit;
  UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] = half == 0 ? sums[i / 2][i % 2] : sums[i / 2][2 + i % 2];
  return unit;
}

__device__ __forceinline__ Unit shuffled(const Unit& unit, int lane) {
#ifdef DITKERNELS_EMULATION
  return __shfl_sync(EVERY_LANE, unit, lane);
#else
  Unit taken;
  UNROLL for (int i = 0; i < UNIT; ++i) taken.at[i] = __shfl_sync(EVERY_LANE, unit.at[i], lane);
  return taken;
#endif
}

// sums[j] += left · right[j] for each of four tiles j.
template <typename T>
__device__ __forceinline__ void multiply_by_shuffles(
    float (&sums)[4][4], const Fragment<T>& low, const Fragment<T>& high, const Fragment<T> (&right)[4]) {
  UNROLL_BY(1) for (int quarter = 0; quarter < 4; ++quarter) {
    const Unit above = shuffled(as_floats(low), lane_row() * 4 + quarter);
    const Unit below = shuffled(as_floats(high), lane_row() * 4 + quarter);
    UNROLL for (int j = 0; j < 4; ++j) {
      const Unit even = shuffled(as_floats(right[j]), lane_quarter() * 8 + quarter);
      const Unit odd = shuffled(as_floats(right[j]), lane_quarter() * 8 + 4 + quarter);
      UNROLL for (int i = 0; i < UNIT; ++i) {
        sums[j][0] += above.at[i] * even.at[i];
        sums[j][1] += above.at[i] * odd.at[i];
        sums[j][2] += below.at[i] * even.at[i];
        sums[j][3] += below.at[i] * odd.at[i];
      }
    }
  }
}

#ifndef DITKERNELS_EMULATION
// Half of the 32 inner indices: those of a lane's first four values (half = 0) or of its last four (half = 1).
template <typename T>
__device__ __forceinline__ void multiply_on_tensor_cores(
    float (&sums)[4], const Fragment<T>& low, const Fragment<T>& high, const Fragment<T>& right, int half) {
  const uint32_t *a = low.words[0].part + 2 * half, *b = high.words[0].part + 2 * half, *c = right.words[0].part + 2 * half;
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(b[0]), "r"(a[1]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(b[0]), "r"(a[1]), "r"(b[1]), "r"(c[0]), "r"(c[1]));
}
#endif

// sums[j] += left · right[j] for each of four tiles j, by all lanes of a warp together.
template <typename T>
__device__ __forceinline__ void multiply(
    float (&sums)[4][4], const Fragment<T>& low, const Fragment<T>& high, const Fragment<T> (&right)[4]) {
#ifndef DITKERNELS_EMULATION
  if constexpr (!std::is_same_v<T, float>) {
    UNROLL for (int j = 0; j < 4; ++j) {
      multiply_on_tensor_cores(sums[j], low, high, right[j], 0);
      multiply_on_tensor_cores(sums[j], low, high, right[j], 1);
    }
  } else
#endif
    multiply_by_shuffles(sums, low, high, right);
}

// Padding of a row in shared memory, in elements, so that a warp's accesses fall into different banks.
template <typename T>
constexpr int UNITS_APART = sizeof(T) == 2 ? 32 : 4;

}  // namespace ditkernels
