// The CPU kernel of `product_sum` (ditkernels/ops/product_sum.py): value · factor + addend, each result rounded as plain PyTorch
// rounds it. This file is compiled without contraction: a product that is not rounded before it is added gives other bits.
//
// A thread owns rows: it reads each of them once and writes the sums once.

// Its conversion to bf16 takes subnormal numbers for zero.
#undef __AVX512BF16__
#include "isa.h"

namespace ditkernels {

// `factor` and `addend` are rows (B, N, D), or vectors with a token stride of 0. `of_product` and `of_sum` are the dtypes that the
// product and the sum are rounded to before the sum is stored.
struct ProductSum {
  Tokens value, factor, addend, out;
  int64_t tokens, width;
  int of_product, of_sum;
};

struct SumKernels {
  void (*product_sum)(const ProductSum&, int64_t first_row, int64_t end_row, float* scratch);
};

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, SumKernels, sum)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

template <typename Product, typename Sum>
void add_rows(const ProductSum& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t room = row_floats(a.width);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens;
    const float* value = row_of<float>(a.value, sample, token, a.width, scratch);
    const float* factor = row_of<float>(a.factor, sample, token, a.width, scratch + room);
    const float* addend = row_of<float>(a.addend, sample, token, a.width, scratch + 2 * room);
    float* out = place_of<float>(a.out, sample, token, scratch + 3 * room);
    each(a.width, [&](int64_t i, auto reach) {
      const Lanes product = rounded(load(value + i, reach) * load(factor + i, reach), Product{});
      store(out + i, reach, rounded(product + load(addend + i, reach), Sum{}));
    });
    put(a.out, sample, token, a.width, out);
  }
}

void product_sum(const ProductSum& a, int64_t begin, int64_t end, float* scratch) {
  by_dtype(a.of_product, [&](auto product) {
    by_dtype(a.of_sum, [&](auto sum) { add_rows<decltype(product), decltype(sum)>(a, begin, end, scratch); });
  });
}

}  // namespace

const SumKernels sum = {product_sum};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include "host.h"

namespace ditkernels {
namespace {

constexpr int ROWS_OF_SCRATCH = 4;

const SumKernels& kernels() {
  static const SumKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, sum)};
  return *tables[isa()];
}

Tensor product_sum(Tensor value, Tensor factor, Tensor addend, ScalarType product, ScalarType sum, ScalarType out) {
  const int64_t samples = value.size(0), length = value.size(1), width = value.size(2);
  const Tensor made = empty({samples, length, width}, number(out));
  const ProductSum a = {tokens(value), tokens(factor), tokens(addend), tokens(made), length, width, number(product), number(sum)};
  const SumKernels& table = kernels();
  in_parallel(samples * length, width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(ROWS_OF_SCRATCH * padded(width));
    table.product_sum(a, begin, end, scratch.get());
  });
  return made;
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_FRAGMENT(ditkernels, library) {
  library.def(
      "product_sum_cpu(Tensor value, Tensor factor, Tensor addend, ScalarType product, ScalarType sum, ScalarType out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) { library.impl("product_sum_cpu", TORCH_BOX(&ditkernels::product_sum)); }
#endif
