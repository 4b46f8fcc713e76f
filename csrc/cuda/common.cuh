// What the CUDA kernels of all families share: access to memory, dispatch by dtype and width, launch.
//
// Kernels access tensors only through the functions below and shared memory only through Shared, so that the tests' host emulation
// (tests/ops/emulation) can check and count every access. A unit is eight channels: one 16-byte access of bf16 or fp16, two of
// fp32. A vectorised access moves 16 bytes. Arithmetic is fp32. Offsets are 64-bit.
//
// The compiler knows the pairs of dtypes that models use. `Any` marks a dtype that is known only at run time; the code is the same.
//
// Operators are registered through torch's stable ABI, and nothing here uses Python's API. So one library serves every Python and
// every torch from 2.10 on. An absent argument is an empty optional; an absent result is a tensor of shape (0,).
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
// A weak symbol: the library also loads with a torch that was built without CUDA.
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int device, void** stream);
#endif

// Placed before a loop, these unroll all of its iterations, or `count` of them.
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(count) DITKERNELS_PRAGMA(unroll count)
#define DITKERNELS_PRAGMA(text) _Pragma(#text)

namespace ditkernels {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int UNIT = 8;
constexpr int WARP = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;

// ---- Tensors as kernels see them ------------------------------------------------------------------------------------

struct Any {};

// A (B, N, D) tensor at any strides, which count elements; `data` is null where the tensor is absent.
template <typename T>
struct Tokens {
  std::conditional_t<std::is_same_v<T, Any>, void, T>* data = nullptr;
  int64_t sample = 0, token = 0, channel = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
};

// A (B, D), (D,) or (B, K, D) vector with contiguous channels; the last one's rows lie `row` apart.
struct Vector {
  void* data = nullptr;
  int64_t sample = 0;
  ScalarType dtype = ScalarType::Float;
  int id = -1;
  int64_t row = 0;
};

// Contiguous integers.
struct Numbers {
  const int64_t* data = nullptr;
  int id = -1;
};

// The vectors of a residual (gate, branch_bias) and of a norm (the others), or the gradients of these vectors.
struct Vectors {
  Vector gate, branch_bias, shift, scale, weight, bias;
};

struct Unit {
  float at[UNIT];
};

struct alignas(16) Word {
  uint32_t part[4];
};

// A unit in a tensor's own dtype.
template <typename T>
struct Fragment {
  Word words[UNIT * sizeof(T) / sizeof(Word)];
};

// Accesses of 16 bytes to global memory. The store is inline PTX because nvcc splits some 16-byte stores into narrower ones. It has
// no memory clobber, because no kernel reads what it has stored.
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

// Calls `body` with a value of the C++ type of `dtype`.
template <typename Body>
__device__ __forceinline__ auto with_dtype(ScalarType dtype, const Body& body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  return body(float{});
}

// The value rounded to T, or to `dtype` where T is Any.
template <typename T>
__device__ __forceinline__ float rounded(float value, ScalarType dtype) {
  if constexpr (std::is_same_v<T, Any>)
    return with_dtype(dtype, [value](auto t) { return static_cast<float>(static_cast<decltype(t)>(value)); });
  else
    return static_cast<float>(static_cast<T>(value));
}

template <typename T>
__device__ __forceinline__ Unit as_floats(const Fragment<T>& fragment) {
  const T* values = reinterpret_cast<const T*>(fragment.words);
  Unit unit;
  UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] = static_cast<float>(values[i]);
  return unit;
}

template <typename T>
__device__ __forceinline__ Fragment<T> as_fragment(const Unit& unit) {
  Fragment<T> fragment;
  T* values = reinterpret_cast<T*>(fragment.words);
  UNROLL for (int i = 0; i < UNIT; ++i) values[i] = static_cast<T>(unit.at[i]);
  return fragment;
}

