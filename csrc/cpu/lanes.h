// Vectors of fp32 for the kernels: lanes, memory in fp32, bf16 and fp16, exp and the logistic function, sums, rows.
//
// `Lanes` is a vector type of the compiler (GCC, clang): sixteen lanes with AVX-512, else eight, which the compiler splits where
// the processor has fewer. All arithmetic is fp32. The order of a sum depends on the size of the row and on the number of lanes
// alone.
//
// Everything here has internal linkage: isa.h says why.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
// GCC 12 warns of the undefined operand of the functions that take no mask.
constexpr __mmask16 EVERY_LANE = 0xffff;
#else
constexpr int64_t WIDTH = 8;
#endif

typedef float Lanes __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Shorts __attribute__((vector_size(WIDTH * 2)));

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename T>
constexpr int DTYPE = FLOAT;
template <>
constexpr int DTYPE<Bfloat16> = BFLOAT16;
template <>
constexpr int DTYPE<Half> = HALF;

inline Lanes all(float value) { return Lanes{} + value; }

// ---- Memory ---------------------------------------------------------------------------------------------------------

// GCC 12 widens and narrows vectors of integers in halves, so AVX2 does it by name.
inline Words widened(Shorts bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Words);
#endif
}

// Of words below 2^16.
inline Shorts narrowed(Words words) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i pairs = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (Shorts)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
  return __builtin_convertvector(words, Shorts);
#endif
}

inline Lanes widened(Shorts bits, Bfloat16) { return (Lanes)(widened(bits) << 16); }

// To the nearest, ties to even; a NaN stays one.
inline Lanes rounded(Lanes lanes, Bfloat16) {
#if defined(__AVX512BF16__)
  return widened((Shorts)_mm512_cvtneps_pbh((__m512)lanes), Bfloat16{});
#else
  const Words bits = (Words)lanes;
  const Words nearest = bits + 0x7fff + ((bits >> 16) & 1);
  return (Lanes)((nearest | (Words)(lanes != lanes)) & 0xffff0000);
#endif
}

inline Lanes rounded(Lanes lanes, float) { return lanes; }

inline Lanes widened(Shorts bits, Half) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_cvtph_ps(EVERY_LANE, (__m256i)bits);
#elif defined(__F16C__)
  return (Lanes)_mm256_cvtph_ps((__m128i)bits);
#else
  __fp16 values[WIDTH];
  memcpy(values, &bits, sizeof values);
  Lanes lanes;
  for (int i = 0; i < WIDTH; ++i) lanes[i] = static_cast<float>(values[i]);
  return lanes;
#endif
}

inline Shorts narrowed(Lanes lanes, Half) {
#if defined(__AVX512F__)
  return (Shorts)_mm512_maskz_cvtps_ph(EVERY_LANE, (__m512)lanes, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Shorts)_mm256_cvtps_ph((__m256)lanes, _MM_FROUND_TO_NEAREST_INT);
#else
  __fp16 values[WIDTH];
  for (int i = 0; i < WIDTH; ++i) values[i] = static_cast<__fp16>(lanes[i]);
  Shorts bits;
  memcpy(&bits, values, sizeof bits);
  return bits;
#endif
}

inline Lanes rounded(Lanes lanes, Half) { return widened(narrowed(lanes, Half{}), Half{}); }

// How much of a vector lies in the row: all lanes, or the first `count`.
struct Whole {};
struct Part {
  int64_t count;
};

inline Lanes load(const float* from, Whole, float = 0.0f) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <typename T>
inline Lanes load(const T* from, Whole, float = 0.0f) {
  Shorts bits;
  memcpy(&bits, from, sizeof bits);
  return widened(bits, T{});
}

// The lanes that do not lie in the row hold `absent`.
template <typename T>
inline Lanes load(const T* from, Part part, float absent = 0.0f) {
  T values[WIDTH] = {};
  memcpy(values, from, part.count * sizeof(T));
  Lanes lanes = load(values, Whole{});
  for (int i = 0; i < WIDTH; ++i)
    if (i >= part.count) lanes[i] = absent;
  return lanes;
}

// Each store gives back what now lies in memory.
inline Lanes store(float* to, Whole, Lanes lanes) {
  memcpy(to, &lanes, sizeof lanes);
  return lanes;
}

inline Lanes store(Bfloat16* to, Whole, Lanes lanes) {
  const Lanes stored = rounded(lanes, Bfloat16{});
  const Shorts bits = narrowed((Words)stored >> 16);
  memcpy(to, &bits, sizeof bits);
  return stored;
}

