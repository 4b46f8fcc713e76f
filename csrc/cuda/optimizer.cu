// The CUDA kernels of `adamw_ema`. Formulas and names are those at the top of ditkernels/ops/optimizer/__init__.py.
//
//   advance_steps   A thread owns a weight. It writes t + 1, unless the step is skipped, and to `factors` (weights, 2), fp32,
//                   lr / (1 - beta1^t) and sqrt(1 - beta2^t). It computes both in fp64, because 1 - beta^t cancels in fp32.
//
//   update_chunks   A block owns a chunk of CHUNK elements of one weight, and a thread moves eight of them at a time. It reads w,
//                   gradient, m, v and the average once, and writes w, m, v, the average and the copy once: 36 bytes a parameter in
//                   fp32, and also with gradient and copy both in bf16.
//
// A launch's arguments, at most 4 KB, hold the addresses of its tensors: STEPS steps or WEIGHTS weights. So nothing is copied to
// the device, the host does not wait, and a CUDA graph can capture the step. A replay updates the tensors that were captured.
//
// Vectorised accesses move the weights whose tensors all begin at multiples of 16 bytes and hold a multiple of eight elements.
// Launches of their own move the other weights afterwards. These kernels need no barrier and no shared memory. The same inputs give
// the same bits: no two threads touch one element.
#include <algorithm>
#include <cmath>

#include "common.cuh"

