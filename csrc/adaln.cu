// The CUDA kernels of `adaln`: modulate_norm, gated_residual, gated_residual_norm and their backwards.
// Formulas and the names P, Q, R, S are those at the top of ditkernels/ops/adaln.py.
//
//   forward_rows   a block owns some rows of one sample.
//                  modulate_norm        reads x              writes h           2 passes
//                  gated_residual       reads x, branch      writes x1          3 passes
//                  gated_residual_norm  reads x, branch      writes x1, h       4 passes
//                  and writes mean and rstd (B, N), fp32. The statistics are those of x1 as stored.
//
//   backward_rows  a block owns one chunk of the tokens of one sample and walks through it, some rows at a time.
//                  modulate_norm        reads dh, x                 writes dx            3 passes
//                  gated_residual       reads dy, branch            writes dbranch       3 passes
//                  gated_residual_norm  reads dx1, dh, x1, branch   writes dx, dbranch   6 passes
//                  and writes its P, Q, R, S to partial sums (B, chunks, 4, D), fp32. Without a gate the branch is not read
//                  and dbranch not written.
//
//   The sums of a sample and of all samples are added up by sums.cuh.
//
// Layout: thread t holds channels 8t to 8t + 7 of every row its block owns, so that a thread's share of a row is one 16-byte
// access of bf16 and two of fp32, neighbours read side by side, and a thread's four sums are 32 registers at any width. 384, 768,
// 1024 and 1152 channels are 48, 96, 128 and 144 threads, rounded up to whole warps. Several rows at a time keep several loads in
// flight and share the barrier of the row sums. Nothing is added atomically, and the number of chunks depends on shapes
// alone: same inputs, same bits.
#include "common.cuh"
#include "sums.cuh"

namespace ditkernels {
namespace {

constexpr int FORWARD_ROWS = 4;
constexpr int BACKWARD_ROWS = 2;
constexpr int WIDEST = 512 * UNIT;
constexpr int64_t BLOCKS = 1024;
constexpr int64_t SHORTEST_CHUNK = 16;

constexpr int threads_for(int width) { return (width + UNIT * WARP - 1) / (UNIT * WARP) * WARP; }
// Rows a thread holds at a time: fewer where blocks may be wide and a thread's registers are few.
__host__ __device__ constexpr int forward_rows_held(int width) { return width == 0 ? 1 : FORWARD_ROWS; }
__host__ __device__ constexpr int backward_rows_held(int width) { return width == 0 ? 1 : BACKWARD_ROWS; }
__host__ __device__ constexpr int forward_shared(int width) { return 2 * forward_rows_held(width) * WARP * 4; }
__host__ __device__ constexpr int backward_shared(int width) { return 2 * 2 * backward_rows_held(width) * WARP * 4; }
constexpr int most_threads(int width) { return width == 0 ? threads_for(WIDEST) : threads_for(width); }

template <typename T, typename U>
struct Forward {
  Tokens<T> x, x1;
  Tokens<U> branch, h;
  Vector gate, branch_bias, shift, scale, weight, bias;
  Tokens<float> mean, rstd;
  int64_t length, blocks;
  int width;
  float eps;
};

template <typename T, typename U, int WIDTH, bool WIDE, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(most_threads(WIDTH)) forward_rows(const Forward<T, U> a) {
  constexpr int ROWS = forward_rows_held(WIDTH);
  const Shared<float> scratch{0};
  int phase = 0;
  const int width = WIDTH > 0 ? WIDTH : a.width;
  const int column = threadIdx.x * UNIT;
  const int64_t sample = blockIdx.x / a.blocks;
  const int64_t first = blockIdx.x % a.blocks * ROWS;
  const bool inside = column < width;

  Unit row[ROWS] = {};
  if (inside) {
    Unit u[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= a.length) continue;
      row[r] = load<WIDE>(a.x, sample, first + r, column, width);
      if constexpr (RESIDUAL) u[r] = load<WIDE>(a.branch, sample, first + r, column, width);
    }
    if constexpr (RESIDUAL) {
      const Unit gate = load<WIDE>(a.gate, sample, column, width, 1.0f);
      const Unit branch_bias = load<WIDE>(a.branch_bias, 0, column, width, 0.0f);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first + r >= a.length) continue;
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
          const float value = row[r].at[i] + gate.at[i] * (u[r].at[i] + branch_bias.at[i]);
          row[r].at[i] = rounded<T>(value, a.x.dtype);
        }
        store<WIDE>(a.x1, sample, first + r, column, width, row[r]);
      }
    }
  }

  if constexpr (NORM) {
    float sums[ROWS];
    if (a.mean.data != nullptr) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sums[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < UNIT; ++i) sums[r] += row[r].at[i];
      }
      block_sums(sums, scratch, phase);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const float mean = sums[r] / width;
        if (threadIdx.x == 0 && first + r < a.length) store_one(a.mean, sample, first + r, 0, mean);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) row[r].at[i] = column + i < width ? row[r].at[i] - mean : 0.0f;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sums[r] = 0.0f;
