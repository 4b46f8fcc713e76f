// The CUDA kernels between an image and its tokens: patch_embed, final_layer, unpatchify, patchify. Formulas and names are those at
// the top of ditkernels/ops/image/__init__.py. K = C·p·p is the number of values of a patch that goes in, V = p·p·O of one that
// goes out. A line is one token of one sample, B·N in all. The backwards of patch_embed and final_layer are made of other ops.
//
//   embed          patch_embed. A block owns 64 lines (32 in fp32 products) and every `parts`-th tile of 128 channels. It gathers
//                  the patches of its lines into shared memory once (once for each tile if K exceeds 256, or 128 in fp32 products)
//                  and writes y: 1 pass. A lane's results in a tile of y are eight contiguous channels of rows r and r + 8, which
//                  it writes from registers.
//
//   final_rows     final_layer. A block owns 32 rows of one sample (16 in fp32 products; fewer where rows are long). It reads x
//                  (and the branch) and writes the image: 1 pass (2 with a branch). Each warp normalises and modulates one row at a
//                  time, which it holds in registers (in shared memory at widths other than the paper's), and leaves it in shared
//                  memory as an operand; a lane holds every 32nd unit of the row. The warps then divide the product by channels and
//                  values, and add up their parts in order. x1 is rounded to x's dtype, h to the weight's.
//
//   place_values   unpatchify: a thread owns one value of the image.
//   gather_values  patchify: a thread owns one value of the tokens.
//
// embed multiplies in the weight's dtype, to which it rounds the patches. final_rows does so too if by_row knows the dtypes and the
// width; otherwise it multiplies in fp32. Sums are fp32. Tiles of channels divide the paper's widths; at other widths the last tile
// is partly empty. The same inputs give the same bits: nothing is added atomically.
#include "common.cuh"
#include "products.cuh"

namespace ditkernels {
namespace {

// ---- Images ---------------------------------------------------------------------------------------------------------

// A (B, C, H, W) tensor at any strides.
struct Image {
  void* data = nullptr;
  int64_t sample = 0, channel = 0, row = 0, column = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

Image image(const char* name, const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0),     tensor.stride(1),      tensor.stride(2),
          tensor.stride(3),  tensor.scalar_type(), describe(name, tensor)};
}

struct Place {
  int channel;
  int64_t row, column;
};

// One row of one channel of an image, as a token whose channels are the columns of the image.
__device__ __forceinline__ Tokens<Any> row_of(const Image& image, const Place& place) {
  const int64_t bytes = image.dtype == ScalarType::Float ? sizeof(float) : sizeof(Half);
  char* data = static_cast<char*>(image.data) + (place.channel * image.channel + place.row * image.row) * bytes;
  return {data, image.sample, 0, image.column, image.dtype, image.id};
}

__device__ __forceinline__ float load_one(const Image& from, int64_t sample, const Place& place) {
  return load_one(row_of(from, place), sample, 0, place.column);
}

__device__ __forceinline__ void store_one(const Image& to, int64_t sample, const Place& place, float value) {
  store_one(row_of(to, place), sample, 0, place.column, value);
}

struct Grid {
  int columns, patch, channels;
};

// The place in the image of a token's value. The token orders its values (channel, row, column) or (row, column, channel).
template <bool CHANNELS_FIRST, typename Token>
__device__ __forceinline__ Place place_of(const Grid& grid, Token token, int value) {
  const int area = grid.patch * grid.patch;
  const int channel = CHANNELS_FIRST ? value / area : value % grid.channels;
  const int within = CHANNELS_FIRST ? value % area : value / grid.channels;
  const int64_t row = token / grid.columns, column = token % grid.columns;
  return {channel, row * grid.patch + within / grid.patch, column * grid.patch + within % grid.patch};
}

// ---- Unpatchify and patchify ----------------------------------------------------------------------------------------

constexpr int MOVE_THREADS = 256;

struct Moves {
  Tokens<Any> tokens;
  Image image;
  Grid grid;
  int64_t elements, grid_h;
  int values;
  bool channels_first;
};

__global__ void __launch_bounds__(MOVE_THREADS) place_values(const Moves a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * MOVE_THREADS + threadIdx.x;
  if (element >= a.elements) return;
  const int p = a.grid.patch;
  const int64_t width = static_cast<int64_t>(a.grid.columns) * p, height = a.grid_h * p;
  const int64_t column = element % width, row = element / width % height;
  const int channel = static_cast<int>(element / (width * height) % a.grid.channels);
  const int64_t sample = element / (width * height * a.grid.channels);
  const int64_t within = row % p * p + column % p;
  const int64_t value = a.channels_first ? channel * p * p + within : within * a.grid.channels + channel;
  const float moved = load_one(a.tokens, sample, row / p * a.grid.columns + column / p, value);
  store_one(a.image, sample, {channel, row, column}, moved);
}

__global__ void __launch_bounds__(MOVE_THREADS) gather_values(const Moves a) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * MOVE_THREADS + threadIdx.x;
  if (element >= a.elements) return;
  const int value = static_cast<int>(element % a.values);
  const int64_t line = element / a.values, length = a.grid_h * a.grid.columns;
  const int64_t sample = line / length, token = line % length;
  const Place place = a.channels_first ? place_of<true>(a.grid, token, value) : place_of<false>(a.grid, token, value);
  store_one(a.tokens, sample, token, value, load_one(a.image, sample, place));
}

