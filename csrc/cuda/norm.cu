// The CUDA kernels of the norm family: modulate_norm, gated_residual, gated_residual_norm and their backwards.
// Formulas and the names P, Q, R, S are those at the top of ditkernels/ops/norm/__init__.py.
//
//   forward_rows   A block owns some rows of one sample.
//                  modulate_norm        reads x              writes h           2 passes
//                  gated_residual       reads x, branch      writes x1          3 passes
//                  gated_residual_norm  reads x, branch      writes x1, h       4 passes
//                  If `keep` is set, it also writes stats (B, N, S), fp32: mean and rstd (rmsnorm: rstd) of x1 as stored.
//
//   backward_rows  A block owns one chunk of the tokens of one sample and walks through it, some rows at a time.
//                  modulate_norm        reads dh, x                 writes dx            3 passes
//                  gated_residual       reads dx1, branch           writes dbranch       3 passes
//                  gated_residual_norm  reads dx1, dh, x1, branch   writes dx, dbranch   6 passes
//                  It writes only wanted gradients and reads only what they need: not the branch without dgate, nor dx1 where only
//                  the norm's own vectors are wanted. P, Q, R and S go to partial sums (B, chunks, 4, D), fp32, if needed.
//
//   add_chunks     A thread owns one channel of one sample. It adds the chunks in order, and writes dshift, dscale, dgate (B, D)
//                  and the sample's terms of dweight, dbias, dbranch_bias (B, 3, D), fp32.
//   add_samples    A block owns 32 channels. It adds the samples' terms and writes dweight, dbias, dbranch_bias (D,).
//
// Thread t holds channels 8t to 8t + 7 of every row that its block owns. Its share of a row is then one 16-byte access of bf16 or
// two of fp32, accesses of neighbouring threads coalesce, and its four sums take 32 registers at any width. Rows of 384, 768, 1024
// and 1152 channels take 48, 96, 128 and 144 threads, rounded up to whole warps. A block holds several rows at a time: several
// loads are in flight, and one barrier serves the sums of all these rows. The same inputs give the same bits: nothing is added
// atomically, and the number of chunks depends on shapes alone.
//
// Of the ops by token (norm/by_token.py), with one row of a block at a time and dtypes known at run time:
//   forward_rows   reads the token's row of gate, shift and scale: its own, or that of an index.
//   backward_rows  TOKEN: reads the token's own gate and scale and writes the gradients of its own vectors. P, Q and S are then
//                  sums of what the vectors are in already, and R is not needed.
//                  INDEX: a block owns a chunk of the tokens of one row of a sample, in their order, and sums as for a sample. The
//                  rows of all samples are the samples of add_chunks. The number of chunks depends on shapes alone.
//
// Of the ops with a branch norm (norm/branch_norm.py), with as many rows and dtypes known at run time; its weight is `branch_bias` here:
//   forward_rows   BRANCH_NORM: norms the branch's row in registers, in the same passes, and writes branch_stats (B, N, 1) if kept.
//   backward_rows  BRANCH_NORM: makes dbranch after one more sum over the row, in the same passes. T is kept in the place of S, and
//                  without a weight in that of R, where add_chunks takes it as it takes these.
#include "common.cuh"
#include "sums.cuh"

