// The CPU kernels of `modulate_norm`, `gated_residual`, `gated_residual_norm` and of their backwards. Formulas and names are
// those at the top of ditkernels/ops/norm/__init__.py.
//
//   forward    a thread owns rows: reads x and the branch once, writes x1 and h once. x1 is rounded as it is stored, then normed.
//              The row stays in the L1 cache between two loops: one makes x1 and its moments, one makes h.
//   backward   a thread owns a chunk of the rows of a sample: reads dx1, dh, x1 and the branch once, writes dx and dbranch once.
//              The first loop over a row makes the two means and adds to P and Q, the second makes dx and dbranch and adds to R
//              and S. The sums of a chunk go to memory.
//   vectors    a thread owns some channels: adds up the chunks in order, and makes the gradients of the vectors of P, Q, R and S.
//
// The moments are taken about the mean of the row's first vector: a constant row has its exact mean and a variance of 0. Where the
// row's mean is so far from it that the difference of squares would cancel, and in short rows, the variance is taken about the row's
// mean, by one more loop.
//
// Same inputs, same bits, for any number of threads: rows and chunks do not share anything, and the cut into chunks is by shapes
// alone. stats: (B, N, 2) of mean and rstd, or (B, N, 1) of rstd for rmsnorm.
#include "norm.h"

namespace ditkernels {

// `stats` is null in gated_residual. `pq` and `rs` are the chunks' sums (samples * chunks, 2, width), or null if they are not
// wanted.
struct NormBackward {
  Tokens dx1, dh, x1, branch, dx, dbranch;
  Vector gate, scale, weight;
  const float* stats;
  float *pq, *rs;
  int64_t tokens, width, chunks, chunk_rows;
  bool rms;
};

struct NormVectors {
  const float *pq, *rs;
  Vector gate, scale, branch_bias, weight, bias;
  Vector dgate, dshift, dscale, dbranch_bias, dweight, dbias;
  int64_t samples, chunks, width;
};

struct NormKernels {
  void (*forward)(const NormForward&, int64_t first_row, int64_t end_row, float* scratch);
  void (*backward)(const NormBackward&, int64_t first_chunk, int64_t end_chunk, float* scratch);
  void (*vectors)(const NormVectors&, int64_t first_block, int64_t end_block);
};

constexpr int FORWARD_ROWS = 8, BACKWARD_ROWS = 9;  // of scratch, each of padded(width) floats

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, NormKernels, norm)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

// factor = (1 + scale) · weight, which the norm's gradient and the norm are multiplied by.
void make_factor(const Vector& scale, const Vector& weight, int64_t sample, int64_t width, float* factor, float* buffer) {
  read(scale, sample, 0, width, 0.0f, factor);
  read(weight, sample, 0, width, 1.0f, buffer);
  each(width, [&](int64_t i, auto reach) { store(factor + i, reach, (1.0f + load(factor + i, reach)) * load(buffer + i, reach)); });
}

// offset = (1 + scale) · bias + shift, which is added to the norm.
void make_offset(const NormForward& a, int64_t sample, float* offset, float* buffer, float* other) {
  read(a.shift, sample, 0, a.width, 0.0f, offset);
  if (a.bias.data == nullptr) return;
  make_factor(a.scale, a.bias, sample, a.width, buffer, other);
  each(a.width, [&](int64_t i, auto reach) { store(offset + i, reach, load(offset + i, reach) + load(buffer + i, reach)); });
}

// ---- Forward --------------------------------------------------------------------------------------------------------

// `rest` is what rounding keeps from the mean. In a row that is nearly constant the values themselves differ by as little.
struct Moments {
  float mean, rstd, rest = 0.0f;
};

// In shorter rows the roundings of two sums of squares do not average out, and one more loop costs little.
constexpr int64_t SHORT = 256;

// Beside one huge square all others round alike, so that a long sum strays by each of them: it is cut into short ones.
float variance_of(const float* row, int64_t width, float about, float apart) {
  double squares = 0.0;
  for (int64_t first = 0; first < width; first += SHORT) {
    Lanes sums[SUMS] = {};
    add_up(first + SHORT < width ? SHORT : width - first, [&](int64_t i, int j, auto reach) {
      const Lanes centred = within((load(row + first + i, reach) - about) - apart, reach);
      sums[j] += centred * centred;
    });
    squares += total(sums);
  }
  return static_cast<float>(squares / width);
}