#pragma unroll
      for (int i = 0; i < UNIT; ++i) sums[r] += row[r].at[i] * row[r].at[i];
    }
    block_sums(sums, scratch, phase);
    if (!inside) return;
    const Unit weight = load<WIDE>(a.weight, 0, column, width, 1.0f);
    const Unit bias = load<WIDE>(a.bias, 0, column, width, 0.0f);
    const Unit scale = load<WIDE>(a.scale, sample, column, width, 0.0f);
    const Unit shift = load<WIDE>(a.shift, sample, column, width, 0.0f);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first + r >= a.length) continue;
      const float rstd = 1.0f / sqrtf(sums[r] / width + a.eps);
      if (threadIdx.x == 0) store_one(a.rstd, sample, first + r, 0, rstd);
#pragma unroll
      for (int i = 0; i < UNIT; ++i) {
        const float affine = row[r].at[i] * rstd * weight.at[i] + bias.at[i];
        row[r].at[i] = affine * (1.0f + scale.at[i]) + shift.at[i];
      }
      store<WIDE>(a.h, sample, first + r, column, width, row[r]);
    }
  }
}

template <typename T, typename U>
struct Backward {
  Tokens<T> dx1, x1, dx;
  Tokens<U> dh, branch, dbranch;
  Vector gate, scale, weight;
  Tokens<float> mean, rstd, partial;
  int64_t length, chunks, chunk_rows;
  int width;
};

// One block on a multiprocessor is asked for: without a number the compiler aims at more than fit and keeps registers in memory.
template <typename T, typename U, int WIDTH, bool WIDE, bool RESIDUAL, bool NORM>
__global__ void __launch_bounds__(most_threads(WIDTH), 1) backward_rows(const Backward<T, U> a) {
  constexpr int ROWS = backward_rows_held(WIDTH);
  const Shared<float> scratch{0};
  int phase = 0;
  const int width = WIDTH > 0 ? WIDTH : a.width;
  const int column = threadIdx.x * UNIT;
  const bool inside = column < width;
  const int64_t sample = blockIdx.x / a.chunks;
  const int64_t first = blockIdx.x % a.chunks * a.chunk_rows;
  const int count = static_cast<int>(first + a.chunk_rows < a.length ? a.chunk_rows : a.length - first);

  const bool gated = a.dbranch.data != nullptr, has_dx1 = a.dx1.data != nullptr;
  Unit slope = {}, gate = {}, p = {}, q = {}, r = {}, s = {};
  if (inside) {
    if constexpr (NORM) {
      const Unit scale = load<WIDE>(a.scale, sample, column, width, 0.0f);
      slope = load<WIDE>(a.weight, 0, column, width, 1.0f);
#pragma unroll
      for (int i = 0; i < UNIT; ++i) slope.at[i] *= 1.0f + scale.at[i];
    }
    if constexpr (RESIDUAL) gate = load<WIDE>(a.gate, sample, column, width, 1.0f);
  }

  for (int start = 0; start < count; start += ROWS) {
    Unit stream[ROWS] = {}, u[ROWS] = {}, dnormed[ROWS] = {}, normed[ROWS] = {};
    float mean[ROWS] = {}, rstd[ROWS] = {};
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int64_t token = first + start + k;
      if (!inside || start + k >= count) continue;
      if (!NORM || has_dx1) stream[k] = load<WIDE>(a.dx1, sample, token, column, width);
      if constexpr (RESIDUAL)
        if (gated) u[k] = load<WIDE>(a.branch, sample, token, column, width);
      if constexpr (NORM) {
        dnormed[k] = load<WIDE>(a.dh, sample, token, column, width);
        normed[k] = load<WIDE>(a.x1, sample, token, column, width);
        if (a.mean.data != nullptr) mean[k] = load_one(a.mean, sample, token, 0);
        rstd[k] = load_one(a.rstd, sample, token, 0);
      }
    }
    if constexpr (NORM) {
      float sums[2 * ROWS] = {};
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
          normed[k].at[i] = (normed[k].at[i] - mean[k]) * rstd[k];
          p.at[i] += dnormed[k].at[i];
          q.at[i] += dnormed[k].at[i] * normed[k].at[i];
          dnormed[k].at[i] *= slope.at[i];
          sums[2 * k] += dnormed[k].at[i];
          sums[2 * k + 1] += dnormed[k].at[i] * normed[k].at[i];
        }
      }
      block_sums(sums, scratch, phase);
