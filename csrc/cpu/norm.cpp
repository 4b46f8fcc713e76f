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
//
// Of the ops by token (norm/by_token.py), the forward reads a token's own row of the vectors. Without an index, the backward writes the
// gradients of that row as it reads the token, and sums only what all tokens share. With one it walks through the tokens of a row, which
// `order` lists, as through those of a sample: a row of a sample has its chunks, and their number is by shapes.
//
// Of the ops with a branch norm (norm/branch_norm.py), the forward reads a branch's row once more from the L1 cache, for its mean square.
// The backward keeps dx of a row in fp32 there between a loop that makes it and the mean of c · dx · b̂, and one that makes dbranch. T
// stands in the place of S where the norm has a weight, which stands in that of the branch's bias, else in the place of R.
#include "norm.h"

namespace ditkernels {

// `stats` is null in gated_residual. `pq` and `rs` are the chunks' sums (groups * chunks, 2, width), or null if they are not
// wanted. A group is a sample, or one of the `rows` of a sample, whose tokens lie in `order` (B, N) from `starts` (B, rows + 1) on.
// `by_token`: each token has a row of its own, whose gradients are dgate, dshift and dscale. `branch_stats` is null without a branch norm,
// `branch_weighted`: that has a weight, which is given as far as it is needed.
struct NormBackward {
  Tokens dx1, dh, x1, branch, dx, dbranch;
  Vector gate, scale, weight;
  const float* stats;
  float *pq, *rs;
  int64_t tokens, width, chunks, chunk_rows;
  bool rms;
  int64_t rows = 1;
  const int64_t *order, *starts;
  bool by_token;
  Vector branch_bias, bias;
  Tokens dgate, dshift, dscale;
  const float* branch_stats;
  Vector branch_weight;
  bool branch_weighted;
};

struct NormVectors {
  const float *pq, *rs;
  Vector gate, scale, branch_bias, weight, bias;
  Vector dgate, dshift, dscale, dbranch_bias, dweight, dbias;
  int64_t groups, rows = 1, chunks, width;
};

struct NormKernels {
  void (*forward)(const NormForward&, int64_t first_row, int64_t end_row, float* scratch);
  void (*backward)(const NormBackward&, int64_t first_chunk, int64_t end_chunk, float* scratch);
  void (*vectors)(const NormVectors&, int64_t first_block, int64_t end_block);
};

constexpr int FORWARD_ROWS = 8, BACKWARD_ROWS = 16;  // of scratch, each of padded(width) floats

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, NormKernels, norm)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

// (1 + scale) · weight, which the norm's gradient and the norm are multiplied by. It may lie where the weight does.
const float* make_factor(const Vector& scale, const Vector& weight, int64_t sample, int64_t width, float* factor, float* buffer) {
  if (scale.data == nullptr) return values_of(weight, sample, width, 1.0f, factor);
  const float* given = values_of(scale, sample, width, 0.0f, factor);
  if (weight.data == nullptr) {
    each(width, [&](int64_t i, auto reach) { store(factor + i, reach, 1.0f + load(given + i, reach)); });
    return factor;
  }
  const float* of_norm = values_of(weight, sample, width, 1.0f, buffer);
  each(width, [&](int64_t i, auto reach) { store(factor + i, reach, (1.0f + load(given + i, reach)) * load(of_norm + i, reach)); });
  return factor;
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

// Room for vectors in fp32 and for rows.
struct ForwardScratch {
  float *factor, *offset, *gate, *bias, *row, *x, *branch, *x1;
};

ForwardScratch cut(float* scratch, int64_t width) {
  const int64_t n = row_floats(width);
  return {scratch,         scratch + n,     scratch + 2 * n, scratch + 3 * n,
          scratch + 4 * n, scratch + 5 * n, scratch + 6 * n, scratch + 7 * n};
}

// Which row of the vectors a token takes.
inline int64_t row_of(const NormForward& a, int64_t at) {
  if (!a.by_token) return 0;
  return a.index != nullptr ? a.index[at] : at % a.tokens;
}

// The gate, times the weight of the branch's norm.
const float* gate_of(const Vector& gate, const Vector& branch_weight, int64_t sample, int64_t width, float* made, float* buffer) {
  const float* given = values_of(gate, sample, width, 1.0f, made);
  if (branch_weight.data == nullptr) return given;
  const float* weight = values_of(branch_weight, 0, width, 1.0f, buffer);
  each(width, [&](int64_t i, auto reach) { store(made + i, reach, load(given + i, reach) * load(weight + i, reach)); });
  return made;
}

// 1/rms of a row of the branch.
template <typename U>
float rstd_of(const U* row, int64_t width, float eps) {
  Lanes squares[SUMS] = {};
  add_up(width, [&](int64_t i, int j, auto reach) {
    const Lanes value = load(row + i, reach);
    squares[j] += value * value;
  });
  return 1.0f / __builtin_sqrtf(total(squares) / width + eps);
}

// What a row of the vectors makes of a token: x1 = x + gate · u, h = x̂ · factor + offset, where offset = (1 + scale) · bias + shift.
struct Modulation {
  const float *gate, *factor, *offset;
};

Modulation modulation_of(const NormForward& a, int64_t sample, int64_t row, const ForwardScratch& s) {
  const Vector scale = row_of(a.scale, row);
  const float* gate = gate_of(row_of(a.gate, row), a.branch_weight, sample, a.width, s.gate, s.row);
  const float* offset = values_of(row_of(a.shift, row), sample, a.width, 0.0f, s.offset);
  if (a.bias.data != nullptr) {
    const float *shift = offset, *bias = make_factor(scale, a.bias, sample, a.width, s.row, s.x);
    each(a.width, [&](int64_t i, auto reach) { store(s.offset + i, reach, load(shift + i, reach) + load(bias + i, reach)); });
    offset = s.offset;
  }
  return {gate, make_factor(scale, a.weight, sample, a.width, s.factor, s.row), offset};
}

template <typename X>
void norm_rows(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const ForwardScratch s = cut(scratch, a.width);
  Modulation by = {};
  int64_t last = -1;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens, row = row_of(a, at);
    if (token == 0 || row != last) by = modulation_of(a, sample, row, s);
    last = row;
    const X* x = row_of<X>(a.x, sample, token, a.width, reinterpret_cast<X*>(s.x));
    if constexpr (DTYPE<X> == FLOAT) {
      const auto value = [&](int64_t i, auto reach, float absent) { return load(x + i, reach, absent); };
      finish(a, at, x, moments(a, x, value), by.factor, by.offset);
    } else {
      const auto value = [&](int64_t i, auto reach, float absent) { return store(s.row + i, reach, load(x + i, reach, absent)); };
      finish(a, at, s.row, moments(a, s.row, value), by.factor, by.offset);
    }
  }
}