// value(i, how much of a vector, what absent lanes hold) makes the row's values from channel i on, and leaves them in `row`.
template <typename Value>
[[gnu::always_inline]] inline Moments moments(const NormForward& a, const float* row, const Value& value) {
  float about = 0.0f;
  if (!a.rms) about = a.width >= WIDTH ? total(value(0, Whole{}, 0.0f)) / WIDTH : value(0, Part{a.width}, 0.0f)[0];
  Lanes sums[SUMS] = {}, squares[SUMS] = {};
  add_up(a.width, [&](int64_t i, int j, auto reach) {
    const Lanes apart = value(i, reach, about) - about;
    sums[j] += apart;
    squares[j] += apart * apart;
  });
  const float square = total(squares) / a.width;
  if (a.rms) return {0.0f, 1.0f / __builtin_sqrtf(square + a.eps)};
  const float apart = total(sums) / a.width, mean = about + apart, added = mean - about;
  float variance = square - apart * apart;
  if (a.width < SHORT || !(variance > apart * apart)) variance = variance_of(row, a.width, about, apart);
  // Zero times a variance that has overflowed is NaN: such a row is lost, and not a row of zeros.
  const float rstd = 1.0f / __builtin_sqrtf(variance + a.eps) + 0.0f * variance;
  return {mean, rstd, (about - (mean - added)) + (apart - added)};
}

// h of a row, and its moments, if they are kept.
void finish(const NormForward& a, int64_t at, const float* row, Moments m, const float* factor, const float* offset) {
  if (a.stats != nullptr && a.rms) a.stats[at] = m.rstd;
  if (a.stats != nullptr && !a.rms) a.stats[2 * at] = m.mean, a.stats[2 * at + 1] = m.rstd;
  const float rest = m.rest * m.rstd;
  by_dtype(a.rounding, [&](auto type) {
    using T = decltype(type);
    const auto modulate = [&](auto* h) {
      each(a.width, [&](int64_t i, auto reach) {
        const Lanes normed = (load(row + i, reach) - m.mean) * m.rstd - rest;
        store(h + i, reach, rounded(normed * load(factor + i, reach) + load(offset + i, reach), T{}));
      });
    };
    if (a.h.dtype == a.rounding) return modulate(place_of<T>(a.h, at / a.tokens, at % a.tokens, nullptr));
    modulate(place_of<float>(a.h, at / a.tokens, at % a.tokens, nullptr));
  });
}

// The vectors of a sample in fp32, and room for rows.
struct ForwardScratch {
  float *factor, *offset, *gate, *bias, *row, *x, *branch, *x1;
};

ForwardScratch cut(float* scratch, int64_t width) {
  const int64_t n = row_floats(width);
  return {scratch,         scratch + n,     scratch + 2 * n, scratch + 3 * n,
          scratch + 4 * n, scratch + 5 * n, scratch + 6 * n, scratch + 7 * n};
}

template <typename X>
void norm_rows(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const ForwardScratch s = cut(scratch, a.width);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens;
    if (at == begin || token == 0) {
      make_factor(a.scale, a.weight, sample, a.width, s.factor, s.row);
      make_offset(a, sample, s.offset, s.row, s.x);
    }
    const X* x = row_of<X>(a.x, sample, token, a.width, reinterpret_cast<X*>(s.x));
    if constexpr (DTYPE<X> == FLOAT) {
      const auto value = [&](int64_t i, auto reach, float absent) { return load(x + i, reach, absent); };
      finish(a, at, x, moments(a, x, value), s.factor, s.offset);
    } else {
      const auto value = [&](int64_t i, auto reach, float absent) { return store(s.row + i, reach, load(x + i, reach, absent)); };
      finish(a, at, s.row, moments(a, s.row, value), s.factor, s.offset);
    }
  }
}

