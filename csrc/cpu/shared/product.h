// Products of float32 matrices in plain vector code, for processors that torch has no brgemm for.
#pragma once
#include <cstdint>

#include "shared/vec_math.h"

namespace flashmark {

// R rows and V vectors of c, held in registers; the last vector has `last` columns.
template <int64_t R, int64_t V, bool WHOLE>
inline void product_block(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                          float* c, int64_t ldc, bool add, int64_t last) {
  const auto load = [&](const float* row, int64_t v) {
    return WHOLE || v + 1 < V ? Vec::loadu(row + v * LANES) : Vec::loadu(row + v * LANES, last);
  };
  Vec sum[R][V];
  for (int64_t r = 0; r < R; r++)
    for (int64_t v = 0; v < V; v++) sum[r][v] = add ? load(c + r * ldc, v) : Vec(0.f);
  for (int64_t x = 0; x < k; x++) {
    Vec row[V];
    for (int64_t v = 0; v < V; v++) row[v] = load(b + x * ldb, v);
    for (int64_t r = 0; r < R; r++) {
      const Vec factor(a[r * lda + x]);
      for (int64_t v = 0; v < V; v++) sum[r][v] = at::vec::fmadd(factor, row[v], sum[r][v]);
    }
  }
  for (int64_t r = 0; r < R; r++)
    for (int64_t v = 0; v < V; v++)
      sum[r][v].store(c + r * ldc + v * LANES, WHOLE || v + 1 < V ? LANES : last);
}

template <int64_t V, bool WHOLE>
inline void product_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b,
                            int64_t ldb, float* c, int64_t ldc, bool add, int64_t last) {
  int64_t r = 0;
  for (; r + 4 <= m; r += 4)
    product_block<4, V, WHOLE>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add, last);
  for (; r < m; r++)
    product_block<1, V, WHOLE>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc, add, last);
}

// c (m, n) = or += a (m, k) b (k, n). Never inlined: it would grow each of its many callers.
[[gnu::noinline]] inline void vector_product(int64_t m, int64_t n, int64_t k, const float* a,
                                             int64_t lda, const float* b, int64_t ldb, float* c,
                                             int64_t ldc, bool add) {
  int64_t x = 0;
  for (; x + 4 * LANES <= n; x += 4 * LANES)
    product_columns<4, true>(m, k, a, lda, b + x, ldb, c + x, ldc, add, LANES);
  for (; x + LANES <= n; x += LANES)
    product_columns<1, true>(m, k, a, lda, b + x, ldb, c + x, ldc, add, LANES);
  if (x < n) product_columns<1, false>(m, k, a, lda, b + x, ldb, c + x, ldc, add, n - x);
}

}  // namespace flashmark
