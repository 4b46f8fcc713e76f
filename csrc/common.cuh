// What the CUDA kernels of all ops share: access to memory, products, reductions, dispatch, launch.
//
// Every access to a tensor goes through the accessors below, every access to shared memory through Shared, so that the host
// emulation of the tests (tests/emulation) can check and count them. Kernels hold channels in units of eight: one 16-byte access
// of bf16 or fp16, two of fp32. Arithmetic is fp32. Offsets are 64-bit.
//
// Dtypes: the pairs that models use are known to the compiler; `Any` stands for a dtype known at run time, read by the same code.
//
// Operators are registered through torch's stable ABI; nothing here uses Python's API, so that one library serves every
// torch from 2.10 and every Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef DITKERNELS_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#define DITKERNELS_DEVICE CUDA
// Weak, so that the library also loads beside a torch that is built without CUDA.
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int device, void** stream);
#endif

namespace ditkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int UNIT = 8;
constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors as kernels see them
// ---------------------------------------------------------------------------------------------------------------------

struct Any {};

// A (B, N, D) tensor at any strides, in elements; data is null where the tensor is absent.
template <typename T>
struct Tokens {
  std::conditional_t<std::is_same_v<T, Any>, void, T>* data = nullptr;
  int64_t sample = 0, token = 0, channel = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

// A (B, D) or (D,) vector, channels side by side.
struct Vector {
  void* data = nullptr;
  int64_t sample = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

// A (B, C, H, W) tensor at any strides.
struct Image {
  void* data = nullptr;
  int64_t sample = 0, channel = 0, row = 0, column = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

struct Unit {
  float at[UNIT];
};

struct alignas(16) Word {
  uint32_t part[4];
};

// Eight values of a product's operand.
template <typename T>
struct Fragment {
  Word words[UNIT * sizeof(T) / sizeof(Word)];
};

// Global memory, 16 bytes at once. The store is written out because nvcc splits some that it can see through; no kernel reads what
// it has stored, so it need not be ordered.
#ifndef DITKERNELS_EMULATION
__device__ __forceinline__ void touch(int, const void*, int, int, bool) {}

__device__ __forceinline__ Word read_word(const Word* from) {
  const uint4 read = *reinterpret_cast<const uint4*>(from);
  return {{read.x, read.y, read.z, read.w}};
}

__device__ __forceinline__ void write_word(Word* to, const Word& word) {
  asm volatile(
      "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.part[0]), "r"(word.part[1]), "r"(word.part[2]),
      "r"(word.part[3]));
}
#else
using emulation::touch;

inline Word read_word(const Word* from) { return *from; }
inline void write_word(Word* to, const Word& word) { *to = word; }
#endif

template <typename T>
__device__ __forceinline__ Tokens<T> typed(const Tokens<Any>& from) {
  return {static_cast<T*>(from.data), from.sample, from.token, from.channel, from.dtype, from.id};
}

// Calls body with a value of the dtype.
template <typename Body>
__device__ __forceinline__ auto with_dtype(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  return body(float{});
}

// The value as a tensor of T would hold it; `dtype` counts only where T is Any.
template <typename T>
__device__ __forceinline__ float rounded(float value, ScalarType dtype) {
  if constexpr (std::is_same_v<T, Any>)
    return with_dtype(dtype, [value](auto t) { return static_cast<float>(static_cast<decltype(t)>(value)); });
  else
    return static_cast<float>(static_cast<T>(value));
}

template <typename T>
__device__ __forceinline__ Unit widened(const Fragment<T>& fragment) {
  const T* values = reinterpret_cast<const T*>(fragment.words);
  Unit unit;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = static_cast<float>(values[i]);
  return unit;
}

template <typename T>
__device__ __forceinline__ Fragment<T> narrowed(const Unit& unit) {
  Fragment<T> fragment;
  T* values = reinterpret_cast<T*>(fragment.words);
#pragma unroll
  for (int i = 0; i < UNIT; ++i) values[i] = static_cast<T>(unit.at[i]);
  return fragment;
}

// Eight channels from `column` on by 16-byte accesses, as they are stored.
template <typename T>
__device__ __forceinline__ Fragment<T> load_words(const Tokens<T>& from, int64_t sample, int64_t token, int column) {
  const T* row = from.data + sample * from.sample + token * from.token;
  Fragment<T> fragment;
#pragma unroll
  for (int i = 0; i < static_cast<int>(UNIT * sizeof(T) / sizeof(Word)); ++i) {
    const Word* word = reinterpret_cast<const Word*>(row + column) + i;
    touch(from.id, word, sizeof(Word), sizeof(T), false);
    fragment.words[i] = read_word(word);
  }
  return fragment;
}

template <typename T>
__device__ __forceinline__ float load_one(const Tokens<T>& from, int64_t sample, int64_t token, int64_t column) {
  if constexpr (std::is_same_v<T, Any>) {
    return with_dtype(from.dtype, [&](auto t) { return load_one(typed<decltype(t)>(from), sample, token, column); });
  } else {
    const T* value = from.data + sample * from.sample + token * from.token + column * from.channel;
    touch(from.id, value, sizeof(T), sizeof(T), false);
    return static_cast<float>(*value);
  }
}

template <typename T>
__device__ __forceinline__ void store_one(const Tokens<T>& to, int64_t sample, int64_t token, int64_t column, float value) {
  if constexpr (std::is_same_v<T, Any>) {
    with_dtype(to.dtype, [&](auto t) { store_one(typed<decltype(t)>(to), sample, token, column, value); });
  } else {
    T* place = to.data + sample * to.sample + token * to.token + column * to.channel;
    touch(to.id, place, sizeof(T), sizeof(T), true);
    *place = static_cast<T>(value);
  }
}

// A stride that the compiler takes for another one each time, so that it does not keep all its multiples in registers.
template <typename T>
__device__ __forceinline__ Tokens<T> with_stride_anew(Tokens<T> tensor) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(tensor.channel));
#endif
  return tensor;
}

// Eight channels from `column` on. WIDE: by 16-byte accesses; the caller has seen to alignment and that the unit lies in the row.
// Otherwise one by one, zero beyond `width`.
template <bool WIDE, typename T>
__device__ __forceinline__ Unit load(const Tokens<T>& from, int64_t sample, int64_t token, int column, int width) {
  if constexpr (std::is_same_v<T, Any>) {
    return with_dtype(from.dtype, [&](auto t) { return load<WIDE>(typed<decltype(t)>(from), sample, token, column, width); });
  } else if constexpr (WIDE) {
    return widened(load_words(from, sample, token, column));
  } else {
    Unit unit;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) unit.at[i] = column + i < width ? load_one(from, sample, token, column + i) : 0.0f;
    return unit;
  }
}