Grid grid_of(int64_t grid_w, int64_t patch, int64_t values) {
  return {static_cast<int>(grid_w), static_cast<int>(patch), static_cast<int>(values / (patch * patch))};
}

// The values pass through fp32, which represents every value of bf16 and fp16 exactly.
Tensor unpatchify(Tensor tokens_in, int64_t grid_h, int64_t grid_w, int64_t patch, bool channels_first) {
  const int64_t batch = tokens_in.size(0), values = tokens_in.size(2);
  const Grid grid = grid_of(grid_w, patch, values);
  const Tensor out = empty(tokens_in, {batch, grid.channels, grid_h * patch, grid_w * patch}, tokens_in.scalar_type());
  const Moves a{tokens<Any>("tokens", tokens_in), image("image", out), grid, out.numel(), grid_h,
                static_cast<int>(values),         channels_first};
  launch<place_values, MOVE_THREADS>("unpatchify", ceil_div(a.elements, MOVE_THREADS), out, a);
  return out;
}

Tensor patchify(Tensor image_in, int64_t patch, bool channels_first, ScalarType dtype) {
  const int64_t grid_h = image_in.size(2) / patch, grid_w = image_in.size(3) / patch;
  const int64_t values = image_in.size(1) * patch * patch;
  const Tensor out = empty(image_in, {image_in.size(0), grid_h * grid_w, values}, dtype);
  const Grid grid = grid_of(grid_w, patch, values);
  const Moves a{
      tokens<Any>("tokens", out), image("image", image_in), grid, out.numel(), grid_h, static_cast<int>(values), channels_first};
  launch<gather_values, MOVE_THREADS>("patchify", ceil_div(a.elements, MOVE_THREADS), out, a);
  return out;
}

// ---- patch_embed ----------------------------------------------------------------------------------------------------

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
  Image image;
  Grid grid;
  Tokens<T> weight;
  Vector bias;
  Tokens<Any> pos, y;
  int64_t length, lines;
  int parts, width, values;
};

// Copies values `first` to `first` + EMBED_VALUES - 1 of a block's lines into rows of shared memory, with zeros beyond K and beyond
// the last line. A thread copies from one line only, because finding a line's place takes a division.
template <typename T>
__device__ __forceinline__ void gather_patches(const Embed<T>& a, const Shared<T>& tile, int64_t start, int first) {
  constexpr int LINES = EMBED_LINES<T>;
  const int row = threadIdx.x % LINES;
  const bool live = start + row < a.lines;
  const int64_t line = live ? start + row : 0, sample = line / a.length;
  const int token = static_cast<int>(line - sample * a.length);
  for (int at = threadIdx.x / LINES; at < EMBED_VALUES<T>; at += EMBED_THREADS / LINES) {
    float value = 0.0f;
    if (live && first + at < a.values) value = load_one(a.image, sample, place_of<true>(a.grid, token, first + at));
    tile.write(row * EMBED_STRIDE<T> + at, static_cast<T>(value));
  }
}

