// The CPU kernels' loops without torch: reads a case from standard input, runs one kernel, writes its outputs. So that loops that are
// built for another machine can run in an emulator and be held against fp64 by a test.
//
// A case is int64s: which kernel, dtype, samples, tokens, width, whether rmsnorm; then fp32 arrays in the order of the arguments.
// Tensors of tokens are rounded to the dtype before the kernel sees them; outputs are written in fp32.
#include <cstdio>
#include <cstdlib>
#include <vector>

#define DITKERNELS_ISA native
#include "../../../csrc/cpu/gelu.cpp"
#include "../../../csrc/cpu/norm.cpp"

namespace {

using namespace ditkernels;
using Floats = std::vector<float>;

struct Case {
  int64_t kernel, dtype, samples, tokens, width, rms;
};

template <typename T>
void read_all(T* to, size_t count) {
  if (std::fread(to, sizeof(T), count, stdin) != count) std::exit(2);
}

Floats read_floats(int64_t count) {
  Floats made(count);
  read_all(made.data(), made.size());
  return made;
}

void write_floats(const Floats& from) { std::fwrite(from.data(), sizeof(float), from.size(), stdout); }

// Rows of tokens in a case's dtype.
struct Rows {
  std::vector<char> bytes;
  Tokens tokens;

  explicit Rows(const Case& c) : bytes(c.samples * c.tokens * c.width * sizeof(float)) {
    tokens = {bytes.data(), c.tokens * c.width, c.width, 1, static_cast<int>(c.dtype)};
  }

  Rows(const Case& c, const Floats& values) : Rows(c) {
    native::write({bytes.data(), 0, 1, tokens.dtype}, 0, 0, static_cast<int64_t>(values.size()), values.data());
  }

  Floats values() const {
    const int64_t size = bytes.size() / sizeof(float);
    Floats made(size);
    native::read({const_cast<char*>(bytes.data()), 0, 1, tokens.dtype}, 0, 0, size, 0.0f, made.data());
    return made;
  }
};

Vector per_sample(Floats& values, const Case& c) { return {values.data(), c.width, 1, FLOAT}; }

void run_norm(const Case& c) {
  const int64_t rows = c.samples * c.tokens, size = rows * c.width, of_samples = c.samples * c.width;
  const Floats x_in = read_floats(size), branch_in = read_floats(size);
  Floats gate = read_floats(of_samples), shift = read_floats(of_samples), scale = read_floats(of_samples);
  const Floats dx1_in = read_floats(size), dh_in = read_floats(size);
  Rows x(c, x_in), branch(c, branch_in), x1(c), h(c), dx1(c, dx1_in), dh(c, dh_in), dx(c), dbranch(c);
  Floats stats(2 * rows), scratch(64 * (c.width + 16)), sums(4 * c.samples * c.width + 1), more(sums.size());
  Floats dgate(of_samples), dshift(of_samples), dscale(of_samples);

  NormForward f = {};
  f.x = x.tokens, f.branch = branch.tokens, f.x1 = x1.tokens, f.h = h.tokens;
  f.gate = per_sample(gate, c), f.shift = per_sample(shift, c), f.scale = per_sample(scale, c);
  f.stats = stats.data(), f.tokens = c.tokens, f.width = c.width, f.rms = c.rms != 0, f.eps = 1e-6f;
  f.rounding = static_cast<int>(c.dtype);
  native::norm.forward(f, 0, rows, scratch.data());

  NormBackward b = {};
  b.dx1 = dx1.tokens, b.dh = dh.tokens, b.x1 = x1.tokens, b.branch = branch.tokens, b.dx = dx.tokens, b.dbranch = dbranch.tokens;
  b.gate = f.gate, b.scale = f.scale, b.stats = stats.data(), b.pq = sums.data(), b.rs = more.data();
  b.tokens = c.tokens, b.width = c.width, b.chunks = 2, b.chunk_rows = (c.tokens + 1) / 2, b.rms = f.rms;
  native::norm.backward(b, 0, 2 * c.samples, scratch.data());
  NormVectors v = {};
  v.pq = b.pq, v.rs = b.rs, v.gate = f.gate, v.scale = f.scale;
  v.dgate = per_sample(dgate, c), v.dshift = per_sample(dshift, c), v.dscale = per_sample(dscale, c);
  v.groups = c.samples, v.chunks = 2, v.width = c.width;
  native::norm.vectors(v, 0, (c.width + BLOCK - 1) / BLOCK);
  for (const Rows* made : {&x1, &h, &dx, &dbranch}) write_floats(made->values());
  for (const Floats* made : {&dgate, &dshift, &dscale}) write_floats(*made);
}

void run_gelu(const Case& c) {
  const int64_t rows = c.samples * c.tokens, size = rows * c.width;
  const Floats x_in = read_floats(size);
  Floats bias = read_floats(c.width);
  const Floats dy_in = read_floats(size);
  Rows x(c, x_in), dy(c, dy_in), y(c), dx(c);
  Floats scratch(64 * (c.width + 16)), partial(c.width), dbias(c.width);
  Gelu a = {};
  a.x = x.tokens, a.out = y.tokens, a.bias = {bias.data(), 0, 1, FLOAT};
  a.rows = rows, a.tokens = c.tokens, a.width = c.width, a.chunk_rows = rows;
  native::gelu.forward(a, 0, rows, scratch.data());
  a.dy = dy.tokens, a.out = dx.tokens, a.partial = partial.data();
  native::gelu.backward(a, 0, 1, scratch.data());
  native::gelu.add(partial.data(), 1, c.width, {dbias.data(), 0, 1, FLOAT}, 0, (c.width + BLOCK - 1) / BLOCK);
  for (const Rows* made : {&y, &dx}) write_floats(made->values());
  write_floats(dbias);
}

}  // namespace

int main() {
  Case c;
  read_all(&c, 1);
  c.kernel == 0 ? run_norm(c) : run_gelu(c);
}
