// step.cpp's arithmetic: exp, GELU, layer norm, and products of rows of activations with packed
// weights in fp32, bf16, int8 or int4.
//
// The order of computation of each result depends only on its own row, never on other rows: a
// request's results are bitwise equal in any batch and with any chunks.
#pragma once

#include <type_traits>

#include "vectors.h"

enum class Kind : int { fp32 = 0, bf16 = 1, int8 = 2, int4 = 3 };

constexpr int64_t kBlock = 32;   // columns of a block of packed weights: two vectors
#ifdef GPTJ_AVX512
constexpr int64_t kMaxRows = 12;   // rows per pass over a block: 24 accumulators of 32 registers
constexpr int64_t kWideRows = 12;  // rows for which a pass takes both vectors of a block together
#else
constexpr int64_t kMaxRows = 6;   // 12 accumulators of 16 registers, one vector at a time
constexpr int64_t kWideRows = 3;  // likewise, two vectors at a time
#endif
constexpr int64_t kAhead = 2048;  // prefetch distance of weights, in bytes

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inputs per 32-bit word of weights.
inline int64_t per_word(Kind kind) { return int64_t(1) << int(kind); }

// Inputs that share a scale in quantized activations; in int4 also in weights.
inline int64_t group(Kind kind) { return kind == Kind::int4 ? 64 : 128; }

// Words of activations per word of weights. Without instructions for dot products of bf16 or of
// bytes, a word's halves are widened once for each row instead of for every column.
#if defined(GPTJ_AVX512) && defined(__AVX512BF16__)
#define GPTJ_DOT_BF16 1
#endif
#if defined(GPTJ_AVX512) && defined(__AVX512VNNI__)
#define GPTJ_DOT_INT8 1
#endif
#ifdef GPTJ_DOT_BF16
constexpr int64_t kBf16Words = 1;
#else
constexpr int64_t kBf16Words = 2;
#endif
#ifdef GPTJ_DOT_INT8
constexpr int64_t kInt8Words = 1;
#else
constexpr int64_t kInt8Words = 2;
#endif
inline int64_t words_each(Kind kind) {
  return kind == Kind::fp32 ? 1 : kind == Kind::bf16 ? kBf16Words
         : kind == Kind::int8 ? kInt8Words : 2;
}

// e^x to about one unit in the last place (Cephes' polynomial), for x <= 88; below -87 it is 0.
inline Floats exp(Floats x) {
  const Floats n = rounded(mul(x, all(1.44269504088896341f)));
  Floats r = fnma(n, all(0.693359375f), x);
  r = fnma(n, all(-2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, all(1.0f)));
  return if_nan(x, x, if_ge(x, all(-87.0f), scaled(p, n)));
}

// The tanh approximation of GELU, as the equivalent x * sigmoid(2u).
inline Floats gelu(Floats x) {
  const Floats u = fma(mul(mul(x, x), x), all(0.044715f), x);
  // Clamp so that exp does not overflow: the sigmoid is 0 or 1 there.
  const Floats twice = mul(u, all(-2.0f * 0.7978845608028654f));
  return div(x, add(all(1.0f), exp(min(all(88.0f), twice))));
}

// Rounds to the nearest bf16, ties to even, in each lane's upper half, as fp32; NaN stays NaN.
inline Floats round_bf16(Floats x) {
  const Ints bits = as_ints(x);
  const Ints odd = both(right<16>(bits), all_ints(1));
  const Ints up = add(add(bits, all_ints(0x7fff)), odd);
  const Ints quiet = either(bits, all_ints(0x400000));
  const Ints kept = as_ints(if_nan(x, as_floats(quiet), as_floats(up)));
  return as_floats(both(kept, all_ints(int(0xffff0000))));
}