template <typename X, typename U>
void residual_rows(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const ForwardScratch s = cut(scratch, a.width);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens;
    if (at == begin || token == 0) {
      read(a.gate, sample, 0, a.width, 1.0f, s.gate);
      read(a.branch_bias, sample, 0, a.width, 0.0f, s.bias);
      make_factor(a.scale, a.weight, sample, a.width, s.factor, s.row);
      make_offset(a, sample, s.offset, s.row, s.x);
    }
    const X* x = row_of<X>(a.x, sample, token, a.width, reinterpret_cast<X*>(s.x));
    const U* branch = row_of<U>(a.branch, sample, token, a.width, reinterpret_cast<U*>(s.branch));
    X* x1 = place_of<X>(a.x1, sample, token, reinterpret_cast<X*>(s.x1));
    const auto value = [&](int64_t i, auto reach, float absent) {
      const Lanes u = load(branch + i, reach) + load(s.bias + i, reach);
      return store(x1 + i, reach, load(x + i, reach, absent) + load(s.gate + i, reach) * u);
    };
    if (a.h.data == nullptr) {
      each(a.width, [&](int64_t i, auto reach) { value(i, reach, 0.0f); });
    } else if constexpr (DTYPE<X> == FLOAT) {
      finish(a, at, x1, moments(a, x1, value), s.factor, s.offset);
    } else {
      const auto kept = [&](int64_t i, auto reach, float absent) { return store(s.row + i, reach, value(i, reach, absent)); };
      finish(a, at, s.row, moments(a, s.row, kept), s.factor, s.offset);
    }
  }
}

// body(X{}, U{}) for the dtypes of a stream and of a branch. A pair that few models have takes the branch as fp32: row_of
// converts it.
template <typename Body>
void by_dtypes(int stream, int branch, const Body& body) {
  if (stream == FLOAT && branch == BFLOAT16) return body(float{}, Bfloat16{});
  if (stream == BFLOAT16 && branch == BFLOAT16) return body(Bfloat16{}, Bfloat16{});
  by_dtype(stream, [&](auto x) { body(x, float{}); });
}

void forward(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  if (a.branch.data == nullptr) return by_dtype(a.x.dtype, [&](auto x) { norm_rows<decltype(x)>(a, begin, end, scratch); });
  by_dtypes(a.x.dtype, a.branch.dtype, [&](auto x, auto u) { residual_rows<decltype(x), decltype(u)>(a, begin, end, scratch); });
}

// ---- Backward -------------------------------------------------------------------------------------------------------

// What the second loop does with dx beside storing it.
enum class Branch { NONE, GRADIENT, SUMS };

// dbranch of a row and its part of R and S; value(i, how much) makes dx from channel i on.
template <Branch WANTED, typename U, typename Value>
[[gnu::always_inline]] inline void through_gate(
    int64_t width, const Value& value, const float* gate, const U* branch, U* dbranch, float* rs) {
  each(width, [&](int64_t i, auto reach) {
    const Lanes dx = value(i, reach);
    if constexpr (WANTED != Branch::NONE) store(dbranch + i, reach, load(gate + i, reach) * dx);
    if constexpr (WANTED == Branch::SUMS) {
      add(rs + i, reach, dx * load(branch + i, reach));
      add(rs + width + i, reach, dx);
    }
  });
}

struct Means {
  float dnormed, product;
};

// mean(dx̂) and mean(dx̂ · x̂) of a row, and its part of P and Q.
template <bool SUM, typename X, typename U>
Means first_loop(int64_t width, const X* x1, const U* dh, const float* factor, Moments m, float* pq) {
  Lanes sums[SUMS] = {}, products[SUMS] = {};
  add_up(width, [&](int64_t i, int j, auto reach) {
    const Lanes gradient = load(dh + i, reach);
    const Lanes normed = (load(x1 + i, reach) - m.mean) * m.rstd;
    const Lanes dnormed = gradient * load(factor + i, reach);
    sums[j] += dnormed;
    products[j] += dnormed * normed;
    if constexpr (SUM) {
      add(pq + i, reach, gradient);
      add(pq + width + i, reach, gradient * normed);
    }
  });
  return {total(sums) / width, total(products) / width};
}

// Where the rows of a token are.
template <typename X, typename U>
struct Rows {
  const X *dx1, *x1;
  const U *dh, *branch;
  X* dx;
  U* dbranch;
};

template <Branch WANTED, typename X, typename U>
void second_loop(int64_t width, const Rows<X, U>& row, const float* factor, Moments m, Means means, const float* gate, float* rs) {
  const auto value = [&](int64_t i, auto reach) {
    const Lanes normed = (load(row.x1 + i, reach) - m.mean) * m.rstd;
    const Lanes dnormed = load(row.dh + i, reach) * load(factor + i, reach);
    const Lanes of_norm = (dnormed - means.dnormed) - normed * means.product;
    const Lanes dx = load(row.dx1 + i, reach) + m.rstd * of_norm;
    store(row.dx + i, reach, dx);
    return dx;
  };
  through_gate<WANTED>(width, value, gate, row.branch, row.dbranch, rs);
}