#pragma unroll
      for (int k = 0; k < ROWS; ++k) {
        const float along_mean = a.mean.data != nullptr ? sums[2 * k] / width : 0.0f;
        const float along_normed = sums[2 * k + 1] / width;
#pragma unroll
        for (int i = 0; i < UNIT; ++i)
          stream[k].at[i] += rstd[k] * (dnormed[k].at[i] - along_mean - normed[k].at[i] * along_normed);
      }
    }
#pragma unroll
    for (int k = 0; k < ROWS; ++k) {
      const int64_t token = first + start + k;
      if (!inside || start + k >= count) continue;
      if constexpr (NORM) store<WIDE>(a.dx, sample, token, column, width, stream[k]);
      if constexpr (RESIDUAL) {
        Unit dbranch;
#pragma unroll
        for (int i = 0; i < UNIT; ++i) {
          r.at[i] += stream[k].at[i] * u[k].at[i];
          s.at[i] += stream[k].at[i];
          dbranch.at[i] = gate.at[i] * stream[k].at[i];
        }
        if (gated) store<WIDE>(a.dbranch, sample, token, column, width, dbranch);
      }
    }
  }

  if (!inside) return;
  const int64_t chunk = blockIdx.x % a.chunks * SUMS;
  if constexpr (NORM) {
    store<WIDE>(a.partial, sample, chunk, column, width, p);
    store<WIDE>(a.partial, sample, chunk + 1, column, width, q);
  }
  if constexpr (RESIDUAL) {
    store<WIDE>(a.partial, sample, chunk + 2, column, width, r);
    store<WIDE>(a.partial, sample, chunk + 3, column, width, s);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launch
// ---------------------------------------------------------------------------------------------------------------------

Tensor rows_of(const Tensor& like, ScalarType dtype) { return empty(like, {like.size(0), like.size(1), like.size(2)}, dtype); }

OptionalTensor if_any(const Tensor& mean) { return mean.dim() == 2 ? OptionalTensor(mean) : std::nullopt; }

void check_width(const char* name, int64_t width) {
  STD_TORCH_CHECK(width <= WIDEST, name, ": a row of ", width, " channels is wider than a block; the widest taken is ", WIDEST);
}

struct ForwardTensors {
  Tensor x;
  OptionalTensor branch, gate, branch_bias, shift, scale, weight, bias, x1, h, mean, rstd;
};

template <bool RESIDUAL, bool NORM>
void forward(const char* name, ForwardTensors t, double eps) {
  const int64_t batch = t.x.size(0), length = t.x.size(1), width = t.x.size(2);
  check_width(name, width);
  for (OptionalTensor* v : {&t.gate, &t.branch_bias, &t.shift, &t.scale, &t.weight, &t.bias}) *v = packed(*v);
  const bool wide = all_wide(OptionalTensor(t.x), t.branch, t.gate, t.branch_bias, t.shift, t.scale, t.weight, t.bias);
  const Tensor& second = RESIDUAL ? *t.branch : *t.h;
  const bool uniform = !t.branch.has_value() || !t.h.has_value() || t.branch->scalar_type() == t.h->scalar_type();
  by_row(
      t.x.scalar_type(), uniform ? second.scalar_type() : MIXED, width, wide,
      [&](auto stream, auto other, auto known, auto reach) {
    using T = decltype(stream);
    using U = decltype(other);
    Forward<T, U> a;
    a.x = tokens<T>("x", t.x);
    a.x1 = tokens<T>("x1", t.x1);
    a.branch = tokens<U>("branch", t.branch);
    a.h = tokens<U>("h", t.h);
    a.gate = vector("gate", t.gate);
    a.branch_bias = vector("branch_bias", t.branch_bias);
    a.shift = vector("shift", t.shift);
    a.scale = vector("scale", t.scale);
    a.weight = vector("weight", t.weight);
    a.bias = vector("bias", t.bias);
    a.mean = tokens<float>("mean", t.mean);
    a.rstd = tokens<float>("rstd", t.rstd);
    a.length = length;
    a.blocks = ceil_div(length, forward_rows_held(known));
    a.width = static_cast<int>(width);
    a.eps = static_cast<float>(eps);
    launch<forward_rows<T, U, known, reach, RESIDUAL, NORM>, most_threads(known), forward_shared(known)>(
        name, batch * a.blocks, t.x, a, threads_for(a.width));
  });
}

struct BackwardTensors {
  OptionalTensor dx1, dh, x1, branch, gate, scale, branch_bias, weight, bias, mean, rstd;
  OptionalTensor dx, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias;
};

// As many chunks as fill a GPU, but none so short that its partial sums would outweigh it. From shapes alone.
int64_t rows_of_a_chunk(int64_t batch, int64_t length) {
  int64_t wanted = ceil_div(BLOCKS, batch > 0 ? batch : 1);
  const int64_t most = ceil_div(length, SHORTEST_CHUNK);
  if (wanted > most) wanted = most;
  if (wanted < 1) wanted = 1;
  return ceil_div(ceil_div(length > 0 ? length : 1, wanted), BACKWARD_ROWS) * BACKWARD_ROWS;
}

template <bool RESIDUAL, bool NORM>
void backward(const char* name, BackwardTensors t) {
  const Tensor& stream = NORM ? *t.x1 : *t.dx1;
  const Tensor& second = NORM ? *t.dh : *t.branch;
  const int64_t batch = stream.size(0), length = stream.size(1), width = stream.size(2);
  check_width(name, width);
  for (OptionalTensor* v : {&t.gate, &t.scale, &t.branch_bias, &t.weight, &t.bias}) *v = packed(*v);
  const bool wide = all_wide(t.dx1, t.dh, t.x1, t.branch, t.gate, t.scale, t.weight);
  const int64_t chunk_rows = rows_of_a_chunk(batch, length), chunks = ceil_div(length, chunk_rows);
  const Tensor partial = empty(stream, {batch, chunks * SUMS, width}, ScalarType::Float);

  const bool uniform = same_dtype(t.dx1, stream) && same_dtype(t.branch, second);
  by_row(
      stream.scalar_type(), uniform ? second.scalar_type() : MIXED, width, wide,
      [&](auto first, auto other, auto known, auto reach) {
    using T = decltype(first);
    using U = decltype(other);
    Backward<T, U> a;
    a.dx1 = tokens<T>("dx1", t.dx1);
    a.x1 = tokens<T>("x1", t.x1);
    a.dx = tokens<T>("dx", t.dx);
    a.dh = tokens<U>("dh", t.dh);
    a.branch = tokens<U>("branch", t.branch);
    a.dbranch = tokens<U>("dbranch", t.dbranch);
    a.gate = vector("gate", t.gate);
    a.scale = vector("scale", t.scale);
    a.weight = vector("weight", t.weight);
    a.mean = tokens<float>("mean", t.mean);
    a.rstd = tokens<float>("rstd", t.rstd);
    a.partial = tokens<float>("partial", partial);
    a.length = length;
    a.chunks = chunks;
    a.chunk_rows = chunk_rows;
    a.width = static_cast<int>(width);
    launch<backward_rows<T, U, known, reach, RESIDUAL, NORM>, most_threads(known), backward_shared(known)>(
        name, batch * chunks, stream, a, threads_for(a.width));
  });
  add_sums(
      name, partial,
      {t.gate, t.scale, t.branch_bias, t.weight, t.bias, t.dgate, t.dshift, t.dscale, t.dbranch_bias, t.dweight, t.dbias},
      RESIDUAL, NORM, stream);
}

std::tuple<Tensor, Tensor> statistics(const Tensor& x, const std::string& norm) {
  const std::vector<int64_t> rows{x.size(0), x.size(1)};
  return {empty(x, norm == "rmsnorm" ? std::vector<int64_t>{0} : rows, ScalarType::Float), empty(x, rows, ScalarType::Float)};
}

// ---------------------------------------------------------------------------------------------------------------------
// The operators; arguments have been checked by ditkernels/ops/adaln.py
// ---------------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> modulate_norm(
    Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, std::string norm,
    double eps, ScalarType out_dtype) {
  auto [mean, rstd] = statistics(x, norm);
  const Tensor h = rows_of(x, out_dtype);
  forward<false, true>("modulate_norm", {x, {}, {}, {}, shift, scale, weight, bias, {}, h, if_any(mean), rstd}, eps);
  return {h, mean, rstd};
}

