// What the CUDA kernels of all ops share: access to memory, reductions, dispatch, launch.
//
// Every access to a tensor goes through load, load_one, store or store_one, every access to shared memory through Shared, so that
// the host emulation of the tests (tests/emulation) can check and count them. Kernels hold channels in units of eight: one
// 16-byte access of bf16 or fp16, two of fp32. Arithmetic is fp32. Offsets are 64-bit.
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

// A (B, N, D) tensor at any strides, in elements; data is null where the tensor is absent.
template <typename T>
struct Tokens {
  T* data = nullptr;
  int64_t sample = 0, token = 0, channel = 0;
  int id = -1;
};

// A (B, D) or (D,) vector, channels side by side; its dtype is known at run time only, since each may have its own.
struct Vector {
  void* data = nullptr;
  int64_t sample = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

struct Unit {
  float at[UNIT];
};

struct alignas(16) Word {
  uint32_t part[4];
};

#ifndef DITKERNELS_EMULATION
__device__ __forceinline__ void touch(int, const void*, int, int, bool) {}

template <typename T>
struct Shared {
  T* data;
  __device__ __forceinline__ T read(int at) const { return data[at]; }
  __device__ __forceinline__ void write(int at, T value) const { data[at] = value; }
};

#define DITKERNELS_SHARED(type, name, count) \
  __shared__ type name##_storage[count];     \
  const Shared<type> name { name##_storage }
#else
using emulation::Shared;
using emulation::touch;
#define DITKERNELS_SHARED(type, name, count) const Shared<type> name = emulation::shared<type>(count)
#endif

// Eight channels from `column` on. WIDE: by 16-byte accesses; the caller has seen to alignment and that the unit lies in the row.
// Otherwise one by one, zero beyond `width`.
template <bool WIDE, typename T>
__device__ __forceinline__ Unit load(const Tokens<T>& from, int64_t sample, int64_t token, int column, int width) {
  Unit unit;
  const T* row = from.data + sample * from.sample + token * from.token;
  if constexpr (WIDE) {
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
    Word words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const Word* word = reinterpret_cast<const Word*>(row + column) + i;
      touch(from.id, word, sizeof(Word), sizeof(T), false);
      words[i] = *word;
    }
    const T* values = reinterpret_cast<const T*>(words);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) unit.at[i] = static_cast<float>(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
      unit.at[i] = 0.0f;
      if (column + i < width) {
        const T* value = row + (column + i) * from.channel;
        touch(from.id, value, sizeof(T), sizeof(T), false);
        unit.at[i] = static_cast<float>(*value);
      }
    }
  }
  return unit;
}

template <bool WIDE, typename T>
__device__ __forceinline__ void store(
    const Tokens<T>& to, int64_t sample, int64_t token, int column, int width, const Unit& unit) {
  T* row = to.data + sample * to.sample + token * to.token;
  if constexpr (WIDE) {
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
    Word words[WORDS];
    T* values = reinterpret_cast<T*>(words);
#pragma unroll
    for (int i = 0; i < UNIT; ++i) values[i] = static_cast<T>(unit.at[i]);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      Word* word = reinterpret_cast<Word*>(row + column) + i;
      touch(to.id, word, sizeof(Word), sizeof(T), true);
      *word = words[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) {
      if (column + i < width) {
        T* value = row + (column + i) * to.channel;
        touch(to.id, value, sizeof(T), sizeof(T), true);
        *value = static_cast<T>(unit.at[i]);
      }
    }
  }
}

template <typename T>
__host__ __device__ __forceinline__ Tokens<T> typed(const Vector& vector) {
  return {static_cast<T*>(vector.data), vector.sample, 0, 1, vector.id};
}

// Eight channels of an optional vector; `absent` in each where it is not there.
template <bool WIDE>
__device__ __forceinline__ Unit load(const Vector& from, int64_t sample, int column, int width, float absent) {
  if (from.data == nullptr) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < UNIT; ++i) unit.at[i] = absent;
    return unit;
  }
  if (from.dtype == ScalarType::BFloat16) return load<WIDE>(typed<BFloat16>(from), sample, 0, column, width);
  if (from.dtype == ScalarType::Half) return load<WIDE>(typed<Half>(from), sample, 0, column, width);
  return load<WIDE>(typed<float>(from), sample, 0, column, width);
}