template <Branch WANTED, typename X, typename U>
void backward_row(
    const NormBackward& a, int64_t at, const Rows<X, U>& row, const float* factor, const float* gate, float* pq, float* rs) {
  if (a.stats == nullptr) {
    const auto value = [&](int64_t i, auto reach) { return load(row.dx1 + i, reach); };
    return through_gate<WANTED>(a.width, value, gate, row.branch, row.dbranch, rs);
  }
  const Moments m = a.rms ? Moments{0.0f, a.stats[at]} : Moments{a.stats[2 * at], a.stats[2 * at + 1]};
  Means means = pq != nullptr ? first_loop<true>(a.width, row.x1, row.dh, factor, m, pq)
                              : first_loop<false>(a.width, row.x1, row.dh, factor, m, pq);
  if (a.rms) means.dnormed = 0.0f;
  if (WANTED == Branch::NONE && a.dx.data == nullptr) return;
  second_loop<WANTED>(a.width, row, factor, m, means, gate, rs);
}

template <Branch WANTED, typename X, typename U>
void backward_chunk(const NormBackward& a, int64_t chunk, float* scratch) {
  const int64_t n = row_floats(a.width), sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
  const int64_t end = first + a.chunk_rows < a.tokens ? first + a.chunk_rows : a.tokens;
  float *factor = scratch, *gate = scratch + n, *zeros = scratch + 2 * n, *room = scratch + 3 * n;
  make_factor(a.scale, a.weight, sample, a.width, factor, zeros);
  read(a.gate, sample, 0, a.width, 1.0f, gate);
  memset(zeros, 0, a.width * sizeof(float));
  float* pq = a.pq == nullptr ? nullptr : a.pq + chunk * 2 * a.width;
  float* rs = a.rs == nullptr ? nullptr : a.rs + chunk * 2 * a.width;
  if (pq != nullptr) memset(pq, 0, 2 * a.width * sizeof(float));
  if (rs != nullptr) memset(rs, 0, 2 * a.width * sizeof(float));
  const auto given = [&](const Tokens& from, int64_t token, auto type, int64_t place) {
    using T = decltype(type);
    if (from.data == nullptr) return reinterpret_cast<const T*>(zeros);
    return row_of<T>(from, sample, token, a.width, reinterpret_cast<T*>(room + place * n));
  };
  X* dx_room = reinterpret_cast<X*>(room + 4 * n);
  U* dbranch_room = reinterpret_cast<U*>(room + 5 * n);
  for (int64_t token = first; token < end; ++token) {
    const Rows<X, U> row = {
        given(a.dx1, token, X{}, 0),
        given(a.x1, token, X{}, 1),
        given(a.dh, token, U{}, 2),
        given(a.branch, token, U{}, 3),
        place_of(a.dx, sample, token, dx_room),
        place_of(a.dbranch, sample, token, dbranch_room)};
    backward_row<WANTED>(a, sample * a.tokens + token, row, factor, gate, pq, rs);
    put(a.dx, sample, token, a.width, dx_room);
    put(a.dbranch, sample, token, a.width, dbranch_room);
  }
}

// The dtype of all tensors that are there, or fp32, to which row_of converts, where they have several.
int common(int dtype, const Tokens& tensor) {
  if (tensor.data == nullptr || dtype == tensor.dtype) return dtype;
  return dtype == 0 ? tensor.dtype : FLOAT;
}

void backward(const NormBackward& a, int64_t begin, int64_t end, float* scratch) {
  int stream = common(common(common(0, a.dx1), a.x1), a.dx);
  if (stream == HALF) stream = FLOAT;
  const int branch = common(common(common(0, a.dh), a.branch), a.dbranch);
  by_dtypes(stream, branch, [&](auto x, auto u) {
    using X = decltype(x);
    using U = decltype(u);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (a.rs != nullptr)
        backward_chunk<Branch::SUMS, X, U>(a, chunk, scratch);
      else if (a.dbranch.data != nullptr)
        backward_chunk<Branch::GRADIENT, X, U>(a, chunk, scratch);
      else
        backward_chunk<Branch::NONE, X, U>(a, chunk, scratch);
    }
  });
}