template <bool VECTORISED, typename T>
__device__ __forceinline__ void store_line(const Embed<T>& a, int64_t line, int column, Unit unit, const Unit& bias) {
  if (line >= a.lines || column >= a.width) return;
  Unit pos = {};
  if (a.pos.data != nullptr) pos = load<VECTORISED>(a.pos, 0, line % a.length, column, a.width);
  UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] += bias.at[i] + pos.at[i];
  store<VECTORISED>(a.y, 0, line, column, a.width, unit);
}

// Eight values of a row of the weight, from `value` on, as the right operand; zero outside the weight.
template <typename H, bool VECTORISED, typename T>
__device__ __forceinline__ Fragment<H> weight_unit(const Tokens<T>& weight, int row, int rows, int value, int values) {
  if (row >= rows || value >= values) return as_fragment<H>(Unit{});
  if constexpr (VECTORISED && std::is_same_v<H, T>)
    return load_words(weight, 0, row, value);
  else
    return as_fragment<H>(load<VECTORISED>(weight, 0, row, value, values));
}

template <typename T, bool VECTORISED>
__global__ void __launch_bounds__(EMBED_THREADS) embed(const Embed<T> a) {
  constexpr int VALUES = EMBED_VALUES<T>, STRIDE = EMBED_STRIDE<T>, LINES = EMBED_LINES<T>, TILES = LINES / TILE_ROWS;
  const Shared<T> tile{0};
  const int64_t first = static_cast<int64_t>(blockIdx.x / a.parts) * LINES;
  const bool kept = a.values <= VALUES;
  const int own = threadIdx.x / WARP * DEPTH;
  if (kept) {
    gather_patches(a, tile, first, 0);
    __syncthreads();
  }
  for (int column = blockIdx.x % a.parts * EMBED_COLUMNS; column < a.width; column += a.parts * EMBED_COLUMNS) {
    float sums[TILES][4][4] = {};
    for (int from = 0; from < a.values; from += VALUES) {
      if (!kept) {
        __syncthreads();
        gather_patches(a, tile, first, from);
        __syncthreads();
      }
      for (int depth = 0; depth < VALUES && from + depth < a.values; depth += DEPTH) {
        const int unit = depth + lane_quarter() * UNIT;
        Fragment<T> right[4];
        UNROLL for (int j = 0; j < 4; ++j) {
          right[j] = weight_unit<T, VECTORISED>(a.weight, column + own + spread_column(j), a.width, from + unit, a.values);
        }
        UNROLL for (int i = 0; i < TILES; ++i) {
          const int row = i * TILE_ROWS + lane_row();
          multiply(sums[i], tile.read_unit(row * STRIDE + unit), tile.read_unit((row + 8) * STRIDE + unit), right);
        }
      }
    }
    const int place = column + own + lane_quarter() * UNIT;
    if (place >= a.width) continue;
    const Unit bias = load<VECTORISED>(a.bias, 0, place, a.width, 0.0f);
    UNROLL for (int i = 0; i < 2 * TILES; ++i) {
      const int64_t line = first + i * 8 + lane_row();
      store_line<VECTORISED>(a, line, place, sums_of(sums[i / 2], i % 2), bias);
    }
  }
}

Tensor patch_embed(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed, ScalarType out_dtype) {
  const Tensor matrix_of_weight = torch::stable::flatten(torch::stable::contiguous(weight), 1, -1);
  bias = packed(bias);
  const int64_t batch = x.size(0), patch = weight.size(2), width = weight.size(0), values = x.size(1) * patch * patch;
  const int64_t grid_w = x.size(3) / patch, length = x.size(2) / patch * grid_w;
  const Tensor y = empty(x, {batch, length, width}, out_dtype);
  by_dtype(weight.scalar_type(), [&](auto t) {
    by_truth(all_vectorised(y, bias, pos_embed, matrix_of_weight), [&](auto by_words) {
      using T = decltype(t);
      const int64_t blocks = ceil_div(batch * length, EMBED_LINES<T>), tiles = ceil_div(width, EMBED_COLUMNS);
      const int64_t parts = ceil_div(EMBED_BLOCKS, blocks > 0 ? blocks : 1);
      const Embed<T> a{
          .image = image("x", x),
          .grid = grid_of(grid_w, patch, values),
          .weight = matrix<T>("weight", matrix_of_weight),
          .bias = vector("bias", bias),
          .pos = matrix<Any>("pos_embed", pos_embed),
          .y = matrix<Any>("y", torch::stable::flatten(y, 0, 1)),
          .length = length,
          .lines = batch * length,
          .parts = static_cast<int>(parts < tiles ? parts : tiles),
          .width = static_cast<int>(width),
          .values = static_cast<int>(values)};
      launch<embed<T, by_words>, EMBED_THREADS, static_cast<int>(sizeof(T)) * EMBED_LINES<T> * EMBED_STRIDE<T>>(
          "patch_embed", blocks * a.parts, x, a);
    });
  });
  return y;
}

