// What the ops of the CPU library share: torch's tensors as plain structs, results, scratch memory, work for threads.
//
// Ops are registered through torch's stable ABI; nothing here uses Python's API, so that one library serves every torch from 2.10
// and every Python.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "isa.h"

namespace ditkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

// The place of the instruction set in use in DITKERNELS_EVERY_ISA. Raises RuntimeError on a processor that is too old.
int isa();

constexpr int64_t UNIT = 16;  // floats in a line of the cache

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t width) { return ceil_div(width, UNIT) * UNIT; }

// ---- Tensors --------------------------------------------------------------------------------------------------------

// Asks Linux for large pages under a large result: it is new memory, and the first touch of each small page costs more than
// computing what goes there.
inline void ask_for_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t PAGE = 4096;
  if (bytes < 4 * 1024 * 1024) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + PAGE - 1) / PAGE * PAGE;
  madvise(reinterpret_cast<void*>(first), bytes - PAGE, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// A new packed tensor on the CPU.
inline Tensor empty(Shape shape, int dtype) {
  int64_t strides[8], apart = 1;
  for (size_t i = shape.size(); i-- > 0; apart *= shape.begin()[i] > 0 ? shape.begin()[i] : 1) strides[i] = apart;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made));
  const Tensor tensor(made);
  ask_for_large_pages(tensor.data_ptr(), apart * static_cast<int64_t>(tensor.element_size()));
  return tensor;
}

// torch's number of a tensor's dtype, one that the kernels know.
inline int dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  STD_TORCH_CHECK(
      dtype == FLOAT || dtype == BFLOAT16 || dtype == HALF, "the cpu backend takes fp32, bf16 and fp16, got dtype number ", dtype);
  return dtype;
}

inline int number(ScalarType dtype) { return static_cast<int>(dtype); }

// What an op gives where nothing is asked for, and what stands for it in a kernel's arguments.
inline Tensor nothing() { return empty({0}, FLOAT); }

inline Tensor empty_if(bool wanted, Shape shape, int dtype) { return wanted ? empty(shape, dtype) : nothing(); }

// A gradient, if it is wanted; `wanted` is the number of its dtype, or -1.
inline Tensor gradient(int64_t wanted, Shape shape) { return empty_if(wanted >= 0, shape, static_cast<int>(wanted)); }

// (B, N, D) tensors, and vectors (B, D), (D,) or (B, K, D). An absent tensor, None or of shape (0,), has null data.
inline Tokens tokens(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->dim() != 3) return {};
  return {tensor->data_ptr(), tensor->stride(0), tensor->stride(1), tensor->stride(2), dtype_of(*tensor)};
}

inline Vector vector(const OptionalTensor& tensor) {
  if (!tensor.has_value() || tensor->numel() == 0) return {};
  const int64_t last = tensor->dim() - 1;
  const int64_t row = last == 2 ? tensor->stride(1) : 0;
  return {tensor->data_ptr(), last == 0 ? 0 : tensor->stride(0), tensor->stride(last), dtype_of(*tensor), row};
}

// ---- Work -----------------------------------------------------------------------------------------------------------

// Floats that a thread works in, at an address that is a multiple of 64 bytes. One allocation for all rows of a thread.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    if (floats == 0) return;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, padded(floats) * sizeof(float))));
    STD_TORCH_CHECK(memory_ != nullptr, "out of memory: ", floats, " floats of scratch");
  }
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

// Values for which a thread is worth waking, as in torch.
constexpr int64_t VALUES_A_THREAD = 32768;

// Calls body(begin, end) for parts of 0 .. count on torch's threads; one of them stands for about `values` values of work.
template <typename Body>
void in_parallel(int64_t count, int64_t values, const Body& body) {
  if (count == 0) return;
  torch::stable::parallel_for(0, count, ceil_div(VALUES_A_THREAD, values > 0 ? values : 1), body);
}

// Sums over tokens are taken in chunks of rows, each by one thread, and then added up in order. The cut depends on shapes alone,
// so that bits do not depend on the number of threads: about CHUNKS of them, none of fewer than ROWS rows where there are as
// many.
constexpr int64_t CHUNKS = 64, ROWS = 32;

inline int64_t rows_of_a_chunk(int64_t samples, int64_t rows) {
  int64_t length = ceil_div(samples * rows, CHUNKS);
  if (length < ROWS) length = ROWS;
  if (length > rows) length = rows;
  return length > 0 ? length : 1;
}

}  // namespace ditkernels