inline void store_bf16(uint16_t* p, Mask mask, Floats x) {
#ifdef GPTJ_DOT_BF16
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
#else
  store_upper(p, mask, as_ints(round_bf16(x)));
#endif
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline Floats load_bf16(const uint16_t* p, Mask mask) { return as_floats(load_upper(p, mask)); }

// Accumulation of products. `dot` adds, in each of 16 lanes, the products of a part of a word of
// weights with the part of the word of activations that all lanes share: a word has `kParts` parts,
// which `part` prepares for all rows.
struct Fp32 {
  using Sum = Floats;
  using Part = Floats;
  static constexpr int kParts = 1;
  static Sum zero() { return zeros(); }
  static Part part(Ints w, int) { return as_floats(w); }
  static Sum dot(Sum sum, Part w, uint32_t a) { return fma(w, as_floats(all_ints(int(a))), sum); }
  static Sum dot_word(Sum sum, Ints w, uint32_t a) { return dot(sum, as_floats(w), a); }
};

// The lower or upper of a word's two bf16, as fp32.
inline Floats half(Ints w, int number) {
  return as_floats(number == 0 ? left<16>(w) : both(w, all_ints(int(0xffff0000))));
}

struct Bf16 {
  using Sum = Floats;
  static constexpr int kParts = kBf16Words;
  static Sum zero() { return zeros(); }
#ifdef GPTJ_DOT_BF16
  using Part = Ints;
  static Part part(Ints w, int) { return w; }
  static Sum dot(Sum sum, Part w, uint32_t a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(a)));
  }
  static Sum dot_word(Sum sum, Ints w, uint32_t a) { return dot(sum, w, a); }
#else
  using Part = Floats;
  static Part part(Ints w, int number) { return half(w, number); }
  static Sum dot(Sum sum, Part w, uint32_t a) { return fma(w, as_floats(all_ints(int(a))), sum); }
  static Sum dot_word(Sum sum, Ints w, uint32_t a) {
    const Ints x = all_ints(int(a));
    return fma(half(w, 1), half(x, 1), fma(half(w, 0), half(x, 0), sum));
  }
#endif
};

#ifdef GPTJ_DOT_INT8
// Adds the products of four unsigned bytes of weights with four signed ones of activations.
inline Ints add_dot_bytes(Ints sum, Ints w, uint32_t a) {
  // Not the intrinsic, with which GCC 12 keeps the sums in memory: half the speed.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(all_ints(int(a))));
  return sum;
}
#endif

struct Int8 {  // weights are stored with 128 added, since one operand must be unsigned
  using Sum = Ints;
  using Part = Ints;
  static constexpr int kParts = kInt8Words;
  static constexpr int32_t kZero = 128;
  static Sum zero() { return all_ints(0); }
#ifdef GPTJ_DOT_INT8
  static Part part(Ints w, int) { return w; }
  static Sum dot(Sum sum, Part w, uint32_t a) { return add_dot_bytes(sum, w, a); }
#else  // in 16 bits, so that nothing saturates: |255 * 127| * 2 fits 32 bits only
  static Part part(Ints w, int number) {
    return number == 0 ? both(w, all_ints(0x00ff00ff)) : upper_bytes(w);
  }
  static Sum dot(Sum sum, Part w, uint32_t a) { return add(sum, dot_words(w, all_ints(int(a)))); }
#endif
};

struct Int4 {  // codes of 0 to 15: of a word's eight, the even ones are one part, the odd the other
  using Sum = Ints;
  using Part = Ints;
  static constexpr int kParts = 2;
  static constexpr int32_t kZero = 8;
  static Sum zero() { return all_ints(0); }
  static Part part(Ints w, int number) {
    return both(number == 0 ? w : right<4>(w), all_ints(0x0f0f0f0f));
  }
#ifdef GPTJ_DOT_INT8
  static Sum dot(Sum sum, Part w, uint32_t a) { return add_dot_bytes(sum, w, a); }
#else  // in 16 bits, which hold the sum of kShort words: |15 * 127| * 2 * 2 * 4 < 2^15
  static constexpr int64_t kShort = 4;
  static Sum dot(Sum sum, Part w, uint32_t a) {
    return add_words(sum, dot_bytes(w, all_ints(int(a))));
  }
  static Ints widened(Sum sum) { return dot_words(sum, all_ints(0x00010001)); }
#endif
};

// Rows per pass over a block of weights, split as evenly as possible.
struct Pass {
  int64_t row, count;

  static int64_t passes(int64_t rows) { return ceil_div(rows, kMaxRows); }