inline Lanes store(Half* to, Whole, Lanes lanes) {
  const Shorts bits = narrowed(lanes, Half{});
  memcpy(to, &bits, sizeof bits);
  return widened(bits, Half{});
}

template <typename T>
inline Lanes store(T* to, Part part, Lanes lanes) {
  T values[WIDTH];
  const Lanes stored = store(values, Whole{}, lanes);
  memcpy(to, values, part.count * sizeof(T));
  return stored;
}

// Zeros in the place of lanes that do not lie in the row.
inline Lanes within(Lanes lanes, Whole) { return lanes; }
inline Lanes within(Lanes lanes, Part part) {
  for (int i = 0; i < WIDTH; ++i)
    if (i >= part.count) lanes[i] = 0.0f;
  return lanes;
}

template <typename T>
inline float load_one(const T* from) {
  return load(from, Part{1})[0];
}

// ---- Loops and sums -------------------------------------------------------------------------------------------------

// Calls body(first channel, how much of a vector) over a row of `size` channels.
template <typename Body>
[[gnu::always_inline]] inline void each(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) body(i, Whole{});
  if (i < size) body(i, Part{size - i});
}

// Sums that do not wait for each other.
constexpr int SUMS = 4;

// As each, for loops that add up: calls body(first channel, which of the sums to add to, how much of a vector).
template <typename Body>
[[gnu::always_inline]] inline void add_up(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + SUMS * WIDTH <= size; i += SUMS * WIDTH) {
    body(i, 0, Whole{});
    body(i + WIDTH, 1, Whole{});
    body(i + 2 * WIDTH, 2, Whole{});
    body(i + 3 * WIDTH, 3, Whole{});
  }
  for (; i < size; i += WIDTH) body(i, 0, Part{size - i < WIDTH ? size - i : WIDTH});
}

inline float total(Lanes lanes) {
  float sums[WIDTH];
  memcpy(sums, &lanes, sizeof sums);
#pragma GCC unroll 4
  for (int apart = WIDTH / 2; apart > 0; apart /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < apart; ++i) sums[i] += sums[i + apart];
  return sums[0];
}

