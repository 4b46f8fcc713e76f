// The CPU kernels of `bias_gelu` and of its backward. Formulas and names are those at the top of ditkernels/ops/gelu/__init__.py.
//
//   forward    a thread owns rows: reads x once, writes y once.
//   backward   a thread owns a chunk of the rows: reads dy and x once, writes dx once, and adds dx up. The sums of a chunk go to
//              memory.
//   add        a thread owns some channels: adds up the chunks in order: dbias.
//
// Same inputs, same bits, for any number of threads: the cut into chunks is by shapes alone. `mlp` takes the same kernels between
// torch's products.
#include "isa.h"

namespace ditkernels {

// `dy` is absent in the forward, `out` is y or dx; `partial` (chunks, width) is null where dbias is not wanted.
struct Gelu {
  Tokens dy, x, out;
  Vector bias;
  float* partial;
  int64_t rows, tokens, width, chunk_rows;
};

struct GeluKernels {
  void (*forward)(const Gelu&, int64_t first_row, int64_t end_row, float* scratch);
  void (*backward)(const Gelu&, int64_t first_chunk, int64_t end_chunk, float* scratch);
  void (*add)(const float* partial, int64_t chunks, int64_t width, const Vector& to, int64_t first_block, int64_t end_block);
  void (*exp_of_negative)(const float* x, int64_t size, float* y);
  void (*sigmoid)(const float* x, int64_t size, float* y);
};

constexpr int GELU_ROWS = 4;  // of scratch, each of padded(width) floats

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, GeluKernels, gelu)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

// 2u(z) = STEEP·z + CUBIC·z³
constexpr float STEEP = 1.5957691216057308f, CUBIC = 0.044715f * STEEP;

inline Lanes gelu_of(Lanes z) {
  const Lanes steep = z * (STEEP + CUBIC * (z * z));
  return z * chosen(steep, logistic(steep));
}

inline Lanes derivative_of(Lanes z) {
  const Lanes square = z * z, steep = z * (STEEP + CUBIC * square);
  const Logistic both = logistic(steep);
  return chosen(steep, both) + (z * (both.above * both.below)) * (STEEP + 3.0f * CUBIC * square);
}

template <typename T>
void forward_rows(const Gelu& a, int64_t begin, int64_t end, float* scratch) {
  float* bias = scratch;
  T* room = reinterpret_cast<T*>(scratch + row_floats(a.width));
  read(a.bias, 0, 0, a.width, 0.0f, bias);
  for (int64_t at = begin; at < end; ++at) {
    const T* x = row_of<T>(a.x, at / a.tokens, at % a.tokens, a.width, room);
    T* y = place_of<T>(a.out, at / a.tokens, at % a.tokens, nullptr);
    each(a.width, [&](int64_t i, auto reach) { store(y + i, reach, gelu_of(load(x + i, reach) + load(bias + i, reach))); });
  }
}

void forward(const Gelu& a, int64_t begin, int64_t end, float* scratch) {
  by_dtype(a.x.dtype, [&](auto type) { forward_rows<decltype(type)>(a, begin, end, scratch); });
}

template <bool SUM, typename T>
void backward_chunk(const Gelu& a, int64_t chunk, float* scratch) {
  const int64_t n = row_floats(a.width), first = chunk * a.chunk_rows;
  const int64_t end = first + a.chunk_rows < a.rows ? first + a.chunk_rows : a.rows;
  float *bias = scratch, *sums = a.partial + chunk * a.width;
  T *dy_room = reinterpret_cast<T*>(scratch + n), *x_room = reinterpret_cast<T*>(scratch + 2 * n);
  T* dx_room = reinterpret_cast<T*>(scratch + 3 * n);
  read(a.bias, 0, 0, a.width, 0.0f, bias);
  if constexpr (SUM) memset(sums, 0, a.width * sizeof(float));
  for (int64_t at = first; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens;
    const T* dy = row_of<T>(a.dy, sample, token, a.width, dy_room);
    const T* x = row_of<T>(a.x, sample, token, a.width, x_room);
    T* dx = place_of<T>(a.out, sample, token, dx_room);
    each(a.width, [&](int64_t i, auto reach) {
      const Lanes gradient = load(dy + i, reach) * derivative_of(load(x + i, reach) + load(bias + i, reach));
      store(dx + i, reach, gradient);
      if constexpr (SUM) add(sums + i, reach, gradient);
    });
    put(a.out, sample, token, a.width, dx_room);
  }
}