template <bool WIDE, typename T>
__device__ __forceinline__ void store(
    const Tokens<T>& to, int64_t sample, int64_t token, int column, int width, const Unit& unit) {
  if constexpr (std::is_same_v<T, Any>) {
    with_dtype(to.dtype, [&](auto t) { store<WIDE>(typed<decltype(t)>(to), sample, token, column, width, unit); });
  } else if constexpr (WIDE) {
    T* row = to.data + sample * to.sample + token * to.token;
    const Fragment<T> fragment = narrowed<T>(unit);
#pragma unroll
    for (int i = 0; i < static_cast<int>(UNIT * sizeof(T) / sizeof(Word)); ++i) {
      Word* word = reinterpret_cast<Word*>(row + column) + i;
      touch(to.id, word, sizeof(Word), sizeof(T), true);
      write_word(word, fragment.words[i]);
    }
  } else {
    const Tokens<T> own = with_stride_anew(to);
#pragma unroll
    for (int i = 0; i < UNIT; ++i)
      if (column + i < width) store_one(own, sample, token, column + i, unit.at[i]);
  }
}

__device__ __forceinline__ Tokens<Any> as_tokens(const Vector& vector) {
  return {vector.data, vector.sample, 0, 1, vector.dtype, vector.id};
}

// Eight channels of an optional vector; `absent` in each where it is not there.
template <bool WIDE>
__device__ __forceinline__ Unit load(const Vector& from, int64_t sample, int column, int width, float absent) {
  if (from.data != nullptr) return load<WIDE>(as_tokens(from), sample, 0, column, width);
  Unit unit;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = absent;
  return unit;
}

__device__ __forceinline__ float load_one(const Vector& from, int64_t sample, int64_t column, float absent) {
  return from.data == nullptr ? absent : load_one(as_tokens(from), sample, 0, column);
}