namespace ditkernels {
namespace {

constexpr int THREADS = 256;
constexpr int CHUNK = 8192;
constexpr int STEPS = 448;
constexpr int WEIGHTS = 64;  // a power of two
constexpr int KINDS = 6;
constexpr int ARGUMENT_BYTES = 4096;
constexpr int NO_CHUNK = 0x7fffffff;

// The arguments of advance_steps: the steps of some consecutive weights, and the rows of `factors` for them.
struct Steps {
  void* steps[STEPS];
  Tokens<float> factors;
  Vector found_inf;
  double lr, beta1, beta2;
  int count, first_row, first_id;
};

__global__ void __launch_bounds__(THREADS) advance_steps(const Steps a) {
  const int index = static_cast<int>(blockIdx.x) * THREADS + static_cast<int>(threadIdx.x);
  if (index >= a.count) return;
  const Tokens<float> step{static_cast<float*>(a.steps[index]), 0, 0, 0, ScalarType::Float, a.first_id + index};
  const float before = load_one(step, 0, 0, 0);
  const double t = static_cast<double>(before + 1.0f);
  const int64_t row = a.first_row + index;
  store_one(a.factors, 0, row, 0, static_cast<float>(a.lr / (1.0 - pow(a.beta1, t))));
  store_one(a.factors, 0, row, 1, static_cast<float>(sqrt(1.0 - pow(a.beta2, t))));
  const bool skipped = load_one(a.found_inf, 0, 0, 0.0f) != 0.0f;
  store_one(step, 0, 0, 0, skipped ? before : before + 1.0f);
}

// The arguments of update_chunks: some consecutive weights. Averages and copies are null where they are absent.
struct Update {
  void* weights[WEIGHTS];
  void* gradients[WEIGHTS];
  void* exp_avgs[WEIGHTS];
  void* exp_avg_sqs[WEIGHTS];
  void* averages[WEIGHTS];
  void* copies[WEIGHTS];
  int64_t sizes[WEIGHTS];
  int first_chunks[WEIGHTS];  // NO_CHUNK where there is no weight
  Tokens<float> factors;
  Vector grad_scale, found_inf;
  float shrink, complement1, beta2, complement2, eps, towards;
  int first_row, first_id;
  ScalarType gradient, copy;
};

static_assert(sizeof(Steps) <= ARGUMENT_BYTES && sizeof(Update) <= ARGUMENT_BYTES);

// The weight of the block's chunk: the last one whose first chunk is not after it. So a weight without elements is never found.
__device__ __forceinline__ int owner(const int (&first_chunks)[WEIGHTS]) {
  int weight = 0;
  UNROLL for (int apart = WEIGHTS / 2; apart > 0; apart /= 2) {
    if (first_chunks[weight + apart] <= static_cast<int>(blockIdx.x)) weight += apart;
  }
  return weight;
}

// A tensor whose chunks are tokens of CHUNK channels.
template <typename T>
__device__ __forceinline__ Tokens<T> chunks_of(void* data, ScalarType dtype, int id) {
  Tokens<T> tensor;
  tensor.data = static_cast<decltype(tensor.data)>(data);
  tensor.token = CHUNK;
  tensor.channel = 1;
  tensor.dtype = dtype;
  tensor.id = id;
  return tensor;
}

// G and C are the dtypes of gradients and copies.
template <typename G, typename C, bool VECTORISED>
__global__ void __launch_bounds__(THREADS) update_chunks(const Update a) {
  const int weight = owner(a.first_chunks), id = a.first_id + weight * KINDS;
  const Tokens<float> weights = chunks_of<float>(a.weights[weight], ScalarType::Float, id);
  const Tokens<G> gradients = chunks_of<G>(a.gradients[weight], a.gradient, id + 1);
  const Tokens<float> exp_avgs = chunks_of<float>(a.exp_avgs[weight], ScalarType::Float, id + 2);
  const Tokens<float> exp_avg_sqs = chunks_of<float>(a.exp_avg_sqs[weight], ScalarType::Float, id + 3);
  const Tokens<float> averages = chunks_of<float>(a.averages[weight], ScalarType::Float, id + 4);
  const Tokens<C> copies = chunks_of<C>(a.copies[weight], a.copy, id + 5);
  const int64_t chunk = static_cast<int>(blockIdx.x) - a.first_chunks[weight];
  const int64_t left = a.sizes[weight] - chunk * CHUNK;
  const int width = static_cast<int>(left < CHUNK ? left : CHUNK);
  const float step_size = load_one(a.factors, 0, a.first_row + weight, 0);
  const float root = load_one(a.factors, 0, a.first_row + weight, 1);
  const float scale = load_one(a.grad_scale, 0, 0, 1.0f);
  const bool skipped = load_one(a.found_inf, 0, 0, 0.0f) != 0.0f;

  UNROLL_BY(1) for (int column = static_cast<int>(threadIdx.x) * UNIT; column < width; column += THREADS * UNIT) {
    Unit w = load<VECTORISED>(weights, 0, chunk, column, width);
    const Unit gradient = load<VECTORISED>(gradients, 0, chunk, column, width);
    Unit m = load<VECTORISED>(exp_avgs, 0, chunk, column, width);
    Unit v = load<VECTORISED>(exp_avg_sqs, 0, chunk, column, width);
    Unit average = {};
    if (averages.data != nullptr) average = load<VECTORISED>(averages, 0, chunk, column, width);
    UNROLL for (int i = 0; i < UNIT; ++i) {
      const float g = gradient.at[i] / scale;
      const float new_m = m.at[i] + a.complement1 * (g - m.at[i]);
      const float new_v = a.beta2 * v.at[i] + a.complement2 * (g * g);
      const float denominator = sqrtf(new_v) / root + a.eps;
      const float new_w = a.shrink * w.at[i] - step_size * (new_m / denominator);
      w.at[i] = skipped ? w.at[i] : new_w;
      m.at[i] = skipped ? m.at[i] : new_m;
      v.at[i] = skipped ? v.at[i] : new_v;
      average.at[i] += a.towards * (w.at[i] - average.at[i]);
    }
    store<VECTORISED>(weights, 0, chunk, column, width, w);
    store<VECTORISED>(exp_avgs, 0, chunk, column, width, m);
    store<VECTORISED>(exp_avg_sqs, 0, chunk, column, width, v);
    if (averages.data != nullptr) store<VECTORISED>(averages, 0, chunk, column, width, average);
    if (copies.data != nullptr) store<VECTORISED>(copies, 0, chunk, column, width, w);
  }
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

using Tensors = std::vector<Tensor>;

// A list with one tensor for each weight, or an empty list, and the member of Update that takes the addresses.
struct Kind {
  const char* name;
  const Tensors& tensors;
  void* (Update::*addresses)[WEIGHTS];
};

// What all launches of a step share. `order`: the indices of the weights, those with vectorised accesses before the others.
struct Step {
  const Kind (&kinds)[KINDS];
  const Tensors& steps;
  std::vector<int64_t> order = {};
  Steps advanced = {};
  Update updated = {};
};

bool is_vectorised(const Kind (&kinds)[KINDS], size_t weight) {
  for (const Kind& kind : kinds) {
    if (kind.tensors.empty()) continue;
    const Tensor& tensor = kind.tensors[weight];
    if (tensor.numel() % UNIT != 0 || reinterpret_cast<uintptr_t>(tensor.data_ptr()) % sizeof(Word) != 0) return false;
  }
  return true;
}

void advance(const Step& step, int64_t first) {
  Steps a = step.advanced;
  a.count = static_cast<int>(std::min<int64_t>(STEPS, step.order.size() - first));
  a.first_row = static_cast<int>(first);
  for (int i = 0; i < a.count; ++i) {
    const int64_t weight = step.order[first + i];
    const int id = describe("steps", step.steps[weight], weight);
    if (i == 0) a.first_id = id;
    a.steps[i] = step.steps[weight].data_ptr();
  }
  launch<advance_steps, THREADS>("adamw_ema", ceil_div(a.count, THREADS), step.steps[0], a);
}

// Updates the weights at places `first` to `end` - 1 of `order`, but at most as many as one launch takes.
void update(const Step& step, int64_t first, int64_t end, bool vectorised) {
  Update a = step.updated;
  std::fill_n(a.first_chunks, WEIGHTS, NO_CHUNK);
  int64_t chunks = 0;
  for (int64_t i = 0; i < std::min<int64_t>(WEIGHTS, end - first); ++i) {
    const int64_t weight = step.order[first + i];
    const Tensor& own = step.kinds[0].tensors[weight];
    for (const Kind& kind : step.kinds) {
      // An absent kind is described too, because the kernel computes a tensor's id from the index of its kind.
      const Tensor& tensor = kind.tensors.empty() ? own : kind.tensors[weight];
      const int id = describe(kind.name, tensor, weight);
      if (i == 0 && &kind == step.kinds) a.first_id = id;
      (a.*kind.addresses)[i] = kind.tensors.empty() ? nullptr : tensor.data_ptr();
    }
    a.sizes[i] = own.numel();
    a.first_chunks[i] = static_cast<int>(chunks);
    chunks += ceil_div(a.sizes[i], CHUNK);
  }
  a.first_row = static_cast<int>(first);
  by_layout(a.gradient, a.copy, vectorised, [&](auto gradient, auto copy, auto by_words) {
    launch<update_chunks<decltype(gradient), decltype(copy), by_words>, THREADS>("adamw_ema", chunks, step.steps[0], a);
  });
}

void adamw_ema(
    Tensors weights, Tensors gradients, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps, Tensors averages, Tensors copies,
    OptionalTensor grad_scale, OptionalTensor found_inf, double lr, double beta1, double beta2, double eps, double weight_decay,
    double decay) {
  const Kind kinds[KINDS] = {{"weights", weights, &Update::weights},    {"gradients", gradients, &Update::gradients},
                             {"exp_avgs", exp_avgs, &Update::exp_avgs}, {"exp_avg_sqs", exp_avg_sqs, &Update::exp_avg_sqs},
                             {"averages", averages, &Update::averages}, {"copies", copies, &Update::copies}};
  const int64_t all = static_cast<int64_t>(weights.size());
  const Tensor factors = empty(weights[0], {all, 2}, ScalarType::Float);
  Step step{kinds, steps};
  Update& u = step.updated;
  u.factors = matrix<float>("factors", factors);
  u.grad_scale = vector("grad_scale", grad_scale);
  u.found_inf = vector("found_inf", found_inf);
  u.shrink = static_cast<float>(1.0 - lr * weight_decay);
  u.complement1 = static_cast<float>(1.0 - beta1);
  u.beta2 = static_cast<float>(beta2);
  u.complement2 = static_cast<float>(1.0 - beta2);
  u.eps = static_cast<float>(eps);
  u.towards = static_cast<float>(1.0 - decay);
  u.gradient = gradients[0].scalar_type();
  u.copy = copies.empty() ? u.gradient : copies[0].scalar_type();
  step.advanced = {.factors = u.factors, .found_inf = u.found_inf, .lr = lr, .beta1 = beta1, .beta2 = beta2};
  std::vector<int64_t> others;
  for (int64_t i = 0; i < all; ++i) (is_vectorised(kinds, i) ? step.order : others).push_back(i);
  const int64_t vectorised = static_cast<int64_t>(step.order.size());
  step.order.insert(step.order.end(), others.begin(), others.end());
  for (int64_t first = 0; first < all; first += STEPS) advance(step, first);
  for (int64_t first = 0; first < vectorised; first += WEIGHTS) update(step, first, vectorised, true);
  for (int64_t first = vectorised; first < all; first += WEIGHTS) update(step, first, all, false);
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("adamw_ema_cuda", TORCH_BOX(&ditkernels::adamw_ema));
}