Tensor gated_residual(Tensor x, Tensor branch, OptionalTensor gate, OptionalTensor branch_bias) {
  const Tensor x1 = rows_of(x, x.scalar_type());
  forward<true, false>("gated_residual", {x, branch, gate, branch_bias, {}, {}, {}, {}, x1, {}, {}, {}}, 0.0);
  return x1;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm(
    Tensor x, Tensor branch, OptionalTensor gate, OptionalTensor shift, OptionalTensor scale, OptionalTensor branch_bias,
    OptionalTensor weight, OptionalTensor bias, std::string norm, double eps, ScalarType out_dtype) {
  auto [mean, rstd] = statistics(x, norm);
  const Tensor x1 = rows_of(x, x.scalar_type()), h = rows_of(x, out_dtype);
  forward<true, true>(
      "gated_residual_norm", {x, branch, gate, branch_bias, shift, scale, weight, bias, x1, h, if_any(mean), rstd}, eps);
  return {x1, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_norm_backward(
    Tensor dy, Tensor x, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, Tensor mean, Tensor rstd,
    OptionalTensor shift, std::string) {
  BackwardTensors t;
  t.dh = dy, t.x1 = x, t.scale = scale, t.weight = weight, t.bias = bias, t.mean = if_any(mean), t.rstd = rstd;
  const Tensor dx = rows_of(x, x.scalar_type()), dshift = empty_like(shift, x), dscale = empty_like(scale, x),
               dweight = empty_like(weight, x), dbias = empty_like(bias, x);
  t.dx = dx, t.dshift = if_given(shift, dshift), t.dscale = if_given(scale, dscale);
  t.dweight = if_given(weight, dweight), t.dbias = if_given(bias, dbias);
  backward<false, true>("modulate_norm_backward", t);
  return {dx, dshift, dscale, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    Tensor dy, Tensor branch, OptionalTensor gate, OptionalTensor branch_bias) {
  BackwardTensors t;
  t.dx1 = dy, t.branch = branch, t.gate = gate, t.branch_bias = branch_bias;
  const Tensor dbranch = gate.has_value() ? rows_of(branch, branch.scalar_type()) : nothing(branch);
  const Tensor dgate = empty_like(gate, dy), dbranch_bias = empty_like(branch_bias, dy);
  t.dbranch = if_given(gate, dbranch), t.dgate = if_given(gate, dgate), t.dbranch_bias = if_given(branch_bias, dbranch_bias);
  backward<true, false>("gated_residual_backward", t);
  return {dbranch, dgate, dbranch_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(
    OptionalTensor dx1, Tensor dh, Tensor x1, Tensor branch, OptionalTensor gate, OptionalTensor scale,
    OptionalTensor branch_bias, OptionalTensor weight, OptionalTensor bias, Tensor mean, Tensor rstd, OptionalTensor shift,
    std::string) {
  BackwardTensors t;
  t.dx1 = dx1, t.dh = dh, t.x1 = x1, t.branch = branch, t.gate = gate, t.scale = scale, t.branch_bias = branch_bias;
  t.weight = weight, t.bias = bias, t.mean = if_any(mean), t.rstd = rstd;
  const Tensor dx = rows_of(x1, x1.scalar_type());
  const Tensor dbranch = gate.has_value() ? rows_of(branch, branch.scalar_type()) : nothing(branch);
  const Tensor dgate = empty_like(gate, x1), dshift = empty_like(shift, x1), dscale = empty_like(scale, x1),
               dbranch_bias = empty_like(branch_bias, x1), dweight = empty_like(weight, x1), dbias = empty_like(bias, x1);
  t.dx = dx, t.dbranch = if_given(gate, dbranch), t.dgate = if_given(gate, dgate), t.dshift = if_given(shift, dshift);
  t.dscale = if_given(scale, dscale), t.dbranch_bias = if_given(branch_bias, dbranch_bias);
  t.dweight = if_given(weight, dweight), t.dbias = if_given(bias, dbias);
  backward<true, true>("gated_residual_norm_backward", t);
  return {dx, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("modulate_norm_cuda", TORCH_BOX(&ditkernels::modulate_norm));
  library.impl("modulate_norm_backward_cuda", TORCH_BOX(&ditkernels::modulate_norm_backward));
  library.impl("gated_residual_cuda", TORCH_BOX(&ditkernels::gated_residual));
  library.impl("gated_residual_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_backward));
  library.impl("gated_residual_norm_cuda", TORCH_BOX(&ditkernels::gated_residual_norm));
  library.impl("gated_residual_norm_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_norm_backward));
}
