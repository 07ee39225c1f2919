// Vector helpers on top of at::vec: base-2 exponential, selection by bits, paired bfloat16 stores.
#pragma once
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace flashmark {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t LANES = Vec::size();
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// 2^x, relative error below 3e-7; 0 at -inf.
inline Vec exp2_vec(Vec x) {
  // 2^f for f in [-1/2, 1/2]
  [[maybe_unused]] constexpr float c[] = {1.0000001f,   6.9314697e-1f, 2.402212e-1f,
                                          5.5507133e-2f, 9.6755413e-3f, 1.3276467e-3f};
#if defined(CPU_CAPABILITY_AVX512)
  // The second operand of max is what comes back for a NaN.
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-160.f), x);
  const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(v, n);
  __m512 r = _mm512_set1_ps(c[5]);
  for (int k = 4; k >= 0; k--) r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(c[k]));
  return _mm512_scalef_ps(r, n);
#elif defined(CPU_CAPABILITY_AVX2)
  // Below 2^-126, 0; from 2^128 on, infinity.
  const __m256 low = _mm256_set1_ps(-126.f);
  const __m256 v = _mm256_min_ps(_mm256_set1_ps(128.f), _mm256_max_ps(low, x));
  const __m256 n = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(v, n);
  __m256 r = _mm256_set1_ps(c[5]);
  for (int k = 4; k >= 0; k--) r = _mm256_fmadd_ps(r, f, _mm256_set1_ps(c[k]));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), _mm256_mul_ps(r, power));
#else
  return (x * Vec(LN2)).exp_u20();
#endif
}

inline Vec max_vec(Vec a, Vec b) {  // a NaN in b may be lost: the exponential that follows keeps it
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return at::vec::maximum(a, b);
#endif
}

// Lane k of the result is `yes` where bit (first + k) of `bits` is set, else `no`.
inline Vec select_bits(uint64_t bits, int64_t first, Vec yes, Vec no) {
  const uint64_t b = bits >> first;
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_mask_blend_ps(static_cast<__mmask16>(b), no, yes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b & 255)), lane);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
#else
  float y[LANES], n[LANES];
  yes.store(y);
  no.store(n);
  for (int64_t k = 0; k < LANES; k++) n[k] = (b >> k) & 1 ? y[k] : n[k];
  return Vec::loadu(n);
#endif
}

inline float sum_lanes(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, v);
}

#if defined(CPU_CAPABILITY_AVX512)
// float32 bits rounded to the nearest bfloat16, still in the upper half of each lane.
inline __m512i round_bfloat16(Vec x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// Two rows interleaved, as brgemm wants its second bfloat16 operand.
inline void store_pairs(c10::BFloat16* to, __m512i even, __m512i odd) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i low = _mm512_srli_epi32(even, 16);
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_and_si512(odd, upper), low));
}

inline void store_row(c10::BFloat16* to, __m512i rounded) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
#endif

}  // namespace flashmark