__device__ __forceinline__ void store_one(const Vector& to, int64_t sample, int64_t column, float value) {
  if (to.data != nullptr) store_one(as_tokens(to), sample, 0, column, value);
}

// A row of an image as a row of tokens.
__device__ __forceinline__ Tokens<Any> row_of(const Image& image, int channel, int64_t row) {
  const int64_t bytes = image.dtype == ScalarType::Float ? sizeof(float) : sizeof(Half);
  char* data = static_cast<char*>(image.data) + (channel * image.channel + row * image.row) * bytes;
  return {data, image.sample, 0, image.column, image.dtype, image.id};
}

__device__ __forceinline__ float load_one(const Image& from, int64_t sample, int channel, int64_t row, int64_t column) {
  return load_one(row_of(from, channel, row), sample, 0, column);
}

__device__ __forceinline__ void store_one(
    const Image& to, int64_t sample, int channel, int64_t row, int64_t column, float value) {
  store_one(row_of(to, channel, row), sample, 0, column, value);
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory: a launch says how many bytes it needs, a kernel cuts them up
// ---------------------------------------------------------------------------------------------------------------------

#ifndef DITKERNELS_EMULATION
__device__ __forceinline__ char* shared_at(int offset, int, bool) {
  extern __shared__ __align__(16) char arena[];
  return arena + offset;
}
#else
using emulation::shared_at;
#endif

// Values of type T from byte `first` on.
template <typename T>
struct Shared {
  int first;

  __device__ __forceinline__ T read(int at) const {
    return *reinterpret_cast<const T*>(shared_at(first + at * static_cast<int>(sizeof(T)), sizeof(T), false));
  }
  __device__ __forceinline__ void write(int at, T value) const {
    *reinterpret_cast<T*>(shared_at(first + at * static_cast<int>(sizeof(T)), sizeof(T), true)) = value;
  }
  // Eight values side by side; `at` is a multiple of eight.
  __device__ __forceinline__ Fragment<T> read_unit(int at) const {
    Fragment<T> fragment;
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int offset = first + at * static_cast<int>(sizeof(T)) + i * static_cast<int>(sizeof(Word));
      fragment.words[i] = *reinterpret_cast<const Word*>(shared_at(offset, sizeof(Word), false));
    }
    return fragment;
  }
  __device__ __forceinline__ void write_unit(int at, const Fragment<T>& fragment) const {
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int offset = first + at * static_cast<int>(sizeof(T)) + i * static_cast<int>(sizeof(Word));
      *reinterpret_cast<Word*>(shared_at(offset, sizeof(Word), true)) = fragment.words[i];
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Products of a warp: tiles of 16 rows by 8 columns, summed over 32 at a time
// ---------------------------------------------------------------------------------------------------------------------
//
// With r = lane / 4 and q = lane % 4, a lane holds of the left operand rows r (`low`) and r + 8 (`high`), of the right operand
// column r, eight of the 32 summands each; of the sum, in this order, (r, 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1).
// Which eight does not matter as long as both operands agree:
//   units    summands 8q to 8q + 7, which lie side by side in memory: one 16-byte access.
//   across   summands 8i + 2q and 8i + 2q + 1, i = 0 .. 3, one row of shared memory apart: `read_across` turns them round.
//
// bf16 and fp16 are multiplied on the tensor cores, fp32 by shuffles and fused multiply-adds, never as TF32. The tests' emulation
// runs the second on all three.

constexpr int DEPTH = 32;
constexpr int TILE_ROWS = 16;
constexpr int TILE_COLUMNS = 8;

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int lane_quarter() { return threadIdx.x % 4; }

// Four tiles side by side give a lane eight columns side by side, 8q to 8q + 7, if column r of tile j is this one.
__device__ __forceinline__ int spread_column(int tile) { return lane_row() / 2 * UNIT + tile * 2 + lane_row() % 2; }

// Rows r (half = 0) or r + 8 (half = 1) of four such tiles.
__device__ __forceinline__ Unit sums_of(const float (&sums)[4][4], int half) {
  Unit unit;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) unit.at[i] = half == 0 ? sums[i / 2][i % 2] : sums[i / 2][2 + i % 2];
  return unit;
}

__device__ __forceinline__ Unit shuffled(const Unit& unit, int lane) {
#ifdef DITKERNELS_EMULATION
  return __shfl_sync(EVERY_LANE, unit, lane);
#else
  Unit taken;
#pragma unroll
  for (int i = 0; i < UNIT; ++i) taken.at[i] = __shfl_sync(EVERY_LANE, unit.at[i], lane);
  return taken;
#endif
}

// sums[j] += left · right[j] for each tile j.
template <typename T, int TILES>
__device__ __forceinline__ void multiply_by_shuffles(
    float (&sums)[TILES][4], const Fragment<T>& low, const Fragment<T>& high, const Fragment<T> (&right)[TILES]) {
#pragma unroll 1
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Unit above = shuffled(widened(low), lane_row() * 4 + quarter);
    const Unit below = shuffled(widened(high), lane_row() * 4 + quarter);
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const Unit even = shuffled(widened(right[j]), lane_quarter() * 8 + quarter);
      const Unit odd = shuffled(widened(right[j]), lane_quarter() * 8 + 4 + quarter);
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        sums[j][0] += above.at[i] * even.at[i];
        sums[j][1] += above.at[i] * odd.at[i];
        sums[j][2] += below.at[i] * even.at[i];
        sums[j][3] += below.at[i] * odd.at[i];
      }
    }
  }
}