// Eight channels from `column` on, by 16-byte accesses, in the dtype in which they are stored.
template <typename T>
__device__ __forceinline__ Fragment<T> load_words(const Tokens<T>& from, int64_t sample, int64_t token, int column) {
  const T* row = from.data + sample * from.sample + token * from.token;
  Fragment<T> fragment;
  UNROLL for (int i = 0; i < static_cast<int>(UNIT * sizeof(T) / sizeof(Word)); ++i) {
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

// Hides the value of the channel stride from the compiler, which would otherwise keep all multiples of the stride in registers.
template <typename T>
__device__ __forceinline__ Tokens<T> with_stride_anew(Tokens<T> tensor) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+l"(tensor.channel));
#endif
  return tensor;
}

// Eight channels from `column` on. With VECTORISED, the caller guarantees that they are aligned and lie within the row. Otherwise
// they are read one by one, and those from `width` on are zero.
template <bool VECTORISED, typename T>
__device__ __forceinline__ Unit load(const Tokens<T>& from, int64_t sample, int64_t token, int column, int width) {
  if constexpr (std::is_same_v<T, Any>) {
    return with_dtype(from.dtype, [&](auto t) { return load<VECTORISED>(typed<decltype(t)>(from), sample, token, column, width); });
  } else if constexpr (VECTORISED) {
    return as_floats(load_words(from, sample, token, column));
  } else {
    Unit unit;
    UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] = column + i < width ? load_one(from, sample, token, column + i) : 0.0f;
    return unit;
  }
}

template <bool VECTORISED, typename T>
__device__ __forceinline__ void store(const Tokens<T>& to, int64_t sample, int64_t token, int column, int width, const Unit& unit) {
  if constexpr (std::is_same_v<T, Any>) {
    with_dtype(to.dtype, [&](auto t) { store<VECTORISED>(typed<decltype(t)>(to), sample, token, column, width, unit); });
  } else if constexpr (VECTORISED) {
    T* row = to.data + sample * to.sample + token * to.token;
    const Fragment<T> fragment = as_fragment<T>(unit);
    UNROLL for (int i = 0; i < static_cast<int>(UNIT * sizeof(T) / sizeof(Word)); ++i) {
      Word* word = reinterpret_cast<Word*>(row + column) + i;
      touch(to.id, word, sizeof(Word), sizeof(T), true);
      write_word(word, fragment.words[i]);
    }
  } else {
    const Tokens<T> own = with_stride_anew(to);
    UNROLL for (int i = 0; i < UNIT; ++i) if (column + i < width) store_one(own, sample, token, column + i, unit.at[i]);
  }
}

__device__ __forceinline__ Tokens<Any> as_tokens(const Vector& vector) {
  return {vector.data, vector.sample, 0, 1, vector.dtype, vector.id};
}

// Eight channels of an optional vector, or `absent` eight times without one.
template <bool VECTORISED>
__device__ __forceinline__ Unit load(const Vector& from, int64_t sample, int column, int width, float absent) {
  if (from.data != nullptr) return load<VECTORISED>(as_tokens(from), sample, 0, column, width);
  Unit unit;
  UNROLL for (int i = 0; i < UNIT; ++i) unit.at[i] = absent;
  return unit;
}

__device__ __forceinline__ float load_one(const Vector& from, int64_t sample, int64_t column, float absent) {
  return from.data == nullptr ? absent : load_one(as_tokens(from), sample, 0, column);
}

__device__ __forceinline__ void store_one(const Vector& to, int64_t sample, int64_t column, float value) {
  if (to.data != nullptr) store_one(as_tokens(to), sample, 0, column, value);
}

__device__ __forceinline__ int64_t load_number(const Numbers& from, int64_t at) {
  touch(from.id, from.data + at, sizeof(int64_t), sizeof(int64_t), false);
  return from.data[at];
}

// A row of a (B, K, D) vector as a vector.
__device__ __forceinline__ Vector row_of(Vector vector, int64_t row) {
  const int64_t bytes = vector.dtype == ScalarType::Float ? sizeof(float) : sizeof(BFloat16);
  if (vector.data != nullptr) vector.data = static_cast<char*>(vector.data) + row * vector.row * bytes;
  return vector;
}

// A row of those of the vectors that have rows.
__device__ __forceinline__ Vectors row_of(Vectors vectors, int64_t row) {
  vectors.gate = row_of(vectors.gate, row);
  vectors.shift = row_of(vectors.shift, row);
  vectors.scale = row_of(vectors.scale, row);
  return vectors;
}

