// The backward of `final_layer`. Formulas and names are those at the top of ditkernels/ops/final_layer.py; V = p·p·O, the values of a
// patch. It takes both means of a row from z, the op's own result, and not from x (final_layer.py says why that is the same):
//
//   sample_terms      a warp owns one value of one sample: slope_v and offset_v (B, 2, V), fp32.
//   row_means         a warp owns one row: gathers dz and z from the images, writes both means (B, N, 2), fp32, and dz as rows
//                     (B, N, V), padded with zeros, in the product's dtype.
//   backward_columns  a block owns 64 channels and a group of chunks, a chunk being consecutive tokens of a sample. A warp holds
//                     16 rows and 32 channels: dh = Wᵀ·dz comes out of the product in the layout in which x is read. Reads x (and
//                     the branch), writes dx (and dbranch): 2 passes (4). Adds up P, Q, R, S over each chunk (sums.cuh). For
//                     V <= 128 (32 in fp32 products) it adds up dW and dbias too, (groups, V, D) and (groups, V), fp32.
//   weight_products   dW and dbias where V is larger: a block owns 32 channels and up to 512 values (256 in fp32 products), whose
//                     sums outgrow the registers of backward_columns. Reads x (and the branch) once more.
//
// A lane has eight channels of rows r and r + 8, the layout of the products (common.cuh). Every access to a (B, N, D) tensor is a
// unit of eight channels.
//
// x1 is rounded to x's dtype and h to the weight's. Products take operands in the weight's dtype where all have it and accumulate in
// fp32; otherwise they are fp32 products. Nothing is added atomically; chunks and groups depend on shapes alone: same inputs, same
// bits.
#include "final_layer.cuh"
#include "sums.cuh"
#include "turned.cuh"

namespace ditkernels {
namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Vectors of a chunk
// ---------------------------------------------------------------------------------------------------------------------

// The vectors of a row from shared memory, where `stage` has put them: a block of the backward comes back to them for every row.
constexpr int VECTORS = 6;

template <int WIDTH>
struct Staged {
  Shared<float> from;
  int own;
  __device__ __forceinline__ Unit vector(int i) const { return widened(from.read_unit(i * WIDTH + own)); }
  __device__ __forceinline__ Unit gate() const { return vector(0); }
  __device__ __forceinline__ Unit branch_bias() const { return vector(1); }
  __device__ __forceinline__ Unit norm_weight() const { return vector(2); }
  __device__ __forceinline__ Unit norm_bias() const { return vector(3); }
  __device__ __forceinline__ Unit shift() const { return vector(4); }
  __device__ __forceinline__ Unit factor() const { return vector(5); }
};

// WIDTH channels from `first` on of a sample's vectors, by a block.
template <bool WIDE, int WIDTH>
__device__ __forceinline__ void stage(const Shared<float>& to, const RowVectors& v, int64_t sample, int first, int width) {
  constexpr int UNITS = WIDTH / UNIT;
  const int own = threadIdx.x % UNITS * UNIT, vector = threadIdx.x / UNITS;
  const Direct<WIDE> from{v, sample, first + own, width};
  __syncthreads();
  if (vector < VECTORS && first + own < width) {
    Unit unit;
    if (vector == 0) unit = from.gate();
    if (vector == 1) unit = from.branch_bias();
    if (vector == 2) unit = from.norm_weight();
    if (vector == 3) unit = from.norm_bias();
    if (vector == 4) unit = from.shift();
    if (vector == 5) unit = from.factor();
    to.write_unit(vector * WIDTH + own, narrowed<float>(unit));
  }
  __syncthreads();
}

// Eight channels of (1 + scale) · norm_weight.
template <typename Vectors>
__device__ __forceinline__ Unit slope_of(const Vectors& v) {
  const Unit factor = v.factor();
  Unit slope = v.norm_weight();
#pragma unroll
  for (int i = 0; i < UNIT; ++i) slope.at[i] *= factor.at[i];
  return slope;
}

// ---------------------------------------------------------------------------------------------------------------------
// Means of the rows, for the backward
// ---------------------------------------------------------------------------------------------------------------------

struct SampleTerms {
  Tokens<Any> weight;
  RowVectors vectors;
  Vector bias;
  Tokens<float> terms;
  int64_t batch;
  int width, values;
};

template <bool WIDE>
__global__ void __launch_bounds__(THREADS) sample_terms(const SampleTerms a) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  const int64_t sample = warp / a.values;
  const int value = static_cast<int>(warp % a.values);
  if (sample >= a.batch) return;
  float slope_sum = 0.0f, offset = 0.0f;
  for (int i = 0; own_column(i) < a.width; ++i) {
    const Unit weight = load<WIDE>(a.weight, 0, value, own_column(i), a.width);
    const Direct<WIDE> vectors{a.vectors, sample, own_column(i), a.width};
    const Unit slope = slope_of(vectors), origin = modulated(Unit{}, vectors);
#pragma unroll
    for (int k = 0; k < UNIT; ++k) {
      slope_sum += weight.at[k] * slope.at[k];
      offset += weight.at[k] * origin.at[k];
    }
  }
  slope_sum = warp_sum(slope_sum);
  offset = warp_sum(offset) + load_one(a.bias, 0, value, 0.0f);
  if (threadIdx.x % WARP != 0) return;
  store_one(a.terms, sample, 0, value, slope_sum);
  store_one(a.terms, sample, 1, value, offset);
}

