// The CUDA kernels of `patch_embed`. Formulas and names are those at the top of ditkernels/ops/patch_embed.py; K = C·p·p, the values
// of a patch; a line is one token of one sample, B·N in all.
//
//   embed            a block owns 64 lines (32 in fp32 products) and every `parts`-th tile of 128 channels. Gathers the patches of its lines into shared
//                    memory once (again for every tile where K is beyond 256, or 128 in fp32 products), writes y: 1 pass.
//
//   weight_products  a block owns 128 channels (64 where a patch has more than 64 values) and a group of consecutive lines.
//                    Reads dy once, or once for every 256 of K (128 in fp32 products), and gathers the patches; writes partial
//                    sums of dW (groups, D, K) and dbias (groups, D), fp32, which add_groups of sums.cuh brings together.
//
//   image_gradients  a warp owns 32 lines and 64 values. Reads dy, once for every 64 of K, writes dx; only if dx is asked for.
//                    The weight is first turned round, (D, K) -> (K, D), by turned.cuh.
//
//   add_positions    a thread owns eight channels of one token. Reads dy, adding the samples in order, writes dpos; only if
//                    dpos is asked for.
//
// Layout of lanes: that of the products (common.cuh). Of a tile of y or dy a lane has eight channels side by side of rows r and
// r + 8: one 16-byte access of bf16 or fp16, two of fp32, and the four lanes of a row read or write whole sectors. Of y no lane's
// values pass through shared memory: the columns of the product are dealt out so that a lane gets its eight.
//
// The patches are rounded to the weight's dtype. Products take operands in the weight's dtype where all have it and accumulate in
// fp32; otherwise they are fp32 products. Nothing is added atomically, and the number of groups depends on shapes alone: same
// inputs, same bits. Tiles of channels divide the paper's widths; any other width leaves the last tile partly empty.
#include "common.cuh"
#include "sums.cuh"
#include "turned.cuh"