// ---- The gradients of the vectors -----------------------------------------------------------------------------------

// Two sums over the tokens of a sample, for the channels of a block.
struct Sums {
  float first[BLOCK], second[BLOCK];
};

void add_chunks(const float* partial, const NormVectors& a, int64_t sample, int64_t from, int64_t size, Sums& sums) {
  const float* chunks = partial + sample * a.chunks * 2 * a.width + from;
  add_rows(chunks, a.chunks, 2 * a.width, size, sums.first);
  add_rows(chunks + a.width, a.chunks, 2 * a.width, size, sums.second);
}

// Of P and Q: dshift and dscale of a sample, and what it adds to dweight and dbias.
void through_modulation(const NormVectors& a, int64_t sample, int64_t from, int64_t size, Sums& shared) {
  Sums sums;
  float scale[BLOCK], weight[BLOCK], bias[BLOCK], dscale[BLOCK];
  add_chunks(a.pq, a, sample, from, size, sums);
  read(a.scale, sample, from, size, 0.0f, scale);
  read(a.weight, sample, from, size, 1.0f, weight);
  read(a.bias, sample, from, size, 0.0f, bias);
  each(size, [&](int64_t i, auto reach) {
    const Lanes p = load(sums.first + i, reach), q = load(sums.second + i, reach), factor = 1.0f + load(scale + i, reach);
    store(dscale + i, reach, load(weight + i, reach) * q + load(bias + i, reach) * p);
    add(shared.first + i, reach, factor * q);
    add(shared.second + i, reach, factor * p);
  });
  write(a.dshift, sample, from, size, sums.first);
  write(a.dscale, sample, from, size, dscale);
}

// Of R and S: dgate of a sample, and what it adds to dbranch_bias.
void through_residual(const NormVectors& a, int64_t sample, int64_t from, int64_t size, float* shared) {
  Sums sums;
  float gate[BLOCK], bias[BLOCK], dgate[BLOCK];
  add_chunks(a.rs, a, sample, from, size, sums);
  read(a.gate, sample, from, size, 1.0f, gate);
  read(a.branch_bias, sample, from, size, 0.0f, bias);
  each(size, [&](int64_t i, auto reach) {
    const Lanes r = load(sums.first + i, reach), s = load(sums.second + i, reach);
    store(dgate + i, reach, r + load(bias + i, reach) * s);
    add(shared + i, reach, load(gate + i, reach) * s);
  });
  write(a.dgate, sample, from, size, dgate);
}

void vectors(const NormVectors& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t from = block * BLOCK, size = from + BLOCK < a.width ? BLOCK : a.width - from;
    Sums of_norm = {};
    float of_branch[BLOCK] = {};
    for (int64_t sample = 0; sample < a.samples; ++sample) {
      if (a.pq != nullptr) through_modulation(a, sample, from, size, of_norm);
      if (a.rs != nullptr) through_residual(a, sample, from, size, of_branch);
    }
    write(a.dweight, 0, from, size, of_norm.first);
    write(a.dbias, 0, from, size, of_norm.second);
    write(a.dbranch_bias, 0, from, size, of_branch);
  }
}

}  // namespace

const NormKernels norm = {forward, backward, vectors};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include "host.h"

namespace ditkernels {
namespace {

const NormKernels& kernels() {
  static const NormKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, norm)};
  return *tables[isa()];
}

using Wanted = std::vector<int64_t>;

bool is_rms(const std::string& norm) { return norm == "rmsnorm"; }
int64_t columns(const std::string& norm) { return is_rms(norm) ? 1 : 2; }

std::tuple<Tensor, Tensor> modulate_norm(
    Tensor x, OptionalTensor shift, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, std::string norm, double eps,
    ScalarType out_dtype, bool keep) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2);
  const Tensor h = empty({samples, length, width}, number(out_dtype));
  const Tensor stats = empty_if(keep, {samples, length, columns(norm)}, FLOAT);
  NormForward a = {};
  a.x = tokens(x);
  a.h = tokens(h);
  a.shift = vector(shift);
  a.scale = vector(scale);
  a.weight = vector(weight);
  a.bias = vector(bias);
  a.stats = keep ? static_cast<float*>(stats.data_ptr()) : nullptr;
  a.tokens = length;
  a.width = width;
  a.rms = is_rms(norm);
  a.eps = static_cast<float>(eps);
  a.rounding = a.h.dtype;
  norm_forward(a, samples);
  return {h, stats};
}