template <typename P>
struct RowMeans {
  Image dout, out;
  Grid grid;
  Tokens<float> terms, means;
  Tokens<P> dz;
  int64_t lines, length;
  int width, values, padded;
};

template <typename P>
__global__ void __launch_bounds__(THREADS) row_means(const RowMeans<P> a) {
  const int64_t line = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (line >= a.lines) return;
  const int64_t sample = line / a.length, token = line % a.length;
  float along_mean = 0.0f, along_normed = 0.0f;
  for (int value = threadIdx.x % WARP; value < a.padded; value += WARP) {
    float dz = 0.0f;
    if (value < a.values)
      placed(a.grid, token, value, [&](int channel, int64_t row, int64_t column) {
        dz = load_one(a.dout, sample, channel, row, column);
        const float z = load_one(a.out, sample, channel, row, column);
        along_mean += dz * load_one(a.terms, sample, 0, value);
        along_normed += dz * (z - load_one(a.terms, sample, 1, value));
      });
    store_one(a.dz, sample, token, value, dz);
  }
  along_mean = warp_sum(along_mean) / a.width;
  along_normed = warp_sum(along_normed) / a.width;
  if (threadIdx.x % WARP != 0) return;
  store_one(a.means, sample, token, 0, along_mean);
  store_one(a.means, sample, token, 1, along_normed);
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// backward_columns: small blocks, several on a multiprocessor, because a thread needs many registers.
constexpr int COLUMN_THREADS = 128;
constexpr int COLUMN_WARPS = COLUMN_THREADS / WARP;
constexpr int COLUMNS = 64;
constexpr int COLUMN_ROWS = COLUMN_WARPS / (COLUMNS / DEPTH) * TILE_ROWS;
constexpr int ROW_BANDS = COLUMN_ROWS / TILE_ROWS;
// weight_products
constexpr int PRODUCT_ROWS = 64;
constexpr int PRODUCT_COLUMNS = 32;
constexpr int64_t GROUPS = 64;
constexpr int64_t ROWS_PER_VALUE = 8;  // so that the partial sums of dW stay below 1/8 of the elements of x

// Values of a patch whose dW backward_columns adds up on its way.
template <typename P>
constexpr int MOST_HELD = sizeof(P) == 2 ? 128 : 32;
template <typename P>
constexpr int PRODUCT_VALUES = sizeof(P) == 2 ? 512 : 256;

template <typename T, typename U, typename P>
struct Backward {
  Tokens<T> x, dx;
  Tokens<U> branch, dbranch;
  Tokens<P> dz, turned;
  RowVectors vectors;
  Tokens<float> mean, rstd, means, partial, weight_partial, bias_partial;
  int64_t length, chunks, chunk_rows, all_chunks, group_chunks;
  ScalarType weight;
  int width, values, padded, value_tiles;
};

// Eight channels of a row, on their way from global memory while a product is being computed.
template <typename T>
using Raw = std::conditional_t<std::is_same_v<T, Any>, Unit, Fragment<T>>;

template <bool WIDE, typename T>
__device__ __forceinline__ Raw<T> fetch(const Tokens<T>& from, int64_t sample, int64_t token, int column, int width) {
  if constexpr (std::is_same_v<T, Any>)
    return load<WIDE>(from, sample, token, column, width);
  else
    return load_words(from, sample, token, column);
}

__device__ __forceinline__ Unit widened(const Unit& unit) { return unit; }

template <typename T, typename U>
struct RawRow {
  Raw<T> x;
  Raw<U> branch;
};

template <bool WIDE, typename T, typename U, typename P>
__device__ __forceinline__ RawRow<T, U> fetch_row(const Backward<T, U, P>& a, int64_t sample, int64_t token, int column) {
  RawRow<T, U> row = {};
  row.x = fetch<WIDE>(a.x, sample, token, column, a.width);
  if (a.branch.data != nullptr) row.branch = fetch<WIDE>(a.branch, sample, token, column, a.width);
  return row;
}

// Eight channels of x̂.
template <typename T, typename U, typename P, typename Vectors>
__device__ __forceinline__ Unit
normed_row(const Backward<T, U, P>& a, const RawRow<T, U>& row, const Vectors& vectors, int64_t sample, int64_t token) {
  Unit unit = widened(row.x);
  if (a.branch.data != nullptr) unit = joined<T>(unit, widened(row.branch), vectors, a.x.dtype);
  const float rstd = load_one(a.rstd, sample, token, 0);
  const float mean = a.mean.data != nullptr ? load_one(a.mean, sample, token, 0) : 0.0f;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = (unit.at[i] - mean) * rstd;
  return unit;
}

// `count` values, from `from` on, of rows of dz as operands in shared memory; zero outside. By a block.
template <int THREADS, int ROWS, int COUNT, typename T, typename U, typename P>
__device__ __forceinline__ void stage_dz(
    const Backward<T, U, P>& a, const Shared<P>& tile, int stride, int64_t sample, int64_t start, int64_t last, int from) {
  for (int unit = threadIdx.x; unit < ROWS * COUNT / UNIT; unit += THREADS) {
    const int row = unit / (COUNT / UNIT), value = unit % (COUNT / UNIT) * UNIT;
    const bool inside = start + row < last && from + value < a.padded;
    tile.write_unit(row * stride + value, inside ? load_words(a.dz, sample, start + row, from + value) : narrowed<P>(Unit{}));
  }
}

// Sums over a lane's rows, by the products' layout.
struct ChunkSums {
  Unit of[SUMS];
};

// dx and dbranch of a unit, and its part of the sums.
template <bool WIDE, typename T, typename U, typename P, typename Vectors>
__device__ __forceinline__ void finish(
    const Backward<T, U, P>& a, const Unit& normed, const Unit& branch, const Unit& dh, const Vectors& vectors, int64_t sample,
    int64_t token, int column, ChunkSums& sums) {
  const Unit slope = slope_of(vectors);
  const float rstd = load_one(a.rstd, sample, token, 0);
  const float along_mean = a.mean.data != nullptr ? load_one(a.means, sample, token, 0) : 0.0f;
  const float along_normed = load_one(a.means, sample, token, 1);
  Unit dx;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) {
    dx.at[i] = rstd * (dh.at[i] * slope.at[i] - along_mean - normed.at[i] * along_normed);
    sums.of[0].at[i] += dh.at[i];
    sums.of[1].at[i] += dh.at[i] * normed.at[i];
    sums.of[2].at[i] += dx.at[i] * branch.at[i];
    sums.of[3].at[i] += dx.at[i];
  }
  store<WIDE>(a.dx, sample, token, column, a.width, dx);
  if (a.dbranch.data == nullptr) return;
  const Unit gate = vectors.gate();
#pragma unroll
  for (int i = 0; i < UNIT; ++i) dx.at[i] *= gate.at[i];
  store<WIDE>(a.dbranch, sample, token, column, a.width, dx);
}

