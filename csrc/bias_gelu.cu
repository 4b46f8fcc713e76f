// The CUDA kernels of `bias_gelu` and its backward. Formulas and names are those at the top of ditkernels/ops/bias_gelu.py.
//
//   forward_tiles   a thread owns eight channels of some rows of one sample: reads x, writes y. 2 passes.
//
//   backward_tiles  a thread owns eight channels of one chunk of the rows of one sample and walks through it: reads dy and x, writes
//                   dx. 3 passes. It adds up dx in fp32 and writes the sum to partial sums (B * chunks, D), fp32; without a bias
//                   there are none. add_groups of sums.cuh adds them up: dbias.
//
// Threads share nothing: no barrier, no shared memory. Blocks are of 64 threads, 512 channels, which divide the hidden widths of all
// models. Samples that follow each other without a gap are taken as one long sample. The number of chunks depends on shapes alone:
// same inputs, same bits.
#include "common.cuh"
#include "sums.cuh"

namespace ditkernels {
namespace {

constexpr int THREADS = 64;
constexpr int FORWARD_ROWS = 4;
constexpr int BACKWARD_ROWS = 4;
constexpr int64_t BLOCKS = 1024;
constexpr int64_t SHORTEST_CHUNK = 64;
constexpr float ROOT = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float KAPPA = 0.044715f;

struct Sigmas {
  float sigma, bend;  // the second is sigma * (1 - sigma)
};

// The exponential is of a negative number: it overflows nowhere, and nothing cancels.
__device__ __forceinline__ Sigmas sigmas(float z) {
  const float steep = 2.0f * ROOT * z * (1.0f + KAPPA * z * z);
  const float small = expf(-fabsf(steep));
  const float nearer = 1.0f / (1.0f + small), farther = small * nearer;
  return {steep >= 0.0f ? nearer : farther, nearer * farther};
}

template <typename T>
struct Forward {
  Tokens<T> x, y;
  Vector bias;
  int64_t length, blocks;
  int width, across;
};

template <typename T, bool WIDE>
__global__ void __launch_bounds__(THREADS) forward_tiles(const Forward<T> a) {
  const int column = (static_cast<int>(blockIdx.x % a.across) * THREADS + static_cast<int>(threadIdx.x)) * UNIT;
  if (column >= a.width) return;
  const int64_t block = blockIdx.x / a.across;
  const int64_t sample = block / a.blocks, first = block % a.blocks * FORWARD_ROWS;
  const Unit bias = load<WIDE>(a.bias, 0, column, a.width, 0.0f);
  Unit rows[FORWARD_ROWS];
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; ++r)
    if (first + r < a.length) rows[r] = load<WIDE>(a.x, sample, first + r, column, a.width);
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; ++r) {
    if (first + r >= a.length) continue;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
      const float z = rows[r].at[i] + bias.at[i];
      rows[r].at[i] = z * sigmas(z).sigma;
    }
    store<WIDE>(a.y, sample, first + r, column, a.width, rows[r]);
  }
}

template <typename T, typename U>
struct Backward {
  Tokens<T> x, dx;
  Tokens<U> dy;
  Vector bias;
  Tokens<float> partial;
  int64_t length, chunks, chunk_rows;
  int width, across;
};

