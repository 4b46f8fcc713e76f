// The CPU kernel of `split_qkv`'s backward. Formulas and names are those at the top of ditkernels/ops/qkv/__init__.py.
//
//   stack      a thread owns a chunk of the rows: reads dq, dk and dv once, each at its own strides, writes dpacked once, and
//              adds it up. The sums of a chunk go to memory.
//   add        a thread owns some channels: adds up the chunks in order: dbias.
//
// Same inputs, same bits, for any number of threads: the cut into chunks is by shapes alone.
#include "isa.h"

namespace ditkernels {

// dq, dk or dv: (B, N, heads, head_dim), strides in elements. Heads that lie side by side are one long head.
struct Heads {
  const void* data;
  int64_t sample, token, head, channel, heads, head_dim;
};

// `width` is that of one part; `dpacked` (rows, parts, width) and `partial` (chunks, parts, width) are packed.
struct Stack {
  Heads parts[3];
  void* dpacked;
  float* partial;
  int64_t count, rows, tokens, width, chunk_rows;
  int dtype;
};

struct QkvKernels {
  void (*stack)(const Stack&, int64_t first_chunk, int64_t end_chunk, float* scratch);
  void (*add)(const float* partial, int64_t chunks, int64_t width, const Vector& to, int64_t first_block, int64_t end_block);
};

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, QkvKernels, qkv)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

template <typename T>
void stack_part(const Heads& part, int64_t sample, int64_t token, T* to, float* sums, T* room) {
  for (int64_t head = 0; head < part.heads; ++head) {
    const T* from = static_cast<const T*>(part.data) + sample * part.sample + token * part.token + head * part.head;
    if (part.channel != 1) {
      gather(from, part.channel, part.head_dim, room);
      from = room;
    }
    each(part.head_dim, [&](int64_t i, auto reach) { add(sums + i, reach, store(to + i, reach, load(from + i, reach))); });
    to += part.head_dim;
    sums += part.head_dim;
  }
}

void stack(const Stack& a, int64_t begin, int64_t end, float* scratch) {
  by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t all = a.count * a.width;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = a.partial + chunk * all;
      memset(sums, 0, all * sizeof(float));
      for (int64_t row = chunk * a.chunk_rows; row < a.rows && row < (chunk + 1) * a.chunk_rows; ++row)
        for (int64_t p = 0; p < a.count; ++p)
          stack_part(
              a.parts[p], row / a.tokens, row % a.tokens, static_cast<T*>(a.dpacked) + row * all + p * a.width, sums + p * a.width,
              reinterpret_cast<T*>(scratch));
    }
  });
}

}  // namespace

const QkvKernels qkv = {stack, add_blocks};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include "host.h"

namespace ditkernels {
namespace {

const QkvKernels& kernels() {
  static const QkvKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, qkv)};
  return *tables[isa()];
}

Heads heads_of(const Tensor& t) {
  Heads made = {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.size(2), t.size(3)};
  if (made.heads == 1 || made.head == made.head_dim * made.channel) {
    made.head_dim *= made.heads;
    made.heads = 1;
  }
  return made;
}

std::tuple<Tensor, Tensor> split_qkv_backward(OptionalTensor dq, Tensor dk, Tensor dv, ScalarType dtype) {
  const int64_t parts = dq.has_value() ? 3 : 2;
  Stack a = {};
  a.dtype = dtype_of(dk);
  a.tokens = dk.size(1);
  a.rows = dk.size(0) * a.tokens;
  a.width = dk.size(2) * dk.size(3);
  if (dq.has_value()) a.parts[a.count++] = heads_of(*dq);
  a.parts[a.count++] = heads_of(dk);
  a.parts[a.count++] = heads_of(dv);
  const Tensor dpacked = empty({dk.size(0), a.tokens, parts, dk.size(2), dk.size(3)}, a.dtype);
  const Tensor dbias = empty({parts * a.width}, number(dtype));
  a.dpacked = dpacked.data_ptr();
  a.chunk_rows = rows_of_a_chunk(1, a.rows);
  const int64_t chunks = ceil_div(a.rows, a.chunk_rows), all = parts * a.width;
  const Scratch partial(chunks * all);
  a.partial = partial.get();
  const QkvKernels& table = kernels();
  in_parallel(chunks, a.chunk_rows * all, [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded(a.width));
    table.stack(a, begin, end, scratch.get());
  });
  in_parallel(ceil_div(all, BLOCK), chunks * BLOCK, [&](int64_t begin, int64_t end) {
    table.add(a.partial, chunks, all, vector(dbias), begin, end);
  });
  return {dpacked, dbias};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) {
  library.impl("split_qkv_backward_cpu", TORCH_BOX(&ditkernels::split_qkv_backward));
}
#endif