// ---- Shared memory: a launch sets its size, a kernel divides it -----------------------------------------------------

#ifndef DITKERNELS_EMULATION
__device__ __forceinline__ char* shared_at(int offset, int, bool) {
  extern __shared__ __align__(16) char arena[];
  return arena + offset;
}
#else
using emulation::shared_at;
#endif

// An array of T that begins at byte `first` of shared memory.
template <typename T>
struct Shared {
  int first;

  __device__ __forceinline__ T read(int at) const {
    return *reinterpret_cast<const T*>(shared_at(first + at * static_cast<int>(sizeof(T)), sizeof(T), false));
  }
  __device__ __forceinline__ void write(int at, T value) const {
    *reinterpret_cast<T*>(shared_at(first + at * static_cast<int>(sizeof(T)), sizeof(T), true)) = value;
  }
  // Eight consecutive values; `at` is a multiple of eight.
  __device__ __forceinline__ Fragment<T> read_unit(int at) const {
    Fragment<T> fragment;
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
    UNROLL for (int i = 0; i < WORDS; ++i) {
      const int offset = first + at * static_cast<int>(sizeof(T)) + i * static_cast<int>(sizeof(Word));
      fragment.words[i] = *reinterpret_cast<const Word*>(shared_at(offset, sizeof(Word), false));
    }
    return fragment;
  }
  __device__ __forceinline__ void write_unit(int at, const Fragment<T>& fragment) const {
    constexpr int WORDS = UNIT * sizeof(T) / sizeof(Word);
    UNROLL for (int i = 0; i < WORDS; ++i) {
      const int offset = first + at * static_cast<int>(sizeof(T)) + i * static_cast<int>(sizeof(Word));
      *reinterpret_cast<Word*>(shared_at(offset, sizeof(Word), true)) = fragment.words[i];
    }
  }
};

__device__ __forceinline__ float warp_sum(float value) {
  UNROLL for (int apart = WARP / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(EVERY_LANE, value, apart);
  return value;
}

// ---- Host side: tensors ---------------------------------------------------------------------------------------------

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// An uninitialised gradient. wanted[at] is the number of its ScalarType, or -1 if the gradient is not wanted.
inline OptionalTensor gradient(
    const std::vector<int64_t>& wanted, size_t at, const Tensor& like, const std::vector<int64_t>& shape) {
  if (wanted.at(at) < 0) return std::nullopt;
  return empty(like, shape, static_cast<ScalarType>(wanted[at]));
}

// An optional result as a schema returns it: a tensor of shape (0,) where it is absent.
inline Tensor or_nothing(const OptionalTensor& tensor, const Tensor& like) {
  return tensor.has_value() ? *tensor : empty(like, {0}, like.scalar_type());
}

// Tells the emulation of a tensor and returns its id, one more at every call. `index`: the tensor's place in a list.
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

// The matrix in a tensor's last two axes, as one sample: its rows are tokens, its columns are channels.
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

// A (B, N, D) tensor.
template <typename T>
Tokens<T> tokens(const char* name, const OptionalTensor& tensor) {
  Tokens<T> made = matrix<T>(name, tensor);
  if (tensor.has_value()) made.sample = tensor->stride(0);
  return made;
}

// The tensor with a contiguous last axis. It is copied only if that axis is strided.
inline OptionalTensor packed(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->stride(tensor->dim() - 1) == 1) return tensor;
  return torch::stable::contiguous(*tensor);
}

inline Vector vector(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  const int64_t sample = tensor->dim() > 1 ? tensor->stride(0) : 0, row = tensor->dim() == 3 ? tensor->stride(1) : 0;
  return {tensor->data_ptr(), sample, tensor->scalar_type(), describe(name, *tensor), row};
}

inline Numbers numbers(const char* name, const OptionalTensor& tensor) {
  if (!tensor.has_value()) return {};
  return {static_cast<const int64_t*>(tensor->data_ptr()), describe(name, *tensor)};
}

