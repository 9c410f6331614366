// step.cpp's arithmetic on 512-bit vectors: exp, GELU, layer norm, and products of rows of
// activations with packed weights in fp32, bf16 or int8.
//
// The order of computation of each result depends only on its own row, never on other rows: a
// request's results are bitwise equal in any batch and with any chunks.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

enum class Kind : int { fp32 = 0, bf16 = 1, int8 = 2 };

constexpr int64_t kBlock = 32;   // columns of a block of packed weights: two vectors
constexpr int64_t kMaxRows = 12;  // rows per pass over a block: 24 accumulators
constexpr int64_t kAhead = 2048;  // prefetch distance of weights, in bytes
constexpr int64_t kGroup = 128;  // inputs that share a scale in quantized activations

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inputs per 32-bit word of weights.
inline int64_t per_word(Kind kind) { return kind == Kind::fp32 ? 1 : kind == Kind::bf16 ? 2 : 4; }

// Words of activations per word of weights. Without the bf16 dot product instruction, each input has
// its own word, widened once instead of for every column.
#ifdef __AVX512BF16__
constexpr int64_t kBf16Words = 1;
#else
constexpr int64_t kBf16Words = 2;
#endif
inline int64_t words_each(Kind kind) { return kind == Kind::bf16 ? kBf16Words : 1; }

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << (n < 0 ? 0 : n)) - 1); }

// e^x to about one unit in the last place (Cephes' polynomial), for x <= 88; below -87 it is 0.
inline __m512 exp512(__m512 x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_mask_mov_ps(_mm512_maskz_scalef_ps(normal, p, n), nan, x);
}

// The tanh approximation of GELU, as the equivalent x * sigmoid(2u).
inline __m512 gelu512(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  // Clamp so that exp does not overflow: the sigmoid is 0 or 1 there.
  const __m512 twice = _mm512_mul_ps(u, _mm512_set1_ps(-2.0f * 0.7978845608028654f));
  const __m512 e = exp512(_mm512_min_ps(_mm512_set1_ps(88.0f), twice));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// Rounds to the nearest bf16, ties to even, in each lane's upper half, as fp32; NaN stays NaN.
inline __m512 round_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i kept = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
  return _mm512_castsi512_ps(_mm512_and_si512(kept, _mm512_set1_epi32(int(0xffff0000))));
}

inline __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(round_bf16(x)), 16));
#endif
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline __m512 load_bf16(const void* p, __mmask16 mask) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

// Accumulation of products. `dot` adds, in each of 16 lanes, the products of a word of weights with
// the word of activations that all lanes share. `split` prepares weights for all rows, each of which
// has `kWords` words for them, `stride` words apart.
struct Fp32 {
  using Sum = __m512;
  using Split = __m512i;
  static constexpr int64_t kWords = 1;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Split split(__m512i w) { return w; }
  static Sum dot(Sum sum, __m512i w, uint32_t a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(_mm512_set1_epi32(int(a))), sum);
  }
  static Sum dot(Sum sum, Split w, const uint32_t* a, int64_t) { return dot(sum, w, *a); }
};

struct Halves {  // words of two bf16, as fp32
  __m512 low, high;
};

inline Halves halves(__m512i w) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(int(0xffff0000))))};
}

struct Bf16 {
  using Sum = __m512;
  static constexpr int64_t kWords = kBf16Words;
  static Sum zero() { return _mm512_setzero_ps(); }
#ifdef __AVX512BF16__
  using Split = __m512i;
  static Split split(__m512i w) { return w; }
  static Sum dot(Sum sum, __m512i w, uint32_t a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(int(a)));
  }
  static Sum dot(Sum sum, Split w, const uint32_t* a, int64_t) { return dot(sum, w, *a); }