void backward(const Gelu& a, int64_t begin, int64_t end, float* scratch) {
  // Where dtypes differ, rows are converted to fp32 and back.
  const bool alike = a.dy.dtype == a.x.dtype && (a.out.data == nullptr || a.out.dtype == a.x.dtype);
  by_dtype(alike ? a.x.dtype : FLOAT, [&](auto type) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      a.partial == nullptr ? backward_chunk<false, decltype(type)>(a, chunk, scratch)
                           : backward_chunk<true, decltype(type)>(a, chunk, scratch);
  });
}

// The functions alone, for the test that holds their errors.
void each_exp_of_negative(const float* x, int64_t size, float* y) {
  each(size, [&](int64_t i, auto reach) { store(y + i, reach, exp_of_negative(load(x + i, reach))); });
}

void each_sigmoid(const float* x, int64_t size, float* y) {
  each(size, [&](int64_t i, auto reach) {
    const Lanes lanes = load(x + i, reach);
    store(y + i, reach, chosen(lanes, logistic(lanes)));
  });
}

}  // namespace

const GeluKernels gelu = {forward, backward, add_blocks, each_exp_of_negative, each_sigmoid};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include "host.h"

namespace ditkernels {
namespace {

const GeluKernels& kernels() {
  static const GeluKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, gelu)};
  return *tables[isa()];
}

Gelu arguments(const Tensor& x, const OptionalTensor& bias, const Tensor& out) {
  Gelu a = {};
  a.x = tokens(x);
  a.out = tokens(out);
  a.bias = vector(bias);
  a.rows = x.size(0) * x.size(1);
  a.tokens = x.size(1);
  a.width = x.size(2);
  return a;
}

// GELU costs about as much as moving eight values.
constexpr int64_t WORK = 8;

Tensor bias_gelu(Tensor x, OptionalTensor bias) {
  const Tensor y = empty({x.size(0), x.size(1), x.size(2)}, dtype_of(x));
  const Gelu a = arguments(x, bias, y);
  const GeluKernels& table = kernels();
  in_parallel(a.rows, WORK * a.width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(GELU_ROWS * padded(a.width));
    table.forward(a, begin, end, scratch.get());
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(Tensor dy, OptionalTensor x, OptionalTensor bias, std::vector<int64_t> wanted) {
  const Tensor dx = gradient(wanted[0], {dy.size(0), dy.size(1), dy.size(2)}), dbias = gradient(wanted[1], {dy.size(2)});
  Gelu a = arguments(*x, bias, dx);
  a.dy = tokens(dy);
  a.chunk_rows = rows_of_a_chunk(1, a.rows);
  const int64_t chunks = ceil_div(a.rows, a.chunk_rows);
  const Scratch partial(wanted[1] >= 0 ? chunks * a.width + 1 : 0);
  a.partial = partial.get();
  const GeluKernels& table = kernels();
  in_parallel(chunks, WORK * a.chunk_rows * a.width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(GELU_ROWS * padded(a.width));
    table.backward(a, begin, end, scratch.get());
  });
  if (wanted[1] >= 0)
    in_parallel(ceil_div(a.width, BLOCK), chunks * BLOCK, [&](int64_t begin, int64_t end) {
      table.add(a.partial, chunks, a.width, vector(dbias), begin, end);
    });
  return {dx, dbias};
}

Tensor of_each(void (*function)(const float*, int64_t, float*), const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous() && dtype_of(x) == FLOAT, "x: expected a packed tensor of fp32");
  const Tensor y = empty({x.numel()}, FLOAT);
  function(static_cast<const float*>(x.data_ptr()), x.numel(), static_cast<float*>(y.data_ptr()));
  return y;
}

Tensor cpu_exp_of_negative(Tensor x) { return of_each(kernels().exp_of_negative, x); }
Tensor cpu_sigmoid(Tensor x) { return of_each(kernels().sigmoid, x); }

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_FRAGMENT(ditkernels, library) {
  library.def("cpu_exp_of_negative(Tensor x) -> Tensor");
  library.def("cpu_sigmoid(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) {
  library.impl("bias_gelu_cpu", TORCH_BOX(&ditkernels::bias_gelu));
  library.impl("bias_gelu_backward_cpu", TORCH_BOX(&ditkernels::bias_gelu_backward));
  library.impl("cpu_exp_of_negative", TORCH_BOX(&ditkernels::cpu_exp_of_negative));
  library.impl("cpu_sigmoid", TORCH_BOX(&ditkernels::cpu_sigmoid));
}
#endif