#ifndef DITKERNELS_EMULATION
// One half of a tile's 32 summands: the first or the second four of a lane's eight.
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

// sums[j] += left · right[j] for each tile j, by all lanes of a warp together.
template <typename T, int TILES>
__device__ __forceinline__ void multiply(
    float (&sums)[TILES][4], const Fragment<T>& low, const Fragment<T>& high, const Fragment<T> (&right)[TILES]) {
#ifndef DITKERNELS_EMULATION
  if constexpr (!std::is_same_v<T, float>) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      multiply_on_tensor_cores(sums[j], low, high, right[j], 0);
      multiply_on_tensor_cores(sums[j], low, high, right[j], 1);
    }
  } else
#endif
    multiply_by_shuffles(sums, low, high, right);
}

// Element c + r of each of 32 consecutive rows of shared memory, the first of which begins at `at - c`: a lane's eight summands
// `across`. Rows lie `stride` values apart; `at` and `stride` are multiples of eight.
template <typename T>
__device__ __forceinline__ Fragment<T> read_across(const Shared<T>& from, int at, int stride) {
#ifndef DITKERNELS_EMULATION
  if constexpr (!std::is_same_v<T, float>) {
    Fragment<T> fragment;
    uint32_t (&part)[4] = fragment.words[0].part;
    const int row = threadIdx.x % WARP;
    const char* address = shared_at(from.first + (at + row * stride) * static_cast<int>(sizeof(T)), sizeof(Word), false);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address)))
                 : "memory");
    return fragment;
  } else
#else
  emulation::require_aligned(at % UNIT == 0 && stride % UNIT == 0);
#endif
  {
    Unit unit;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
      const int row = i / 2 * UNIT + lane_quarter() * 2 + i % 2;
      unit.at[i] = static_cast<float>(from.read(at + row * stride + lane_row()));
    }
    return narrowed<T>(unit);
  }
}

// What a row of shared memory is longer than its values, so that a warp's accesses fall into different banks.
template <typename T>
constexpr int UNITS_APART = sizeof(T) == 2 ? 32 : 4;
template <typename T>
constexpr int ACROSS_APART = 8;

// ---------------------------------------------------------------------------------------------------------------------
// Reductions
// ---------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int apart = WARP / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(EVERY_LANE, value, apart);
  return value;
}