namespace ditkernels {
namespace {

constexpr int FORWARD_ROWS = 4;
constexpr int BACKWARD_ROWS = 2;
constexpr int WIDEST = 512 * UNIT;
constexpr int64_t BLOCKS = 1024;
constexpr int64_t SHORTEST_CHUNK = 16;
constexpr int SUMS = 4;   // P, Q, R, S
constexpr int TERMS = 3;  // of dweight, dbias, dbranch_bias
constexpr int SUM_THREADS = 128;

constexpr int threads_for(int width) { return (width + UNIT * WARP - 1) / (UNIT * WARP) * WARP; }
// Rows that a block holds at a time: one at widths unknown to the compiler, whose blocks may be large and leave few registers.
__host__ __device__ constexpr int forward_rows_held(int width) { return width == 0 ? 1 : FORWARD_ROWS; }
__host__ __device__ constexpr int backward_rows_held(int width) { return width == 0 ? 1 : BACKWARD_ROWS; }
__host__ __device__ constexpr int forward_shared(int width) { return 2 * forward_rows_held(width) * WARP * 4; }
__host__ __device__ constexpr int backward_shared(int width) { return 2 * 2 * backward_rows_held(width) * WARP * 4; }
// Of the sums of backward_rows with a branch norm, behind the others.
__host__ __device__ constexpr int branch_shared(int width) { return 2 * backward_rows_held(width) * WARP * 4; }
constexpr int most_threads(int width) { return width == 0 ? threads_for(WIDEST) : threads_for(width); }

// Replaces each of COUNT values by its sum over the block, in an order that depends on the block's size alone. `scratch` holds
// 2 * COUNT * WARP floats. Calls alternate between its halves by `phase`, which saves the barrier before the next write.
template <int COUNT>
__device__ __forceinline__ void block_sums(float (&values)[COUNT], const Shared<float>& scratch, int& phase) {
  const int warps = blockDim.x / WARP;
  const int base = phase * COUNT * WARP;
  UNROLL for (int i = 0; i < COUNT; ++i) {
    values[i] = warp_sum(values[i]);
    if (threadIdx.x % WARP == 0) scratch.write(base + i * WARP + threadIdx.x / WARP, values[i]);
  }
  __syncthreads();
  UNROLL for (int i = 0; i < COUNT; ++i) {
    values[i] = 0.0f;
    for (int warp = 0; warp < warps; ++warp) values[i] += scratch.read(base + i * WARP + warp);
  }
  phase ^= 1;
}

// Whose vectors a token takes: its sample's, its own, or those of an index.
enum class By { SAMPLE, TOKEN, INDEX };

template <typename T, typename U>
struct Forward {
  Tokens<T> x, x1;
  Tokens<U> branch, h;
  Tokens<float> stats, branch_stats;
  Vectors vectors;
  Numbers index;
  int64_t length, blocks;
  int width;
  float eps, branch_eps;
  bool centred;
};

template <typename T, typename U, int WIDTH, bool VECTORISED, bool RESIDUAL, bool NORM, By BY, bool BRANCH_NORM>
__global__ void __launch_bounds__(most_threads(WIDTH)) forward_rows(const Forward<T, U> a) {
  constexpr int ROWS = forward_rows_held(WIDTH);
  static_assert(BY == By::SAMPLE || ROWS == 1, "a block reads the vectors of one row");
  const Shared<float> scratch{0};
  int phase = 0;
  const int width = WIDTH > 0 ? WIDTH : a.width;
  const int column = threadIdx.x * UNIT;
  const int64_t sample = blockIdx.x / a.blocks;
  const int64_t first = blockIdx.x % a.blocks * ROWS;
  const bool inside = column < width, keeps = threadIdx.x == 0 && a.stats.data != nullptr;
  Vectors vectors = a.vectors;
  if constexpr (BY == By::TOKEN) vectors = row_of(vectors, first);
  if constexpr (BY == By::INDEX) vectors = row_of(vectors, load_number(a.index, sample * a.length + first));

  Unit row[ROWS] = {}, u[ROWS] = {};
  if (inside) {
    UNROLL for (int r = 0; r < ROWS; ++r) {
      if (first + r >= a.length) continue;
      row[r] = load<VECTORISED>(a.x, sample, first + r, column, width);
      if constexpr (RESIDUAL) u[r] = load<VECTORISED>(a.branch, sample, first + r, column, width);
    }
  }
  if constexpr (BRANCH_NORM) {
    float squares[ROWS] = {};
    UNROLL for (int r = 0; r < ROWS; ++r) { UNROLL for (int i = 0; i < UNIT; ++i) squares[r] += u[r].at[i] * u[r].at[i]; }
    block_sums(squares, scratch, phase);
    const Unit weight = inside ? load<VECTORISED>(vectors.branch_bias, 0, column, width, 1.0f) : Unit{};
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const float rstd = 1.0f / sqrtf(squares[r] / width + a.branch_eps);
      if (threadIdx.x == 0 && a.branch_stats.data != nullptr && first + r < a.length)
        store_one(a.branch_stats, sample, first + r, 0, rstd);
      UNROLL for (int i = 0; i < UNIT; ++i) u[r].at[i] *= rstd * weight.at[i];
    }
  }
  if (inside) {
    if constexpr (RESIDUAL) {
      const Unit gate = load<VECTORISED>(vectors.gate, sample, column, width, 1.0f);
      const Unit branch_bias = BRANCH_NORM ? Unit{} : load<VECTORISED>(vectors.branch_bias, 0, column, width, 0.0f);
      UNROLL for (int r = 0; r < ROWS; ++r) {
        if (first + r >= a.length) continue;
        UNROLL for (int i = 0; i < UNIT; ++i) {
          const float value = row[r].at[i] + gate.at[i] * (u[r].at[i] + branch_bias.at[i]);
          row[r].at[i] = rounded<T>(value, a.x.dtype);
        }
        store<VECTORISED>(a.x1, sample, first + r, column, width, row[r]);
      }
    }
  }

  if constexpr (NORM) {
    float sums[ROWS];
    if (a.centred) {
      float means[ROWS] = {};
      // The second turn takes what rounding kept from the mean in the first. It leaves a constant row exactly zero.
      UNROLL for (int turn = 0; turn < 2; ++turn) {
        UNROLL for (int r = 0; r < ROWS; ++r) {
          sums[r] = 0.0f;
          UNROLL for (int i = 0; i < UNIT; ++i) sums[r] += row[r].at[i];
        }
        block_sums(sums, scratch, phase);
        UNROLL for (int r = 0; r < ROWS; ++r) {
          const float apart = sums[r] / width;
          means[r] += apart;
          UNROLL for (int i = 0; i < UNIT; ++i) row[r].at[i] = column + i < width ? row[r].at[i] - apart : 0.0f;
        }
      }
      UNROLL for (int r = 0; r < ROWS; ++r) {
        if (keeps && first + r < a.length) store_one(a.stats, sample, first + r, 0, means[r]);
      }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
      sums[r] = 0.0f;
      UNROLL for (int i = 0; i < UNIT; ++i) sums[r] += row[r].at[i] * row[r].at[i];
    }
    block_sums(sums, scratch, phase);
    if (!inside) return;
    const Unit weight = load<VECTORISED>(vectors.weight, 0, column, width, 1.0f);
    const Unit bias = load<VECTORISED>(vectors.bias, 0, column, width, 0.0f);
    const Unit scale = load<VECTORISED>(vectors.scale, sample, column, width, 0.0f);
    const Unit shift = load<VECTORISED>(vectors.shift, sample, column, width, 0.0f);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      if (first + r >= a.length) continue;
      // Zero times a sum that has overflowed is NaN: such a row is lost, and not a row of zeros.
      const float rstd = 1.0f / sqrtf(sums[r] / width + a.eps) + (a.centred ? 0.0f * sums[r] : 0.0f);
      if (keeps) store_one(a.stats, sample, first + r, a.centred ? 1 : 0, rstd);
      UNROLL for (int i = 0; i < UNIT; ++i) {
        const float affine = row[r].at[i] * rstd * weight.at[i] + bias.at[i];
        row[r].at[i] = affine * (1.0f + scale.at[i]) + shift.at[i];
      }
      store<VECTORISED>(a.h, sample, first + r, column, width, row[r]);
    }
  }
}

template <typename T, typename U>
struct Backward {
  Tokens<T> dx1, x1, dx;
  Tokens<U> dh, branch, dbranch;
  Tokens<float> stats, branch_stats, partial;
  Vectors vectors;
  Numbers order, starts;
  Tokens<Any> dgate, dshift, dscale;
  int64_t length, chunks, chunk_rows, rows;
  int width;
  bool centred, beyond_norm, norm_sums, residual_sums, branch_weighted;
};