// ---- final_layer ----------------------------------------------------------------------------------------------------

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int GENERAL_BYTES = 96 * 1024;  // of shared memory, which every device from 8.0 on can give a block
constexpr int APART = DEPTH + 1;          // stride of rows of 32 sums: a column falls into different banks

template <typename H>
constexpr int MOST_ROWS = sizeof(H) == 2 ? 32 : 16;
template <typename H>
constexpr int SUMS_BYTES = WARPS * MOST_ROWS<H> * APART * 4;

template <typename T, typename U>
struct Final {
  Tokens<T> x;
  Tokens<U> branch, weight;
  Vectors vectors;
  Vector bias;
  Image out;
  Grid grid;
  int64_t length, blocks;
  int rows, width, values;
  float eps;
  bool centred;
};

// The first channel of the lane's i-th unit.
__device__ __forceinline__ int own_column(int i) { return (i * WARP + threadIdx.x % WARP) * UNIT; }

// A lane's units of a row: in registers at a width known to the compiler, else in shared memory.
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
  __device__ __forceinline__ Unit get(int i) const { return as_floats(tile.read_unit(first + i * WARP * UNIT)); }
  __device__ __forceinline__ void set(int i, const Unit& unit) {
    tile.write_unit(first + i * WARP * UNIT, as_fragment<float>(unit));
  }
};

// Eight channels of x, or of x1 where there is a branch.
template <bool VECTORISED, typename T, typename U>
__device__ __forceinline__ Unit stream_unit(const Final<T, U>& a, int64_t sample, int64_t token, int column, int width) {
  Unit unit = load<VECTORISED>(a.x, sample, token, column, width);
  if (a.branch.data == nullptr) return unit;
  const Unit branch = load<VECTORISED>(a.branch, sample, token, column, width);
  const Unit gate = load<VECTORISED>(a.vectors.gate, sample, column, width, 1.0f);
  const Unit bias = load<VECTORISED>(a.vectors.branch_bias, 0, column, width, 0.0f);
  UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] = rounded<T>(unit.at[i] + gate.at[i] * (branch.at[i] + bias.at[i]), a.x.dtype);
  return unit;
}

// Eight channels of h from those of x̂, rounded to the weight's dtype, as the left operand.
template <typename H, bool VECTORISED, typename T, typename U>
__device__ __forceinline__ Fragment<H> modulated(const Final<T, U>& a, Unit unit, int64_t sample, int column, int width) {
  const Unit weight = load<VECTORISED>(a.vectors.weight, 0, column, width, 1.0f);
  const Unit bias = load<VECTORISED>(a.vectors.bias, 0, column, width, 0.0f);
  const Unit scale = load<VECTORISED>(a.vectors.scale, sample, column, width, 0.0f);
  const Unit shift = load<VECTORISED>(a.vectors.shift, sample, column, width, 0.0f);
  UNROLL for (int i = 0; i < UNIT; ++i) {
    const float affine = unit.at[i] * weight.at[i] + bias.at[i];
    unit.at[i] = rounded<U>(affine * (1.0f + scale.at[i]) + shift.at[i], a.weight.dtype);
  }
  return as_fragment<H>(unit);
}

// A lane's share of the sum of part(value) over a row. Beside one huge part all others round alike, so the sum is cut into short ones.
template <int WIDTH, typename Part>
__device__ __forceinline__ float sum_of(const Row<WIDTH>& row, int width, const Part& part) {
  float sum = 0.0f;
  UNROLL for (int i = 0; i < row.units(width); ++i) {
    if (own_column(i) >= width) continue;
    const Unit unit = row.get(i);
    float of_unit = 0.0f;
    UNROLL for (int k = 0; k < UNIT; ++k) of_unit += part(unit.at[k]);
    sum += of_unit;
  }
  return sum;
}