// Whether vectorised accesses can move every unit of every row.
inline bool is_vectorised(const OptionalTensor& tensor) {
  if (!tensor.has_value()) return true;
  const int64_t bytes = tensor->element_size(), last = tensor->dim() - 1;
  if (tensor->size(last) % UNIT != 0 || reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 != 0) return false;
  if (tensor->size(last) > 0 && tensor->stride(last) != 1) return false;
  for (int64_t i = 0; i < last; ++i)
    if (tensor->size(i) > 1 && tensor->stride(i) * bytes % 16 != 0) return false;
  return true;
}

struct VectorTensors {
  OptionalTensor gate, branch_bias, shift, scale, weight, bias;
};

inline VectorTensors packed(const VectorTensors& t) {
  return {packed(t.gate), packed(t.branch_bias), packed(t.shift), packed(t.scale), packed(t.weight), packed(t.bias)};
}

inline Vectors vectors(const VectorTensors& t) {
  return {vector("gate", t.gate),   vector("branch_bias", t.branch_bias), vector("shift", t.shift),
          vector("scale", t.scale), vector("weight", t.weight),           vector("bias", t.bias)};
}

inline bool is_vectorised(const VectorTensors& t) {
  return is_vectorised(t.gate) && is_vectorised(t.branch_bias) && is_vectorised(t.shift) && is_vectorised(t.scale) &&
         is_vectorised(t.weight) && is_vectorised(t.bias);
}

template <typename... Tensors>
bool all_vectorised(const Tensors&... tensors) {
  return (is_vectorised(tensors) && ...);
}

// ---- Host side: dispatch --------------------------------------------------------------------------------------------

// The pairs of a stream's and a branch's dtype that models use: one dtype for both, or an fp32 stream. Any other pair is Any.
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

// The result of common_dtype where dtypes differ. by_dtypes then selects Any.
constexpr ScalarType MIXED = ScalarType::Undefined;

// The dtype of all given tensors, MIXED if they differ, `otherwise` if none is given.
template <typename... Tensors>
ScalarType common_dtype(ScalarType otherwise, const Tensors&... tensors) {
  OptionalTensor first;
  for (const OptionalTensor& tensor : {OptionalTensor(tensors)...}) {
    if (!tensor.has_value()) continue;
    if (!first.has_value()) first = tensor;
    if (tensor->scalar_type() != first->scalar_type()) return MIXED;
  }
  return first.has_value() ? first->scalar_type() : otherwise;
}

template <typename Body>
void by_dtype(ScalarType dtype, Body body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Half) return body(Half{});
  body(float{});
}

template <int VALUE>
using Number = std::integral_constant<int, VALUE>;

// The compiler knows the paper's widths; every other width is 0.
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

// Calls body(stream's type, branch's type, whether accesses are vectorised). If they are not, both types are Any.
template <typename Body>
void by_layout(ScalarType stream, ScalarType branch, bool vectorised, Body body) {
  if (!vectorised) return body(Any{}, Any{}, std::false_type{});
  by_dtypes(stream, branch, [&](auto t, auto u) { body(t, u, std::true_type{}); });
}

// Calls body(stream's type, branch's type, width, whether accesses are vectorised). Unless types and width are all known, the types
// are Any and the width is 0.
template <typename Body>
void by_row(ScalarType stream, ScalarType branch, int64_t width, bool vectorised, Body body) {
  by_layout(stream, branch, vectorised, [&](auto t, auto u, auto by_words) {
    if constexpr (std::is_same_v<decltype(t), Any>)
      body(t, u, Number<0>{}, by_words);
    else
      by_width(width, [&](auto known) {
        if constexpr (known == 0)
          body(Any{}, Any{}, known, by_words);
        else
          body(t, u, known, by_words);
      });
  });
}

// ---- Host side: launch ----------------------------------------------------------------------------------------------

// Bytes of dynamic shared memory that a launch may use without setting an attribute of the kernel.
constexpr int SHARED_UNASKED = 48 * 1024;

// A kernel of the library, with the most threads of a block and the most bytes of shared memory that it is launched with.
struct Kernel {
  std::string name;
  const void* function;
  int threads, shared;
};

inline std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

// The kernel's name and template arguments, cut from the name that the compiler gives this function.
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

// THREADS and SHARED (bytes) are the most that any launch of the kernel uses; `threads` and `shared` are those of this launch.
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