// Absent tensors are neither read nor written. `beyond_norm`: dx, or a gradient that depends on it, is wanted.
// The launch bound asks for one block on a multiprocessor. Without it the compiler aims at more than fit and spills registers.
template <typename T, typename U, int WIDTH, bool VECTORISED, bool RESIDUAL, bool NORM, By BY, bool BRANCH_NORM>
__global__ void __launch_bounds__(most_threads(WIDTH), 1) backward_rows(const Backward<T, U> a) {
  constexpr int ROWS = backward_rows_held(WIDTH);
  const Shared<float> scratch{0}, branch_scratch{backward_shared(WIDTH)};
  int phase = 0, branch_phase = 0;
  const int width = WIDTH > 0 ? WIDTH : a.width;
  const int column = threadIdx.x * UNIT;
  const bool inside = column < width;
  // The vectors of a group serve all tokens of the block: of a sample, or of a row of one.
  const int64_t group = blockIdx.x / a.chunks, sample = BY == By::INDEX ? group / a.rows : group;
  int64_t first = blockIdx.x % a.chunks * a.chunk_rows;
  int count = static_cast<int>(first + a.chunk_rows < a.length ? a.chunk_rows : a.length - first);
  if constexpr (BY == By::INDEX) {
    const int64_t at = sample * (a.rows + 1) + group % a.rows;
    const int64_t begin = load_number(a.starts, at), end = load_number(a.starts, at + 1);
    const int64_t share = ceil_div(end - begin, a.chunks);
    first = begin + blockIdx.x % a.chunks * share;
    count = static_cast<int>(first + share < end ? share : end - first);
  }
  const auto token_at = [&](int64_t place) {
    if constexpr (BY == By::INDEX) return load_number(a.order, sample * a.length + place);
    return place;
  };

  Unit factor = {}, gate = {}, p = {}, q = {}, r = {}, s = {};
  if (inside) {
    if constexpr (NORM) {
      factor = load<VECTORISED>(a.vectors.weight, 0, column, width, 1.0f);
      if constexpr (BY != By::TOKEN) {
        const Unit scale = load<VECTORISED>(a.vectors.scale, group, column, width, 0.0f);
        UNROLL for (int i = 0; i < UNIT; ++i) factor.at[i] *= 1.0f + scale.at[i];
      }
    }
    if constexpr (RESIDUAL && BY != By::TOKEN) gate = load<VECTORISED>(a.vectors.gate, group, column, width, 1.0f);
    if constexpr (BRANCH_NORM) {
      const Unit weight = load<VECTORISED>(a.vectors.branch_bias, 0, column, width, 1.0f);
      UNROLL for (int i = 0; i < UNIT; ++i) gate.at[i] *= weight.at[i];
    }
  }

  for (int start = 0; start < count; start += ROWS) {
    Unit scale = {}, unmodulated = {};
    if constexpr (BY == By::TOKEN) {
      const Vectors own = row_of(a.vectors, first + start);
      if (inside && NORM) scale = load<VECTORISED>(own.scale, sample, column, width, 0.0f);
      if (inside && NORM) unmodulated = load<VECTORISED>(own.bias, 0, column, width, 0.0f);
      if (inside && RESIDUAL) gate = load<VECTORISED>(own.gate, sample, column, width, 1.0f);
    }
    Unit stream[ROWS] = {}, u[ROWS] = {}, dnormed[ROWS] = {}, normed[ROWS] = {};
    float mean[ROWS] = {}, rstd[ROWS] = {};
    UNROLL for (int k = 0; k < ROWS; ++k) {
      if (!inside || start + k >= count) continue;
      const int64_t token = token_at(first + start + k);
      if (!NORM || a.dx1.data != nullptr) stream[k] = load<VECTORISED>(a.dx1, sample, token, column, width);
      if constexpr (RESIDUAL)
        if (a.branch.data != nullptr) u[k] = load<VECTORISED>(a.branch, sample, token, column, width);
      if constexpr (NORM) {
        dnormed[k] = load<VECTORISED>(a.dh, sample, token, column, width);
        normed[k] = load<VECTORISED>(a.x1, sample, token, column, width);
        if (a.centred) mean[k] = load_one(a.stats, sample, token, 0);
        rstd[k] = load_one(a.stats, sample, token, a.centred ? 1 : 0);
      }
    }
    if constexpr (NORM) {
      float sums[2 * ROWS] = {};
      UNROLL for (int k = 0; k < ROWS; ++k) {
        UNROLL for (int i = 0; i < UNIT; ++i) {
          normed[k].at[i] = (normed[k].at[i] - mean[k]) * rstd[k];
          if constexpr (BY == By::TOKEN) {
            unmodulated.at[i] = dnormed[k].at[i] * (normed[k].at[i] * factor.at[i] + unmodulated.at[i]);
            dnormed[k].at[i] *= 1.0f + scale.at[i];
          }
          p.at[i] += dnormed[k].at[i];
          q.at[i] += dnormed[k].at[i] * normed[k].at[i];
          dnormed[k].at[i] *= factor.at[i];
          sums[2 * k] += dnormed[k].at[i];
          sums[2 * k + 1] += dnormed[k].at[i] * normed[k].at[i];
        }
      }
      if (a.beyond_norm) block_sums(sums, scratch, phase);
      UNROLL for (int k = 0; k < ROWS; ++k) {
        const float along_mean = a.centred ? sums[2 * k] / width : 0.0f;
        const float along_normed = sums[2 * k + 1] / width;
        UNROLL for (int i = 0; i < UNIT; ++i) {
          stream[k].at[i] += rstd[k] * (dnormed[k].at[i] - along_mean - normed[k].at[i] * along_normed);
        }
      }
    }
    float along_branch[ROWS] = {}, branch_rstd[ROWS] = {};
    if constexpr (BRANCH_NORM) {
      UNROLL for (int k = 0; k < ROWS; ++k) {
        if (!inside || start + k >= count) continue;
        branch_rstd[k] = load_one(a.branch_stats, sample, token_at(first + start + k), 0);
        UNROLL for (int i = 0; i < UNIT; ++i) {
          u[k].at[i] *= branch_rstd[k];
          along_branch[k] += gate.at[i] * stream[k].at[i] * u[k].at[i];
        }
      }
      block_sums(along_branch, branch_scratch, branch_phase);
    }
    UNROLL for (int k = 0; k < ROWS; ++k) {
      if (!inside || start + k >= count) continue;
      const int64_t token = token_at(first + start + k);
      if constexpr (NORM && BY == By::TOKEN) {
        if (a.dscale.data != nullptr) store<VECTORISED>(a.dscale, sample, token, column, width, unmodulated);
        if (a.dshift.data != nullptr)
          store<VECTORISED>(a.dshift, sample, token, column, width, load<VECTORISED>(a.dh, sample, token, column, width));
      }
      if constexpr (NORM)
        if (a.dx.data != nullptr) store<VECTORISED>(a.dx, sample, token, column, width, stream[k]);
      if constexpr (RESIDUAL) {
        Unit dbranch;
        if constexpr (BY == By::TOKEN) {
          Unit dgate = load<VECTORISED>(a.vectors.branch_bias, 0, column, width, 0.0f);
          UNROLL for (int i = 0; i < UNIT; ++i) dgate.at[i] = stream[k].at[i] * (u[k].at[i] + dgate.at[i]);
          if (a.dgate.data != nullptr) store<VECTORISED>(a.dgate, sample, token, column, width, dgate);
        }
        UNROLL for (int i = 0; i < UNIT; ++i) {
          if constexpr (BRANCH_NORM) {
            const float through = gate.at[i] * stream[k].at[i] - u[k].at[i] * (along_branch[k] / width);
            dbranch.at[i] = branch_rstd[k] * through;
            s.at[i] += u[k].at[i] * stream[k].at[i];
          } else {
            r.at[i] += stream[k].at[i] * u[k].at[i];
            dbranch.at[i] = gate.at[i] * stream[k].at[i];
            s.at[i] += BY == By::TOKEN ? dbranch.at[i] : stream[k].at[i];
          }
        }
        if (a.dbranch.data != nullptr) store<VECTORISED>(a.dbranch, sample, token, column, width, dbranch);
      }
    }
  }

  if (!inside) return;
  const int64_t chunk = blockIdx.x % a.chunks * SUMS;
  if (NORM && a.norm_sums) {
    store<VECTORISED>(a.partial, group, chunk, column, width, p);
    store<VECTORISED>(a.partial, group, chunk + 1, column, width, q);
  }
  if (RESIDUAL && a.residual_sums) {
    // Chosen number by number: a choice between two arrays would put both into memory.
    if constexpr (BRANCH_NORM) {
      UNROLL for (int i = 0; i < UNIT; ++i) r.at[i] = a.branch_weighted ? r.at[i] : s.at[i];
    }
    store<VECTORISED>(a.partial, group, chunk + 2, column, width, r);
    store<VECTORISED>(a.partial, group, chunk + 3, column, width, s);
  }
}