Tensor gated_residual(Tensor x, Tensor branch, OptionalTensor gate, OptionalTensor branch_bias) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2);
  const Tensor x1 = empty({samples, length, width}, dtype_of(x));
  NormForward a = {};
  a.x = tokens(x);
  a.branch = tokens(branch);
  a.x1 = tokens(x1);
  a.gate = vector(gate);
  a.branch_bias = vector(branch_bias);
  a.tokens = length;
  a.width = width;
  norm_forward(a, samples);
  return x1;
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm(
    Tensor x, Tensor branch, OptionalTensor gate, OptionalTensor shift, OptionalTensor scale, OptionalTensor branch_bias,
    OptionalTensor weight, OptionalTensor bias, std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2);
  const Tensor x1 = empty({samples, length, width}, dtype_of(x)), h = empty({samples, length, width}, number(out_dtype));
  const Tensor stats = empty_if(keep, {samples, length, columns(norm)}, FLOAT);
  NormForward a = {};
  a.x = tokens(x);
  a.branch = tokens(branch);
  a.x1 = tokens(x1);
  a.h = tokens(h);
  a.gate = vector(gate);
  a.branch_bias = vector(branch_bias);
  a.shift = vector(shift);
  a.scale = vector(scale);
  a.weight = vector(weight);
  a.bias = vector(bias);
  a.stats = keep ? static_cast<float*>(stats.data_ptr()) : nullptr;
  a.tokens = length;
  a.width = width;
  a.rms = is_rms(norm);
  a.eps = static_cast<float>(eps);
  a.rounding = a.h.dtype;
  norm_forward(a, samples);
  return {x1, h, stats};
}