// The sums of a chunk over all of a block's rows, in a fixed order. `scratch` holds ROW_BANDS * SUMS * COLUMNS floats.
__device__ __forceinline__ void store_sums(
    const Tokens<float>& to, ChunkSums& sums, const Shared<float>& scratch, int64_t sample, int64_t chunk, int first_column,
    int own, int width) {
  const int band = threadIdx.x / WARP / 2;
#pragma unroll
  for (int k = 0; k < SUMS; ++k)
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
      float& value = sums.of[k].at[i];
#pragma unroll
      for (int apart = 4; apart < WARP; apart *= 2) value += __shfl_xor_sync(EVERY_LANE, value, apart);
      if (lane_row() == 0) scratch.write((band * SUMS + k) * COLUMNS + own + i, value);
    }
  __syncthreads();
  for (int at = threadIdx.x; at < SUMS * COLUMNS; at += COLUMN_THREADS) {
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < ROW_BANDS; ++other) total += scratch.read(other * SUMS * COLUMNS + at);
    const int column = first_column + at % COLUMNS;
    if (column < width) store_one(to, sample, chunk * SUMS + at / COLUMNS, column, total);
  }
  __syncthreads();
}

// Writes the tiles a warp holds of dW.
template <int TILES, typename T, typename U, typename P>
__device__ __forceinline__ void store_weight_sums(
    const Backward<T, U, P>& a, const float (&sums)[TILES][4], int64_t group, int value, int column) {
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = value + lane_row() + i / 2 * 8, at = column + j * TILE_COLUMNS + lane_quarter() * 2 + i % 2;
      if (row < a.values && at < a.width) store_one(a.weight_partial, group, row, at, sums[j][i]);
    }
}

