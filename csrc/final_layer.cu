// The forward of `final_layer`, and `unpatchify`. Formulas and names are those at the top of ditkernels/ops/final_layer.py;
// V = p·p·O, the values of a patch.
//
//   forward_rows      a block owns 32 rows of one sample (16 in fp32 products; fewer where rows are long). A warp holds a row in
//                     registers (at other widths than the paper's in shared memory), norms and modulates it, rounds it to the
//                     weight's dtype and leaves it in shared memory; then the warps share the product among them by channels
//                     and values and add up their parts in order. Reads x (and the branch), writes the image, and mean and rstd
//                     (B, N), fp32: 1 pass (2 with a branch).
//
//   place_values      unpatchify: a thread owns one value of the image.
//   gather_values     its backward: a thread owns one value of the tokens.
//
// A lane has every 32nd unit of eight channels of a row. Every access to a (B, N, D) tensor is a unit. x1 is rounded to x's dtype and
// h to the weight's. Products take operands in the weight's dtype where all have it and accumulate in fp32; otherwise they are fp32
// products. Nothing is added atomically: same inputs, same bits.
#include "final_layer.cuh"

namespace ditkernels {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

constexpr int GENERAL_BYTES = 96 * 1024;  // of shared memory, what every device since 8.0 has
constexpr int APART = DEPTH + 1;          // of rows of 32 sums, so that a column of them falls into different banks

template <typename H>
constexpr int MOST_ROWS = sizeof(H) == 2 ? 32 : 16;
template <typename H>
constexpr int SUMS_BYTES = WARPS * MOST_ROWS<H> * APART * 4;

template <typename T, typename U>
struct Forward {
  Tokens<T> x;
  Tokens<U> branch, weight;
  RowVectors vectors;
  Vector bias;
  Image out;
  Grid grid;
  Tokens<float> mean, rstd;
  int64_t length, blocks;
  int rows, width, values;
  float eps;
};

// A lane's share of a row: every 32nd unit.
template <int WIDTH>
struct Row {
  static constexpr int UNITS = (WIDTH + WARP * UNIT - 1) / (WARP * UNIT);
  Unit held[UNITS];
  __device__ __forceinline__ Row(const Shared<float>&, int) {}
  __device__ __forceinline__ int units(int) const { return UNITS; }
  __device__ __forceinline__ Unit get(int i) const { return held[i]; }
  __device__ __forceinline__ void set(int i, const Unit& unit) { held[i] = unit; }
};

template <>
struct Row<0> {
  Shared<float> tile;
  int first;
  __device__ __forceinline__ Row(const Shared<float>& to, int at) : tile(to), first(at + threadIdx.x % WARP * UNIT) {}
  __device__ __forceinline__ int units(int width) const { return static_cast<int>(ceil_div(width, WARP * UNIT)); }
  __device__ __forceinline__ Unit get(int i) const { return widened(tile.read_unit(first + i * WARP * UNIT)); }
  __device__ __forceinline__ void set(int i, const Unit& unit) {
    tile.write_unit(first + i * WARP * UNIT, narrowed<float>(unit));
  }
};

// By a warp: h of one row as operands in shared memory, its mean and rstd in global memory.
template <typename H, int WIDTH, bool WIDE, typename T, typename U>
__device__ __forceinline__ void norm_row(const Forward<T, U>& a, const Shared<H>& tile, int at, int64_t sample, int64_t token) {
  const int width = WIDTH > 0 ? WIDTH : a.width;
  Row<WIDTH> row(Shared<float>{0}, at);
  float sums = 0.0f, squares = 0.0f, mean = 0.0f;
#pragma unroll
  for (int i = 0; i < row.units(width); ++i) {
    const int column = own_column(i);
    if (column >= width) continue;
    Unit unit = load<WIDE>(a.x, sample, token, column, width);
    if (a.branch.data != nullptr)
      unit = joined<T>(
          unit, load<WIDE>(a.branch, sample, token, column, width), Direct<WIDE>{a.vectors, sample, column, width}, a.x.dtype);
#pragma unroll
    for (int k = 0; k < UNIT; ++k) sums += unit.at[k];
    row.set(i, unit);
  }
  if (a.mean.data != nullptr) {
    mean = warp_sum(sums) / width;
    if (threadIdx.x % WARP == 0) store_one(a.mean, sample, token, 0, mean);
  }
#pragma unroll
  for (int i = 0; i < row.units(width); ++i) {
    if (own_column(i) >= width) continue;
    Unit unit = row.get(i);
#pragma unroll
    for (int k = 0; k < UNIT; ++k) {
      unit.at[k] = own_column(i) + k < width ? unit.at[k] - mean : 0.0f;
      squares += unit.at[k] * unit.at[k];
    }
    row.set(i, unit);
  }
  const float rstd = 1.0f / sqrtf(warp_sum(squares) / width + a.eps);
  if (threadIdx.x % WARP == 0) store_one(a.rstd, sample, token, 0, rstd);
#pragma unroll
  for (int i = 0; i < row.units(width); ++i) {
    if (own_column(i) >= width) continue;
    Unit unit = row.get(i);
#pragma unroll
    for (int k = 0; k < UNIT; ++k) unit.at[k] *= rstd;
    unit = modulated(unit, Direct<WIDE>{a.vectors, sample, own_column(i), width});
    tile.write_unit(at + own_column(i), operand<H, U>(unit, a.weight.dtype));
  }
}

// Zeros in the columns `from` to `to` - 1 of a row of shared memory, both multiples of eight, by a warp.
template <typename H>
__device__ __forceinline__ void clear(const Shared<H>& tile, int at, int from, int to) {
  for (int column = from + threadIdx.x % WARP * UNIT; column < to; column += WARP * UNIT)
    tile.write_unit(at + column, narrowed<H>(Unit{}));
}

// Rows of eight channels of the weight as the right operand; zero outside.
template <typename H, bool WIDE, typename T, typename U>
__device__ __forceinline__ Fragment<H> weight_unit(const Forward<T, U>& a, int value, int column) {
  if (value >= a.values || column >= a.width) return narrowed<H>(Unit{});
  return narrowed<H>(load<WIDE>(a.weight, 0, value, column, a.width));
}

// Blocks on a multiprocessor, which bounds the registers: fp32 products need more than half of them.
template <typename U>
constexpr int FORWARD_ABREAST = std::is_same_v<U, float> || std::is_same_v<U, Any> ? 1 : 2;

template <typename T, typename U, int WIDTH, bool WIDE>
__global__ void __launch_bounds__(THREADS, FORWARD_ABREAST<U>) forward_rows(const Forward<T, U> a) {
  using H = std::conditional_t<std::is_same_v<U, Any>, float, U>;
  constexpr int ROWS = MOST_ROWS<H>, TILES = ROWS / TILE_ROWS;
  const int width = WIDTH > 0 ? WIDTH : a.width, rows = WIDTH > 0 ? ROWS : a.rows;
  const int padded = (width + DEPTH - 1) / DEPTH * DEPTH, stride = padded + UNITS_APART<H>;
  const Shared<H> tile{0};
  const Shared<float> parts{rows * stride * static_cast<int>(sizeof(H))};
  const int64_t sample = blockIdx.x / a.blocks, first = blockIdx.x % a.blocks * rows;
  const int warp = threadIdx.x / WARP;

  for (int row = warp; row < rows; row += WARPS) {
    const bool live = first + row < a.length;
    if (live) norm_row<H, WIDTH, WIDE>(a, tile, row * stride, sample, first + row);
    clear(tile, row * stride, live ? (width + UNIT - 1) / UNIT * UNIT : 0, padded);
  }
  __syncthreads();

  // As many warps side by side as there are tiles of 32 values, up to all; the others share the channels.
  const int tiles = (a.values + DEPTH - 1) / DEPTH;
  const int abreast = tiles >= 8 ? 8 : tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
  const int deep = WARPS / abreast;
  for (int start = 0; start < tiles; start += abreast) {
    const int value = (start + warp % abreast) * DEPTH;
    float sums[TILES][4][4] = {};
#pragma unroll 2
    for (int depth = warp / abreast * DEPTH; depth < padded && value < a.values; depth += deep * DEPTH) {
      const int column = depth + lane_quarter() * UNIT;
      Fragment<H> right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) right[j] = weight_unit<H, WIDE>(a, value + spread_column(j), column);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        const int row = i * TILE_ROWS + lane_row();
        const Fragment<H> none = narrowed<H>(Unit{});
        const Fragment<H> low = row < rows ? tile.read_unit(row * stride + column) : none;
        const Fragment<H> high = row + 8 < rows ? tile.read_unit((row + 8) * stride + column) : none;
        multiply(sums[i], low, high, right);
      }
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Unit unit = sums_of(sums[i], half);
        const int at = (warp * ROWS + i * TILE_ROWS + half * 8 + lane_row()) * APART + lane_quarter() * UNIT;
#pragma unroll
        for (int k = 0; k < UNIT; ++k) parts.write(at + k, unit.at[k]);
      }
    __syncthreads();
    for (int element = threadIdx.x; element < abreast * DEPTH * ROWS; element += THREADS) {
      const int row = element % ROWS, place = element / ROWS;
      const int at = start * DEPTH + place;
      if (row >= rows || first + row >= a.length || at >= a.values) continue;
      float z = load_one(a.bias, 0, at, 0.0f);
      for (int part = place / DEPTH; part < WARPS; part += abreast) z += parts.read((part * ROWS + row) * APART + place % DEPTH);
      placed(a.grid, first + row, at, [&](int channel, int64_t y, int64_t x) { store_one(a.out, sample, channel, y, x, z); });
    }
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Unpatchify
// ---------------------------------------------------------------------------------------------------------------------

struct Moves {
  Tokens<Any> tokens;
  Image image;
  Grid grid;
  int64_t elements, grid_h;
  int values;
};

__global__ void __launch_bounds__(THREADS) place_values(const Moves a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (element >= a.elements) return;
  const int64_t width = static_cast<int64_t>(a.grid.columns) * a.grid.patch, height = a.grid_h * a.grid.patch;
  const int64_t column = element % width, row = element / width % height;
  const int channel = static_cast<int>(element / (width * height) % a.grid.channels);
  const int64_t sample = element / (width * height * a.grid.channels);
  const int64_t token = row / a.grid.patch * a.grid.columns + column / a.grid.patch;
  const int64_t value = (row % a.grid.patch * a.grid.patch + column % a.grid.patch) * a.grid.channels + channel;
  store_one(a.image, sample, channel, row, column, load_one(a.tokens, sample, token, value));
}

__global__ void __launch_bounds__(THREADS) gather_values(const Moves a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (element >= a.elements) return;
  const int value = static_cast<int>(element % a.values);
  const int64_t line = element / a.values, length = a.grid_h * a.grid.columns;
  const int64_t sample = line / length, token = line % length;
  const float moved = placed(a.grid, token, value, [&](int channel, int64_t row, int64_t column) {
    return load_one(a.image, sample, channel, row, column);
  });
  store_one(a.tokens, sample, token, value, moved);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

// fp32 holds every value of the dtypes taken, so moving through it changes none.
Tensor unpatchify(Tensor tokens_in, int64_t grid_h, int64_t grid_w, int64_t patch) {
  const int64_t batch = tokens_in.size(0), values = tokens_in.size(2);
  const Grid grid = grid_of(grid_w, patch, values);
  const Tensor out = empty(tokens_in, {batch, grid.channels, grid_h * patch, grid_w * patch}, tokens_in.scalar_type());
  const Moves a{tokens<Any>("tokens", tokens_in), image("image", out), grid, out.numel(), grid_h, static_cast<int>(values)};
  launch<place_values, THREADS>("unpatchify", ceil_div(a.elements, THREADS), tokens_in, a);
  return out;
}

Tensor unpatchify_backward(Tensor dout, int64_t patch) {
  const int64_t grid_h = dout.size(2) / patch, grid_w = dout.size(3) / patch, values = dout.size(1) * patch * patch;
  const Tensor out = empty(dout, {dout.size(0), grid_h * grid_w, values}, dout.scalar_type());
  const Moves a{tokens<Any>("tokens", out), image("image", dout), grid_of(grid_w, patch, values), out.numel(), grid_h,
                static_cast<int>(values)};
  launch<gather_values, THREADS>("unpatchify_backward", ceil_div(a.elements, THREADS), dout, a);
  return out;
}

// Rows a block holds, and what they take in shared memory beside the sums.
int rows_held(int64_t width) {
  const int64_t bytes = 4 * (round_up(width, DEPTH) + UNITS_APART<float>);
  const int64_t most = (GENERAL_BYTES - SUMS_BYTES<float>) / bytes;
  STD_TORCH_CHECK(most > 0, "final_layer: a row of ", width, " channels does not fit in shared memory");
  return most < MOST_ROWS<float> ? static_cast<int>(most) : MOST_ROWS<float>;
}

template <typename H, int WIDTH>
constexpr int FORWARD_SHARED =
    WIDTH == 0 ? GENERAL_BYTES : SUMS_BYTES<H> + MOST_ROWS<H> * static_cast<int>(sizeof(H)) * (WIDTH + UNITS_APART<H>);

std::tuple<Tensor, Tensor, Tensor> final_layer(
    Tensor x, OptionalTensor branch, OptionalTensor gate, OptionalTensor branch_bias, OptionalTensor shift, OptionalTensor scale,
    OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor weight, OptionalTensor bias, int64_t grid_h, int64_t grid_w,
    int64_t patch, std::string norm, double eps, ScalarType out_dtype) {
  Inputs t{x, branch, gate, branch_bias, shift, scale, norm_weight, norm_bias, weight, bias};
  pack(t);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), values = weight.size(0);
  const Grid grid = grid_of(grid_w, patch, values);
  const Tensor out = empty(x, {batch, grid.channels, grid_h * patch, grid_w * patch}, out_dtype);
  const bool centred = norm != "rmsnorm";
  const Tensor mean = centred ? empty(x, {batch, length}, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  const Tensor rstd = empty(x, {batch, length}, ScalarType::Float);
  const bool wide = rows_are_wide(t) && is_wide(t.weight);
  by_row(x.scalar_type(), common_dtype(t), width, wide, [&](auto stream, auto other, auto known, auto reach) {
    using T = decltype(stream);
    using U = decltype(other);
    using H = std::conditional_t<std::is_same_v<U, Any>, float, U>;
    Forward<T, U> a;
    a.x = tokens<T>("x", x);
    a.branch = tokens<U>("branch", branch);
    a.weight = matrix<U>("weight", t.weight);
    a.vectors = vectors_of(t);
    a.bias = vector("bias", t.bias);
    a.out = image("out", out);
    a.grid = grid;
    a.mean = tokens<float>("mean", centred ? OptionalTensor(mean) : std::nullopt);
    a.rstd = tokens<float>("rstd", rstd);
    a.rows = known > 0 ? MOST_ROWS<H> : rows_held(width);
    a.length = length;
    a.blocks = ceil_div(length, a.rows);
    a.width = static_cast<int>(width);
    a.values = static_cast<int>(values);
    a.eps = static_cast<float>(eps);
    launch<forward_rows<T, U, known, reach>, THREADS, FORWARD_SHARED<H, known>>("final_layer", batch * a.blocks, x, a);
  });
  return {out, mean, rstd};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("unpatchify_cuda", TORCH_BOX(&ditkernels::unpatchify));
  library.impl("unpatchify_backward_cuda", TORCH_BOX(&ditkernels::unpatchify_backward));
  library.impl("final_layer_cuda", TORCH_BOX(&ditkernels::final_layer));
}
