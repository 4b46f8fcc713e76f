// The CPU kernel of `adamw_ema`. Formulas and names are those at the top of ditkernels/ops/optimizer/__init__.py.
//
//   update     a thread owns a piece of PIECE elements of one weight: reads w, gradient, m, v and the average once, writes w, m,
//              v, the average and the copy once. 36 bytes a parameter in fp32, and with both gradient and copy in bf16.
//
// The factors of a weight, lr / (1 - beta1^t) and sqrt(1 - beta2^t), are taken in fp64: in fp32 1 - beta2 cancels. Elements share
// nothing: same inputs, same bits, for any number of threads.
#include "isa.h"

namespace ditkernels {

// A weight and what belongs to it, packed; `average` and `copy` are null where there are none.
struct Weight {
  float *weight, *exp_avg, *exp_avg_sq, *average;
  const void* gradient;
  void* copy;
  int64_t size;
  float step_size, root;
};

// What is alike for all weights.
struct Step {
  float shrink, complement1, beta2, complement2, eps, towards, grad_scale;
  int gradient, copy;  // dtypes
  bool skipped;
};

struct OptimizerKernels {
  void (*update)(const Step&, const Weight&, int64_t begin, int64_t end);
};

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, OptimizerKernels, optimizer)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

// G and C are the dtypes of gradient and copy.
template <bool AVERAGE, bool COPY, typename G, typename C>
void update_elements(const Step& s, const Weight& w, int64_t begin, int64_t end) {
  const G* gradients = static_cast<const G*>(w.gradient);
  C* copies = static_cast<C*>(w.copy);
  each(end - begin, [&](int64_t i, auto reach) {
    const int64_t at = begin + i;
    Lanes value = load(w.weight + at, reach);
    if (!s.skipped) {
      const Lanes m = load(w.exp_avg + at, reach), v = load(w.exp_avg_sq + at, reach);
      const Lanes g = load(gradients + at, reach) / s.grad_scale;
      const Lanes new_m = m + s.complement1 * (g - m);
      const Lanes new_v = s.beta2 * v + s.complement2 * (g * g);
      const Lanes denominator = root(new_v) / w.root + s.eps;
      value = s.shrink * value - w.step_size * (new_m / denominator);
      store(w.exp_avg + at, reach, new_m);
      store(w.exp_avg_sq + at, reach, new_v);
      store(w.weight + at, reach, value);
    }
    if constexpr (AVERAGE) {
      const Lanes average = load(w.average + at, reach);
      store(w.average + at, reach, average + s.towards * (value - average));
    }
    if constexpr (COPY) store(copies + at, reach, value);
  });
}

void update(const Step& s, const Weight& w, int64_t begin, int64_t end) {
  by_dtype(s.gradient, [&](auto g) {
    using G = decltype(g);
    if (w.copy == nullptr)
      return w.average == nullptr ? update_elements<false, false, G, float>(s, w, begin, end)
                                  : update_elements<true, false, G, float>(s, w, begin, end);
    by_dtype(s.copy, [&](auto c) {
      using C = decltype(c);
      w.average == nullptr ? update_elements<false, true, G, C>(s, w, begin, end)
                           : update_elements<true, true, G, C>(s, w, begin, end);
    });
  });
}

}  // namespace

const OptimizerKernels optimizer = {update};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include <algorithm>
#include <cmath>

#include "host.h"

namespace ditkernels {
namespace {

constexpr int64_t PIECE = 8192;

const OptimizerKernels& kernels() {
  static const OptimizerKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, optimizer)};
  return *tables[isa()];
}

using Tensors = std::vector<Tensor>;

template <typename T = float>
T* data_of(const Tensors& tensors, size_t index) {
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[index].data_ptr());
}

float value_of(const OptionalTensor& tensor, float absent) {
  return tensor.has_value() ? *static_cast<const float*>(tensor->data_ptr()) : absent;
}

void adamw_ema(
    Tensors weights, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors averages, Tensors copies,
    OptionalTensor grad_scale, OptionalTensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay,
    double decay) {
  if (weights.empty()) return;
  Step step = {};
  step.shrink = static_cast<float>(1.0 - lr * weight_decay);
  step.complement1 = static_cast<float>(1.0 - beta1);
  step.beta2 = static_cast<float>(beta2);
  step.complement2 = static_cast<float>(1.0 - beta2);
  step.eps = static_cast<float>(eps);
  step.towards = static_cast<float>(1.0 - decay);
  step.grad_scale = value_of(grad_scale, 1.0f);
  step.gradient = dtype_of(gradients[0]);
  step.copy = copies.empty() ? FLOAT : dtype_of(copies[0]);
  step.skipped = value_of(found_inf, 0.0f) != 0.0f;
  std::vector<Weight> all;
  std::vector<int64_t> first;  // piece of each weight, and the number of pieces
  int64_t pieces = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    float* taken = data_of(steps, i);
    const double t = static_cast<double>(*taken + 1.0f);
    if (!step.skipped) *taken += 1.0f;
    all.push_back(
        {data_of(weights, i), data_of(exp_avgs, i), data_of(exp_avg_sqs, i), data_of(averages, i), data_of<void>(gradients, i),
         data_of<void>(copies, i), weights[i].numel(), static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
         static_cast<float>(std::sqrt(1.0 - std::pow(beta2, t)))});
    first.push_back(pieces);
    pieces += ceil_div(weights[i].numel(), PIECE);
  }
  const OptimizerKernels& table = kernels();
  in_parallel(pieces, PIECE, [&](int64_t begin, int64_t end) {
    // The last weight that does not begin behind the piece; one without elements has none.
    size_t owner = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t piece = begin; piece < end; ++piece) {
      while (owner + 1 < first.size() && first[owner + 1] <= piece) ++owner;
      const int64_t from = (piece - first[owner]) * PIECE;
      table.update(step, all[owner], from, std::min(from + PIECE, all[owner].size));
    }
  });
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) { library.impl("adamw_ema_cpu", TORCH_BOX(&ditkernels::adamw_ema)); }
#endif
