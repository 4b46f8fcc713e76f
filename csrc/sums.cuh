// The second stage of every backward through a norm: from the sums P, Q, R, S of each chunk of a sample's tokens to the gradients
// of the vectors. Formulas and names are those at the top of ditkernels/ops/adaln.py.
//
//   add_chunks   a thread owns one channel of one sample: adds the chunks in order, writes dshift, dscale, dgate (B, D), and
//                the sample's terms of dweight, dbias, dbranch_bias (B, 3, D), fp32.
//   add_samples  a block owns 32 channels: adds the samples' terms, writes dweight, dbias, dbranch_bias (D,).
//   add_groups   a block owns 32 elements of a weight's gradient: adds the groups' partial sums.
//
// In the last two a lane has a column: each warp of a block adds every eighth row, in order, and the first adds up what they have.
// A thread that walked through all rows alone would wait for some hundred loads one after another.
#pragma once

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int SUMS = 4;
constexpr int TERMS = 3;
constexpr int SUM_THREADS = 128;
constexpr int GROUP_WARPS = 8;
constexpr int GROUP_THREADS = GROUP_WARPS * WARP;
constexpr int GROUP_BYTES = GROUP_THREADS * sizeof(float);

struct Gradients {
  Vector gate, scale, branch_bias, weight, bias;
  Vector dgate, dshift, dscale, dbranch_bias, dweight, dbias;
  Tokens<float> partial, terms;
  int64_t batch, chunks;
  int width, blocks;
  bool residual, norm;
};

__global__ void __launch_bounds__(SUM_THREADS) add_chunks(const Gradients a) {
  const int64_t sample = blockIdx.x / a.blocks;
  const int column = blockIdx.x % a.blocks * SUM_THREADS + threadIdx.x;
  if (column >= a.width) return;
  float p = 0.0f, q = 0.0f, r = 0.0f, s = 0.0f;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    if (a.norm) {
      p += load_one(a.partial, sample, chunk * SUMS, column);
      q += load_one(a.partial, sample, chunk * SUMS + 1, column);
    }
    if (a.residual) {
      r += load_one(a.partial, sample, chunk * SUMS + 2, column);
      s += load_one(a.partial, sample, chunk * SUMS + 3, column);
    }
  }
  store_one(a.dshift, sample, column, p);
  store_one(a.dscale, sample, column, load_one(a.weight, 0, column, 1.0f) * q + load_one(a.bias, 0, column, 0.0f) * p);
  store_one(a.dgate, sample, column, r + load_one(a.branch_bias, 0, column, 0.0f) * s);
  const float slope = 1.0f + load_one(a.scale, sample, column, 0.0f);
  store_one(a.terms, sample, 0, column, slope * q);
  store_one(a.terms, sample, 1, column, slope * p);
  store_one(a.terms, sample, 2, column, load_one(a.gate, sample, column, 1.0f) * s);
}

// The first warp's sums become those of all warps, lane by lane.
template <int COUNT>
__device__ __forceinline__ void add_warps(float (&totals)[COUNT]) {
  const Shared<float> parts{0};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) parts.write(i * GROUP_THREADS + threadIdx.x, totals[i]);
  __syncthreads();
  if (threadIdx.x >= WARP) return;
#pragma unroll
  for (int warp = 1; warp < GROUP_WARPS; ++warp)
#pragma unroll
    for (int i = 0; i < COUNT; ++i) totals[i] += parts.read(i * GROUP_THREADS + warp * WARP + threadIdx.x);
}

__global__ void __launch_bounds__(GROUP_THREADS) add_samples(const Gradients a) {
  const int column = blockIdx.x * WARP + threadIdx.x % WARP;
  float total[TERMS] = {};
  if (column < a.width)
#pragma unroll 4
    for (int64_t sample = threadIdx.x / WARP; sample < a.batch; sample += GROUP_WARPS)
#pragma unroll
      for (int term = 0; term < TERMS; ++term) total[term] += load_one(a.terms, sample, term, column);
  add_warps(total);
  if (threadIdx.x >= WARP || column >= a.width) return;
  store_one(a.dweight, 0, column, total[0]);
  store_one(a.dbias, 0, column, total[1]);
  store_one(a.dbranch_bias, 0, column, total[2]);
}

struct Groups {
  Tokens<float> partial;
  Vector total;
  int64_t groups, size;
};

__global__ void __launch_bounds__(GROUP_THREADS) add_groups(const Groups a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x % WARP;
  float total[1] = {};
  if (element < a.size)
#pragma unroll 8
    for (int64_t group = threadIdx.x / WARP; group < a.groups; group += GROUP_WARPS)
      total[0] += load_one(a.partial, 0, group, element);
  add_warps(total);
  if (threadIdx.x < WARP && element < a.size) store_one(a.total, 0, element, total[0]);
}

struct VectorTensors {
  OptionalTensor gate, scale, branch_bias, weight, bias;
  OptionalTensor dgate, dshift, dscale, dbranch_bias, dweight, dbias;
};

// From partial sums (B, chunks * SUMS, D) of P and Q, if there is a norm, and R and S, if a residual.
inline void add_sums(
    const char* op, const Tensor& partial, const VectorTensors& t, bool residual, bool norm, const Tensor& like) {
  const int64_t batch = partial.size(0), width = partial.size(2);
  const Tensor terms = empty(like, {batch, TERMS, width}, ScalarType::Float);
  Gradients g;
  g.gate = vector("gate", t.gate);
  g.scale = vector("scale", t.scale);
  g.branch_bias = vector("branch_bias", t.branch_bias);
  g.weight = vector("weight", t.weight);
  g.bias = vector("bias", t.bias);
  g.dgate = vector("dgate", t.dgate);
  g.dshift = vector("dshift", t.dshift);
  g.dscale = vector("dscale", t.dscale);
  g.dbranch_bias = vector("dbranch_bias", t.dbranch_bias);
  g.dweight = vector("dweight", t.dweight);
  g.dbias = vector("dbias", t.dbias);
  g.partial = tokens<float>("partial", partial);
  g.terms = tokens<float>("terms", terms);
  g.batch = batch;
  g.chunks = partial.size(1) / SUMS;
  g.width = static_cast<int>(width);
  g.blocks = static_cast<int>(ceil_div(width, SUM_THREADS));
  g.residual = residual;
  g.norm = norm;
  launch<add_chunks, SUM_THREADS>(op, batch * g.blocks, like, g);
  if (t.dweight.has_value() || t.dbias.has_value() || t.dbranch_bias.has_value())
    launch<add_samples, GROUP_THREADS, TERMS * GROUP_BYTES>(op, ceil_div(width, WARP), like, g);
}

// The sum of partial sums (groups, elements) as a packed tensor in the shape and dtype of `like`.
inline Tensor sum_groups(const char* op, const char* name, const Tensor& partial, const Tensor& like) {
  const Tensor total = empty_like(like, like);
  Groups a;
  a.partial = matrix<float>("partial", partial);
  a.total = {total.data_ptr(), 0, total.scalar_type(), describe(name, total)};
  a.groups = partial.size(0);
  a.size = total.numel();
  launch<add_groups, GROUP_THREADS, GROUP_BYTES>(op, ceil_div(a.size, WARP), like, a);
  return total;
}

}  // namespace
}  // namespace ditkernels
