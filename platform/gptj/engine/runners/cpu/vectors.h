// Vectors of 16 lanes of fp32 or int32: one 512-bit register with AVX-512, two of 256 bits with AVX2.
// Each function works lane by lane, and all give the same values at either level; only what adds up
// the lanes of a vector may round differently.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define GPTJ_AVX512 1
#endif

#ifdef GPTJ_AVX512

using Floats = __m512;
using Ints = __m512i;
using Mask = __mmask16;  // which lanes count

// The first n lanes, all of them from 16 on.
inline Mask first(int64_t n) { return n >= 16 ? 0xffff : Mask((1u << (n < 0 ? 0 : n)) - 1); }
inline bool none(Mask mask) { return mask == 0; }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline Floats load_or(Floats other, Mask mask, const float* p) {
  return _mm512_mask_loadu_ps(other, mask, p);
}
inline Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Mask mask, Floats x) { _mm512_mask_storeu_ps(p, mask, x); }
// 16-bit words, in the upper half of each lane.
inline Ints load_upper(const uint16_t* p, Mask mask) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}
inline void store_upper(uint16_t* p, Mask mask, Ints x) {
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)));
}
inline __m128i to_bytes(Ints x) { return _mm512_cvtepi32_epi8(x); }
inline Floats keep(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }  // else 0
inline Floats swapped(Floats x) { return _mm512_permute_ps(x, 0xb1); }  // in pairs of lanes

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where one is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline Floats abs(Floats a) { return _mm512_abs_ps(a); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - ab
inline Floats rounded(Floats a) { return _mm512_roundscale_ps(a, 0); }
inline Floats if_nan(Floats test, Floats then, Floats otherwise) {
  return _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask(test, test, _CMP_UNORD_Q), then);
}
// x where a >= b, else 0; for x * 2^n, n whole and within the exponents of normal numbers.
inline Floats if_ge(Floats a, Floats b, Floats x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), x);
}
inline Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a); }
inline float max_of(Floats a) { return _mm512_reduce_max_ps(a); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints add_long(Ints a, Ints b) { return _mm512_add_epi64(a, b); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int N>
inline Ints left(Ints a) { return _mm512_slli_epi32(a, N); }
template <int N>
inline Ints right(Ints a) { return _mm512_srli_epi32(a, N); }
inline Ints upper_bytes(Ints a) { return _mm512_srli_epi16(a, 8); }  // of 16-bit words
inline Ints add_words(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
// Sums of the products of two bytes in each 16-bit word, of which those of a are unsigned.
inline Ints dot_bytes(Ints a, Ints b) { return _mm512_maddubs_epi16(a, b); }
inline Ints dot_words(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }  // to nearest, ties to even
inline int32_t sum_of(Ints a) { return _mm512_reduce_add_epi32(a); }
inline int64_t sum_of_long(Ints a) { return _mm512_reduce_add_epi64(a); }

#else  // AVX2 and FMA

struct Floats {
  __m256 low, high;
};
struct Ints {
  __m256i low, high;
};
struct Mask {
  int lanes;  // the first ones count
};

inline Mask first(int64_t n) { return {int(std::clamp<int64_t>(n, 0, 16))}; }
inline bool none(Mask mask) { return mask.lanes == 0; }

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Floats as_floats(Ints x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}
inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

// All bits of the lanes that count.
inline Ints lanes_of(Mask mask) {
  const __m256i n = _mm256_set1_epi32(mask.lanes);
  return {_mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats load(const float* p, Mask mask) {
  if (mask.lanes == 16) return load(p);
  const Ints lanes = lanes_of(mask);
  return {_mm256_maskload_ps(p, lanes.low), _mm256_maskload_ps(p + 8, lanes.high)};
}
inline Floats blended(Floats a, Floats b, Floats lanes) {  // b in these lanes
  return {_mm256_blendv_ps(a.low, b.low, lanes.low), _mm256_blendv_ps(a.high, b.high, lanes.high)};
}
inline Floats load_or(Floats other, Mask mask, const float* p) {
  return mask.lanes == 16 ? load(p) : blended(other, load(p, mask), as_floats(lanes_of(mask)));
}
inline Ints load_ints(const void* p) {
  const auto* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
inline void store(float* p, Mask mask, Floats x) {
  if (mask.lanes == 16) return store(p, x);
  const Ints lanes = lanes_of(mask);
  _mm256_maskstore_ps(p, lanes.low, x.low);
  _mm256_maskstore_ps(p + 8, lanes.high, x.high);
}
inline Ints load_upper(const uint16_t* p, Mask mask) {
  uint16_t part[16] = {};
  if (mask.lanes < 16) {
    std::memcpy(part, p, size_t(mask.lanes) * 2);
    p = part;
  }
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16),
          _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16)};
}
inline void store_upper(uint16_t* p, Mask mask, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_srli_epi32(x.low, 16), _mm256_srli_epi32(x.high, 16)), 0xd8);
  if (mask.lanes == 16) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
  uint16_t part[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), words);
  std::memcpy(p, part, size_t(mask.lanes) * 2);
}
inline __m128i to_bytes(Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline Floats keep(Mask mask, Floats x) {
  const Floats lanes = as_floats(lanes_of(mask));
  return {_mm256_and_ps(x.low, lanes.low), _mm256_and_ps(x.high, lanes.high)};
}
inline Floats swapped(Floats x) {
  return {_mm256_permute_ps(x.low, 0xb1), _mm256_permute_ps(x.high, 0xb1)};
}

#define BOTH(f, a, b) {f((a).low, (b).low), f((a).high, (b).high)}
inline Floats add(Floats a, Floats b) { return BOTH(_mm256_add_ps, a, b); }
inline Floats sub(Floats a, Floats b) { return BOTH(_mm256_sub_ps, a, b); }
inline Floats mul(Floats a, Floats b) { return BOTH(_mm256_mul_ps, a, b); }
inline Floats div(Floats a, Floats b) { return BOTH(_mm256_div_ps, a, b); }
inline Floats min(Floats a, Floats b) { return BOTH(_mm256_min_ps, a, b); }
inline Floats max(Floats a, Floats b) { return BOTH(_mm256_max_ps, a, b); }
inline Ints add(Ints a, Ints b) { return BOTH(_mm256_add_epi32, a, b); }
inline Ints add_long(Ints a, Ints b) { return BOTH(_mm256_add_epi64, a, b); }
inline Ints both(Ints a, Ints b) { return BOTH(_mm256_and_si256, a, b); }
inline Ints either(Ints a, Ints b) { return BOTH(_mm256_or_si256, a, b); }
inline Ints dot_words(Ints a, Ints b) { return BOTH(_mm256_madd_epi16, a, b); }
inline Ints add_words(Ints a, Ints b) { return BOTH(_mm256_add_epi16, a, b); }
inline Ints dot_bytes(Ints a, Ints b) { return BOTH(_mm256_maddubs_epi16, a, b); }
#undef BOTH
inline Floats abs(Floats a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats rounded(Floats a) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, nearest), _mm256_round_ps(a.high, nearest)};
}
inline Floats if_nan(Floats test, Floats then, Floats otherwise) {
  return blended(otherwise, then,
                 {_mm256_cmp_ps(test.low, test.low, _CMP_UNORD_Q),
                  _mm256_cmp_ps(test.high, test.high, _CMP_UNORD_Q)});
}
inline Floats if_ge(Floats a, Floats b, Floats x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.low, b.low, _CMP_GE_OQ), x.low),
          _mm256_and_ps(_mm256_cmp_ps(a.high, b.high, _CMP_GE_OQ), x.high)};
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline Ints to_ints(Floats a) { return {_mm256_cvtps_epi32(a.low), _mm256_cvtps_epi32(a.high)}; }
template <int N>
inline Ints left(Ints a) { return {_mm256_slli_epi32(a.low, N), _mm256_slli_epi32(a.high, N)}; }
template <int N>
inline Ints right(Ints a) { return {_mm256_srli_epi32(a.low, N), _mm256_srli_epi32(a.high, N)}; }
inline Ints upper_bytes(Ints a) { return {_mm256_srli_epi16(a.low, 8), _mm256_srli_epi16(a.high, 8)}; }
inline Floats scaled(Floats x, Floats n) {  // 2^n from its exponent's bits
  return mul(x, as_floats(left<23>(add(to_ints(n), all_ints(127)))));
}
inline float sum_of(Floats a) {
  const __m256 sums = _mm256_add_ps(a.low, a.high);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_of(Floats a) {
  const __m256 most = _mm256_max_ps(a.low, a.high);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline int32_t sum_of(Ints a) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(a.low, a.high));
  int32_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}
inline int64_t sum_of_long(Ints a) {
  alignas(32) int64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(a.low, a.high));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

#endif