// Run by a warp: computes h of one row and leaves it in shared memory as the left operand.
template <typename H, int WIDTH, bool VECTORISED, typename T, typename U>
__device__ __forceinline__ void norm_row(const Final<T, U>& a, const Shared<H>& tile, int at, int64_t sample, int64_t token) {
  const int width = WIDTH > 0 ? WIDTH : a.width;
  Row<WIDTH> row(Shared<float>{0}, at);
  UNROLL for (int i = 0; i < row.units(width); ++i) {
    if (own_column(i) >= width) continue;
    row.set(i, stream_unit<VECTORISED>(a, sample, token, own_column(i), width));
  }
  if (a.centred) {
    // The second turn takes what rounding kept from the mean in the first. It leaves a constant row exactly zero.
    UNROLL for (int turn = 0; turn < 2; ++turn) {
      const float mean = warp_sum(sum_of(row, width, [](float value) { return value; })) / width;
      UNROLL for (int i = 0; i < row.units(width); ++i) {
        if (own_column(i) >= width) continue;
        Unit unit = row.get(i);
        UNROLL for (int k = 0; k < UNIT; ++k) unit.at[k] = own_column(i) + k < width ? unit.at[k] - mean : 0.0f;
        row.set(i, unit);
      }
    }
  }
  const float squares = warp_sum(sum_of(row, width, [](float value) { return value * value; }));
  // Zero times a sum that has overflowed is NaN: such a row is lost, and not a row of zeros.
  const float rstd = 1.0f / sqrtf(squares / width + a.eps) + (a.centred ? 0.0f * squares : 0.0f);
  UNROLL for (int i = 0; i < row.units(width); ++i) {
    if (own_column(i) >= width) continue;
    Unit unit = row.get(i);
    UNROLL for (int k = 0; k < UNIT; ++k) unit.at[k] *= rstd;
    tile.write_unit(at + own_column(i), modulated<H, VECTORISED>(a, unit, sample, own_column(i), width));
  }
}

// Run by a warp: writes zeros to columns `from` to `to` - 1 of a row of shared memory. Both are multiples of eight.
template <typename H>
__device__ __forceinline__ void clear(const Shared<H>& tile, int at, int from, int to) {
  for (int column = from + threadIdx.x % WARP * UNIT; column < to; column += WARP * UNIT)
    tile.write_unit(at + column, as_fragment<H>(Unit{}));
}

// The blocks that a multiprocessor must hold. Two would leave fp32 products too few registers.
template <typename U>
constexpr int BLOCKS_AT_ONCE = std::is_same_v<U, float> || std::is_same_v<U, Any> ? 1 : 2;

template <typename T, typename U, int WIDTH, bool VECTORISED>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE<U>) final_rows(const Final<T, U> a) {
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
    if (live) norm_row<H, WIDTH, VECTORISED>(a, tile, row * stride, sample, first + row);
    clear(tile, row * stride, live ? (width + UNIT - 1) / UNIT * UNIT : 0, padded);
  }
  __syncthreads();

  // `abreast` warps take one tile of 32 values each; the `deep` warps on one tile divide its channels among them.
  const int tiles = (a.values + DEPTH - 1) / DEPTH;
  const int abreast = tiles >= 8 ? 8 : tiles >= 4 ? 4 : tiles >= 2 ? 2 : 1;
  const int deep = WARPS / abreast;
  for (int start = 0; start < tiles; start += abreast) {
    const int value = (start + warp % abreast) * DEPTH;
    float sums[TILES][4][4] = {};
    UNROLL_BY(2) for (int depth = warp / abreast * DEPTH; depth < padded && value < a.values; depth += deep * DEPTH) {
      const int column = depth + lane_quarter() * UNIT;
      Fragment<H> right[4];
      UNROLL for (int j = 0; j < 4; ++j) {
        right[j] = weight_unit<H, VECTORISED>(a.weight, value + spread_column(j), a.values, column, width);
      }
      UNROLL for (int i = 0; i < TILES; ++i) {
        const int row = i * TILE_ROWS + lane_row();
        const Fragment<H> none = as_fragment<H>(Unit{});
        const Fragment<H> low = row < rows ? tile.read_unit(row * stride + column) : none;
        const Fragment<H> high = row + 8 < rows ? tile.read_unit((row + 8) * stride + column) : none;
        multiply(sums[i], low, high, right);
      }
    }
    UNROLL for (int i = 0; i < TILES; ++i) UNROLL for (int half = 0; half < 2; ++half) {
      const Unit unit = sums_of(sums[i], half);
      const int at = (warp * ROWS + i * TILE_ROWS + half * 8 + lane_row()) * APART + lane_quarter() * UNIT;
      UNROLL for (int k = 0; k < UNIT; ++k) parts.write(at + k, unit.at[k]);
    }
    __syncthreads();
    for (int element = threadIdx.x; element < abreast * DEPTH * ROWS; element += THREADS) {
      const int row = element % ROWS, place = element / ROWS;
      const int at = start * DEPTH + place;
      if (row >= rows || first + row >= a.length || at >= a.values) continue;
      float z = load_one(a.bias, 0, at, 0.0f);
      for (int part = place / DEPTH; part < WARPS; part += abreast) z += parts.read((part * ROWS + row) * APART + place % DEPTH);
      store_one(a.out, sample, place_of<false>(a.grid, first + row, at), z);
    }
    __syncthreads();
  }
}