struct Gradients {
  Tokens<float> partial, terms;
  Vectors vectors, gradients;
  int64_t batch, chunks;
  int width, blocks;
  bool norm_sums, residual_sums;
};

__global__ void __launch_bounds__(SUM_THREADS) add_chunks(const Gradients a) {
  const int64_t sample = blockIdx.x / a.blocks;
  const int column = blockIdx.x % a.blocks * SUM_THREADS + threadIdx.x;
  if (column >= a.width) return;
  float p = 0.0f, q = 0.0f, r = 0.0f, s = 0.0f;
  for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
    if (a.norm_sums) {
      p += load_one(a.partial, sample, chunk * SUMS, column);
      q += load_one(a.partial, sample, chunk * SUMS + 1, column);
    }
    if (a.residual_sums) {
      r += load_one(a.partial, sample, chunk * SUMS + 2, column);
      s += load_one(a.partial, sample, chunk * SUMS + 3, column);
    }
  }
  store_one(a.gradients.shift, sample, column, p);
  store_one(
      a.gradients.scale, sample, column,
      load_one(a.vectors.weight, 0, column, 1.0f) * q + load_one(a.vectors.bias, 0, column, 0.0f) * p);
  store_one(a.gradients.gate, sample, column, r + load_one(a.vectors.branch_bias, 0, column, 0.0f) * s);
  if (a.terms.data == nullptr) return;
  const float modulation = 1.0f + load_one(a.vectors.scale, sample, column, 0.0f);
  store_one(a.terms, sample, 0, column, modulation * q);
  store_one(a.terms, sample, 1, column, modulation * p);
  store_one(a.terms, sample, 2, column, load_one(a.vectors.gate, sample, column, 1.0f) * s);
}

