// What the kernels and the ops of the CPU library share: tensors as plain structs, and a table of kernels for each instruction
// set.
//
// A family is one file. It is compiled once without DITKERNELS_ISA, for the oldest processor there is: that makes its ops, which
// talk to torch. It is compiled once more for each instruction set, with DITKERNELS_ISA as a namespace: that makes its kernels,
// which ops reach through the set's table alone. The linker keeps one of several definitions of a template or of an inline
// function. It must not find one that was compiled for a newer processor, so the objects of an instruction set define no such
// name: they use no template of std::, and all they have stands in anonymous namespaces. No function stands in this header.
#pragma once

#include <stdint.h>

// The instruction sets, the best one last. tools/build_native.py knows their flags, and may build fewer.
#if !defined(DITKERNELS_EVERY_ISA)
#if defined(__x86_64__)
#define DITKERNELS_EVERY_ISA(APPLY, ...) APPLY(avx2, __VA_ARGS__) APPLY(avx512, __VA_ARGS__) APPLY(avx512_bf16, __VA_ARGS__)
#else
#define DITKERNELS_EVERY_ISA(APPLY, ...) APPLY(native, __VA_ARGS__)
#endif
#endif
#define DITKERNELS_DECLARE(isa, Table, name) \
  namespace isa {                            \
  extern const Table name;                   \
  }
#define DITKERNELS_ADDRESS(isa, name) &isa::name,

namespace ditkernels {

// torch's numbers of the dtypes.
constexpr int HALF = 5, FLOAT = 6, BFLOAT16 = 15;

// A (B, N, D) tensor, strides in elements. `data` is null where the tensor is absent.
struct Tokens {
  void* data;
  int64_t sample, token, channel;
  int dtype;
};

// A (B, D) vector, a (D,) vector with a sample stride of 0, or a (B, K, D) vector, whose rows lie `row` apart.
struct Vector {
  void* data;
  int64_t sample, channel;
  int dtype;
  int64_t row = 0;
};

// Channels that a thread takes at a time where it adds up partial sums.
constexpr int64_t BLOCK = 256;

}  // namespace ditkernels