template <typename T, typename U, bool WIDE>
__global__ void __launch_bounds__(THREADS) backward_tiles(const Backward<T, U> a) {
  const int column = (static_cast<int>(blockIdx.x % a.across) * THREADS + static_cast<int>(threadIdx.x)) * UNIT;
  if (column >= a.width) return;
  const int64_t chunk = blockIdx.x / a.across;
  const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
  const int count = static_cast<int>(first + a.chunk_rows < a.length ? a.chunk_rows : a.length - first);
  const Unit bias = load<WIDE>(a.bias, 0, column, a.width, 0.0f);
  Unit total = {};
#pragma unroll 1
  for (int start = 0; start < count; start += BACKWARD_ROWS) {
    Unit x[BACKWARD_ROWS], dy[BACKWARD_ROWS];
#pragma unroll
    for (int r = 0; r < BACKWARD_ROWS; ++r) {
      if (start + r >= count) continue;
      x[r] = load<WIDE>(a.x, sample, first + start + r, column, a.width);
      dy[r] = load<WIDE>(a.dy, sample, first + start + r, column, a.width);
    }
#pragma unroll
    for (int r = 0; r < BACKWARD_ROWS; ++r) {
      if (start + r >= count) continue;
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        const float z = x[r].at[i] + bias.at[i];
        const Sigmas s = sigmas(z);
        const float slope = s.sigma + z * s.bend * (2.0f * ROOT) * (1.0f + 3.0f * KAPPA * z * z);
        dy[r].at[i] *= slope;
        total.at[i] += dy[r].at[i];
      }
      store<WIDE>(a.dx, sample, first + start + r, column, a.width, dy[r]);
    }
  }
  if (a.partial.data != nullptr) store<WIDE>(a.partial, 0, chunk, column, a.width, total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

struct Rows {
  int64_t batch, length;
};

// All samples as one, if each sample of each tensor begins where the one before ends.
Rows joined(const Tensor& x, const OptionalTensor& dy) {
  const int64_t batch = x.size(0), length = x.size(1);
  for (const OptionalTensor& t : {OptionalTensor(x), dy})
    if (t.has_value() && t->stride(0) != length * t->stride(1)) return {batch, length};
  return {1, batch * length};
}

// As many chunks as fill a GPU, but none of a few rows. From shapes alone.
int64_t rows_of_a_chunk(const Rows& rows, int64_t across) {
  const int64_t others = (rows.batch > 0 ? rows.batch : 1) * across;
  int64_t wanted = ceil_div(BLOCKS, others);
  const int64_t most = ceil_div(rows.length, SHORTEST_CHUNK);
  if (wanted > most) wanted = most;
  if (wanted < 1) wanted = 1;
  return ceil_div(ceil_div(rows.length > 0 ? rows.length : 1, wanted), BACKWARD_ROWS) * BACKWARD_ROWS;
}

Tensor bias_gelu(Tensor x, OptionalTensor bias) {
  const Tensor y = empty_like(x, x);
  const Rows rows = joined(x, std::nullopt);
  const int64_t width = x.size(2), across = ceil_div(width, THREADS * UNIT);
  bias = packed(bias);
  const bool wide = all_wide(OptionalTensor(x), bias);
  by_layout(x.scalar_type(), x.scalar_type(), wide, [&](auto type, auto, auto reach) {
    using T = decltype(type);
    Forward<T> a;
    a.x = tokens<T>("x", x);
    a.y = tokens<T>("y", y);
    a.bias = vector("bias", bias);
    a.length = rows.length;
    a.blocks = ceil_div(rows.length, FORWARD_ROWS);
    a.width = static_cast<int>(width);
    a.across = static_cast<int>(across);
    launch<forward_tiles<T, reach>, THREADS>("bias_gelu", rows.batch * a.blocks * across, x, a);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, Tensor x, OptionalTensor bias) {
  const Tensor dx = empty_like(x, x);
  const Rows rows = joined(x, dy);
  const int64_t width = x.size(2), across = ceil_div(width, THREADS * UNIT);
  const int64_t chunk_rows = rows_of_a_chunk(rows, across), chunks = ceil_div(rows.length, chunk_rows);
  bias = packed(bias);
  const OptionalTensor partial =
      bias.has_value() ? OptionalTensor(empty(x, {rows.batch * chunks, width}, ScalarType::Float)) : std::nullopt;
  const bool wide = all_wide(OptionalTensor(x), OptionalTensor(dy), bias);
  by_layout(x.scalar_type(), dy.scalar_type(), wide, [&](auto first, auto second, auto reach) {
    using T = decltype(first);
    using U = decltype(second);
    Backward<T, U> a;
    a.x = tokens<T>("x", x);
    a.dx = tokens<T>("dx", dx);
    a.dy = tokens<U>("dy", dy);
    a.bias = vector("bias", bias);
    a.partial = matrix<float>("partial", partial);
    a.length = rows.length;
    a.chunks = chunks;
    a.chunk_rows = chunk_rows;
    a.width = static_cast<int>(width);
    a.across = static_cast<int>(across);
    launch<backward_tiles<T, U, reach>, THREADS>("bias_gelu_backward", rows.batch * chunks * across, x, a);
  });
  if (!bias.has_value()) return {dx, nothing(x)};
  return {dx, sum_groups("bias_gelu_backward", "dbias", *partial, *bias)};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("bias_gelu_cuda", TORCH_BOX(&ditkernels::bias_gelu));
  library.impl("bias_gelu_backward_cuda", TORCH_BOX(&ditkernels::bias_gelu_backward));
}