  static Pass number(int64_t pass, int64_t rows) {
    const int64_t least = rows / passes(rows), more = rows % passes(rows);
    return {pass * least + std::min(pass, more), least + (pass < more)};
  }
};

// Rows of activations converted to a kind, then with the rows of each pass interleaved word by word,
// as the products read them. In int8 and int4 each group of inputs has a scale, and its sum, which
// cancels what was added to make weights unsigned.
struct Activations {
  uint32_t* by_row;  // (rows, words)
  uint32_t* turned;  // of each pass: (words, rows of the pass); for one row the same as by_row
  float* scales;     // (rows, groups)
  int32_t* sums;     // (rows, groups)
  int64_t rows;
  int64_t width;   // words of a row of weights
  int64_t words;   // of a row
  int64_t groups;  // of a row
};

// Packed weights (columns, inputs), in blocks of kBlock columns: for each word of inputs, a
// block's columns are contiguous. Columns beyond the last are 0.
struct Weights {
  const void* data;
  const float* scales;           // (columns), int8 only
  const uint16_t* group_scales;  // (blocks, groups, kBlock) in bf16, int4 only
  const float* bias;             // (columns)
  int64_t kind, columns, inputs;
};

// Whether a row is finite: bytes cannot represent NaN, and max() drops it.
inline bool finite(const float* x, int64_t n) {
  Floats sum = zeros();
  for (int64_t i = 0; i < n; i += 16)  // 0 * x is NaN if x is not finite
    sum = fma(load(x + i, first(n - i)), zeros(), sum);
  return sum_of(sum) == 0.0f;
}

// Writes up to 16 inputs of a row, from its i-th on, in the parts that Int8 reads.
inline void store_int8(uint32_t* row, int64_t i, int64_t count, Ints q) {
  int8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), to_bytes(q));
  count = std::min<int64_t>(count, 16);
#ifdef GPTJ_DOT_INT8
  std::memcpy(reinterpret_cast<int8_t*>(row) + i, bytes, size_t(count));
#else  // 16 bits each: of a word's four, first the two even ones
  auto* to = reinterpret_cast<int16_t*>(row + i / 4 * kInt8Words);
  for (int64_t k = 0; k < count; ++k) to[k / 4 * 4 + k % 2 * 2 + k % 4 / 2] = bytes[k];
#endif
}

// Writes 16 inputs of a row, from its i-th on, in the parts that Int4 reads: of eight, the even ones
// and then the odd.
inline void store_int4(uint32_t* row, int64_t i, Ints q) {
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  auto* to = reinterpret_cast<__m128i*>(row + i / 4);
  _mm_storeu_si128(to, _mm_shuffle_epi8(to_bytes(q), order));
}

// Converts n inputs to a row of activations.
inline void convert(Kind kind, const float* x, int64_t n, const Activations& a, int64_t row) {
  uint32_t* own = a.by_row + row * a.words;
  if (kind == Kind::fp32) {
    std::memcpy(own, x, size_t(n) * 4);
  } else if (kind == Kind::bf16) {
    for (int64_t i = 0; i < n; i += 16) {
      const Mask mask = first(n - i);
#ifdef GPTJ_DOT_BF16
      store_bf16(reinterpret_cast<uint16_t*>(own) + i, mask, load(x + i, mask));
#else
      store(reinterpret_cast<float*>(own) + i, mask, round_bf16(load(x + i, mask)));
#endif
    }
  } else {
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t from = g * group(kind), to = std::min(n, from + group(kind));
      Floats most = zeros();
      for (int64_t i = from; i < to; i += 16) most = max(most, abs(load(x + i, first(to - i))));
      const float largest = max_of(most);
      const float scale = largest / 127.0f;
      const Floats inverse = all(largest > 0 ? 127.0f / largest : 0.0f);
      Ints sum = all_ints(0);
      for (int64_t i = from; i < to; i += 16) {
        const Ints q = to_ints(mul(load(x + i, first(to - i)), inverse));
        sum = add(sum, q);
        if (kind == Kind::int8)
          store_int8(own, i, to - i, q);
        else  // whose inputs are whole groups
          store_int4(own, i, q);
      }
      // Non-finite rows must stay non-finite, for the engine to detect.
      a.scales[row * a.groups + g] = finite(x + from, to - from) ? scale : NAN;
      a.sums[row * a.groups + g] = sum_of(sum);
    }
  }
}

