// step.cpp's arithmetic: exp, GELU, layer norm, and products of rows of activations with packed
// weights in fp32, bf16, int8 or int4.
//
// The order of computation of each result depends only on its own row, never on other rows: a
// request's results are bitwise equal in any batch and with any chunks.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

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
// Prefetch distances of weights, in bytes: from memory to the second-level cache, whose prefetches
// do not hold the first level's few miss buffers, and from there to the first.
constexpr int64_t kFarAhead = 8192, kAhead = 2048;
// Words of a block that all passes multiply before the next ones, so that weights are read from a
// core's first-level cache in all passes but the first: 8 KB a vector.
constexpr int64_t kChunk = 128;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Unrolls loops before the compiler decides what to keep in registers: with `#pragma GCC unroll`,
// arrays of sums stay in memory.
#define GPTJ_INLINE inline __attribute__((always_inline))
#define GPTJ_INLINE_LAMBDA __attribute__((always_inline))

template <class F, int... I>
GPTJ_INLINE void unrolled(const F& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// Calls f(0), ..., f(N - 1), with constants.
template <int N, class F>
GPTJ_INLINE void unrolled(const F& f) {
  unrolled(f, std::make_integer_sequence<int, N>{});
}

// Calls f(m, v) for all m < M and v < N, with constants.
template <int M, int N, class F>
GPTJ_INLINE void for_each(const F& f) {
  unrolled<M>([&](auto m) GPTJ_INLINE_LAMBDA {
    unrolled<N>([&](auto v) GPTJ_INLINE_LAMBDA { f(m, v); });
  });
}

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
#else
  using Part = Floats;
  static Part part(Ints w, int number) { return half(w, number); }
  static Sum dot(Sum sum, Part w, uint32_t a) { return fma(w, as_floats(all_ints(int(a))), sum); }
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
  uint32_t* turned;  // of each chunk and pass: (words of the chunk, rows of the pass)
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

// Interleaves a chunk's words of a pass's rows. For one row there is nothing to do: its words are in
// order.
inline void interleave(const Activations& a, int64_t pass_number, int64_t chunk) {
  const Pass pass = Pass::number(pass_number, a.rows);
  const int64_t each = kChunk * a.words / a.width;
  const int64_t start = chunk * each, count = std::min(each, a.words - start);
  const uint32_t* from = a.by_row + pass.row * a.words + start;
  uint32_t* to = a.turned + start * a.rows + pass.row * count;
  for (int64_t i = 0; i < count; ++i)
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

// Adds the products of one word of some vectors of a block with the M rows of a pass.
template <class K, int M, int Vectors>
GPTJ_INLINE void add_word(const char* weights, const uint32_t* x,
                          typename K::Sum (&sum)[M][Vectors]) {
#ifdef GPTJ_AVX512  // rows outside, so that vectors share a row's word
  typename K::Part parts[Vectors][K::kParts];
  unrolled<Vectors>([&](auto v) GPTJ_INLINE_LAMBDA {
    unrolled<K::kParts>([&](auto p) GPTJ_INLINE_LAMBDA {
      parts[v][p] = K::part(load_ints(weights + v * 64), p);
    });
  });
  unrolled<M>([&](auto m) GPTJ_INLINE_LAMBDA {
    unrolled<Vectors>([&](auto v) GPTJ_INLINE_LAMBDA {
      unrolled<K::kParts>([&](auto p) GPTJ_INLINE_LAMBDA {
        sum[m][v] = K::dot(sum[m][v], parts[v][p], x[p * M + m]);
      });
    });
  });
#else  // parts outside, so that few registers hold weights
  unrolled<Vectors>([&](auto v) GPTJ_INLINE_LAMBDA {
    unrolled<K::kParts>([&](auto p) GPTJ_INLINE_LAMBDA {
      const typename K::Part part = K::part(load_ints(weights + v * 64), p);
      unrolled<M>([&](auto m) GPTJ_INLINE_LAMBDA {
        sum[m][v] = K::dot(sum[m][v], part, x[p * M + m]);
      });
    });
  });
#endif
}

// Adds the products of `count` words of some vectors of a block with the M rows of a pass.
// Meanwhile it prefetches weights: of a single pass its own, further on (`lines` is 2 a word), of
// several the next chunk's from `ahead` on (1 a word), or none.
template <class K, int M, int Vectors>
GPTJ_INLINE void add_products(const char* weights, const uint32_t* words, int64_t count,
                              const char* ahead, int lines, typename K::Sum (&sum)[M][Vectors]) {
  if (M == kMaxRows && lines == 0) {  // nearly all passes over many rows: a loop without branches
    for (int64_t i = 0; i < count; ++i)
      add_word<K, M, Vectors>(weights + i * 128, words + i * K::kParts * M, sum);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    if (lines == 1) _mm_prefetch(ahead + i * 64, _MM_HINT_T1);
    if (lines == 2)
      unrolled<2>([&](auto line) GPTJ_INLINE_LAMBDA {
        _mm_prefetch(ahead + i * 128 + line * 64 + kFarAhead, _MM_HINT_T1);
        _mm_prefetch(ahead + i * 128 + line * 64 + kAhead, _MM_HINT_T0);
      });
    add_word<K, M, Vectors>(weights + i * 128, words + i * K::kParts * M, sum);
  }
}

// Adds the products of `count` words of one group of quantized inputs.
template <class K, int M, int Vectors>
GPTJ_INLINE void add_group(const char* weights, const uint32_t* words, int64_t count,
                           const char* ahead, int lines, Ints (&sum)[M][Vectors]) {
#ifndef GPTJ_DOT_INT8
  if constexpr (std::is_same_v<K, Int4>) {
    for (int64_t i = 0; i < count; i += K::kShort) {
      typename K::Sum part[M][Vectors];
      for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA { part[m][v] = K::zero(); });
      add_products<K, M, Vectors>(weights + i * 128, words + i * K::kParts * M, K::kShort,
                                  ahead + i * lines * 64, lines, part);
      for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA {
        sum[m][v] = add(sum[m][v], K::widened(part[m][v]));
      });
    }
    return;
  }
#endif
  add_products<K, M, Vectors>(weights, words, count, ahead, lines, sum);
}