// The rows of a block that fit in shared memory beside the sums, at a width that the compiler does not know.
int rows_held(int64_t width) {
  const int64_t bytes = 4 * (round_up(width, DEPTH) + UNITS_APART<float>);
  const int64_t most = (GENERAL_BYTES - SUMS_BYTES<float>) / bytes;
  STD_TORCH_CHECK(most > 0, "final_layer: a row of ", width, " channels does not fit in shared memory");
  return most < MOST_ROWS<float> ? static_cast<int>(most) : MOST_ROWS<float>;
}

template <typename H, int WIDTH>
constexpr int FINAL_SHARED =
    WIDTH == 0 ? GENERAL_BYTES : SUMS_BYTES<H> + MOST_ROWS<H> * static_cast<int>(sizeof(H)) * (WIDTH + UNITS_APART<H>);

Tensor final_layer(
    Tensor x, OptionalTensor branch, OptionalTensor gate, OptionalTensor branch_bias, OptionalTensor shift, OptionalTensor scale,
    OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor weight, OptionalTensor bias, int64_t grid_h, int64_t grid_w,
    int64_t patch, std::string norm, double eps, ScalarType out_dtype) {
  const VectorTensors given = packed(VectorTensors{gate, branch_bias, shift, scale, norm_weight, norm_bias});
  bias = packed(bias);
  weight = *packed(weight);
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2), values = weight.size(0);
  const Grid grid = grid_of(grid_w, patch, values);
  const Tensor out = empty(x, {batch, grid.channels, grid_h * patch, grid_w * patch}, out_dtype);
  by_row(
      x.scalar_type(), common_dtype(x.scalar_type(), weight, branch), width,
      all_vectorised(x, branch, weight) && is_vectorised(given), [&](auto stream, auto other, auto known, auto vectorised) {
    using T = decltype(stream);
    using U = decltype(other);
    using H = std::conditional_t<std::is_same_v<U, Any>, float, U>;
    const int rows = known > 0 ? MOST_ROWS<H> : rows_held(width);
    const Final<T, U> a{
        .x = tokens<T>("x", x),
        .branch = tokens<U>("branch", branch),
        .weight = matrix<U>("weight", weight),
        .vectors = vectors(given),
        .bias = vector("bias", bias),
        .out = image("out", out),
        .grid = grid,
        .length = length,
        .blocks = ceil_div(length, rows),
        .rows = rows,
        .width = static_cast<int>(width),
        .values = static_cast<int>(values),
        .eps = static_cast<float>(eps),
        .centred = norm != "rmsnorm"};
    launch<final_rows<T, U, known, vectorised>, THREADS, FINAL_SHARED<H, known>>("final_layer", batch * a.blocks, x, a);
  });
  return out;
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("unpatchify_cuda", TORCH_BOX(&ditkernels::unpatchify));
  library.impl("patchify_cuda", TORCH_BOX(&ditkernels::patchify));
  library.impl("patch_embed_cuda", TORCH_BOX(&ditkernels::patch_embed));
  library.impl("final_layer_cuda", TORCH_BOX(&ditkernels::final_layer));
}