template <typename X, typename U>
void residual_rows(const NormForward& a, int64_t begin, int64_t end, float* scratch) {
  const ForwardScratch s = cut(scratch, a.width);
  const float* bias = values_of(a.branch_bias, 0, a.width, 0.0f, s.bias);
  Modulation by = {};
  int64_t last = -1;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens, row = row_of(a, at);
    if (token == 0 || row != last) by = modulation_of(a, sample, row, s);
    last = row;
    const X* x = row_of<X>(a.x, sample, token, a.width, reinterpret_cast<X*>(s.x));
    const U* branch = row_of<U>(a.branch, sample, token, a.width, reinterpret_cast<U*>(s.branch));
    X* x1 = place_of<X>(a.x1, sample, token, reinterpret_cast<X*>(s.x1));
    const float rstd = a.branch_norm ? rstd_of(branch, a.width, a.branch_eps) : 1.0f;
    if (a.branch_stats != nullptr) a.branch_stats[at] = rstd;
    const auto value = [&](int64_t i, auto reach, float absent) {
      const Lanes u = load(branch + i, reach) * rstd + load(bias + i, reach);
      return store(x1 + i, reach, load(x + i, reach, absent) + load(by.gate + i, reach) * u);
    };
    if (a.h.data == nullptr) {
      each(a.width, [&](int64_t i, auto reach) { value(i, reach, 0.0f); });
    } else if constexpr (DTYPE<X> == FLOAT) {
      finish(a, at, x1, moments(a, x1, value), by.factor, by.offset);
    } else {
      const auto kept = [&](int64_t i, auto reach, float absent) { return store(s.row + i, reach, value(i, reach, absent)); };
      finish(a, at, s.row, moments(a, s.row, kept), by.factor, by.offset);
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

// What the second loop does with dx beside storing it. NORMED: all there is, of a branch with a norm.
enum class Branch { NONE, GRADIENT, SUMS, NORMED };

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

// The same with a branch norm: `gate` is times its weight, `dx` has room for a row, and `sum` for T or is null.
template <typename U, typename Value>
void through_branch_norm(
    int64_t width, const Value& value, const float* gate, float rstd, const U* branch, U* dbranch, float* sum, float* dx) {
  Lanes products[SUMS] = {};
  add_up(width, [&](int64_t i, int j, auto reach) {
    const Lanes gradient = value(i, reach), product = gradient * (load(branch + i, reach) * rstd);
    store(dx + i, reach, gradient);
    products[j] += load(gate + i, reach) * product;
    if (sum != nullptr) add(sum + i, reach, product);
  });
  const float product = total(products) / width;
  each(width, [&](int64_t i, auto reach) {
    const Lanes normed = load(branch + i, reach) * rstd;
    store(dbranch + i, reach, rstd * (load(gate + i, reach) * load(dx + i, reach) - normed * product));
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

// Takes dx of a row to the branch; `room` is for a row.
template <Branch WANTED, typename X, typename U, typename Value>
[[gnu::always_inline]] inline void through_branch(
    const NormBackward& a, int64_t at, const Rows<X, U>& row, const Value& value, const float* gate, float* rs, float* room) {
  if constexpr (WANTED == Branch::NORMED) {
    float* sum = rs != nullptr && a.branch_weighted ? rs + a.width : rs;
    through_branch_norm(a.width, value, gate, a.branch_stats[at], row.branch, row.dbranch, sum, room);
  } else {
    through_gate<WANTED>(a.width, value, gate, row.branch, row.dbranch, rs);
  }
}

template <Branch WANTED, typename X, typename U>
void second_loop(
    const NormBackward& a, int64_t at, const Rows<X, U>& row, const float* factor, Moments m, Means means, const float* gate,
    float* rs, float* room) {
  const auto value = [&](int64_t i, auto reach) {
    const Lanes normed = (load(row.x1 + i, reach) - m.mean) * m.rstd;
    const Lanes dnormed = load(row.dh + i, reach) * load(factor + i, reach);
    const Lanes of_norm = (dnormed - means.dnormed) - normed * means.product;
    const Lanes dx = load(row.dx1 + i, reach) + m.rstd * of_norm;
    store(row.dx + i, reach, dx);
    return dx;
  };
  through_branch<WANTED>(a, at, row, value, gate, rs, room);
}

template <Branch WANTED, typename X, typename U>
void backward_row(
    const NormBackward& a, int64_t at, const Rows<X, U>& row, const float* factor, const float* gate, float* pq, float* rs,
    float* room) {
  if (a.stats == nullptr) {
    const auto value = [&](int64_t i, auto reach) { return load(row.dx1 + i, reach); };
    return through_branch<WANTED>(a, at, row, value, gate, rs, room);
  }
  const Moments m = a.rms ? Moments{0.0f, a.stats[at]} : Moments{a.stats[2 * at], a.stats[2 * at + 1]};
  Means means = pq != nullptr ? first_loop<true>(a.width, row.x1, row.dh, factor, m, pq)
                              : first_loop<false>(a.width, row.x1, row.dh, factor, m, pq);
  if (a.rms) means.dnormed = 0.0f;
  if (WANTED == Branch::NONE && a.dx.data == nullptr) return;
  second_loop<WANTED>(a, at, row, factor, m, means, gate, rs, room);
}

// The tokens of a chunk: places in `order`, or tokens themselves.
struct Span {
  int64_t sample, row, first, end;
};

Span span_of(const NormBackward& a, int64_t chunk) {
  const int64_t group = chunk / a.chunks, part = chunk % a.chunks, sample = group / a.rows, row = group % a.rows;
  int64_t begin = 0, end = a.tokens, share = a.chunk_rows;
  if (a.starts != nullptr) {
    const int64_t* starts = a.starts + sample * (a.rows + 1) + row;
    begin = starts[0], end = starts[1], share = (end - begin + a.chunks - 1) / a.chunks;
  }
  const int64_t first = begin + part * share, last = first + share;
  return {sample, row, first, last < end ? last : end};
}

// The loops over a row that has vectors of its own. `dscale` and `dgate` may be null, and so may the sums.
template <typename X, typename U>
void backward_token(
    const NormBackward& a, int64_t sample, int64_t token, const Rows<X, U>& row, float* scratch, float* pq, float* rs) {
  const int64_t n = row_floats(a.width), width = a.width;
  const Vector one = {};
  const float* gate = values_of(row_of(a.gate, token), sample, width, 1.0f, scratch);
  const float* branch_bias = values_of(a.branch_bias, 0, width, 0.0f, scratch + n);
  float* dgate = a.dgate.data == nullptr ? nullptr : place_of<float>(a.dgate, sample, token, scratch + 2 * n);
  const auto through = [&](const auto& value) {
    each(width, [&](int64_t i, auto reach) {
      const Lanes dx = value(i, reach), dbranch = load(gate + i, reach) * dx;
      store(row.dbranch + i, reach, dbranch);
      if (dgate != nullptr) store(dgate + i, reach, dx * (load(row.branch + i, reach) + load(branch_bias + i, reach)));
      if (rs != nullptr) add(rs + width + i, reach, dbranch);
    });
    if (dgate != nullptr) put(a.dgate, sample, token, width, scratch + 2 * n);
  };
  if (a.stats == nullptr) return through([&](int64_t i, auto reach) { return load(row.dx1 + i, reach); });

  const int64_t at = sample * a.tokens + token;
  const Moments m = a.rms ? Moments{0.0f, a.stats[at]} : Moments{a.stats[2 * at], a.stats[2 * at + 1]};
  const float* weight = values_of(a.weight, 0, width, 1.0f, scratch + 3 * n);
  const float* bias = values_of(a.bias, 0, width, 0.0f, scratch + 4 * n);
  const float* modulation = make_factor(row_of(a.scale, token), one, sample, width, scratch + 5 * n, nullptr);
  float* dscale = a.dscale.data == nullptr ? nullptr : place_of<float>(a.dscale, sample, token, scratch + 6 * n);
  Lanes sums[SUMS] = {}, products[SUMS] = {};
  add_up(width, [&](int64_t i, int j, auto reach) {
    const Lanes gradient = load(row.dh + i, reach), modulated = gradient * load(modulation + i, reach);
    const Lanes normed = (load(row.x1 + i, reach) - m.mean) * m.rstd;
    const Lanes dnormed = modulated * load(weight + i, reach);
    sums[j] += dnormed;
    products[j] += dnormed * normed;
    if (dscale != nullptr) store(dscale + i, reach, gradient * (normed * load(weight + i, reach) + load(bias + i, reach)));
    if (pq != nullptr) {
      add(pq + i, reach, modulated);
      add(pq + width + i, reach, modulated * normed);
    }
  });
  if (dscale != nullptr) put(a.dscale, sample, token, width, scratch + 6 * n);
  if (a.dshift.data != nullptr) {
    float* dshift = place_of<float>(a.dshift, sample, token, scratch + 6 * n);
    each(width, [&](int64_t i, auto reach) { store(dshift + i, reach, load(row.dh + i, reach)); });
    put(a.dshift, sample, token, width, scratch + 6 * n);
  }
  if (a.dx.data == nullptr && a.dbranch.data == nullptr && dgate == nullptr && rs == nullptr) return;
  const float mean = a.rms ? 0.0f : total(sums) / width, product = total(products) / width;
  const auto value = [&](int64_t i, auto reach) {
    const Lanes normed = (load(row.x1 + i, reach) - m.mean) * m.rstd;
    const Lanes dnormed = (load(row.dh + i, reach) * load(modulation + i, reach)) * load(weight + i, reach);
    const Lanes dx = load(row.dx1 + i, reach) + m.rstd * ((dnormed - mean) - normed * product);
    store(row.dx + i, reach, dx);
    return dx;
  };
  if (a.dbranch.data != nullptr || dgate != nullptr || rs != nullptr) return through(value);
  each(width, [&](int64_t i, auto reach) { value(i, reach); });
}

template <Branch WANTED, typename X, typename U>
void backward_chunk(const NormBackward& a, int64_t chunk, float* scratch) {
  const int64_t n = row_floats(a.width);
  const Span span = span_of(a, chunk);
  float *zeros = scratch + 2 * n, *room = scratch + 3 * n, *own = scratch + 9 * n;
  const float* factor = make_factor(row_of(a.scale, span.row), a.weight, span.sample, a.width, scratch, zeros);
  const float* gate = gate_of(row_of(a.gate, span.row), a.branch_weight, span.sample, a.width, scratch + n, zeros);
  memset(zeros, 0, a.width * sizeof(float));
  float* pq = a.pq == nullptr ? nullptr : a.pq + chunk * 2 * a.width;
  float* rs = a.rs == nullptr ? nullptr : a.rs + chunk * 2 * a.width;
  if (pq != nullptr) memset(pq, 0, 2 * a.width * sizeof(float));
  if (rs != nullptr) memset(rs, 0, 2 * a.width * sizeof(float));
  const auto given = [&](const Tokens& from, int64_t token, auto type, int64_t place) {
    using T = decltype(type);
    if (from.data == nullptr) return reinterpret_cast<const T*>(zeros);
    return row_of<T>(from, span.sample, token, a.width, reinterpret_cast<T*>(room + place * n));
  };
  X* dx_room = reinterpret_cast<X*>(room + 4 * n);
  U* dbranch_room = reinterpret_cast<U*>(room + 5 * n);
  for (int64_t place = span.first; place < span.end; ++place) {
    const int64_t token = a.order == nullptr ? place : a.order[span.sample * a.tokens + place];
    const Rows<X, U> row = {
        given(a.dx1, token, X{}, 0),
        given(a.x1, token, X{}, 1),
        given(a.dh, token, U{}, 2),
        given(a.branch, token, U{}, 3),
        place_of(a.dx, span.sample, token, dx_room),
        place_of(a.dbranch, span.sample, token, dbranch_room)};
    if (a.by_token)
      backward_token(a, span.sample, token, row, own, pq, rs);
    else
      backward_row<WANTED>(a, span.sample * a.tokens + token, row, factor, gate, pq, rs, own);
    put(a.dx, span.sample, token, a.width, dx_room);
    put(a.dbranch, span.sample, token, a.width, dbranch_room);
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
      if (a.branch_stats != nullptr)
        backward_chunk<Branch::NORMED, X, U>(a, chunk, scratch);
      else if (a.rs != nullptr)
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

void add_chunks(const float* partial, const NormVectors& a, int64_t group, int64_t from, int64_t size, Sums& sums) {
  const float* chunks = partial + group * a.chunks * 2 * a.width + from;
  add_rows(chunks, a.chunks, 2 * a.width, size, sums.first);
  add_rows(chunks + a.width, a.chunks, 2 * a.width, size, sums.second);
}

// A group's part of a vector.
struct Of {
  const NormVectors& a;
  int64_t sample, row, from, size;

  void get(const Vector& vector, float absent, float* to) const { read(row_of(vector, row), sample, from, size, absent, to); }
  void put(const Vector& vector, const float* values) const { write(row_of(vector, row), sample, from, size, values); }
};

// Of P and Q: dshift and dscale of a group, and what it adds to dweight and dbias.
void through_modulation(const NormVectors& a, int64_t group, int64_t from, int64_t size, Sums& shared) {
  Sums sums;
  float scale[BLOCK], weight[BLOCK], bias[BLOCK], dscale[BLOCK];
  const Of of = {a, group / a.rows, group % a.rows, from, size};
  add_chunks(a.pq, a, group, from, size, sums);
  of.get(a.scale, 0.0f, scale);
  of.get(a.weight, 1.0f, weight);
  of.get(a.bias, 0.0f, bias);
  each(size, [&](int64_t i, auto reach) {
    const Lanes p = load(sums.first + i, reach), q = load(sums.second + i, reach), factor = 1.0f + load(scale + i, reach);
    store(dscale + i, reach, load(weight + i, reach) * q + load(bias + i, reach) * p);
    add(shared.first + i, reach, factor * q);
    add(shared.second + i, reach, factor * p);
  });
  of.put(a.dshift, sums.first);
  of.put(a.dscale, dscale);
}

// Of R and S: dgate of a group, and what it adds to dbranch_bias.
void through_residual(const NormVectors& a, int64_t group, int64_t from, int64_t size, float* shared) {
  Sums sums;
  float gate[BLOCK], bias[BLOCK], dgate[BLOCK];
  const Of of = {a, group / a.rows, group % a.rows, from, size};
  add_chunks(a.rs, a, group, from, size, sums);
  of.get(a.gate, 1.0f, gate);
  of.get(a.branch_bias, 0.0f, bias);
  each(size, [&](int64_t i, auto reach) {
    const Lanes r = load(sums.first + i, reach), s = load(sums.second + i, reach);
    store(dgate + i, reach, r + load(bias + i, reach) * s);
    add(shared + i, reach, load(gate + i, reach) * s);
  });
  of.put(a.dgate, dgate);
}

void vectors(const NormVectors& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t from = block * BLOCK, size = from + BLOCK < a.width ? BLOCK : a.width - from;
    Sums of_norm = {};
    float of_branch[BLOCK] = {};
    for (int64_t group = 0; group < a.groups; ++group) {
      if (a.pq != nullptr) through_modulation(a, group, from, size, of_norm);
      if (a.rs != nullptr) through_residual(a, group, from, size, of_branch);
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

// Which vectors a token takes: its sample's; a row of its own; or that of an index, whose tokens `order` and `starts` group. Contiguous.
struct Choice {
  OptionalTensor index, order, starts;
  bool by_token = false;

  static const int64_t* numbers(const OptionalTensor& tensor) {
    return tensor.has_value() ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr;
  }
  int64_t rows(int64_t length) const { return starts.has_value() ? starts->size(1) - 1 : length; }
};

OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(torch::stable::contiguous(*tensor)) : tensor;
}

Choice by_token(const OptionalTensor& index, const OptionalTensor& order, const OptionalTensor& starts) {
  return {packed(index), packed(order), packed(starts), true};
}

// Raises where an index names no row of a vector: the loops would read what is not there.
void check_rows(const char* op, const Choice& choice, const OptionalTensor& vector) {
  if (!choice.index.has_value() || !vector.has_value()) return;
  const int64_t* index = Choice::numbers(choice.index);
  for (int64_t i = 0; i < choice.index->numel(); ++i)
    STD_TORCH_CHECK(
        index[i] >= 0 && index[i] < vector->size(1), op, ": index: got row ", index[i], ", allowed are 0..", vector->size(1) - 1);
}

// `branch_weight` is that of a branch norm.
struct Given {
  OptionalTensor gate, shift, scale, branch_bias, weight, bias, branch_weight;
};

float* numbers(const OptionalTensor& stats) { return stats.has_value() ? static_cast<float*>(stats->data_ptr()) : nullptr; }

// A branch that is normed first, and where 1/rms of its rows goes, if it is kept.
struct BranchNorm {
  double eps;
  OptionalTensor stats;
};

NormForward forward_of(
    const char* op, const Tensor& x, const Given& given, const Choice& choice, const BranchNorm* branch_norm = nullptr) {
  for (const OptionalTensor& vector : {given.gate, given.shift, given.scale}) check_rows(op, choice, vector);
  NormForward a = {};
  a.x = tokens(x);
  a.gate = vector(given.gate);
  a.shift = vector(given.shift);
  a.scale = vector(given.scale);
  a.branch_bias = vector(given.branch_bias);
  a.branch_weight = vector(given.branch_weight);
  a.weight = vector(given.weight);
  a.bias = vector(given.bias);
  a.tokens = x.size(1);
  a.width = x.size(2);
  a.index = Choice::numbers(choice.index);
  a.by_token = choice.by_token;
  if (branch_norm == nullptr) return a;
  a.branch_norm = true;
  a.branch_eps = static_cast<float>(branch_norm->eps);
  a.branch_stats = numbers(branch_norm->stats);
  return a;
}

void finish_with_norm(NormForward& a, const Tensor& h, const Tensor& stats, const std::string& norm, double eps, bool keep) {
  a.h = tokens(h);
  a.stats = keep ? static_cast<float*>(stats.data_ptr()) : nullptr;
  a.rms = is_rms(norm);
  a.eps = static_cast<float>(eps);
  a.rounding = a.h.dtype;
  norm_forward(a, h.size(0));
}

std::tuple<Tensor, Tensor> modulated(
    const char* op, const Tensor& x, const Given& given, const Choice& choice, const std::string& norm, double eps,
    ScalarType out_dtype, bool keep) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2);
  const Tensor h = empty({samples, length, width}, number(out_dtype));
  const Tensor stats = empty_if(keep, {samples, length, columns(norm)}, FLOAT);
  NormForward a = forward_of(op, x, given, choice);
  finish_with_norm(a, h, stats, norm, eps, keep);
  return {h, stats};
}

Tensor gated(
    const char* op, const Tensor& x, const Tensor& branch, const Given& given, const Choice& choice,
    const BranchNorm* branch_norm = nullptr) {
  const Tensor x1 = empty({x.size(0), x.size(1), x.size(2)}, dtype_of(x));
  NormForward a = forward_of(op, x, given, choice, branch_norm);
  a.branch = tokens(branch);
  a.x1 = tokens(x1);
  norm_forward(a, x.size(0));
  return x1;
}

std::tuple<Tensor, Tensor, Tensor> gated_and_modulated(
    const char* op, const Tensor& x, const Tensor& branch, const Given& given, const Choice& choice, const std::string& norm,
    double eps, ScalarType out_dtype, bool keep, const BranchNorm* branch_norm = nullptr) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2);
  const Tensor x1 = empty({samples, length, width}, dtype_of(x)), h = empty({samples, length, width}, number(out_dtype));
  const Tensor stats = empty_if(keep, {samples, length, columns(norm)}, FLOAT);
  NormForward a = forward_of(op, x, given, choice, branch_norm);
  a.branch = tokens(branch);
  a.x1 = tokens(x1);
  finish_with_norm(a, h, stats, norm, eps, keep);
  return {x1, h, stats};
}

// The wanted gradients of vectors; those of gate, shift and scale have a row for each of a sample's. Of a branch with a norm, its weight's
// stands in the place of its bias's.
struct Made {
  Tensor gate, shift, scale, branch_bias, weight, bias;
};

struct WantedVectors {
  int64_t gate = -1, shift = -1, scale = -1, branch_bias = -1, weight = -1, bias = -1;
};

Made made_of(const WantedVectors& wanted, const Choice& choice, int64_t samples, int64_t length, int64_t width) {
  const auto own = [&](int64_t dtype) {
    return choice.by_token ? gradient(dtype, {samples, choice.rows(length), width}) : gradient(dtype, {samples, width});
  };
  const auto shared = [&](int64_t dtype) { return gradient(dtype, {width}); };
  return {own(wanted.gate),           own(wanted.shift),     own(wanted.scale),
          shared(wanted.branch_bias), shared(wanted.weight), shared(wanted.bias)};
}

// How the groups' tokens are cut into chunks, by shapes alone: as if all groups had as many.
void cut_into_chunks(NormBackward& a, int64_t samples) {
  const int64_t tokens = a.rows > 1 ? ceil_div(a.tokens, a.rows) : a.tokens;
  a.chunk_rows = rows_of_a_chunk(samples * a.rows, tokens);
  a.chunks = ceil_div(tokens, a.chunk_rows);
}

// Runs a backward: the rows, then the vectors. Its tensors of tokens, its statistics and its norm are set.
Made run(
    const char* op, NormBackward& a, const Given& given, const Choice& choice, const WantedVectors& wanted, int64_t samples,
    int64_t length, int64_t width) {
  const NormKernels& table = kernels();
  check_rows(op, choice, given.gate);
  check_rows(op, choice, given.scale);
  const bool grouped = choice.index.has_value();
  STD_TORCH_CHECK(
      !grouped || (choice.order.has_value() && choice.starts.has_value()), op, ": an index comes with order and starts");
  const Made made = made_of(wanted, choice, samples, length, width);
  const bool own = choice.by_token && !grouped;
  a.gate = vector(given.gate);
  a.scale = vector(given.scale);
  a.weight = vector(given.weight);
  a.bias = vector(given.bias);
  a.branch_bias = vector(given.branch_bias);
  a.branch_weight = vector(given.branch_weight);
  a.branch_weighted = given.branch_weight.has_value() || wanted.branch_bias >= 0;
  a.tokens = length;
  a.width = width;
  a.rows = grouped ? choice.rows(length) : 1;
  a.order = Choice::numbers(choice.order);
  a.starts = Choice::numbers(choice.starts);
  a.by_token = own;
  NormVectors v = {};
  if (own) {
    a.dgate = tokens(made.gate);
    a.dshift = tokens(made.shift);
    a.dscale = tokens(made.scale);
  } else {
    v.gate = a.gate;
    v.scale = a.scale;
    v.dgate = vector(made.gate);
    v.dshift = vector(made.shift);
    v.dscale = vector(made.scale);
  }
  v.branch_bias = a.branch_stats != nullptr ? a.branch_weight : a.branch_bias;
  v.weight = a.weight;
  v.bias = a.bias;
  v.dbranch_bias = vector(made.branch_bias);
  v.dweight = vector(made.weight);
  v.dbias = vector(made.bias);
  const bool of_norm = wanted.weight >= 0 || wanted.bias >= 0 || (!own && (wanted.shift >= 0 || wanted.scale >= 0));
  const bool of_residual = wanted.branch_bias >= 0 || (!own && wanted.gate >= 0);

  cut_into_chunks(a, samples);
  const int64_t groups = samples * a.rows, all = groups * a.chunks, sums = all * 2 * width;
  const Scratch pq(of_norm ? sums + 1 : 0), rs(of_residual ? sums + 1 : 0);  // there, even where there are no tokens
  a.pq = pq.get();
  a.rs = rs.get();
  in_parallel(all, a.chunk_rows * width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(BACKWARD_ROWS * padded(width));
    table.backward(a, begin, end, scratch.get());
  });
  if (!of_norm && !of_residual) return made;
  v.pq = a.pq;
  v.rs = a.rs;
  v.groups = groups;
  v.rows = a.rows;
  v.chunks = a.chunks;
  v.width = width;
  in_parallel(ceil_div(width, BLOCK), 2 * all * BLOCK, [&](int64_t begin, int64_t end) { table.vectors(v, begin, end); });
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> through_modulated(
    const char* op, const Tensor& dh, const OptionalTensor& x, const Given& given, const OptionalTensor& stats,
    const Choice& choice, const std::string& norm, const Wanted& wanted) {
  const int64_t samples = dh.size(0), length = dh.size(1), width = dh.size(2);
  const Tensor dx = gradient(wanted[0], {samples, length, width});
  NormBackward a = {};
  a.dh = tokens(dh);
  a.x1 = tokens(x);
  a.dx = tokens(dx);
  a.stats = static_cast<const float*>(stats->data_ptr());
  a.rms = is_rms(norm);
  const WantedVectors of = {-1, wanted[1], wanted[2], -1, wanted[3], wanted[4]};
  const Made made = run(op, a, given, choice, of, samples, length, width);
  return {dx, made.shift, made.scale, made.weight, made.bias};
}

std::tuple<Tensor, Tensor, Tensor> through_gated(
    const char* op, const Tensor& dx1, const OptionalTensor& branch, const Given& given, const Choice& choice, const Wanted& wanted,
    const OptionalTensor& branch_stats = {}) {
  const int64_t samples = dx1.size(0), length = dx1.size(1), width = dx1.size(2);
  const Tensor dbranch = gradient(wanted[0], {samples, length, width});
  NormBackward a = {};
  a.dx1 = tokens(dx1);
  a.branch = tokens(branch);
  a.dbranch = tokens(dbranch);
  a.branch_stats = numbers(branch_stats);
  const Made made = run(op, a, given, choice, {wanted[1], -1, -1, wanted[2]}, samples, length, width);
  return {dbranch, made.gate, made.branch_bias};
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors through_gated_and_modulated(
    const char* op, const OptionalTensor& dx1, const OptionalTensor& dh, const OptionalTensor& x1, const OptionalTensor& branch,
    const Given& given, const OptionalTensor& stats, const Choice& choice, const std::string& norm, const Wanted& wanted,
    const OptionalTensor& branch_stats = {}) {
  const int64_t samples = x1->size(0), length = x1->size(1), width = x1->size(2);
  const Tensor dx = gradient(wanted[0], {samples, length, width}), dbranch = gradient(wanted[1], {samples, length, width});
  NormBackward a = {};
  a.dx1 = tokens(dx1);
  a.dh = tokens(dh);
  a.x1 = tokens(x1);
  a.branch = tokens(branch);
  a.dx = tokens(dx);
  a.dbranch = tokens(dbranch);
  a.branch_stats = numbers(branch_stats);
  a.stats = static_cast<const float*>(stats->data_ptr());
  a.rms = is_rms(norm);
  const WantedVectors of = {wanted[2], wanted[3], wanted[4], wanted[5], wanted[6], wanted[7]};
  const Made made = run(op, a, given, choice, of, samples, length, width);
  return {dx, dbranch, made.gate, made.shift, made.scale, made.branch_bias, made.weight, made.bias};
}

// ---- Ops: of vectors per sample, of vectors of rows, and with a branch norm -----------------------------------------

using Optional = OptionalTensor;

std::tuple<Tensor, Tensor> modulate_norm(
    Tensor x, Optional shift, Optional scale, Optional weight, Optional bias, std::string norm, double eps, ScalarType out_dtype,
    bool keep) {
  return modulated("modulate_norm", x, {{}, shift, scale, {}, weight, bias}, {}, norm, eps, out_dtype, keep);
}

std::tuple<Tensor, Tensor> modulate_norm_by_token(
    Tensor x, Optional shift, Optional scale, Optional weight, Optional bias, Optional index, Optional order, Optional starts,
    std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const Choice choice = by_token(index, order, starts);
  return modulated("modulate_norm_by_token", x, {{}, shift, scale, {}, weight, bias}, choice, norm, eps, out_dtype, keep);
}

Tensor gated_residual(Tensor x, Tensor branch, Optional gate, Optional branch_bias) {
  return gated("gated_residual", x, branch, {gate, {}, {}, branch_bias}, {});
}

Tensor gated_residual_by_token(
    Tensor x, Tensor branch, Optional gate, Optional branch_bias, Optional index, Optional order, Optional starts) {
  return gated("gated_residual_by_token", x, branch, {gate, {}, {}, branch_bias}, by_token(index, order, starts));
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_bias, Optional weight, Optional bias,
    std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const Given given = {gate, shift, scale, branch_bias, weight, bias};
  return gated_and_modulated("gated_residual_norm", x, branch, given, {}, norm, eps, out_dtype, keep);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_by_token(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_bias, Optional weight, Optional bias,
    Optional index, Optional order, Optional starts, std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const Given given = {gate, shift, scale, branch_bias, weight, bias};
  const Choice choice = by_token(index, order, starts);
  return gated_and_modulated("gated_residual_norm_by_token", x, branch, given, choice, norm, eps, out_dtype, keep);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_norm_backward(
    Tensor dh, Optional x, Optional scale, Optional weight, Optional bias, Optional stats, std::string norm, Wanted wanted) {
  return through_modulated("modulate_norm_backward", dh, x, {{}, {}, scale, {}, weight, bias}, stats, {}, norm, wanted);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> modulate_norm_by_token_backward(
    Tensor dh, Optional x, Optional scale, Optional weight, Optional bias, Optional stats, Optional index, Optional order,
    Optional starts, std::string norm, Wanted wanted) {
  const Choice choice = by_token(index, order, starts);
  return through_modulated(
      "modulate_norm_by_token_backward", dh, x, {{}, {}, scale, {}, weight, bias}, stats, choice, norm, wanted);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_bias, Wanted wanted) {
  return through_gated("gated_residual_backward", dx1, branch, {gate, {}, {}, branch_bias}, {}, wanted);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_by_token_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_bias, Optional index, Optional order, Optional starts,
    Wanted wanted) {
  const Choice choice = by_token(index, order, starts);
  return through_gated("gated_residual_by_token_backward", dx1, branch, {gate, {}, {}, branch_bias}, choice, wanted);
}

EightTensors gated_residual_norm_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_bias, Optional weight,
    Optional bias, Optional stats, std::string norm, Wanted wanted) {
  const Given given = {gate, {}, scale, branch_bias, weight, bias};
  return through_gated_and_modulated("gated_residual_norm_backward", dx1, dh, x1, branch, given, stats, {}, norm, wanted);
}

EightTensors gated_residual_norm_by_token_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_bias, Optional weight,
    Optional bias, Optional stats, Optional index, Optional order, Optional starts, std::string norm, Wanted wanted) {
  const Given given = {gate, {}, scale, branch_bias, weight, bias};
  const Choice choice = by_token(index, order, starts);
  return through_gated_and_modulated(
      "gated_residual_norm_by_token_backward", dx1, dh, x1, branch, given, stats, choice, norm, wanted);
}

// What the forward keeps of a branch's norm.
BranchNorm norm_of_branch(const Tensor& x, double eps, bool keep) {
  if (!keep) return {eps, {}};
  return {eps, empty({x.size(0), x.size(1), 1}, FLOAT)};
}

Tensor kept(const BranchNorm& branch_norm) { return branch_norm.stats.has_value() ? *branch_norm.stats : nothing(); }

std::tuple<Tensor, Tensor> gated_residual_branch_norm(
    Tensor x, Tensor branch, Optional gate, Optional branch_weight, double branch_eps, bool keep) {
  const BranchNorm branch_norm = norm_of_branch(x, branch_eps, keep);
  const Given given = {gate, {}, {}, {}, {}, {}, branch_weight};
  return {gated("gated_residual_branch_norm", x, branch, given, {}, &branch_norm), kept(branch_norm)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_branch_norm(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_weight, Optional weight, Optional bias,
    double branch_eps, std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const BranchNorm branch_norm = norm_of_branch(x, branch_eps, keep);
  const Given given = {gate, shift, scale, {}, weight, bias, branch_weight};
  const auto [x1, h, stats] =
      gated_and_modulated("gated_residual_norm_branch_norm", x, branch, given, {}, norm, eps, out_dtype, keep, &branch_norm);
  return {x1, h, stats, kept(branch_norm)};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_branch_norm_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_weight, Optional branch_stats, Wanted wanted) {
  const Given given = {gate, {}, {}, {}, {}, {}, branch_weight};
  return through_gated("gated_residual_branch_norm_backward", dx1, branch, given, {}, wanted, branch_stats);
}

EightTensors gated_residual_norm_branch_norm_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_weight, Optional weight,
    Optional bias, Optional stats, Optional branch_stats, std::string norm, Wanted wanted) {
  const Given given = {gate, {}, scale, {}, weight, bias, branch_weight};
  return through_gated_and_modulated(
      "gated_residual_norm_branch_norm_backward", dx1, dh, x1, branch, given, stats, {}, norm, wanted, branch_stats);
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
  library.impl("modulate_norm_by_token_cpu", TORCH_BOX(&ditkernels::modulate_norm_by_token));
  library.impl("modulate_norm_by_token_backward_cpu", TORCH_BOX(&ditkernels::modulate_norm_by_token_backward));
  library.impl("gated_residual_by_token_cpu", TORCH_BOX(&ditkernels::gated_residual_by_token));
  library.impl("gated_residual_by_token_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_by_token_backward));
  library.impl("gated_residual_norm_by_token_cpu", TORCH_BOX(&ditkernels::gated_residual_norm_by_token));
  library.impl("gated_residual_norm_by_token_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_norm_by_token_backward));
  library.impl("gated_residual_branch_norm_cpu", TORCH_BOX(&ditkernels::gated_residual_branch_norm));
  library.impl("gated_residual_branch_norm_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_branch_norm_backward));
  library.impl("gated_residual_norm_branch_norm_cpu", TORCH_BOX(&ditkernels::gated_residual_norm_branch_norm));
  library.impl("gated_residual_norm_branch_norm_backward_cpu", TORCH_BOX(&ditkernels::gated_residual_norm_branch_norm_backward));
}
#endif