// Adds the products of words [from, to), of a chunk or of all, of some vectors of a block, from
// `vector` on, with the M rows of a pass: out[m][v]. In int8 they still lack the columns' scales.
template <class K, int M, int Vectors>
GPTJ_INLINE void product(const Weights& w, int64_t block, int vector, int64_t from, int64_t to,
                         const Activations& a, int64_t row, const char* ahead, int lines,
                         Floats (&out)[M][Vectors]) {
  const char* weights =
      static_cast<const char*>(w.data) + (block * a.width + from) * 128 + vector * 64;
  const uint32_t* words = a.turned + (from * a.rows + row * (to - from)) * K::kParts;
  if constexpr (std::is_same_v<K, Int8> || std::is_same_v<K, Int4>) {
    constexpr Kind kind = std::is_same_v<K, Int8> ? Kind::int8 : Kind::int4;
    const int64_t most = group(kind) / per_word(kind);
    for (int64_t i = 0; i < to - from; i += most) {
      const int64_t g = (from + i) / most;
      Ints sum[M][Vectors];
      for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA {
        sum[m][v] = all_ints(-K::kZero * a.sums[(row + m) * a.groups + g]);
      });
      add_group<K, M, Vectors>(weights + i * 128, words + i * K::kParts * M,
                               std::min(most, to - from - i), ahead + i * lines * 64, lines, sum);
      Floats unit[Vectors];  // the value of one step of the weights, if groups have their own
      if constexpr (kind == Kind::int4)
        unrolled<Vectors>([&](auto v) GPTJ_INLINE_LAMBDA {
          unit[v] = load_bf16(
              w.group_scales + (block * a.groups + g) * kBlock + (vector + v) * 16, first(16));
        });
      for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA {
        const Floats scale = all(a.scales[(row + m) * a.groups + g]);
        out[m][v] = fma(to_floats(sum[m][v]), kind == Kind::int4 ? mul(scale, unit[v]) : scale,
                        out[m][v]);
      });
    }
  } else {
    add_products<K, M, Vectors>(weights, words, to - from, ahead, lines, out);
  }
}