constexpr int64_t kTurned = 64;  // words of each row per work item

// Interleaves some words of a pass's rows.
inline void interleave(const Activations& a, int64_t pass_number, int64_t piece) {
  const Pass pass = Pass::number(pass_number, a.rows);
  const uint32_t* from = a.by_row + pass.row * a.words;
  uint32_t* to = a.turned + pass.row * a.words;
  const int64_t end = std::min(a.words, (piece + 1) * kTurned);
  for (int64_t i = piece * kTurned; i < end; ++i)
    for (int64_t m = 0; m < pass.count; ++m) to[i * pass.count + m] = from[m * a.words + i];
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float epsilon,
                       int64_t n, float* y) {
  Floats total = zeros();
  for (int64_t i = 0; i < n; i += 16) total = add(total, load(x + i, first(n - i)));
  const Floats mean = all(sum_of(total) / float(n));
  Floats squares = zeros();
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first(n - i);
    const Floats d = keep(m, sub(load(x + i, m), mean));
    squares = fma(d, d, squares);
  }
  const float variance = sum_of(squares) / float(n);
  const Floats factor = all(1.0f / std::sqrt(variance + epsilon));
  for (int64_t i = 0; i < n; i += 16) {
    const Mask m = first(n - i);
    const Floats d = mul(sub(load(x + i, m), mean), factor);
    store(y + i, m, fma(d, load(weight + i, m), load(bias + i, m)));
  }
}

// Adds the products of words [from, to) of some vectors of a block with the M rows of a pass.
// Meanwhile it prefetches the weights needed next: `lines` per word, starting at `ahead`.
template <class K, int M, int Vectors>
inline void add_products(const char* weights, const uint32_t* words, int64_t from, int64_t to,
                         const char* ahead, int lines, typename K::Sum (&sum)[M][Vectors]) {
  for (int64_t i = from; i < to; ++i) {
    if (lines > 0) _mm_prefetch(ahead + i * lines * 64, _MM_HINT_T0);
    if (lines > 1) _mm_prefetch(ahead + i * lines * 64 + 64, _MM_HINT_T0);
    const uint32_t* x = words + i * K::kParts * M;
#ifdef GPTJ_AVX512  // rows outside, so that vectors share a row's word
    typename K::Part parts[Vectors][K::kParts];
    for (int v = 0; v < Vectors; ++v)
      for (int p = 0; p < K::kParts; ++p)
        parts[v][p] = K::part(load_ints(weights + i * 128 + v * 64), p);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 2
        for (int p = 0; p < K::kParts; ++p)
          sum[m][v] = K::dot(sum[m][v], parts[v][p], x[p * M + m]);
#else  // parts outside, so that few registers hold weights
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const Ints w = load_ints(weights + i * 128 + v * 64);
#pragma GCC unroll 2
      for (int p = 0; p < K::kParts; ++p) {
        const typename K::Part part = K::part(w, p);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) sum[m][v] = K::dot(sum[m][v], part, x[p * M + m]);
      }
    }
#endif
  }
}

// Adds the products of one group of quantized inputs, words [from, to).
template <class K, int M, int Vectors>
inline void add_group(const char* weights, const uint32_t* words, int64_t from, int64_t to,
                      const char* ahead, int lines, Ints (&sum)[M][Vectors]) {
#ifndef GPTJ_DOT_INT8
  if constexpr (std::is_same_v<K, Int4>) {
    for (int64_t i = from; i < to; i += K::kShort) {
      typename K::Sum part[M][Vectors];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < Vectors; ++v) part[m][v] = K::zero();
      add_products<K, M, Vectors>(weights, words, i, i + K::kShort, ahead, lines, part);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < Vectors; ++v) sum[m][v] = add(sum[m][v], K::widened(part[m][v]));
    }
    return;
  }
#endif
  add_products<K, M, Vectors>(weights, words, from, to, ahead, lines, sum);
}