// Replaces each of COUNT values by its sum over the block, in an order fixed by the block's size. `scratch` holds
// 2 * COUNT * WARP floats; `phase` alternates between its halves, which saves the barrier before it is written again.
template <int COUNT>
__device__ __forceinline__ void block_sums(float (&values)[COUNT], const Shared<float>& scratch, int& phase) {
  const int warps = blockDim.x / WARP;
  const int base = phase * COUNT * WARP;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % WARP == 0) scratch.write(base + i * WARP + threadIdx.x / WARP, values[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    values[i] = 0.0f;
    for (int warp = 0; warp < warps; ++warp) values[i] += scratch.read(base + i * WARP + warp);
  }
  phase ^= 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side: tensors
// ---------------------------------------------------------------------------------------------------------------------

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor nothing(const Tensor& like) { return empty(like, {0}, like.scalar_type()); }

// A packed tensor of the same shape and dtype, (0,) where there is none.
inline Tensor empty_like(const OptionalTensor& tensor, const Tensor& like) {
  if (!tensor.has_value()) return nothing(like);
  return empty(like, std::vector<int64_t>(tensor->sizes().begin(), tensor->sizes().end()), tensor->scalar_type());
}

inline OptionalTensor if_given(const OptionalTensor& tensor, const Tensor& gradient) {
  return tensor.has_value() ? OptionalTensor(gradient) : std::nullopt;
}

// The emulation's number of a tensor, one more at every call; `index` where the tensor is one of a list.
inline int describe(const char* name, const Tensor& tensor, int64_t index = -1) {
#ifdef DITKERNELS_EMULATION
  const std::string full = index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
  int64_t last = tensor.numel() > 0 ? 0 : -1;
  for (int64_t i = 0; i < tensor.dim() && last >= 0; ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return emulation::describe(full.c_str(), tensor.data_ptr(), (last + 1) * tensor.element_size());
#else
  (void)name, (void)tensor, (void)index;
  return -1;
#endif
}

// A (B, N, D) tensor, or a (B, N) one of one channel.
template <typename T>
Tokens<T> tokens(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  Tokens<T> made;
  made.data = static_cast<decltype(made.data)>(tensor->data_ptr());
  made.sample = tensor->stride(0);
  made.token = tensor->stride(1);
  made.channel = tensor->dim() == 3 ? tensor->stride(2) : 1;
  made.dtype = tensor->scalar_type();
  made.id = describe(name, *tensor);
  return made;
}

// The last two axes of a tensor: rows and columns of a matrix as the tokens and channels of one sample.
template <typename T>
Tokens<T> matrix(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  Tokens<T> made;
  made.data = static_cast<decltype(made.data)>(tensor->data_ptr());
  made.token = tensor->stride(tensor->dim() - 2);
  made.channel = tensor->stride(tensor->dim() - 1);
  made.dtype = tensor->scalar_type();
  made.id = describe(name, *tensor);
  return made;
}

// The tensor with its last axis side by side; only one that is strided there is copied.
inline OptionalTensor packed(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->stride(tensor->dim() - 1) == 1) return tensor;
  return torch::stable::contiguous(*tensor);
}

inline Vector vector(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor->data_ptr(), tensor->dim() == 2 ? tensor->stride(0) : 0, tensor->scalar_type(), describe(name, *tensor)};
}

inline Image image(const char* name, const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0),     tensor.stride(1),      tensor.stride(2),
          tensor.stride(3),  tensor.scalar_type(), describe(name, tensor)};
}

// Whether 16-byte accesses reach every unit of every row.
inline bool is_wide(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return true;
  const int64_t bytes = tensor->element_size(), last = tensor->dim() - 1;
  if (tensor->size(last) % UNIT != 0 || reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 != 0) return false;
  if (tensor->size(last) > 0 && tensor->stride(last) != 1) return false;
  for (int64_t i = 0; i < last; ++i)
    if (tensor->size(i) > 1 && tensor->stride(i) * bytes % 16 != 0) return false;
  return true;
}

