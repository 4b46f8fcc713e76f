// A weight turned round, so that what a product sums over lies side by side: turned[row, at] = weight[at, row], in the product's
// dtype, with zeros up to the padded sizes. A thread owns one element. The copy is as small as the weight.
#pragma once

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int TURN_THREADS = 128;

template <typename T>
struct Turned {
  Tokens<Any> weight;
  Tokens<T> turned;
  int64_t padded_rows, padded;
  int rows, count;
};

template <typename T>
__global__ void __launch_bounds__(TURN_THREADS) turn_weight(const Turned<T> a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * TURN_THREADS + threadIdx.x;
  const int64_t row = element / a.padded, at = element % a.padded;
  if (row >= a.padded_rows) return;
  store_one(a.turned, 0, row, at, row < a.rows && at < a.count ? load_one(a.weight, 0, at, row) : 0.0f);
}

// (rows, count) padded to multiples of `rows_by` and DEPTH, from a weight (count, rows).
template <typename T>
Tensor turn(const char* op, const Tokens<Any>& weight, int64_t rows, int64_t count, int64_t rows_by, const Tensor& like) {
  const ScalarType dtype = std::is_same_v<T, float> ? ScalarType::Float : weight.dtype;
  const Tensor turned = empty(like, {round_up(rows, rows_by), round_up(count, DEPTH)}, dtype);
  const Turned<T> a{weight,         matrix<T>("turned", turned), turned.size(0),
                    turned.size(1), static_cast<int>(rows),      static_cast<int>(count)};
  launch<turn_weight<T>, TURN_THREADS>(op, ceil_div(turned.numel(), TURN_THREADS), like, a);
  return turned;
}

}  // namespace
}  // namespace ditkernels