// A pass over words [from, to) of a block, whose products are added to `sums` (rows, kBlock); the
// first words' are stored there.
template <class K, int M>
inline void rows_of_block(const Weights& w, int64_t block, int64_t from, int64_t to,
                          const Activations& a, int64_t row, const char* ahead, int lines,
                          float* sums) {
  constexpr int Vectors = M <= kWideRows ? 2 : 1;
  for (int vector = 0; vector < 2; vector += Vectors) {
    float* own = sums + row * kBlock + vector * 16;
    Floats out[M][Vectors];
    for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA {
      out[m][v] = from == 0 ? zeros() : load(own + m * kBlock + v * 16);
    });
    product<K, M, Vectors>(w, block, vector, from, to, a, row, ahead, vector == 0 ? lines : 0, out);
    for_each<M, Vectors>([&](auto m, auto v) GPTJ_INLINE_LAMBDA {
      store(own + m * kBlock + v * 16, out[m][v]);
    });
  }
}

// The products of all rows with one block, in passes: sums (rows, kBlock). A single pass prefetches
// weights slightly ahead; several go through the block in chunks, of which the first two passes each
// prefetch half of the next, so that memory stays busy while the processor computes from cache.
template <class K>
void block_sums(const Weights& w, int64_t block, const Activations& a, float* sums) {
  const int64_t passes = Pass::passes(a.rows), most = passes == 1 ? a.width : kChunk;
  for (int64_t from = 0; from < a.width; from += most) {
    const int64_t to = std::min(a.width, from + most), bytes = (to - from) * 128;
    const char* start = static_cast<const char*>(w.data) + (block * a.width + from) * 128;
    for (int64_t number = 0; number < passes; ++number) {
      const Pass pass = Pass::number(number, a.rows);
      const int lines = passes == 1 ? 2 : number < 2 ? 1 : 0;
      const char* ahead = passes == 1 ? start : start + bytes + number * (bytes / 2);
      switch (pass.count) {
#define ROWS(M)                                                                    \
  case M:                                                                          \
    if constexpr (M <= kMaxRows)                                                   \
      rows_of_block<K, M>(w, block, from, to, a, pass.row, ahead, lines, sums);    \
    break;
        ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
        ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
      }
    }
  }
}

// Multiplies all rows with one block, and calls done(row, column, values, mask) for each 16 columns,
// with the bias added.
template <class Done>
inline void block_product(const Weights& w, int64_t block, const Activations& a, const Done& done) {
  thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < a.rows * kBlock) buffer.resize(size_t(a.rows * kBlock));
  // Read once: each access to a thread_local variable is a function call.
  float* const sums = buffer.data();
  switch (Kind(w.kind)) {
    case Kind::fp32: block_sums<Fp32>(w, block, a, sums); break;
    case Kind::bf16: block_sums<Bf16>(w, block, a, sums); break;
    case Kind::int8: block_sums<Int8>(w, block, a, sums); break;
    case Kind::int4: block_sums<Int4>(w, block, a, sums); break;
  }
  for (int64_t column = block * kBlock; column < (block + 1) * kBlock; column += 16) {
    const Mask mask = first(w.columns - column);
    if (none(mask)) break;
    const Floats bias = load(w.bias + column, mask);
    const bool scaled = Kind(w.kind) == Kind::int8;
    const Floats scale = scaled ? load(w.scales + column, mask) : all(1.0f);
    for (int64_t row = 0; row < a.rows; ++row) {
      const Floats y = load(sums + row * kBlock + column % kBlock);
      done(row, column, add(scaled ? mul(y, scale) : y, bias), mask);
    }
  }
}