namespace ditkernels {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Patches
// ---------------------------------------------------------------------------------------------------------------------

struct Patches {
  Image image;
  int64_t length;
  int grid_w, patch, values;
};

struct Line {
  int64_t sample;
  int token;
};

__device__ __forceinline__ Line line_of(const Patches& patches, int64_t line) {
  const int64_t sample = line / patches.length;
  return {sample, static_cast<int>(line - sample * patches.length)};
}

// Calls body(channel, row, column) with the place of a patch's value in the image.
template <typename Body>
__device__ __forceinline__ auto placed(const Patches& a, const Line& line, int value, const Body& body) {
  const int column = value % a.patch, row = value / a.patch % a.patch, channel = value / (a.patch * a.patch);
  return body(
      channel, static_cast<int64_t>(line.token / a.grid_w) * a.patch + row,
      static_cast<int64_t>(line.token % a.grid_w) * a.patch + column);
}

__device__ __forceinline__ float patch_value(const Patches& a, const Line& line, int value) {
  return placed(a, line, value, [&](int channel, int64_t row, int64_t column) {
    return load_one(a.image, line.sample, channel, row, column);
  });
}

// Values first to first + COUNT - 1 of ROWS lines from `start` on, zero beyond K and beyond `last`, into rows of shared memory.
// A thread keeps to one line, whose place costs a division.
template <int ROWS, int COUNT, typename T>
__device__ __forceinline__ void gather_patches(
    const Patches& a, const Shared<T>& tile, int stride, int64_t start, int64_t last, int first, ScalarType weight) {
  const int row = threadIdx.x % ROWS;
  const bool live = start + row < last;
  const Line line = line_of(a, live ? start + row : 0);
  for (int at = threadIdx.x / ROWS; at < COUNT; at += blockDim.x / ROWS) {
    const bool inside = live && first + at < a.values;
    const float value = inside ? rounded<Any>(patch_value(a, line, first + at), weight) : 0.0f;
    tile.write(row * stride + at, static_cast<T>(value));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

constexpr int EMBED_THREADS = 128;
constexpr int EMBED_COLUMNS = 128;
constexpr int64_t EMBED_BLOCKS = 1024;

template <typename T>
constexpr int EMBED_LINES = sizeof(T) == 2 ? 64 : 32;
template <typename T>
constexpr int EMBED_VALUES = 512 / sizeof(T);
template <typename T>
constexpr int EMBED_STRIDE = EMBED_VALUES<T> + UNITS_APART<T>;

template <typename T>
struct Embed {
  Patches patches;
  Tokens<T> weight;
  Vector bias;
  Tokens<Any> pos, y;
  ScalarType rounded;
  int64_t lines;
  int parts, width;
};

template <bool WIDE, typename T>
__device__ __forceinline__ void store_lines(const Embed<T>& a, int64_t line, int column, Unit unit, const Unit& bias) {
  if (line >= a.lines || column >= a.width) return;
  if (a.pos.data != nullptr) {
    const Unit pos = load<WIDE>(a.pos, 0, line % a.patches.length, column, a.width);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) unit.at[i] += bias.at[i] + pos.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) unit.at[i] += bias.at[i];
  }
  store<WIDE>(a.y, 0, line, column, a.width, unit);
}

// Eight values, from `value` on, of a row of the weight; zero outside.
template <bool WIDE, typename T>
__device__ __forceinline__ Fragment<T> weight_unit(const Tokens<T>& weight, int row, int rows, int value, int values) {
  if (row >= rows || value >= values) return narrowed<T>(Unit{});
  if constexpr (WIDE)
    return load_words(weight, 0, row, value);
  else
    return narrowed<T>(load<false>(weight, 0, row, value, values));
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(EMBED_THREADS) embed(const Embed<T> a) {
  constexpr int VALUES = EMBED_VALUES<T>, STRIDE = EMBED_STRIDE<T>, LINES = EMBED_LINES<T>, TILES = LINES / TILE_ROWS;
  const Shared<T> tile{0};
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.parts) * LINES;
  const bool kept = a.patches.values <= VALUES;
  const int own = threadIdx.x / WARP * DEPTH;
  if (kept) {
    gather_patches<LINES, VALUES>(a.patches, tile, STRIDE, first, a.lines, 0, a.rounded);
    __syncthreads();
  }
  for (int column = blockIdx.x % a.parts * EMBED_COLUMNS; column < a.width; column += a.parts * EMBED_COLUMNS) {
    float sums[TILES][4][4] = {};
    for (int from = 0; from < a.patches.values; from += VALUES) {
      if (!kept) {
        __syncthreads();
        gather_patches<LINES, VALUES>(a.patches, tile, STRIDE, first, a.lines, from, a.rounded);
        __syncthreads();
      }
      for (int depth = 0; depth < VALUES && from + depth < a.patches.values; depth += DEPTH) {
        const int unit = depth + lane_quarter() * UNIT;
        Fragment<T> right[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          right[j] = weight_unit<WIDE>(a.weight, column + own + spread_column(j), a.width, from + unit, a.patches.values);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          const int row = i * TILE_ROWS + lane_row();
          multiply(sums[i], tile.read_unit(row * STRIDE + unit), tile.read_unit((row + 8) * STRIDE + unit), right);
        }
      }
    }
    const int place = column + own + lane_quarter() * UNIT;
    if (place >= a.width) continue;
    const Unit bias = load<WIDE>(a.bias, 0, place, a.width, 0.0f);
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_lines<WIDE>(a, first + i * TILE_ROWS + half * 8 + lane_row(), place, sums_of(sums[i], half), bias);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradients of weight and bias
// ---------------------------------------------------------------------------------------------------------------------

constexpr int PRODUCT_THREADS = 256;
constexpr int64_t GROUPS = 32;
constexpr int64_t LINES_PER_VALUE = 8;  // so that the partial sums of dW stay below 1/8 of the elements of dy

template <typename T>
constexpr int PRODUCT_LINES = sizeof(T) == 2 ? 64 : 32;
// Values of a patch held at a time: few or many.
template <typename T>
constexpr int FEW_VALUES = sizeof(T) == 2 ? 64 : 32;
template <typename T>
constexpr int MANY_VALUES = sizeof(T) == 2 ? 256 : 128;
template <int VALUES>
constexpr int PRODUCT_COLUMNS = VALUES > 128 ? 64 : 128;

template <typename T, int VALUES>
constexpr int PRODUCT_SHARED =
    PRODUCT_LINES<T> * static_cast<int>(sizeof(T)) * (PRODUCT_COLUMNS<VALUES> + VALUES + 2 * ACROSS_APART<T>);

template <typename U>
struct WeightProducts {
  Patches patches;
  Tokens<U> dy;
  Tokens<float> partial, bias_partial;
  ScalarType rounded;
  int64_t lines, group_lines;
  int column_tiles, value_tiles, width;
};

// Adds up, in a fixed order, what the threads of a block have of dbias: one unit of channels each.
template <int COLUMNS>
__device__ __forceinline__ void store_bias_sums(const Tokens<float>& to, const Unit& unit, int64_t group, int column, int width) {
  const Shared<float> sums{0};
  constexpr int UNITS = COLUMNS / UNIT, ROWS = PRODUCT_THREADS / UNITS;
  __syncthreads();
  sums.write_unit(threadIdx.x * UNIT, narrowed<float>(unit));
  __syncthreads();
  if (threadIdx.x >= COLUMNS || column + static_cast<int>(threadIdx.x) >= width) return;
  float total = 0.0f;
  for (int row = 0; row < ROWS; ++row) total += sums.read(row * COLUMNS + threadIdx.x);
  store_one(to, 0, group, column + threadIdx.x, total);
}

template <typename U, typename T, int VALUES, bool WIDE>
__global__ void __launch_bounds__(PRODUCT_THREADS) weight_products(const WeightProducts<U> a) {
  constexpr int LINES = PRODUCT_LINES<T>, COLUMNS = PRODUCT_COLUMNS<VALUES>;
  constexpr int DY_STRIDE = COLUMNS + ACROSS_APART<T>, PATCH_STRIDE = VALUES + ACROSS_APART<T>;
  constexpr int UNITS = COLUMNS / UNIT, STEP = PRODUCT_THREADS / UNITS;
  constexpr int BANDS = COLUMNS / TILE_ROWS, TILES = VALUES / TILE_COLUMNS / (PRODUCT_THREADS / WARP / BANDS);
  const Shared<T> dy_tile{0}, patch_tile{LINES * DY_STRIDE * static_cast<int>(sizeof(T))};
  const int column = blockIdx.x % a.column_tiles * COLUMNS, own = threadIdx.x % UNITS * UNIT;
  const int value = blockIdx.x / a.column_tiles % a.value_tiles * VALUES;
  const int64_t group = blockIdx.x / (a.column_tiles * a.value_tiles);
  const int64_t first = group * a.group_lines;
  const int64_t last = first + a.group_lines < a.lines ? first + a.group_lines : a.lines;
  const int warp = threadIdx.x / WARP, band = warp % BANDS * TILE_ROWS, side = warp / BANDS * TILES * TILE_COLUMNS;

  float sums[TILES][4] = {};
  Unit bias = {};
  for (int64_t start = first; start < last; start += LINES) {
    Unit units[LINES / STEP] = {};
#pragma unroll
    for (int i = 0; i < LINES / STEP; ++i) {
      const int64_t line = start + i * STEP + threadIdx.x / UNITS;
      if (line >= last || column + own >= a.width) continue;
      const Line place = line_of(a.patches, line);
      units[i] = load<WIDE>(a.dy, place.sample, place.token, column + own, a.width);
    }
#pragma unroll
    for (int i = 0; i < LINES / STEP; ++i) {
#pragma unroll
      for (int k = 0; k < UNIT; ++k) bias.at[k] += units[i].at[k];
      dy_tile.write_unit((i * STEP + threadIdx.x / UNITS) * DY_STRIDE + own, narrowed<T>(units[i]));
    }
    if (a.partial.data == nullptr) continue;
    gather_patches<LINES, VALUES>(a.patches, patch_tile, PATCH_STRIDE, start, last, value, a.rounded);
    __syncthreads();
#pragma unroll
    for (int depth = 0; depth < LINES; depth += DEPTH) {
      const Fragment<T> low = read_across(dy_tile, depth * DY_STRIDE + band, DY_STRIDE);
      const Fragment<T> high = read_across(dy_tile, depth * DY_STRIDE + band + 8, DY_STRIDE);
#pragma unroll
      for (int j = 0; j < TILES; j += 4) {
        Fragment<T> right[4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
          right[k] = read_across(patch_tile, depth * PATCH_STRIDE + side + (j + k) * TILE_COLUMNS, PATCH_STRIDE);
        multiply(reinterpret_cast<float (&)[4][4]>(sums[j]), low, high, right);
      }
    }
    __syncthreads();
  }

  if (a.partial.data != nullptr) {
#pragma unroll
    for (int j = 0; j < TILES; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = column + band + lane_row() + i / 2 * 8;
        const int place = value + side + j * TILE_COLUMNS + lane_quarter() * 2 + i % 2;
        if (channel < a.width && place < a.patches.values) store_one(a.partial, group, channel, place, sums[j][i]);
      }
  }
  if (a.bias_partial.data != nullptr && value == 0) store_bias_sums<COLUMNS>(a.bias_partial, bias, group, column, a.width);
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of the image
// ---------------------------------------------------------------------------------------------------------------------

constexpr int IMAGE_THREADS = 128;
constexpr int IMAGE_LINES = 32;
constexpr int IMAGE_VALUES = 64;

template <typename U, typename T>
struct ImageGradients {
  Patches patches;
  Tokens<U> dy;
  Tokens<T> turned;
  int64_t lines;
  int value_tiles, width;
};

// Eight channels of a line of dy as an operand; zero outside.
template <bool WIDE, typename T, typename U>
__device__ __forceinline__ Fragment<T> line_unit(const ImageGradients<U, T>& a, int64_t line, int column) {
  if (line >= a.lines || column >= a.width) return narrowed<T>(Unit{});
  const Line place = line_of(a.patches, line);
  return narrowed<T>(load<WIDE>(a.dy, place.sample, place.token, column, a.width));
}

template <typename U, typename T, bool WIDE>
__global__ void __launch_bounds__(IMAGE_THREADS) image_gradients(const ImageGradients<U, T> a) {
  constexpr int TILES = IMAGE_LINES / TILE_ROWS, SIDES = IMAGE_VALUES / DEPTH;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (IMAGE_THREADS / WARP) + threadIdx.x / WARP;
  const int value = static_cast<int>(warp % a.value_tiles) * IMAGE_VALUES;
  const int64_t first = warp / a.value_tiles * IMAGE_LINES;
  if (first >= a.lines) return;

  float sums[TILES][SIDES][4][4] = {};
  for (int column = lane_quarter() * UNIT; column - lane_quarter() * UNIT < a.width; column += DEPTH) {
    Fragment<T> low[TILES], high[TILES];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      low[i] = line_unit<WIDE, T>(a, first + i * TILE_ROWS + lane_row(), column);
      high[i] = line_unit<WIDE, T>(a, first + i * TILE_ROWS + lane_row() + 8, column);
    }
#pragma unroll
    for (int side = 0; side < SIDES; ++side) {
      Fragment<T> right[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = value + side * DEPTH + spread_column(j);
        right[j] = row < a.patches.values ? load_words(a.turned, 0, row, column) : narrowed<T>(Unit{});
      }
#pragma unroll
      for (int i = 0; i < TILES; ++i) multiply(sums[i][side], low[i], high[i], right);
    }
  }
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t number = first + i * TILE_ROWS + half * 8 + lane_row();
      if (number >= a.lines) continue;
      const Line line = line_of(a.patches, number);
#pragma unroll
      for (int side = 0; side < SIDES; ++side) {
        const Unit unit = sums_of(sums[i][side], half);
#pragma unroll
        for (int k = 0; k < UNIT; ++k) {
          const int at = value + side * DEPTH + lane_quarter() * UNIT + k;
          if (at >= a.patches.values) continue;
          placed(a.patches, line, at, [&](int channel, int64_t row, int64_t column) {
            store_one(a.patches.image, line.sample, channel, row, column, unit.at[k]);
          });
        }
      }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient of the positions
// ---------------------------------------------------------------------------------------------------------------------

constexpr int POSITION_THREADS = 128;

template <typename U>
struct Positions {
  Tokens<U> dy;
  Tokens<Any> dpos;
  int64_t batch, length;
  int units, width;
};

template <typename U, bool WIDE>
__global__ void __launch_bounds__(POSITION_THREADS) add_positions(const Positions<U> a) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * POSITION_THREADS + threadIdx.x;
  const int64_t token = place / a.units;
  const int column = static_cast<int>(place % a.units) * UNIT;
  if (token >= a.length) return;
  [[maybe_unused]] constexpr int AT_ONCE = std::is_same_v<U, Any> ? 1 : 4;
  Unit total = {};
#pragma unroll AT_ONCE
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    const Unit unit = load<WIDE>(a.dy, sample, token, column, a.width);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) total.at[i] += unit.at[i];
  }
  store<WIDE>(a.dpos, 0, token, column, a.width, total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

Patches patches_of(const char* name, const Tensor& x, const Tensor& weight) {
  const int64_t p = weight.size(2), rows = x.size(2) / p, columns = x.size(3) / p;
  return {image(name, x), rows * columns, static_cast<int>(columns), static_cast<int>(p), static_cast<int>(x.size(1) * p * p)};
}

// A packed convolution's weight as (D, K).
template <typename T>
Tokens<T> weight_matrix(const Tensor& weight) {
  return matrix<T>("weight", torch::stable::flatten(weight, 1, -1));
}

Tensor patch_embed(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed, ScalarType out_dtype) {
  weight = torch::stable::contiguous(weight);
  const Patches patches = patches_of("x", x, weight);
  const int64_t batch = x.size(0), width = weight.size(0), lines = batch * patches.length;
  const Tensor y = empty(x, {batch, patches.length, width}, out_dtype);
  bias = packed(bias);
  const bool wide = all_wide(OptionalTensor(y), bias, pos_embed) && patches.values % UNIT == 0;
  by_dtype(weight.scalar_type(), [&](auto t) {
    by_truth(wide, [&](auto reach) {
      using T = decltype(t);
      Embed<T> a;
      a.patches = patches;
      a.weight = weight_matrix<T>(weight);
      a.bias = vector("bias", bias);
      a.pos = matrix<Any>("pos_embed", pos_embed);
      a.y = matrix<Any>("y", torch::stable::flatten(y, 0, 1));
      a.rounded = weight.scalar_type();
      a.lines = lines;
      const int64_t blocks = ceil_div(lines, EMBED_LINES<T>), tiles = ceil_div(width, EMBED_COLUMNS);
      const int64_t wanted = ceil_div(EMBED_BLOCKS, blocks > 0 ? blocks : 1);
      a.parts = static_cast<int>(wanted < tiles ? wanted : tiles);
      a.width = static_cast<int>(width);
      launch<embed<T, reach>, EMBED_THREADS, static_cast<int>(sizeof(T)) * EMBED_LINES<T> * EMBED_STRIDE<T>>(
          "patch_embed", blocks * a.parts, x, a);
    });
  });
  return y;
}

template <typename U, typename T, int VALUES, bool WIDE>
void launch_weight_products(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Patches& patches, const OptionalTensor& partial,
    const OptionalTensor& bias_partial, int64_t group_lines) {
  const int64_t width = weight.size(0);
  WeightProducts<U> a;
  a.patches = patches;
  a.dy = tokens<U>("dy", dy);
  a.partial = tokens<float>("partial", partial);
  a.bias_partial = matrix<float>("bias_partial", bias_partial);
  a.rounded = weight.scalar_type();
  a.lines = x.size(0) * patches.length;
  a.group_lines = group_lines;
  a.column_tiles = static_cast<int>(ceil_div(width, PRODUCT_COLUMNS<VALUES>));
  a.value_tiles = static_cast<int>(partial.has_value() ? ceil_div(patches.values, VALUES) : 1);
  a.width = static_cast<int>(width);
  const int64_t groups = ceil_div(a.lines, group_lines);
  launch<weight_products<U, T, VALUES, WIDE>, PRODUCT_THREADS, PRODUCT_SHARED<T, VALUES>>(
      "patch_embed_backward", groups * a.column_tiles * a.value_tiles, x, a);
}

// dweight and dbias, (0,) for the one that is not asked for.
std::tuple<Tensor, Tensor> weight_gradients(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool weight_needed) {
  const Patches patches = patches_of("x", x, weight);
  const int64_t width = weight.size(0), values = patches.values, lines = x.size(0) * patches.length;
  int64_t group_lines = ceil_div(lines, GROUPS);
  if (group_lines < LINES_PER_VALUE * values) group_lines = LINES_PER_VALUE * values;
  group_lines = round_up(group_lines, PRODUCT_LINES<Half>);
  const int64_t groups = ceil_div(lines, group_lines);
  OptionalTensor partial, bias_partial;
  if (weight_needed) partial = empty(x, {groups, width, values}, ScalarType::Float);
  if (bias.has_value()) bias_partial = empty(x, {groups, width}, ScalarType::Float);
  if (weight_needed || bias.has_value())
    by_layout(dy.scalar_type(), weight.scalar_type(), is_wide(dy), [&](auto u, auto w, auto reach) {
      using U = std::conditional_t<std::is_same_v<decltype(u), decltype(w)>, decltype(u), Any>;
      using T = std::conditional_t<std::is_same_v<U, Any>, float, U>;
      by_truth(values <= FEW_VALUES<T>, [&](auto few) {
        launch_weight_products<U, T, few ? FEW_VALUES<T> : MANY_VALUES<T>, reach>(
            dy, x, weight, patches, partial, bias_partial, group_lines);
      });
    });
  const char* op = "patch_embed_backward";
  const auto flat = [](const Tensor& sums) { return torch::stable::flatten(sums, 1, -1); };
  return {
      weight_needed ? sum_groups(op, "dweight", flat(*partial), weight) : nothing(x),
      bias.has_value() ? sum_groups(op, "dbias", *bias_partial, *bias) : nothing(x)};
}

Tensor image_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const Tensor dx = empty_like(x, x), packed_weight = torch::stable::contiguous(weight);
  const Patches patches = patches_of("dx", dx, weight);
  const int64_t width = weight.size(0), lines = x.size(0) * patches.length;
  const char* op = "patch_embed_backward";
  by_layout(dy.scalar_type(), weight.scalar_type(), is_wide(dy), [&](auto u, auto w, auto reach) {
    using U = std::conditional_t<std::is_same_v<decltype(u), decltype(w)>, decltype(u), Any>;
    using T = std::conditional_t<std::is_same_v<U, Any>, float, U>;
    const Tensor turned = turn<T>(op, weight_matrix<Any>(packed_weight), patches.values, width, 1, x);
    ImageGradients<U, T> a;
    a.patches = patches;
    a.dy = tokens<U>("dy", dy);
    a.turned = matrix<T>("turned", turned);
    a.lines = lines;
    a.value_tiles = static_cast<int>(ceil_div(patches.values, IMAGE_VALUES));
    a.width = static_cast<int>(width);
    const int64_t warps = ceil_div(lines, IMAGE_LINES) * a.value_tiles;
    launch<image_gradients<U, T, reach>, IMAGE_THREADS>(op, ceil_div(warps, IMAGE_THREADS / WARP), x, a);
  });
  return dx;
}

Tensor position_gradient(const Tensor& dy, const Tensor& pos_embed) {
  const Tensor dpos = empty_like(pos_embed, pos_embed);
  const int64_t length = dy.size(1), width = dy.size(2);
  by_layout(
      dy.scalar_type(), dy.scalar_type(), all_wide(OptionalTensor(dy), OptionalTensor(dpos)), [&](auto u, auto, auto reach) {
    using U = decltype(u);
    Positions<U> a;
    a.dy = tokens<U>("dy", dy);
    a.dpos = matrix<Any>("dpos", dpos);
    a.batch = dy.size(0);
    a.length = length;
    a.units = static_cast<int>(ceil_div(width, UNIT));
    a.width = static_cast<int>(width);
    launch<add_positions<U, reach>, POSITION_THREADS>(
        "patch_embed_backward", ceil_div(length * a.units, POSITION_THREADS), dy, a);
  });
  return dpos;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_embed_backward(
    Tensor dy, Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed, std::vector<bool> needs) {
  const OptionalTensor wanted_bias = needs[2] ? bias : std::nullopt;
  const Tensor dx = needs[0] ? image_gradient(dy, x, weight) : nothing(x);
  auto [dweight, dbias] = weight_gradients(dy, x, weight, wanted_bias, needs[1]);
  const Tensor dpos = needs[3] && pos_embed.has_value() ? position_gradient(dy, *pos_embed) : nothing(x);
  return {dx, dweight, dbias, dpos};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("patch_embed_cuda", TORCH_BOX(&ditkernels::patch_embed));
  library.impl("patch_embed_backward_cuda", TORCH_BOX(&ditkernels::patch_embed_backward));
}
