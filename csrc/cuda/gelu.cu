// The CUDA kernels of `bias_gelu` and its backward. Formulas and names are those at the top of ditkernels/ops/gelu/__init__.py.
//
//   forward_tiles   A thread owns eight channels of some rows of one sample. It reads x and writes y: 2 passes.
//
//   backward_tiles  A thread owns eight channels of one chunk of the rows of one sample and walks through it. It reads dy and x and
//                   writes dx: 3 passes, 2 where dx is not wanted. If dbias is wanted, it sums dx in fp32 and writes partial sums
//                   (B * chunks, D), fp32; add_groups (in sums.cuh) adds them.
//
// These kernels need no barrier and no shared memory. A block of 64 threads owns 512 channels, which divide the hidden widths of
// the paper; a row takes `column_blocks` blocks. Samples that are adjacent in memory are merged into one long sample. The same
// inputs give the same bits: nothing is added atomically, and the number of chunks depends on shapes and strides alone.
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
  float sigma, product;  // product = sigma * (1 - sigma)
};

// The exponential cannot overflow, because its argument is never positive. No 1 - sigma is taken, which would cancel.
__device__ __forceinline__ Sigmas sigmas(float z) {
  const float argument = 2.0f * ROOT * z * (1.0f + KAPPA * z * z);
  const float small = expf(-fabsf(argument));
  const float nearer = 1.0f / (1.0f + small), farther = small * nearer;
  return {argument >= 0.0f ? nearer : farther, nearer * farther};
}

template <typename T>
struct Forward {
  Tokens<T> x, y;
  Vector bias;
  int64_t length, blocks;
  int width, column_blocks;
};

template <typename T, bool VECTORISED>
__global__ void __launch_bounds__(THREADS) forward_tiles(const Forward<T> a) {
  const int column = (static_cast<int>(blockIdx.x % a.column_blocks) * THREADS + static_cast<int>(threadIdx.x)) * UNIT;
  if (column >= a.width) return;
  const int64_t block = blockIdx.x / a.column_blocks;
  const int64_t sample = block / a.blocks, first = block % a.blocks * FORWARD_ROWS;
  const Unit bias = load<VECTORISED>(a.bias, 0, column, a.width, 0.0f);
  Unit rows[FORWARD_ROWS];
  UNROLL for (int r = 0; r < FORWARD_ROWS; ++r) {
    if (first + r < a.length) rows[r] = load<VECTORISED>(a.x, sample, first + r, column, a.width);
  }
  UNROLL for (int r = 0; r < FORWARD_ROWS; ++r) {
    if (first + r >= a.length) continue;
    UNROLL for (int i = 0; i < UNIT; ++i) {
      const float z = rows[r].at[i] + bias.at[i];
      rows[r].at[i] = z * sigmas(z).sigma;
    }
    store<VECTORISED>(a.y, sample, first + r, column, a.width, rows[r]);
  }
}

template <typename T, typename U>
struct Backward {
  Tokens<T> x, dx;
  Tokens<U> dy;
  Vector bias;
  Tokens<float> partial;
  int64_t length, chunks, chunk_rows;
  int width, column_blocks;
};