// Products of some vectors of a block, from `vector` on, with the M rows of a pass: out[m][v].
template <class K, int M, int Vectors>
inline void product(const Weights& w, int64_t block, int vector, const Activations& a, int64_t row,
                    const char* ahead, int lines, Floats (&out)[M][Vectors]) {
  const char* weights = static_cast<const char*>(w.data) + block * a.width * 128 + vector * 64;
  const uint32_t* words = a.turned + row * a.words;
  typename K::Sum sum[M][Vectors];
  if constexpr (std::is_same_v<K, Int8> || std::is_same_v<K, Int4>) {
    constexpr Kind kind = std::is_same_v<K, Int8> ? Kind::int8 : Kind::int4;
    const int64_t each = group(kind) / per_word(kind);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < Vectors; ++v) out[m][v] = zeros();
    for (int64_t g = 0; g < a.groups; ++g) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        for (int v = 0; v < Vectors; ++v)
          sum[m][v] = all_ints(-K::kZero * a.sums[(row + m) * a.groups + g]);
      add_group<K, M, Vectors>(weights, words, g * each, std::min(a.width, (g + 1) * each), ahead,
                               lines, sum);
      Floats unit[Vectors];  // the value of one step of the weights, if groups have their own
      if constexpr (kind == Kind::int4)
        for (int v = 0; v < Vectors; ++v)
          unit[v] = load_bf16(
              w.group_scales + (block * a.groups + g) * kBlock + (vector + v) * 16, first(16));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const Floats scale = all(a.scales[(row + m) * a.groups + g]);
        for (int v = 0; v < Vectors; ++v)
          out[m][v] = fma(to_floats(sum[m][v]), kind == Kind::int4 ? mul(scale, unit[v]) : scale,
                          out[m][v]);
      }
    }
    if constexpr (kind == Kind::int8)
      for (int v = 0; v < Vectors; ++v) {
        const int64_t column = block * kBlock + (vector + v) * 16;
        const Floats scale = load(w.scales + column, first(w.columns - column));
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) out[m][v] = mul(out[m][v], scale);
      }
  } else {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < Vectors; ++v) sum[m][v] = K::zero();
    add_products<K, M, Vectors>(weights, words, 0, a.width, ahead, lines, sum);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < Vectors; ++v) out[m][v] = sum[m][v];
  }
}

// Calls done(row, column, values, mask) for each 16 columns of a block, with the bias added.
template <class K, int M, class Done>
inline void rows_of_block(const Weights& w, int64_t block, const Activations& a, int64_t row,
                          const char* ahead, int lines, const Done& done) {
  constexpr int Vectors = M <= kWideRows ? 2 : 1;
  for (int vector = 0; vector < 2; vector += Vectors) {
    Floats out[M][Vectors];
    product<K, M, Vectors>(w, block, vector, a, row, ahead, vector == 0 ? lines : 0, out);
    for (int v = 0; v < Vectors; ++v) {
      const int64_t column = block * kBlock + (vector + v) * 16;
      const Mask mask = first(w.columns - column);
      if (none(mask)) break;
      const Floats bias = load(w.bias + column, mask);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) done(row + m, column, add(out[m][v], bias), mask);
    }
  }
}

// All rows of one block, in passes. A single pass prefetches weights slightly ahead; with several,
// the first two each prefetch half of the next block, so that memory stays busy while the processor
// computes from cache.
template <class K, class Done>
inline void block_product(const Weights& w, int64_t block, const Activations& a, const Done& done) {
  const int64_t passes = Pass::passes(a.rows), bytes = a.width * 128;
  const char* start = static_cast<const char*>(w.data) + block * bytes;
  for (int64_t number = 0; number < passes; ++number) {
    const Pass pass = Pass::number(number, a.rows);
    const int lines = passes == 1 ? 2 : number < 2 ? 1 : 0;
    const char* ahead = passes == 1 ? start + kAhead : start + bytes + number * (bytes / 2);
    switch (pass.count) {
#define ROWS(M)                                                       \
  case M:                                                             \
    if constexpr (M <= kMaxRows)                                      \
      rows_of_block<K, M>(w, block, a, pass.row, ahead, lines, done); \
    break;
      ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
      ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
    }
  }
}