__global__ void __launch_bounds__(GROUP_THREADS) add_samples(const Gradients a) {
  const int column = blockIdx.x * WARP + threadIdx.x % WARP;
  float total[TERMS] = {};
  const int64_t batch = column < a.width ? a.batch : 0;
  UNROLL_BY(4) for (int64_t sample = threadIdx.x / WARP; sample < batch; sample += GROUP_WARPS) {
    UNROLL for (int term = 0; term < TERMS; ++term) total[term] += load_one(a.terms, sample, term, column);
  }
  add_warps(total);
  if (threadIdx.x >= WARP || column >= a.width) return;
  store_one(a.gradients.weight, 0, column, total[0]);
  store_one(a.gradients.bias, 0, column, total[1]);
  store_one(a.gradients.branch_bias, 0, column, total[2]);
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

void check_width(const char* op, int64_t width) {
  STD_TORCH_CHECK(width <= WIDEST, op, ": a row of ", width, " channels is wider than a block; the widest taken is ", WIDEST);
}

// Which vectors a token takes; contiguous integers.
struct Choice {
  By by = By::SAMPLE;
  OptionalTensor index, order, starts;

  int64_t rows() const { return starts.has_value() ? starts->size(1) - 1 : 1; }
};

Choice by_token(const OptionalTensor& index, const OptionalTensor& order, const OptionalTensor& starts) {
  return {index.has_value() ? By::INDEX : By::TOKEN, packed(index), packed(order), packed(starts)};
}

// Calls body(types of stream and branch, width, whether accesses are vectorised, whose vectors). By token, and with a branch norm, types
// and width are known at run time alone.
template <bool BRANCH_NORM, typename Body>
void by_case(By by, ScalarType stream, ScalarType branch, int64_t width, bool vectorised, Body body) {
  const auto any = [&](auto which) {
    by_truth(vectorised, [&](auto by_words) { body(Any{}, Any{}, Number<0>{}, by_words, which); });
  };
  if constexpr (BRANCH_NORM) {
    any(std::integral_constant<By, By::SAMPLE>{});
  } else {
    if (by == By::TOKEN) return any(std::integral_constant<By, By::TOKEN>{});
    if (by == By::INDEX) return any(std::integral_constant<By, By::INDEX>{});
    by_row(stream, branch, width, vectorised, [&](auto t, auto u, auto known, auto by_words) {
      body(t, u, known, by_words, std::integral_constant<By, By::SAMPLE>{});
    });
  }
}

// A norm of the branch: its eps, and 1/rms of each row as far as it is kept.
struct BranchNorm {
  double eps = 0.0;
  OptionalTensor stats;
};

template <bool RESIDUAL, bool NORM, bool BRANCH_NORM = false>
void forward(
    const char* op, const Tensor& x, const OptionalTensor& branch, VectorTensors given, const Choice& choice,
    const OptionalTensor& x1, const OptionalTensor& h, const OptionalTensor& stats, double eps, bool centred,
    const BranchNorm& branch_norm = {}) {
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  check_width(op, width);
  given = packed(given);
  const bool vectorised = all_vectorised(x, branch) && is_vectorised(given);
  by_case<BRANCH_NORM>(
      choice.by, x.scalar_type(), common_dtype(x.scalar_type(), branch, h), width, vectorised,
      [&](auto stream, auto other, auto known, auto by_words, auto by) {
    using T = decltype(stream);
    using U = decltype(other);
    const Forward<T, U> a{
        .x = tokens<T>("x", x),
        .x1 = tokens<T>("x1", x1),
        .branch = tokens<U>("branch", branch),
        .h = tokens<U>("h", h),
        .stats = tokens<float>("stats", stats),
        .branch_stats = tokens<float>("branch_stats", branch_norm.stats),
        .vectors = vectors(given),
        .index = numbers("index", choice.index),
        .length = length,
        .blocks = ceil_div(length, forward_rows_held(known)),
        .width = static_cast<int>(width),
        .eps = static_cast<float>(eps),
        .branch_eps = static_cast<float>(branch_norm.eps),
        .centred = centred};
    launch<forward_rows<T, U, known, by_words, RESIDUAL, NORM, by, BRANCH_NORM>, most_threads(known), forward_shared(known)>(
        op, batch * a.blocks, x, a, threads_for(a.width));
  });
}

struct BackwardTensors {
  OptionalTensor dx1, dh, x1, branch, stats;
  VectorTensors given;
  OptionalTensor dx, dbranch;
  VectorTensors wanted;
  OptionalTensor branch_stats = std::nullopt;
};

template <typename... Tensors>
bool any_given(const Tensors&... tensors) {
  return (tensors.has_value() || ...);
}

// (B, K, D) vectors as those of B · K samples.
VectorTensors grouped(VectorTensors t) {
  for (OptionalTensor* vector : {&t.gate, &t.shift, &t.scale})
    if (vector->has_value()) *vector = torch::stable::contiguous(**vector);
  return t;
}

Vectors of_groups(const VectorTensors& t) {
  Vectors made = vectors(t);
  for (Vector* vector : {&made.gate, &made.shift, &made.scale}) vector->sample = vector->row;
  return made;
}

Vectors vectors_of(const VectorTensors& t, By by) { return by == By::INDEX ? of_groups(t) : vectors(t); }

void add_up(const char* op, const BackwardTensors& t, By by, const Tensor& partial, bool norm_sums, bool residual_sums) {
  const int64_t groups = partial.size(0), width = partial.size(2);
  OptionalTensor terms;
  if (any_given(t.wanted.weight, t.wanted.bias, t.wanted.branch_bias))
    terms = empty(partial, {groups, TERMS, width}, ScalarType::Float);
  VectorTensors given = t.given, wanted = t.wanted;
  if (by == By::TOKEN) given.gate = given.scale = wanted.gate = wanted.shift = wanted.scale = std::nullopt;
  const Gradients a{
      .partial = tokens<float>("partial", partial),
      .terms = tokens<float>("terms", terms),
      .vectors = vectors_of(given, by),
      .gradients = vectors_of(wanted, by),
      .batch = groups,
      .chunks = partial.size(1) / SUMS,
      .width = static_cast<int>(width),
      .blocks = static_cast<int>(ceil_div(width, SUM_THREADS)),
      .norm_sums = norm_sums,
      .residual_sums = residual_sums};
  launch<add_chunks, SUM_THREADS>(op, groups * a.blocks, partial, a);
  if (terms.has_value()) launch<add_samples, GROUP_THREADS, TERMS * GROUP_BYTES>(op, ceil_div(width, WARP), partial, a);
}

template <bool RESIDUAL, bool NORM, bool BRANCH_NORM = false>
void backward(const char* op, BackwardTensors t, const Choice& choice) {
  const Tensor& rows = NORM ? *t.dh : *t.dx1;
  const int64_t length = rows.size(1), width = rows.size(2), groups = rows.size(0) * choice.rows();
  check_width(op, width);
  STD_TORCH_CHECK(
      choice.by != By::INDEX || any_given(choice.order) == any_given(choice.starts), op, ": order and starts come together");
  STD_TORCH_CHECK(choice.by != By::INDEX || any_given(choice.starts), op, ": an index comes with order and starts");
  const VectorTensors& wanted = t.wanted;
  const bool own = choice.by == By::TOKEN;
  const bool norm_sums = any_given(wanted.weight, wanted.bias) || (!own && any_given(wanted.shift, wanted.scale));
  const bool residual_sums = any_given(wanted.branch_bias) || (!own && any_given(wanted.gate));
  const bool beyond_norm = any_given(wanted.gate, wanted.branch_bias, t.dx, t.dbranch);
  if (NORM && !beyond_norm) t.dx1.reset();
  const bool of_branch = BRANCH_NORM || wanted.gate.has_value();
  if (!of_branch) t.branch.reset();
  STD_TORCH_CHECK(of_branch == t.branch.has_value(), op, ": dgate is wanted, and the branch is not given");
  t.given = packed(choice.by == By::INDEX ? grouped(t.given) : t.given);
  // Rows of a sample are cut by shapes alone, as if all had as many tokens.
  const int64_t tokens_each = choice.rows() > 1 ? ceil_div(length, choice.rows()) : length;
  const Chunks chunks = cut(tokens_each, groups, BLOCKS, SHORTEST_CHUNK, BACKWARD_ROWS);
  OptionalTensor partial;
  if (norm_sums || residual_sums) partial = empty(rows, {groups, chunks.count * SUMS, width}, ScalarType::Float);

  const ScalarType of_stream = common_dtype(rows.scalar_type(), t.x1, t.dx1, t.dx);
  const bool vectorised = all_vectorised(t.dx1, t.dh, t.x1, t.branch) && is_vectorised(t.given);
  by_case<BRANCH_NORM>(
      choice.by, of_stream, common_dtype(of_stream, t.dh, t.branch, t.dbranch), width, vectorised,
      [&](auto stream, auto other, auto known, auto by_words, auto by) {
    using T = decltype(stream);
    using U = decltype(other);
    const Backward<T, U> a{
        .dx1 = tokens<T>("dx1", t.dx1),
        .x1 = tokens<T>("x1", t.x1),
        .dx = tokens<T>("dx", t.dx),
        .dh = tokens<U>("dh", t.dh),
        .branch = tokens<U>("branch", t.branch),
        .dbranch = tokens<U>("dbranch", t.dbranch),
        .stats = tokens<float>("stats", t.stats),
        .branch_stats = tokens<float>("branch_stats", t.branch_stats),
        .partial = tokens<float>("partial", partial),
        .vectors = vectors_of(t.given, choice.by),
        .order = numbers("order", choice.order),
        .starts = numbers("starts", choice.starts),
        .dgate = own ? tokens<Any>("dgate", wanted.gate) : Tokens<Any>{},
        .dshift = own ? tokens<Any>("dshift", wanted.shift) : Tokens<Any>{},
        .dscale = own ? tokens<Any>("dscale", wanted.scale) : Tokens<Any>{},
        .length = length,
        .chunks = chunks.count,
        .chunk_rows = chunks.rows,
        .rows = choice.rows(),
        .width = static_cast<int>(width),
        .centred = t.stats.has_value() && t.stats->size(2) == 2,
        .beyond_norm = beyond_norm,
        .norm_sums = norm_sums,
        .residual_sums = residual_sums,
        .branch_weighted = any_given(t.given.branch_bias, wanted.branch_bias)};
    constexpr int SHARED = backward_shared(known) + (BRANCH_NORM ? branch_shared(known) : 0);
    launch<backward_rows<T, U, known, by_words, RESIDUAL, NORM, by, BRANCH_NORM>, most_threads(known), SHARED>(
        op, groups * chunks.count, rows, a, threads_for(a.width));
  });
  if (partial.has_value()) add_up(op, t, choice.by, *partial, norm_sums, residual_sums);
}

// ---- Operators. Their declarations in ditkernels/ops/norm/__init__.py have checked the arguments --------------------

using Numbers64 = std::vector<int64_t>;

// An uninitialised tensor for mean and rstd (rmsnorm: rstd alone) of each row; none unless `keep` is set.
OptionalTensor statistics(const Tensor& x, bool centred, bool keep) {
  if (!keep) return std::nullopt;
  return empty(x, {x.size(0), x.size(1), centred ? 2 : 1}, ScalarType::Float);
}

Tensor or_no_statistics(const OptionalTensor& stats, const Tensor& x) {
  return stats.has_value() ? *stats : empty(x, {0}, ScalarType::Float);
}

void check_saved(const char* op, const OptionalTensor& x, const OptionalTensor& stats) {
  STD_TORCH_CHECK(x.has_value() && stats.has_value(), op, ": called without the normed rows or their statistics");
  STD_TORCH_CHECK(stats->scalar_type() == ScalarType::Float, op, ": stats: got another dtype than fp32");
}

// The shape of a gradient of gate, shift or scale.
Numbers64 own_shape(const Numbers64& rows, const Choice& choice) {
  if (choice.by == By::SAMPLE) return {rows[0], rows[2]};
  return {rows[0], choice.by == By::INDEX ? choice.rows() : rows[1], rows[2]};
}

std::tuple<Tensor, Tensor> modulated(
    const char* op, const Tensor& x, const VectorTensors& given, const Choice& choice, const std::string& norm, double eps,
    ScalarType out_dtype, bool keep) {
  const bool centred = norm != "rmsnorm";
  const OptionalTensor stats = statistics(x, centred, keep);
  const Tensor h = empty(x, shape_of(x), out_dtype);
  forward<false, true>(op, x, {}, given, choice, {}, h, stats, eps, centred);
  return {h, or_no_statistics(stats, x)};
}

template <bool BRANCH_NORM = false>
Tensor gated(
    const char* op, const Tensor& x, const Tensor& branch, const VectorTensors& given, const Choice& choice,
    const BranchNorm& branch_norm = {}) {
  const Tensor x1 = empty(x, shape_of(x), x.scalar_type());
  forward<true, false, BRANCH_NORM>(op, x, branch, given, choice, x1, {}, {}, 0.0, false, branch_norm);
  return x1;
}

template <bool BRANCH_NORM = false>
std::tuple<Tensor, Tensor, Tensor> gated_and_modulated(
    const char* op, const Tensor& x, const Tensor& branch, const VectorTensors& given, const Choice& choice,
    const std::string& norm, double eps, ScalarType out_dtype, bool keep, const BranchNorm& branch_norm = {}) {
  const bool centred = norm != "rmsnorm";
  const OptionalTensor stats = statistics(x, centred, keep);
  const Tensor x1 = empty(x, shape_of(x), x.scalar_type()), h = empty(x, shape_of(x), out_dtype);
  forward<true, true, BRANCH_NORM>(op, x, branch, given, choice, x1, h, stats, eps, centred, branch_norm);
  return {x1, h, or_no_statistics(stats, x)};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors through_modulated(
    const char* op, const Tensor& dh, const OptionalTensor& x, const VectorTensors& given, const OptionalTensor& stats,
    const Choice& choice, const Numbers64& wanted) {
  check_saved(op, x, stats);
  const Numbers64 rows = shape_of(dh), own = own_shape(rows, choice), shared{rows[2]};
  const OptionalTensor dx = gradient(wanted, 0, dh, rows);
  const VectorTensors made{
      {},
      {},
      gradient(wanted, 1, dh, own),
      gradient(wanted, 2, dh, own),
      gradient(wanted, 3, dh, shared),
      gradient(wanted, 4, dh, shared)};
  backward<false, true>(op, {{}, dh, x, {}, stats, given, dx, {}, made}, choice);
  return {
      or_nothing(dx, dh), or_nothing(made.shift, dh), or_nothing(made.scale, dh), or_nothing(made.weight, dh),
      or_nothing(made.bias, dh)};
}

template <bool BRANCH_NORM = false>
std::tuple<Tensor, Tensor, Tensor> through_gated(
    const char* op, const Tensor& dx1, const OptionalTensor& branch, const VectorTensors& given, const Choice& choice,
    const Numbers64& wanted, const OptionalTensor& branch_stats = {}) {
  const Numbers64 rows = shape_of(dx1);
  const OptionalTensor dbranch = gradient(wanted, 0, dx1, rows);
  const VectorTensors made{gradient(wanted, 1, dx1, own_shape(rows, choice)), gradient(wanted, 2, dx1, {rows[2]})};
  backward<true, false, BRANCH_NORM>(op, {dx1, {}, {}, branch, {}, given, {}, dbranch, made, branch_stats}, choice);
  return {or_nothing(dbranch, dx1), or_nothing(made.gate, dx1), or_nothing(made.branch_bias, dx1)};
}

template <bool BRANCH_NORM = false>
EightTensors through_gated_and_modulated(
    const char* op, const OptionalTensor& dx1, const OptionalTensor& dh, const OptionalTensor& x1, const OptionalTensor& branch,
    const VectorTensors& given, const OptionalTensor& stats, const Choice& choice, const Numbers64& wanted,
    const OptionalTensor& branch_stats = {}) {
  check_saved(op, x1, stats);
  STD_TORCH_CHECK(dh.has_value(), op, ": called without dh");
  const Tensor& like = dx1.has_value() ? *dx1 : *dh;
  const Numbers64 rows = shape_of(like), own = own_shape(rows, choice), shared{rows[2]};
  const OptionalTensor dx = gradient(wanted, 0, like, rows), dbranch = gradient(wanted, 1, like, rows);
  const VectorTensors made{gradient(wanted, 2, like, own), gradient(wanted, 5, like, shared), gradient(wanted, 3, like, own),
                           gradient(wanted, 4, like, own), gradient(wanted, 6, like, shared), gradient(wanted, 7, like, shared)};
  backward<true, true, BRANCH_NORM>(op, {dx1, dh, x1, branch, stats, given, dx, dbranch, made, branch_stats}, choice);
  const auto result = [&](const OptionalTensor& tensor) { return or_nothing(tensor, like); };
  return {result(dx),         result(dbranch),          result(made.gate),   result(made.shift),
          result(made.scale), result(made.branch_bias), result(made.weight), result(made.bias)};
}

using Optional = OptionalTensor;

std::tuple<Tensor, Tensor> modulate_norm(
    Tensor x, Optional shift, Optional scale, Optional weight, Optional bias, std::string norm, double eps, ScalarType out_dtype,
    bool keep) {
  return modulated("modulate_norm", x, {{}, {}, shift, scale, weight, bias}, {}, norm, eps, out_dtype, keep);
}

std::tuple<Tensor, Tensor> modulate_norm_by_token(
    Tensor x, Optional shift, Optional scale, Optional weight, Optional bias, Optional index, Optional order, Optional starts,
    std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const VectorTensors given{{}, {}, shift, scale, weight, bias};
  return modulated("modulate_norm_by_token", x, given, by_token(index, order, starts), norm, eps, out_dtype, keep);
}

Tensor gated_residual(Tensor x, Tensor branch, Optional gate, Optional branch_bias) {
  return gated("gated_residual", x, branch, {gate, branch_bias}, {});
}

Tensor gated_residual_by_token(
    Tensor x, Tensor branch, Optional gate, Optional branch_bias, Optional index, Optional order, Optional starts) {
  return gated("gated_residual_by_token", x, branch, {gate, branch_bias}, by_token(index, order, starts));
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_bias, Optional weight, Optional bias,
    std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const VectorTensors given{gate, branch_bias, shift, scale, weight, bias};
  return gated_and_modulated("gated_residual_norm", x, branch, given, {}, norm, eps, out_dtype, keep);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_norm_by_token(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_bias, Optional weight, Optional bias,
    Optional index, Optional order, Optional starts, std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const VectorTensors given{gate, branch_bias, shift, scale, weight, bias};
  const Choice choice = by_token(index, order, starts);
  return gated_and_modulated("gated_residual_norm_by_token", x, branch, given, choice, norm, eps, out_dtype, keep);
}

FiveTensors modulate_norm_backward(
    Tensor dh, Optional x, Optional scale, Optional weight, Optional bias, Optional stats, std::string, Numbers64 wanted) {
  return through_modulated("modulate_norm_backward", dh, x, {{}, {}, {}, scale, weight, bias}, stats, {}, wanted);
}

FiveTensors modulate_norm_by_token_backward(
    Tensor dh, Optional x, Optional scale, Optional weight, Optional bias, Optional stats, Optional index, Optional order,
    Optional starts, std::string, Numbers64 wanted) {
  const Choice choice = by_token(index, order, starts);
  return through_modulated("modulate_norm_by_token_backward", dh, x, {{}, {}, {}, scale, weight, bias}, stats, choice, wanted);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_bias, Numbers64 wanted) {
  return through_gated("gated_residual_backward", dx1, branch, {gate, branch_bias}, {}, wanted);
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_by_token_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_bias, Optional index, Optional order, Optional starts,
    Numbers64 wanted) {
  const Choice choice = by_token(index, order, starts);
  return through_gated("gated_residual_by_token_backward", dx1, branch, {gate, branch_bias}, choice, wanted);
}

EightTensors gated_residual_norm_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_bias, Optional weight,
    Optional bias, Optional stats, std::string, Numbers64 wanted) {
  const VectorTensors given{gate, branch_bias, {}, scale, weight, bias};
  return through_gated_and_modulated("gated_residual_norm_backward", dx1, dh, x1, branch, given, stats, {}, wanted);
}

EightTensors gated_residual_norm_by_token_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_bias, Optional weight,
    Optional bias, Optional stats, Optional index, Optional order, Optional starts, std::string, Numbers64 wanted) {
  const VectorTensors given{gate, branch_bias, {}, scale, weight, bias};
  const Choice choice = by_token(index, order, starts);
  return through_gated_and_modulated("gated_residual_norm_by_token_backward", dx1, dh, x1, branch, given, stats, choice, wanted);
}

BranchNorm norm_of_branch(const Tensor& x, double eps, bool keep) { return {eps, statistics(x, false, keep)}; }

std::tuple<Tensor, Tensor> gated_residual_branch_norm(
    Tensor x, Tensor branch, Optional gate, Optional branch_weight, double branch_eps, bool keep) {
  const BranchNorm branch_norm = norm_of_branch(x, branch_eps, keep);
  const Tensor x1 = gated<true>("gated_residual_branch_norm", x, branch, {gate, branch_weight}, {}, branch_norm);
  return {x1, or_no_statistics(branch_norm.stats, x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_branch_norm(
    Tensor x, Tensor branch, Optional gate, Optional shift, Optional scale, Optional branch_weight, Optional weight, Optional bias,
    double branch_eps, std::string norm, double eps, ScalarType out_dtype, bool keep) {
  const BranchNorm branch_norm = norm_of_branch(x, branch_eps, keep);
  const VectorTensors given{gate, branch_weight, shift, scale, weight, bias};
  const auto [x1, h, stats] =
      gated_and_modulated<true>("gated_residual_norm_branch_norm", x, branch, given, {}, norm, eps, out_dtype, keep, branch_norm);
  return {x1, h, stats, or_no_statistics(branch_norm.stats, x)};
}

std::tuple<Tensor, Tensor, Tensor> gated_residual_branch_norm_backward(
    Tensor dx1, Optional branch, Optional gate, Optional branch_weight, Optional branch_stats, Numbers64 wanted) {
  const char* op = "gated_residual_branch_norm_backward";
  check_saved(op, branch, branch_stats);
  return through_gated<true>(op, dx1, branch, {gate, branch_weight}, {}, wanted, branch_stats);
}

EightTensors gated_residual_norm_branch_norm_backward(
    Optional dx1, Optional dh, Optional x1, Optional branch, Optional gate, Optional scale, Optional branch_weight, Optional weight,
    Optional bias, Optional stats, Optional branch_stats, std::string, Numbers64 wanted) {
  const char* op = "gated_residual_norm_branch_norm_backward";
  const VectorTensors given{gate, branch_weight, {}, scale, weight, bias};
  // Where nothing of the branch is wanted, its norm has no part in the rest.
  const bool of_branch = wanted[1] >= 0 || wanted[2] >= 0 || wanted[5] >= 0;
  if (!of_branch) return through_gated_and_modulated(op, dx1, dh, x1, branch, given, stats, {}, wanted);
  check_saved(op, branch, branch_stats);
  return through_gated_and_modulated<true>(op, dx1, dh, x1, branch, given, stats, {}, wanted, branch_stats);
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
  library.impl("modulate_norm_by_token_cuda", TORCH_BOX(&ditkernels::modulate_norm_by_token));
  library.impl("modulate_norm_by_token_backward_cuda", TORCH_BOX(&ditkernels::modulate_norm_by_token_backward));
  library.impl("gated_residual_by_token_cuda", TORCH_BOX(&ditkernels::gated_residual_by_token));
  library.impl("gated_residual_by_token_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_by_token_backward));
  library.impl("gated_residual_norm_by_token_cuda", TORCH_BOX(&ditkernels::gated_residual_norm_by_token));
  library.impl("gated_residual_norm_by_token_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_norm_by_token_backward));
  library.impl("gated_residual_branch_norm_cuda", TORCH_BOX(&ditkernels::gated_residual_branch_norm));
  library.impl("gated_residual_branch_norm_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_branch_norm_backward));
  library.impl("gated_residual_norm_branch_norm_cuda", TORCH_BOX(&ditkernels::gated_residual_norm_branch_norm));
  library.impl("gated_residual_norm_branch_norm_backward_cuda", TORCH_BOX(&ditkernels::gated_residual_norm_branch_norm_backward));
}