template <typename... Tensors>
bool all_wide(const Tensors&... tensors) {
  return (is_wide(tensors) && ...);
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side: dispatch
// ---------------------------------------------------------------------------------------------------------------------

// The pairs of a stream's dtype and a branch's that models use: one for both, or an fp32 stream. Any other pair is Any.
template <typename Body>
void by_dtypes(ScalarType stream, ScalarType branch, Body body) {
  constexpr ScalarType F = ScalarType::Float, B = ScalarType::BFloat16, H = ScalarType::Half;
  if (stream == F && branch == F) return body(float{}, float{});
  if (stream == B && branch == B) return body(BFloat16{}, BFloat16{});
  if (stream == H && branch == H) return body(Half{}, Half{});
  if (stream == F && branch == B) return body(float{}, BFloat16{});
  if (stream == F && branch == H) return body(float{}, Half{});
  body(Any{}, Any{});
}

// Stands for two dtypes where by_dtypes asks for one.
constexpr ScalarType MIXED = ScalarType::Undefined;

inline bool same_dtype(const OptionalTensor& tensor, const Tensor& other) {
  return !tensor.has_value() || tensor->scalar_type() == other.scalar_type();
}

template <typename Body>
void by_dtype(ScalarType dtype, Body body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  body(float{});
}

template <int VALUE>
using Number = std::integral_constant<int, VALUE>;

// The paper's widths are known to the compiler; any other is 0.
template <typename Body>
void by_width(int64_t width, Body body) {
  if (width == 384) return body(Number<384>{});
  if (width == 768) return body(Number<768>{});
  if (width == 1024) return body(Number<1024>{});
  if (width == 1152) return body(Number<1152>{});
  body(Number<0>{});
}

template <typename Body>
void by_truth(bool value, Body body) {
  return value ? body(std::true_type{}) : body(std::false_type{});
}

// body(stream's type, branch's type, whether accesses are wide): types known to the compiler only where they are.
template <typename Body>
void by_layout(ScalarType stream, ScalarType branch, bool wide, Body body) {
  if (!wide) return body(Any{}, Any{}, std::false_type{});
  by_dtypes(stream, branch, [&](auto t, auto u) { body(t, u, std::true_type{}); });
}

// body(stream's type, branch's type, width, whether accesses are wide): a known width goes with known types and wide accesses.
template <typename Body>
void by_row(ScalarType stream, ScalarType branch, int64_t width, bool wide, Body body) {
  by_layout(stream, branch, wide, [&](auto t, auto u, auto reach) {
    if constexpr (std::is_same_v<decltype(t), Any>)
      body(t, u, Number<0>{}, reach);
    else
      by_width(width, [&](auto known) {
        if constexpr (known == 0)
          body(Any{}, Any{}, known, reach);
        else
          body(t, u, known, reach);
      });
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Host side: launch
// ---------------------------------------------------------------------------------------------------------------------

// Bytes of shared memory that a launch may use without asking for them.
constexpr int SHARED_UNASKED = 48 * 1024;

// Every kernel of the library, with the largest block and the most shared memory that it is launched with.
struct Kernel {
  std::string name;
  const void* function;
  int threads, shared;
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

// The kernel's name and template arguments, from what the compiler calls this function.
template <auto KERNEL>
std::string kernel_name() {
  std::string name = __PRETTY_FUNCTION__;
  name = name.substr(name.find("KERNEL = ") + 9);
  name = name.substr(0, name.find_first_of(";]"));
  for (const char* space :
       {"ditkernels::", "{anonymous}::", "(anonymous namespace)::", "_NV_ANON_NAMESPACE::", "<unnamed>::", "c10::",
        "torch::headeronly::"})
    for (size_t at = name.find(space); at != std::string::npos; at = name.find(space)) name.erase(at, std::string(space).size());
  return name.substr(name.find_first_not_of("&("));
}

template <auto KERNEL, int THREADS, int SHARED>
struct Registered {
  static const bool done;
};

template <auto KERNEL, int THREADS, int SHARED>
const bool Registered<KERNEL, THREADS, SHARED>::done =
    (kernels().push_back({kernel_name<KERNEL>(), reinterpret_cast<const void*>(KERNEL), THREADS, SHARED}), true);

// THREADS and SHARED bytes are the most the kernel is launched with, `threads` and `shared` what it gets now.
template <auto KERNEL, int THREADS, int SHARED = 0, typename Arguments>
void launch(
    const char* op, int64_t blocks, const Tensor& like, const Arguments& arguments, int threads = THREADS, int shared = SHARED) {
  (void)Registered<KERNEL, THREADS, SHARED>::done;
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": ", blocks, " blocks; a grid holds fewer than 2^31");
#ifdef DITKERNELS_EMULATION
  (void)like;
  static const std::string name = kernel_name<KERNEL>();
  emulation::launch(name, blocks, threads, shared, [&] { KERNEL(arguments); });
#else
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0, op,
      ": torch gave no CUDA stream for device ", device);
  if (SHARED > SHARED_UNASKED) cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
  KERNEL<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(
      error == cudaSuccess, op, ": ", cudaGetErrorString(error), "; the library is built for ", DITKERNELS_ARCHITECTURES);
#endif
}

}  // namespace ditkernels