template <typename P, int HELD>
constexpr int COLUMNS_SHARED =
    (ROW_BANDS * SUMS + VECTORS) * COLUMNS * 4 +
    (HELD == 0 ? 0 : COLUMN_ROWS * static_cast<int>(sizeof(P)) * (COLUMNS + HELD + 2 * ACROSS_APART<P>));

// Blocks on a multiprocessor. Without a number the compiler aims at more than fit and keeps registers in memory for it.
template <typename P, int HELD>
constexpr int COLUMNS_ABREAST = sizeof(P) == 2 && HELD == 0 ? 2 : 1;

template <typename T, typename U, typename P, bool WIDE, int HELD>
__global__ void __launch_bounds__(COLUMN_THREADS, COLUMNS_ABREAST<P, HELD>) backward_columns(const Backward<T, U, P> a) {
  constexpr int ROW_STRIDE = COLUMNS + ACROSS_APART<P>, DZ_STRIDE = HELD + ACROSS_APART<P>;
  // Of dW's bands of 16 values and tiles of 8 channels a warp owns OWN_BANDS by TILES.
  constexpr int BANDS = HELD == 0 ? 1 : HELD / TILE_ROWS, ABREAST = BANDS < COLUMN_WARPS ? BANDS : COLUMN_WARPS;
  constexpr int OWN_BANDS = BANDS / ABREAST, TILES = COLUMNS / TILE_COLUMNS / (COLUMN_WARPS / ABREAST);
  const Shared<float> scratch{0};
  const Shared<float> staged{ROW_BANDS * SUMS * COLUMNS * 4};
  const Shared<P> rows{(ROW_BANDS * SUMS + VECTORS) * COLUMNS * 4};
  const Shared<P> values{rows.first + COLUMN_ROWS * ROW_STRIDE * static_cast<int>(sizeof(P))};
  const int tiles = (a.width + COLUMNS - 1) / COLUMNS, first_column = blockIdx.x % tiles * COLUMNS;
  const int64_t group = blockIdx.x / tiles;
  const int warp = threadIdx.x / WARP, side = warp % 2 * DEPTH, own = side + lane_quarter() * UNIT, column = first_column + own;
  const int row = warp / 2 * TILE_ROWS + lane_row();
  const Staged<COLUMNS> vectors{staged, own};
  const int own_values = warp % ABREAST * OWN_BANDS * TILE_ROWS, own_tiles = warp / ABREAST * TILES * TILE_COLUMNS;

  float weight_sums[OWN_BANDS][TILES][4] = {};
  float bias_sum = 0.0f;
  const int64_t end = (group + 1) * a.group_chunks < a.all_chunks ? (group + 1) * a.group_chunks : a.all_chunks;
  for (int64_t chunk = group * a.group_chunks; chunk < end; ++chunk) {
    const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
    const int64_t last = first + a.chunk_rows < a.length ? first + a.chunk_rows : a.length;
    stage<WIDE, COLUMNS>(staged, a.vectors, sample, first_column, a.width);
    ChunkSums sums = {};
    for (int64_t start = first; start < last; start += COLUMN_ROWS) {
      RawRow<T, U> raw[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (start + row + half * 8 < last && column < a.width)
          raw[half] = fetch_row<WIDE>(a, sample, start + row + half * 8, column);
      float dh[4][4] = {};
#pragma unroll 1
      for (int depth = lane_quarter() * UNIT; depth - lane_quarter() * UNIT < a.padded; depth += DEPTH) {
        const Fragment<P> none = narrowed<P>(Unit{});
        const Fragment<P> low = start + row < last ? load_words(a.dz, sample, start + row, depth) : none;
        const Fragment<P> high = start + row + 8 < last ? load_words(a.dz, sample, start + row + 8, depth) : none;
        Fragment<P> right[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) right[j] = load_words(a.turned, 0, first_column + side + spread_column(j), depth);
        multiply(dh, low, high, right);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = start + row + half * 8;
        const bool inside = token < last && column < a.width;
        Unit h = {};
        if (inside) {
          const Unit normed = normed_row(a, raw[half], vectors, sample, token);
          finish<WIDE>(a, normed, widened(raw[half].branch), sums_of(dh, half), vectors, sample, token, column, sums);
          if constexpr (HELD > 0) h = modulated(normed, vectors);
        }
        if constexpr (HELD > 0) rows.write_unit((row + half * 8) * ROW_STRIDE + own, operand<P, U>(h, a.weight));
      }
      if constexpr (HELD > 0) {
        stage_dz<COLUMN_THREADS, COLUMN_ROWS, HELD>(a, values, DZ_STRIDE, sample, start, last, 0);
        __syncthreads();
#pragma unroll
        for (int depth = 0; depth < COLUMN_ROWS; depth += DEPTH) {
          Fragment<P> right[TILES];
#pragma unroll
          for (int j = 0; j < TILES; ++j)
            right[j] = read_across(rows, depth * ROW_STRIDE + own_tiles + j * TILE_COLUMNS, ROW_STRIDE);
#pragma unroll
          for (int i = 0; i < OWN_BANDS; ++i) {
            const int at = depth * DZ_STRIDE + own_values + i * TILE_ROWS;
            multiply(weight_sums[i], read_across(values, at, DZ_STRIDE), read_across(values, at + 8, DZ_STRIDE), right);
          }
        }
        if (first_column == 0 && threadIdx.x < HELD)
          for (int at = 0; at < COLUMN_ROWS; ++at) bias_sum += static_cast<float>(values.read(at * DZ_STRIDE + threadIdx.x));
        __syncthreads();
      }
    }
    if (a.partial.data != nullptr) store_sums(a.partial, sums, scratch, sample, chunk % a.chunks, first_column, own, a.width);
  }
  if constexpr (HELD > 0) {
#pragma unroll
    for (int i = 0; i < OWN_BANDS; ++i)
      store_weight_sums(a, weight_sums[i], group, own_values + i * TILE_ROWS, first_column + own_tiles);
    if (a.bias_partial.data != nullptr && first_column == 0 && static_cast<int>(threadIdx.x) < a.values && threadIdx.x < HELD)
      store_one(a.bias_partial, 0, group, threadIdx.x, bias_sum);
  }
}

template <typename P>
constexpr int PRODUCT_SHARED = VECTORS * PRODUCT_COLUMNS * 4 + PRODUCT_ROWS * static_cast<int>(sizeof(P)) *
                                                                   (PRODUCT_COLUMNS + PRODUCT_VALUES<P> + 2 * ACROSS_APART<P>);

template <typename T, typename U, typename P, bool WIDE>
__global__ void __launch_bounds__(THREADS) weight_products(const Backward<T, U, P> a) {
  constexpr int VALUES = PRODUCT_VALUES<P>, PER_THREAD = VALUES / THREADS;
  constexpr int ROW_STRIDE = PRODUCT_COLUMNS + ACROSS_APART<P>, DZ_STRIDE = VALUES + ACROSS_APART<P>;
  constexpr int BANDS = VALUES / WARPS / TILE_ROWS, TILES = PRODUCT_COLUMNS / TILE_COLUMNS, UNITS = PRODUCT_COLUMNS / UNIT;
  const Shared<float> staged{0};
  const Shared<P> rows{VECTORS * PRODUCT_COLUMNS * 4};
  const Shared<P> values{rows.first + PRODUCT_ROWS * ROW_STRIDE * static_cast<int>(sizeof(P))};
  const int tiles = (a.width + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, first_column = blockIdx.x % tiles * PRODUCT_COLUMNS;
  const int first_value = blockIdx.x / tiles % a.value_tiles * VALUES;
  const int64_t group = blockIdx.x / (tiles * a.value_tiles);
  const int row = threadIdx.x / UNITS, own = threadIdx.x % UNITS * UNIT, column = first_column + own;
  const int own_values = threadIdx.x / WARP * BANDS * TILE_ROWS;
  const Staged<PRODUCT_COLUMNS> vectors{staged, own};

  float weight_sums[BANDS][TILES][4] = {};
  float bias_sums[PER_THREAD] = {};
  const int64_t end = (group + 1) * a.group_chunks < a.all_chunks ? (group + 1) * a.group_chunks : a.all_chunks;
  for (int64_t chunk = group * a.group_chunks; chunk < end; ++chunk) {
    const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
    const int64_t last = first + a.chunk_rows < a.length ? first + a.chunk_rows : a.length;
    stage<WIDE, PRODUCT_COLUMNS>(staged, a.vectors, sample, first_column, a.width);
    for (int64_t start = first; start < last; start += PRODUCT_ROWS) {
      Unit h = {};
      if (start + row < last && column < a.width) {
        const RawRow<T, U> raw = fetch_row<WIDE>(a, sample, start + row, column);
        h = modulated(normed_row(a, raw, vectors, sample, start + row), vectors);
      }
      rows.write_unit(row * ROW_STRIDE + own, operand<P, U>(h, a.weight));
      stage_dz<THREADS, PRODUCT_ROWS, VALUES>(a, values, DZ_STRIDE, sample, start, last, first_value);
      __syncthreads();
#pragma unroll
      for (int depth = 0; depth < PRODUCT_ROWS; depth += DEPTH) {
        Fragment<P> right[TILES];
#pragma unroll
        for (int j = 0; j < TILES; ++j) right[j] = read_across(rows, depth * ROW_STRIDE + j * TILE_COLUMNS, ROW_STRIDE);
#pragma unroll
        for (int i = 0; i < BANDS; ++i) {
          const int at = depth * DZ_STRIDE + own_values + i * TILE_ROWS;
          multiply(weight_sums[i], read_across(values, at, DZ_STRIDE), read_across(values, at + 8, DZ_STRIDE), right);
        }
      }
      if (first_column == 0)
#pragma unroll
        for (int i = 0; i < PER_THREAD; ++i)
          for (int at = 0; at < PRODUCT_ROWS; ++at)
            bias_sums[i] += static_cast<float>(values.read(at * DZ_STRIDE + i * THREADS + threadIdx.x));
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < BANDS; ++i)
    store_weight_sums(a, weight_sums[i], group, first_value + own_values + i * TILE_ROWS, first_column);
  if (a.bias_partial.data == nullptr || first_column != 0) return;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int value = first_value + i * THREADS + threadIdx.x;
    if (value < a.values) store_one(a.bias_partial, 0, group, value, bias_sums[i]);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

// Chunks of a sample, rows of a chunk, groups, chunks of a group: from shapes alone.
struct Chunks {
  int64_t chunks, rows, groups, of_group;
};

Chunks chunks_of(int64_t batch, int64_t length, int64_t values) {
  const int64_t wanted = ceil_div(GROUPS, batch > 0 ? batch : 1), most = ceil_div(length, PRODUCT_ROWS);
  int64_t chunks = wanted < most ? wanted : most;
  if (chunks < 1) chunks = 1;
  const int64_t rows = round_up(ceil_div(length > 0 ? length : 1, chunks), PRODUCT_ROWS);
  chunks = ceil_div(length, rows);
  int64_t of_group = ceil_div(batch * chunks, GROUPS);
  const int64_t shortest = ceil_div(ROWS_PER_VALUE * values, rows);
  if (of_group < shortest) of_group = shortest;
  return {chunks, rows, ceil_div(batch * chunks, of_group), of_group};
}

// slope_v and offset_v of every sample, (B, 2, V).
Tensor terms_of(const char* op, const Inputs& t) {
  const int64_t batch = t.x.size(0), width = t.x.size(2), values = t.weight.size(0);
  const Tensor terms = empty(t.x, {batch, 2, values}, ScalarType::Float);
  const SampleTerms a{matrix<Any>("weight", t.weight), vectors_of(t), vector("bias", t.bias),
                      tokens<float>("terms", terms),   batch,         static_cast<int>(width),
                      static_cast<int>(values)};
  const bool wide = all_wide(OptionalTensor(t.weight), t.shift, t.scale, t.norm_weight, t.norm_bias);
  by_truth(wide, [&](auto reach) { launch<sample_terms<reach>, THREADS>(op, ceil_div(batch * values, WARPS), t.x, a); });
  return terms;
}

struct Outputs {
  Tensor dx, means, dz, turned, rstd;
  OptionalTensor dbranch, mean, partial, weight_partial, bias_partial;
};

template <typename T, typename U, typename P, bool WIDE>
void launch_backward(const char* op, const Inputs& t, const Outputs& o, const Chunks& chunks) {
  const int64_t width = t.x.size(2), values = t.weight.size(0);
  Backward<T, U, P> a;
  a.x = tokens<T>("x", t.x);
  a.dx = tokens<T>("dx", o.dx);
  a.branch = tokens<U>("branch", t.branch);
  a.dbranch = tokens<U>("dbranch", o.dbranch);
  a.dz = tokens<P>("dz", o.dz);
  a.turned = matrix<P>("turned", o.turned);
  a.vectors = vectors_of(t);
  a.mean = tokens<float>("mean", o.mean);
  a.rstd = tokens<float>("rstd", o.rstd);
  a.means = tokens<float>("means", o.means);
  a.partial = tokens<float>("partial", o.partial);
  a.weight_partial = tokens<float>("weight_partial", o.weight_partial);
  a.bias_partial = matrix<float>("bias_partial", o.bias_partial);
  a.length = t.x.size(1);
  a.chunks = chunks.chunks;
  a.chunk_rows = chunks.rows;
  a.all_chunks = t.x.size(0) * chunks.chunks;
  a.group_chunks = chunks.of_group;
  a.weight = t.weight.scalar_type();
  a.width = static_cast<int>(width);
  a.values = static_cast<int>(values);
  a.padded = static_cast<int>(o.dz.size(2));
  a.value_tiles = static_cast<int>(ceil_div(values, PRODUCT_VALUES<P>));
  const int64_t blocks = chunks.groups * ceil_div(width, COLUMNS);
  const auto launch_columns = [&](auto held) {
    launch<backward_columns<T, U, P, WIDE, held>, COLUMN_THREADS, COLUMNS_SHARED<P, held>>(op, blocks, t.x, a);
  };
  if (values <= 32) return launch_columns(Number<32>{});
  if (values <= MOST_HELD<P>) return launch_columns(Number<MOST_HELD<P>>{});
  launch_columns(Number<0>{});
  launch<weight_products<T, U, P, WIDE>, THREADS, PRODUCT_SHARED<P>>(
      op, chunks.groups * ceil_div(width, PRODUCT_COLUMNS) * a.value_tiles, t.x, a);
}

// mean_d(dx̂) and mean_d(dx̂ · x̂) of every row (B, N, 2), and dz as rows (B, N, V), padded.
template <typename P>
std::tuple<Tensor, Tensor> means_of(
    const char* op, const Tensor& dout, const Tensor& out, const Inputs& t, const Grid& grid, ScalarType product) {
  const int64_t batch = t.x.size(0), length = t.x.size(1), values = t.weight.size(0);
  const Tensor terms = terms_of(op, t), means = empty(t.x, {batch, length, 2}, ScalarType::Float);
  const Tensor dz = empty(t.x, {batch, length, round_up(values, DEPTH)}, product);
  RowMeans<P> a;
  a.dout = image("dout", dout);
  a.out = image("out", out);
  a.grid = grid;
  a.terms = tokens<float>("terms", terms);
  a.means = tokens<float>("means", means);
  a.dz = tokens<P>("dz", dz);
  a.lines = batch * length;
  a.length = length;
  a.width = static_cast<int>(t.x.size(2));
  a.values = static_cast<int>(values);
  a.padded = static_cast<int>(dz.size(2));
  launch<row_means<P>, THREADS>(op, ceil_div(a.lines, WARPS), t.x, a);
  return {means, dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> final_layer_backward(
    Tensor dout, Tensor out, Tensor x, OptionalTensor branch, OptionalTensor gate, OptionalTensor branch_bias,
    OptionalTensor shift, OptionalTensor scale, OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor weight,
    OptionalTensor bias, Tensor mean, Tensor rstd, int64_t, int64_t grid_w, int64_t patch, std::string norm) {
  const char* op = "final_layer_backward";
  Inputs t{x, branch, gate, branch_bias, shift, scale, norm_weight, norm_bias, weight, bias};
  pack(t);
  const int64_t batch = x.size(0), width = x.size(2), values = weight.size(0);
  const Chunks chunks = chunks_of(batch, x.size(1), values);
  const OptionalTensor gated = gate.has_value() ? branch : std::nullopt;
  const Tensor dx = empty_like(x, x), dbranch = empty_like(gated, x);
  const Tensor dgate = empty_like(gate, x), dbranch_bias = empty_like(branch_bias, x), dshift = empty_like(shift, x),
               dscale = empty_like(scale, x), dnorm_weight = empty_like(norm_weight, x), dnorm_bias = empty_like(norm_bias, x);
  const bool summed = gate.has_value() || branch_bias.has_value() || shift.has_value() || scale.has_value() ||
                      norm_weight.has_value() || norm_bias.has_value();
  OptionalTensor partial, bias_partial;
  if (summed) partial = empty(x, {batch, chunks.chunks * SUMS, width}, ScalarType::Float);
  if (bias.has_value()) bias_partial = empty(x, {chunks.groups, values}, ScalarType::Float);
  const Tensor weight_partial = empty(x, {chunks.groups, values, width}, ScalarType::Float);
  const ScalarType common = dout.scalar_type() == weight.scalar_type() ? common_dtype(t) : MIXED;
  by_layout(x.scalar_type(), common, rows_are_wide(t), [&](auto stream, auto other, auto reach) {
    using U = decltype(other);
    using P = std::conditional_t<std::is_same_v<U, Any>, float, U>;
    const Tensor turned = turn<P>(op, matrix<Any>("weight", t.weight), width, values, COLUMNS, x);
    auto [means, dz] = means_of<P>(op, dout, out, t, grid_of(grid_w, patch, values), turned.scalar_type());
    const OptionalTensor centre = norm == "rmsnorm" ? std::nullopt : OptionalTensor(mean);
    launch_backward<decltype(stream), U, P, reach>(
        op, t, {dx, means, dz, turned, rstd, if_given(gated, dbranch), centre, partial, weight_partial, bias_partial}, chunks);
  });
  if (summed)
    add_sums(
        op, *partial,
        {t.gate, t.scale, t.branch_bias, t.norm_weight, t.norm_bias, if_given(gate, dgate), if_given(shift, dshift),
         if_given(scale, dscale), if_given(branch_bias, dbranch_bias), if_given(norm_weight, dnorm_weight),
         if_given(norm_bias, dnorm_bias)},
        true, true, x);
  const Tensor dweight = sum_groups(op, "dweight", torch::stable::flatten(weight_partial, 1, -1), weight);
  const Tensor dbias = bias.has_value() ? sum_groups(op, "dbias", *bias_partial, *bias) : nothing(x);
  return {dx, dbranch, dgate, dbranch_bias, dshift, dscale, dnorm_weight, dnorm_bias, dweight, dbias};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("final_layer_backward_cuda", TORCH_BOX(&ditkernels::final_layer_backward));
}