inline float total(const Lanes (&sums)[SUMS]) { return total((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// ---- Functions ------------------------------------------------------------------------------------------------------

inline Lanes smaller(Lanes a, Lanes b) { return a < b ? a : b; }
inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }
inline Lanes absolute(Lanes x) { return (Lanes)((Words)x & 0x7fffffff); }

inline Lanes root(Lanes x) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_maskz_sqrt_ps(EVERY_LANE, (__m512)x);
#elif defined(__AVX__)
  return (Lanes)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < WIDTH; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// e^x for x <= 0, within 1.1 ulp of the exact value; 0 below -87.33, where it is less than the smallest normal number.
// x = n·ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial of degree 6 (minimax, 4e-9).
inline Lanes exp_of_negative(Lanes x) {
  constexpr float LOG2_E = 0x1.715476p+0f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f, SHIFT = 0x1.8p23f;
  const Lanes shifted = x * LOG2_E + SHIFT;
  const Lanes n = shifted - SHIFT;
  const Lanes r = (x - n * LN2_HIGH) - n * LN2_LOW;
  Lanes q = r * 0x1.6a2430p-10f + 0x1.1239e4p-7f;
  q = q * r + 0x1.5558f2p-5f;
  q = q * r + 0x1.555492p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Lanes power = (q * r) * r + r + 1.0f;
  // The lowest bits of `shifted` are n. A NaN stays one.
  const Lanes power_of_two = (Lanes)(((Words)shifted << 23) + 0x3f800000);
  return x < -87.33f ? Lanes{} : power * power_of_two;
}

// σ(|x|) and σ(-|x|), where σ(x) = 1 / (1 + e^-x) = (1 + tanh(x/2)) / 2.
struct Logistic {
  Lanes above, below;
};

// Both within 3 ulp: neither is one minus the other, which would cancel.
inline Logistic logistic(Lanes x) {
  const Lanes power = exp_of_negative((Lanes)((Words)x | 0x80000000));
  const Lanes above = 1.0f / (1.0f + power);
  return {above, power * above};
}

// σ(x) of the two.
inline Lanes chosen(Lanes x, Logistic both) { return (Ints)x < 0 ? both.below : both.above; }

// ---- Rows -----------------------------------------------------------------------------------------------------------

// A dtype known to the compiler: body(T{}).
template <typename Body>
inline void by_dtype(int dtype, const Body& body) {
  if (dtype == BFLOAT16) return body(Bfloat16{});
  if (dtype == HALF) return body(Half{});
  body(float{});
}

template <typename T, typename U>
inline void gather(const U* from, int64_t stride, int64_t size, T* to) {
  if constexpr (DTYPE<T> == DTYPE<U>) {
    for (int64_t i = 0; i < size; ++i) to[i] = from[i * stride];
  } else if (stride == 1) {
    each(size, [&](int64_t i, auto reach) { store(to + i, reach, load(from + i, reach)); });
  } else {
    for (int64_t i = 0; i < size; ++i) store(to + i, Part{1}, load(from + i * stride, Part{1}));
  }
}

// A row as values of T side by side: where it lies if it lies so, else gathered into `buffer`. T is the tensor's dtype or float.
template <typename T>
inline const T* row_of(const Tokens& from, int64_t sample, int64_t token, int64_t size, T* buffer) {
  const int64_t first = sample * from.sample + token * from.token;
  if (from.dtype == DTYPE<T> && from.channel == 1) return static_cast<const T*>(from.data) + first;
  by_dtype(from.dtype, [&](auto type) {
    using U = decltype(type);
    if constexpr (DTYPE<T> == DTYPE<U> || DTYPE<T> == FLOAT)
      gather(static_cast<const U*>(from.data) + first, from.channel, size, buffer);
  });
  return buffer;
}

// `size` values of a vector of a sample from channel `first` on, in fp32; `absent` where there is no vector.
inline void read(const Vector& from, int64_t sample, int64_t first, int64_t size, float absent, float* to) {
  if (from.data == nullptr) return each(size, [&](int64_t i, auto reach) { store(to + i, reach, all(absent)); });
  by_dtype(from.dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(from.data) + sample * from.sample + first * from.channel;
    gather(values, from.channel, size, to);
  });
}

// A row of a (B, K, D) vector as a vector.
inline Vector row_of(Vector from, int64_t row) {
  if (from.data != nullptr) from.data = static_cast<char*>(from.data) + row * from.row * (from.dtype == FLOAT ? 4 : 2);
  return from;
}

// All of a vector of a sample in fp32: where it lies if it lies so, else read into `buffer`.
inline const float* values_of(const Vector& from, int64_t sample, int64_t size, float absent, float* buffer) {
  if (from.data != nullptr && from.dtype == FLOAT && from.channel == 1)
    return static_cast<const float*>(from.data) + sample * from.sample;
  read(from, sample, 0, size, absent, buffer);
  return buffer;
}

// Rounds values into a packed vector, if there is one.
inline void write(const Vector& to, int64_t sample, int64_t first, int64_t size, const float* from) {
  if (to.data == nullptr) return;
  by_dtype(to.dtype, [&](auto type) {
    auto* values = static_cast<decltype(type)*>(to.data) + sample * to.sample + first;
    each(size, [&](int64_t i, auto reach) { store(values + i, reach, load(from + i, reach)); });
  });
}

// The place of a row of the result, or `buffer` where it is not a row of T or nowhere.
template <typename T>
inline T* place_of(const Tokens& to, int64_t sample, int64_t token, T* buffer) {
  if (to.data == nullptr || to.dtype != DTYPE<T>) return buffer;
  return static_cast<T*>(to.data) + sample * to.sample + token * to.token;
}

// Rounds `buffer` into the row if it was the place of it.
template <typename T>
inline void put(const Tokens& to, int64_t sample, int64_t token, int64_t width, const T* buffer) {
  if (to.data == nullptr || to.dtype == DTYPE<T>) return;
  if constexpr (DTYPE<T> == FLOAT) write({to.data, to.sample, 1, to.dtype}, sample, token * to.token, width, buffer);
}

template <typename Reach>
inline void add(float* sums, Reach reach, Lanes lanes) {
  store(sums, reach, load(sums, reach) + lanes);
}

// Adds up `count` rows of partial sums, the next one `stride` further on, one after the other.
inline void add_rows(const float* from, int64_t count, int64_t stride, int64_t size, float* to) {
  each(size, [&](int64_t i, auto reach) {
    Lanes sum = {};
    for (int64_t row = 0; row < count; ++row) sum += load(from + row * stride + i, reach);
    store(to + i, reach, sum);
  });
}

// The same for the channels of some blocks of a (D,) vector, from packed rows of partial sums.
inline void add_blocks(const float* partial, int64_t count, int64_t width, const Vector& to, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * BLOCK, size = first + BLOCK < width ? BLOCK : width - first;
    float sums[BLOCK];
    add_rows(partial + first, count, width, size, sums);
    write(to, 0, first, size, sums);
  }
}

// Floats of a row of scratch memory, which begins a line of the cache.
inline int64_t row_floats(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace
}  // namespace ditkernels::DITKERNELS_ISA