#else
  using Split = Halves;
  static Split split(__m512i w) { return halves(w); }
  static Sum dot(Sum sum, __m512i w, uint32_t a) {
    const Halves both = halves(w), x = halves(_mm512_set1_epi32(int(a)));
    return _mm512_fmadd_ps(both.high, x.high, _mm512_fmadd_ps(both.low, x.low, sum));
  }
  static Sum dot(Sum sum, Split w, const uint32_t* a, int64_t stride) {
    const auto word = [&](int64_t i) { return _mm512_castsi512_ps(_mm512_set1_epi32(int(a[i]))); };
    return _mm512_fmadd_ps(w.high, word(stride), _mm512_fmadd_ps(w.low, word(0), sum));
  }
#endif
};

struct Int8 {  // weights are stored with 128 added, since one operand must be unsigned
  using Sum = __m512i;
  using Split = __m512i;
  static constexpr int64_t kWords = 1;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Split split(__m512i w) { return w; }
  static Sum dot(Sum sum, Split w, const uint32_t* a, int64_t) { return dot(sum, w, *a); }
  static Sum dot(Sum sum, __m512i w, uint32_t a) {
    const __m512i x = _mm512_set1_epi32(int(a));
#ifdef __AVX512VNNI__
    // Not the intrinsic, with which GCC 12 keeps the sums in memory: half the speed.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
#else  // in 16 bits, so that nothing saturates: |255 * 127| * 2 fits 32 bits only
    const __m512i mask = _mm512_set1_epi16(0x00ff);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(w, mask),
                                           _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w, 8), _mm512_srai_epi16(x, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
  }
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
// as the products read them. In int8 each group of kGroup inputs has a scale, and 128 times its sum,
// which cancels the 128 added to the weights.
struct Activations {
  uint32_t* by_row;  // (rows, words)
  uint32_t* turned;  // of each pass: (words, rows of the pass); for one row the same as by_row
  float* scales;     // (rows, groups)
  int32_t* offsets;  // (rows, groups)
  int64_t rows;
  int64_t width;   // words of a row of weights
  int64_t words;   // of a row
  int64_t groups;  // of a row
};

// Packed weights (columns, inputs), in blocks of kBlock columns: for each word of inputs, a
// block's columns are contiguous. Columns beyond the last are 0.
struct Weights {
  const void* data;
  const float* scales;  // (columns), int8 only
  const float* bias;    // (columns)
  int64_t columns;
  int64_t inputs;
};

// Whether a row is finite: int8 cannot represent NaN, and max() drops it.
inline bool finite(const float* x, int64_t n) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16)  // 0 * x is NaN if x is not finite
    sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(first(n - i), x + i), _mm512_setzero_ps(), sum);
  return _mm512_reduce_add_ps(sum) == 0.0f;
}

// Converts n inputs to a row of activations.
inline void convert(Kind kind, const float* x, int64_t n, const Activations& a, int64_t row) {
  uint32_t* own = a.by_row + row * a.words;
  if (kind == Kind::fp32) {
    std::memcpy(own, x, size_t(n) * 4);
  } else if (kind == Kind::bf16) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first(n - i);
      const __m512 y = _mm512_maskz_loadu_ps(mask, x + i);
#ifdef __AVX512BF16__
      _mm256_mask_storeu_epi16(reinterpret_cast<uint16_t*>(own) + i, mask, to_bf16(y));
#else
      _mm512_mask_storeu_ps(own + i, mask, round_bf16(y));
#endif
    }
  } else {
    for (int64_t g = 0; g * kGroup < n; ++g) {
      const int64_t from = g * kGroup, to = std::min(n, from + kGroup);
      __m512 most = _mm512_setzero_ps();
      for (int64_t i = from; i < to; i += 16)
        most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(first(to - i), x + i)));
      const float largest = _mm512_reduce_max_ps(most);
      const float scale = largest / 127.0f;
      const __m512 inverse = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = from; i < to; i += 16) {
        const __m512i q =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(first(to - i), x + i), inverse));
        sum = _mm512_add_epi32(sum, q);
        _mm_mask_storeu_epi8(reinterpret_cast<int8_t*>(own) + i, first(to - i),
                             _mm512_cvtepi32_epi8(q));
      }
      // Non-finite rows must stay non-finite, for the engine to detect.
      a.scales[row * a.groups + g] = finite(x + from, to - from) ? scale : NAN;
      a.offsets[row * a.groups + g] = 128 * _mm512_reduce_add_epi32(sum);
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
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16)
    total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(first(n - i), x + i));
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / float(n));
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = first(n - i);
    const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, x + i), mean);
    squares = _mm512_fmadd_ps(d, d, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / float(n);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(variance + epsilon));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = first(n - i);
    const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mean), factor);
    _mm512_mask_storeu_ps(y + i, m, _mm512_fmadd_ps(d, _mm512_maskz_loadu_ps(m, weight + i),
                                                    _mm512_maskz_loadu_ps(m, bias + i)));
  }
}