template <typename T, typename U, bool VECTORISED>
__global__ void __launch_bounds__(THREADS) backward_tiles(const Backward<T, U> a) {
  const int column = (static_cast<int>(blockIdx.x % a.column_blocks) * THREADS + static_cast<int>(threadIdx.x)) * UNIT;
  if (column >= a.width) return;
  const int64_t chunk = blockIdx.x / a.column_blocks;
  const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
  const int count = static_cast<int>(first + a.chunk_rows < a.length ? a.chunk_rows : a.length - first);
  const Unit bias = load<VECTORISED>(a.bias, 0, column, a.width, 0.0f);
  Unit total = {};
  UNROLL_BY(1) for (int start = 0; start < count; start += BACKWARD_ROWS) {
    Unit x[BACKWARD_ROWS], dy[BACKWARD_ROWS];
    UNROLL for (int r = 0; r < BACKWARD_ROWS; ++r) {
      if (start + r >= count) continue;
      x[r] = load<VECTORISED>(a.x, sample, first + start + r, column, a.width);
      dy[r] = load<VECTORISED>(a.dy, sample, first + start + r, column, a.width);
    }
    UNROLL for (int r = 0; r < BACKWARD_ROWS; ++r) {
      if (start + r >= count) continue;
      UNROLL for (int i = 0; i < UNIT; ++i) {
        const float z = x[r].at[i] + bias.at[i];
        const Sigmas s = sigmas(z);
        const float derivative = s.sigma + z * s.product * (2.0f * ROOT) * (1.0f + 3.0f * KAPPA * z * z);
        dy[r].at[i] *= derivative;
        total.at[i] += dy[r].at[i];
      }
      if (a.dx.data != nullptr) store<VECTORISED>(a.dx, sample, first + start + r, column, a.width, dy[r]);
    }
  }
  if (a.partial.data != nullptr) store<VECTORISED>(a.partial, 0, chunk, column, a.width, total);
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

struct Rows {
  int64_t batch, length;
};

// One long sample, if in each tensor every sample begins where the one before it ends.
Rows joined(const Tensor& x, const OptionalTensor& dy) {
  const int64_t batch = x.size(0), length = x.size(1);
  for (const OptionalTensor& t : {OptionalTensor(x), dy})
    if (t.has_value() && t->stride(0) != length * t->stride(1)) return {batch, length};
  return {1, batch * length};
}

Tensor bias_gelu(Tensor x, OptionalTensor bias) {
  const Tensor y = empty(x, shape_of(x), x.scalar_type());
  const Rows rows = joined(x, std::nullopt);
  const int64_t width = x.size(2), column_blocks = ceil_div(width, THREADS * UNIT);
  bias = packed(bias);
  by_layout(x.scalar_type(), x.scalar_type(), all_vectorised(x, bias), [&](auto type, auto, auto vectorised) {
    using T = decltype(type);
    const Forward<T> a{
        .x = tokens<T>("x", x),
        .y = tokens<T>("y", y),
        .bias = vector("bias", bias),
        .length = rows.length,
        .blocks = ceil_div(rows.length, FORWARD_ROWS),
        .width = static_cast<int>(width),
        .column_blocks = static_cast<int>(column_blocks)};
    launch<forward_tiles<T, vectorised>, THREADS>("bias_gelu", rows.batch * a.blocks * column_blocks, x, a);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, OptionalTensor given_x, OptionalTensor bias, std::vector<int64_t> wanted) {
  const char* op = "bias_gelu_backward";
  STD_TORCH_CHECK(given_x.has_value(), op, ": called without x");
  const Tensor& x = *given_x;
  const Rows rows = joined(x, dy);
  const int64_t width = x.size(2), column_blocks = ceil_div(width, THREADS * UNIT);
  const OptionalTensor dx = gradient(wanted, 0, dy, shape_of(x)), dbias = gradient(wanted, 1, dy, {width});
  const Chunks chunks = cut(rows.length, rows.batch * column_blocks, BLOCKS, SHORTEST_CHUNK, BACKWARD_ROWS);
  OptionalTensor partial;
  if (dbias.has_value()) partial = empty(x, {rows.batch * chunks.count, width}, ScalarType::Float);
  bias = packed(bias);
  const ScalarType of_x = common_dtype(x.scalar_type(), x, dx);
  by_layout(of_x, dy.scalar_type(), all_vectorised(x, dy, bias), [&](auto first, auto second, auto vectorised) {
    using T = decltype(first);
    using U = decltype(second);
    const Backward<T, U> a{
        .x = tokens<T>("x", x),
        .dx = tokens<T>("dx", dx),
        .dy = tokens<U>("dy", dy),
        .bias = vector("bias", bias),
        .partial = matrix<float>("partial", partial),
        .length = rows.length,
        .chunks = chunks.count,
        .chunk_rows = chunks.rows,
        .width = static_cast<int>(width),
        .column_blocks = static_cast<int>(column_blocks)};
    launch<backward_tiles<T, U, vectorised>, THREADS>(op, rows.batch * chunks.count * column_blocks, x, a);
  });
  if (dbias.has_value()) sum_groups(op, "dbias", *partial, *dbias);
  return {or_nothing(dx, dy), or_nothing(dbias, dy)};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("bias_gelu_cuda", TORCH_BOX(&ditkernels::bias_gelu));
  library.impl("bias_gelu_backward_cuda", TORCH_BOX(&ditkernels::bias_gelu_backward));
}
