// Base-2 logarithm of vectors.
#pragma once
#include "shared/vec_math.h"

namespace flashmark {

// log2 of 0, of normal positive numbers and of +inf: error below 1e-7 of 1, or of the result where
// that is more.
inline Vec log2_vec(Vec x) {
  // log2(1 + f) / f for f in [-1/4, 1/2]
  [[maybe_unused]] constexpr float c[] = {1.442695f,    -0.72134846f, 0.48090222f,
                                          -0.36057657f, 0.2881863f,   -0.2427019f,
                                          0.21635856f,  -0.17444378f, 0.0782798f};
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_nan);
  const __m512 below = _mm512_getexp_ps(_mm512_mul_ps(x, _mm512_set1_ps(2.f / 3)));
  const __m512 n = _mm512_add_ps(below, _mm512_set1_ps(1.f));
  const __m512 f = _mm512_sub_ps(m, _mm512_set1_ps(1.f));
  __m512 r = _mm512_set1_ps(c[8]);
  for (int k = 7; k >= 0; k--) r = _mm512_fmadd_ps(r, f, _mm512_set1_ps(c[k]));
  return _mm512_fmadd_ps(r, f, n);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i three_quarters = _mm256_set1_epi32(0x3f400000);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, three_quarters), 23);
  const __m256 m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
  const __m256 f = _mm256_sub_ps(m, _mm256_set1_ps(1.f));
  __m256 r = _mm256_set1_ps(c[8]);
  for (int k = 7; k >= 0; k--) r = _mm256_fmadd_ps(r, f, _mm256_set1_ps(c[k]));
  r = _mm256_fmadd_ps(r, f, _mm256_cvtepi32_ps(n));
  const __m256 zero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ);
  r = _mm256_blendv_ps(r, _mm256_set1_ps(NEG_INF), zero);
  // +inf and NaN stay
  return _mm256_blendv_ps(x, r, _mm256_cmp_ps(x, _mm256_set1_ps(-NEG_INF), _CMP_LT_OQ));
#else
  return x.log2();
#endif
}

}  // namespace flashmark
