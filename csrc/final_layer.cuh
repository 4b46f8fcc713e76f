// What forward and backward of `final_layer` share: a row's vectors, what becomes of it before the linear, the places of a token's
// values in the image, and the arguments. Names are those at the top of ditkernels/ops/final_layer.py.
#pragma once

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// ---------------------------------------------------------------------------------------------------------------------
// Rows and patches
// ---------------------------------------------------------------------------------------------------------------------

// The first channel of a lane's i-th unit: it has every 32nd.
__device__ __forceinline__ int own_column(int i) { return (i * WARP + threadIdx.x % WARP) * UNIT; }

// What becomes of a row before the linear.
struct RowVectors {
  Vector gate, branch_bias, shift, scale, norm_weight, norm_bias;
};

// Eight channels of each, straight from global memory; neutral values for what is absent.
template <bool WIDE>
struct Direct {
  const RowVectors& v;
  int64_t sample;
  int column, width;
  __device__ __forceinline__ Unit gate() const { return load<WIDE>(v.gate, sample, column, width, 1.0f); }
  __device__ __forceinline__ Unit branch_bias() const { return load<WIDE>(v.branch_bias, 0, column, width, 0.0f); }
  __device__ __forceinline__ Unit norm_weight() const { return load<WIDE>(v.norm_weight, 0, column, width, 1.0f); }
  __device__ __forceinline__ Unit norm_bias() const { return load<WIDE>(v.norm_bias, 0, column, width, 0.0f); }
  __device__ __forceinline__ Unit shift() const { return load<WIDE>(v.shift, sample, column, width, 0.0f); }
  __device__ __forceinline__ Unit factor() const {
    Unit factor = load<WIDE>(v.scale, sample, column, width, 0.0f);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) factor.at[i] += 1.0f;
    return factor;
  }
};

// Eight channels of x1 from those of x and the branch.
template <typename T, typename Vectors>
__device__ __forceinline__ Unit joined(const Unit& x, const Unit& branch, const Vectors& v, ScalarType dtype) {
  const Unit gate = v.gate(), bias = v.branch_bias();
  Unit unit;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = rounded<T>(x.at[i] + gate.at[i] * (branch.at[i] + bias.at[i]), dtype);
  return unit;
}

// Eight channels of h = (x̂ · norm_weight + norm_bias) · (1 + scale) + shift.
template <typename Vectors>
__device__ __forceinline__ Unit modulated(const Unit& normed, const Vectors& v) {
  const Unit weight = v.norm_weight(), bias = v.norm_bias(), factor = v.factor(), shift = v.shift();
  Unit unit;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = (normed.at[i] * weight.at[i] + bias.at[i]) * factor.at[i] + shift.at[i];
  return unit;
}

// An operand of a product from values to be rounded to the weight's dtype first.
template <typename P, typename U>
__device__ __forceinline__ Fragment<P> operand(Unit unit, ScalarType weight) {
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = rounded<U>(unit.at[i], weight);
  return narrowed<P>(unit);
}

struct Grid {
  int columns, patch, channels;
};

// Calls body(channel, row, column) with the place of a token's value in the image.
template <typename Body>
__device__ __forceinline__ auto placed(const Grid& grid, int64_t token, int value, const Body& body) {
  const int place = value / grid.channels;
  return body(
      value % grid.channels, token / grid.columns * grid.patch + place / grid.patch,
      token % grid.columns * grid.patch + place % grid.patch);
}

// ---------------------------------------------------------------------------------------------------------------------
// Arguments
// ---------------------------------------------------------------------------------------------------------------------

inline Grid grid_of(int64_t grid_w, int64_t patch, int64_t values) {
  return {static_cast<int>(grid_w), static_cast<int>(patch), static_cast<int>(values / (patch * patch))};
}

struct Inputs {
  Tensor x;
  OptionalTensor branch, gate, branch_bias, shift, scale, norm_weight, norm_bias;
  Tensor weight;
  OptionalTensor bias;
};

inline RowVectors vectors_of(const Inputs& t) {
  return {vector("gate", t.gate),   vector("branch_bias", t.branch_bias), vector("shift", t.shift),
          vector("scale", t.scale), vector("norm_weight", t.norm_weight), vector("norm_bias", t.norm_bias)};
}

// Vectors and weight with their last axis side by side.
inline void pack(Inputs& t) {
  for (OptionalTensor* v : {&t.gate, &t.branch_bias, &t.shift, &t.scale, &t.norm_weight, &t.norm_bias, &t.bias}) *v = packed(*v);
  t.weight = *packed(t.weight);
}

inline bool rows_are_wide(const Inputs& t) {
  return all_wide(OptionalTensor(t.x), t.branch, t.gate, t.branch_bias, t.shift, t.scale, t.norm_weight, t.norm_bias);
}

// The dtype of branch and weight, or MIXED.
inline ScalarType common_dtype(const Inputs& t) { return same_dtype(t.branch, t.weight) ? t.weight.scalar_type() : MIXED; }

}  // namespace
}  // namespace ditkernels