// Runs a backward: the rows, then the vectors. `of_norm` and `of_residual`: whether sums P and Q, and R and S, are needed.
void run(NormBackward& a, NormVectors& v, int64_t samples, bool of_norm, bool of_residual) {
  const NormKernels& table = kernels();
  a.chunk_rows = rows_of_a_chunk(samples, a.tokens);
  a.chunks = ceil_div(a.tokens, a.chunk_rows);
  const int64_t all = samples * a.chunks, sums = all * 2 * a.width;
  const Scratch pq(of_norm ? sums + 1 : 0), rs(of_residual ? sums + 1 : 0);  // there, even where there are no tokens
  a.pq = pq.get();
  a.rs = rs.get();
  in_parallel(all, a.chunk_rows * a.width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(BACKWARD_ROWS * padded(a.width));
    table.backward(a, begin, end, scratch.get());
  });
  if (!of_norm && !of_residual) return;
  v.pq = a.pq;
  v.rs = a.rs;
  v.samples = samples;
  v.chunks = a.chunks;
  v.width = a.width;
  in_parallel(ceil_div(a.width, BLOCK), 2 * all * BLOCK, [&](int64_t begin, int64_t end) { table.vectors(v, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_norm_backward(
    Tensor dh, OptionalTensor x, OptionalTensor scale, OptionalTensor weight, OptionalTensor bias, OptionalTensor stats,
    std::string norm, Wanted wanted) {
  const int64_t samples = dh.size(0), length = dh.size(1), width = dh.size(2);
  const Tensor dx = gradient(wanted[0], {samples, length, width});
  const Tensor dshift = gradient(wanted[1], {samples, width}), dscale = gradient(wanted[2], {samples, width});
  const Tensor dweight = gradient(wanted[3], {width}), dbias = gradient(wanted[4], {width});
  NormBackward a = {};
  a.dh = tokens(dh);
  a.x1 = tokens(x);
  a.dx = tokens(dx);
  a.scale = vector(scale);
  a.weight = vector(weight);
  a.stats = static_cast<const float*>(stats->data_ptr());
  a.tokens = length;
  a.width = width;
  a.rms = is_rms(norm);
  NormVectors v = {};
  v.scale = a.scale;
  v.weight = a.weight;
  v.bias = vector(bias);
  v.dshift = vector(dshift);
  v.dscale = vector(dscale);
  v.dweight = vector(dweight);
  v.dbias = vector(dbias);
  run(a, v, samples, wanted[1] >= 0 || wanted[2] >= 0 || wanted[3] >= 0 || wanted[4] >= 0, false);
  return {dx, dshift, dscale, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    Tensor dx1, OptionalTensor branch, OptionalTensor gate, OptionalTensor branch_bias, Wanted wanted) {
  const int64_t samples = dx1.size(0), length = dx1.size(1), width = dx1.size(2);
  const Tensor dbranch = gradient(wanted[0], {samples, length, width});
  const Tensor dgate = gradient(wanted[1], {samples, width}), dbranch_bias = gradient(wanted[2], {width});
  NormBackward a = {};
  a.dx1 = tokens(dx1);
  a.branch = tokens(branch);
  a.dbranch = tokens(dbranch);
  a.gate = vector(gate);
  a.tokens = length;
  a.width = width;
  NormVectors v = {};
  v.gate = a.gate;
  v.branch_bias = vector(branch_bias);
  v.dgate = vector(dgate);
  v.dbranch_bias = vector(dbranch_bias);
  run(a, v, samples, false, wanted[1] >= 0 || wanted[2] >= 0);
  return {dbranch, dgate, dbranch_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(
    OptionalTensor dx1, OptionalTensor dh, OptionalTensor x1, OptionalTensor branch, OptionalTensor gate, OptionalTensor scale,
    OptionalTensor branch_bias, OptionalTensor weight, OptionalTensor bias, OptionalTensor stats, std::string norm, Wanted wanted) {
  const int64_t samples = x1->size(0), length = x1->size(1), width = x1->size(2);
  const Tensor dx = gradient(wanted[0], {samples, length, width}), dbranch = gradient(wanted[1], {samples, length, width});
  const Tensor dgate = gradient(wanted[2], {samples, width}), dshift = gradient(wanted[3], {samples, width});
  const Tensor dscale = gradient(wanted[4], {samples, width}), dbranch_bias = gradient(wanted[5], {width});
  const Tensor dweight = gradient(wanted[6], {width}), dbias = gradient(wanted[7], {width});
  NormBackward a = {};
  a.dx1 = tokens(dx1);
  a.dh = tokens(dh);
  a.x1 = tokens(x1);
  a.branch = tokens(branch);
  a.dx = tokens(dx);
  a.dbranch = tokens(dbranch);
  a.gate = vector(gate);
  a.scale = vector(scale);
  a.weight = vector(weight);
  a.stats = static_cast<const float*>(stats->data_ptr());
  a.tokens = length;
  a.width = width;
  a.rms = is_rms(norm);
  NormVectors v = {};
  v.gate = a.gate;
  v.scale = a.scale;
  v.branch_bias = vector(branch_bias);
  v.weight = a.weight;
  v.bias = vector(bias);
  v.dgate = vector(dgate);
  v.dshift = vector(dshift);
  v.dscale = vector(dscale);
  v.dbranch_bias = vector(dbranch_bias);
  v.dweight = vector(dweight);
  v.dbias = vector(dbias);
  const bool of_norm = wanted[3] >= 0 || wanted[4] >= 0 || wanted[6] >= 0 || wanted[7] >= 0;
  run(a, v, samples, of_norm, wanted[2] >= 0 || wanted[5] >= 0);
  return {dx, dbranch, dgate, dshift, dscale, dbranch_bias, dweight, dbias};
}

}  // namespace

void norm_forward(const NormForward& a, int64_t samples) {
  const NormKernels& table = kernels();
  in_parallel(samples * a.tokens, a.width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(FORWARD_ROWS * padded(a.width));
    table.forward(a, begin, end, scratch.get());
  });
}

}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) {
  library.impl("modulate_norm_cpu", TORCH_BOX(&ditkernels::modulate_norm));
  library.impl("modulate_norm_backward_cpu", TORCH_BOX(&ditkernels::modulate_norm_backward));
  library.impl("gated_residual_cpu", TORCH_BOX(&ditkernels::gated_residual));
  library.impl("gated_residual_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_backward));
  library.impl("gated_residual_norm_cpu", TORCH_BOX(&ditkernels::gated_residual_norm));
  library.impl("gated_residual_norm_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_norm_backward));
}
#endif