template <typename T>
__device__ __forceinline__ float load_one(const Tokens<T>& from, int64_t sample, int64_t token, int column) {
  const T* value = from.data + sample * from.sample + token * from.token + column * from.channel;
  touch(from.id, value, sizeof(T), sizeof(T), false);
  return static_cast<float>(*value);
}

template <typename T>
__device__ __forceinline__ void store_one(const Tokens<T>& to, int64_t sample, int64_t token, int column, float value) {
  T* place = to.data + sample * to.sample + token * to.token + column * to.channel;
  touch(to.id, place, sizeof(T), sizeof(T), true);
  *place = static_cast<T>(value);
}

__device__ __forceinline__ float load_one(const Vector& from, int64_t sample, int column, float absent) {
  if (from.data == nullptr) return absent;
  if (from.dtype == ScalarType::BFloat16) return load_one(typed<BFloat16>(from), sample, 0, column);
  if (from.dtype == ScalarType::Half) return load_one(typed<Half>(from), sample, 0, column);
  return load_one(typed<float>(from), sample, 0, column);
}

__device__ __forceinline__ void store_one(const Vector& to, int64_t sample, int column, float value) {
  if (to.data == nullptr) return;
  if (to.dtype == ScalarType::BFloat16) return store_one(typed<BFloat16>(to), sample, 0, column, value);
  if (to.dtype == ScalarType::Half) return store_one(typed<Half>(to), sample, 0, column, value);
  store_one(typed<float>(to), sample, 0, column, value);
}

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
// Host side
// ---------------------------------------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int describe(const char* name, const Tensor& tensor) {
#ifdef DITKERNELS_EMULATION
  int64_t last = tensor.numel() > 0 ? 0 : -1;
  for (int64_t i = 0; i < tensor.dim() && last >= 0; ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  return emulation::describe(name, tensor.data_ptr(), (last + 1) * tensor.element_size());
#else
  (void)name, (void)tensor;
  return -1;
#endif
}

template <typename T>
Tokens<T> tokens(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  const bool three = tensor->dim() == 3;
  return {static_cast<T*>(tensor->data_ptr()), tensor->stride(0), tensor->stride(1), three ? tensor->stride(2) : 1,
          describe(name, *tensor)};
}

// The tensor with its channels side by side; only one with strided channels is copied.
inline OptionalTensor packed(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->stride(tensor->dim() - 1) == 1) return tensor;
  return torch::stable::contiguous(*tensor);
}

inline Vector vector(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor->data_ptr(), tensor->dim() == 2 ? tensor->stride(0) : 0, tensor->scalar_type(), describe(name, *tensor)};
}

// Whether 16-byte accesses reach every unit of every row.
inline bool is_wide(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return true;
  const int64_t bytes = tensor->element_size(), last = tensor->dim() - 1;
  if (tensor->stride(last) != 1 || reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 != 0) return false;
  for (int64_t i = 0; i < last; ++i)
    if (tensor->size(i) > 1 && tensor->stride(i) * bytes % 16 != 0) return false;
  return true;
}

template <typename Body>
void by_dtype(const char* name, ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, name, ": the CUDA kernels take float32, bfloat16 and float16");
  }
}

// The paper's widths are known to the compiler; every other width, and every layout that 16 bytes do not fit, is 0.
template <typename Body>
void by_width(int64_t width, bool wide, Body body) {
  if (wide && width == 384) return body(std::integral_constant<int, 384>{});
  if (wide && width == 768) return body(std::integral_constant<int, 768>{});
  if (wide && width == 1024) return body(std::integral_constant<int, 1024>{});
  if (wide && width == 1152) return body(std::integral_constant<int, 1152>{});
  body(std::integral_constant<int, 0>{});
}

template <typename Arguments>
void launch(
    const char* name, void (*kernel)(Arguments), int64_t blocks, int threads, const Tensor& like, const Arguments& arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), name, ": ", blocks, " blocks; a grid holds fewer than 2^31");
#ifdef DITKERNELS_EMULATION
  (void)like;
  emulation::launch(name, blocks, threads, [&] { kernel(arguments); });
#else
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
      name, ": torch gave no CUDA stream for device ", device);
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error), "; the library is built for ",
                  DITKERNELS_ARCHITECTURES);
#endif
}

}  // namespace ditkernels