// A block's products with the M rows of a pass: out[m][v] is row m's with vector v. Meanwhile it
// prefetches the weights needed next: `lines` per word, starting at `ahead`.
template <class K, int M>
inline void product(const Weights& w, int64_t block, const Activations& a, int64_t row,
                    const char* ahead, int lines, __m512 (&out)[M][2]) {
  const auto* weights = static_cast<const char*>(w.data) + block * a.width * 128;
  const uint32_t* words = a.turned + row * a.words;
  const auto run = [&](int64_t from, int64_t to, typename K::Sum (&sum)[M][2]) {
    for (int64_t i = from; i < to; ++i) {
      const auto w0 = K::split(_mm512_loadu_si512(weights + i * 128));
      const auto w1 = K::split(_mm512_loadu_si512(weights + i * 128 + 64));
      if (lines > 0) _mm_prefetch(ahead + i * lines * 64, _MM_HINT_T0);
      if (lines > 1) _mm_prefetch(ahead + i * lines * 64 + 64, _MM_HINT_T0);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const uint32_t* x = words + i * K::kWords * M + m;
        sum[m][0] = K::dot(sum[m][0], w0, x, M);
        sum[m][1] = K::dot(sum[m][1], w1, x, M);
      }
    }
  };
  typename K::Sum sum[M][2];
  if constexpr (std::is_same_v<K, Int8>) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) out[m][0] = out[m][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < a.groups; ++g) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        sum[m][0] = sum[m][1] = _mm512_set1_epi32(-a.offsets[(row + m) * a.groups + g]);
      run(g * (kGroup / 4), std::min(a.width, (g + 1) * (kGroup / 4)), sum);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const __m512 scale = _mm512_set1_ps(a.scales[(row + m) * a.groups + g]);
        out[m][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][0]), scale, out[m][0]);
        out[m][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][1]), scale, out[m][1]);
      }
    }
    for (int v = 0; v < 2; ++v) {
      const int64_t column = block * kBlock + v * 16;
      const __m512 scale = _mm512_maskz_loadu_ps(first(w.columns - column), w.scales + column);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) out[m][v] = _mm512_mul_ps(out[m][v], scale);
    }
  } else {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = K::zero();
    run(0, a.width, sum);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) out[m][0] = sum[m][0], out[m][1] = sum[m][1];
  }
}

// Calls done(row, column, values, mask) for each 16 columns of a block, with the bias added.
template <class K, int M, class Done>
inline void rows_of_block(const Weights& w, int64_t block, const Activations& a, int64_t row,
                          const char* ahead, int lines, const Done& done) {
  __m512 out[M][2];
  product<K, M>(w, block, a, row, ahead, lines, out);
  for (int v = 0; v < 2; ++v) {
    const int64_t column = block * kBlock + v * 16;
    const __mmask16 mask = first(w.columns - column);
    if (mask == 0) break;
    const __m512 bias = _mm512_maskz_loadu_ps(mask, w.bias + column);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) done(row + m, column, _mm512_add_ps(out[m][v], bias), mask);
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
#define ROWS(M)                                                     \
  case M:                                                           \
    rows_of_block<K, M>(w, block, a, pass.row, ahead, lines, done); \
    break;
      ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6)
      ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12)
#undef ROWS
    }
  }
}
