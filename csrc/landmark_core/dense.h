// Small dense products, Cholesky factors and inverses, on row-major matrices padded to whole
// vectors.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "../native.h"

namespace flashmark::dense_blocks {

template <class T>
constexpr int64_t kBlock = 128 / sizeof(T);  // two vectors of 64 bytes

template <class T>
struct Lanes {
  typedef T type __attribute__((vector_size(64), may_alias));
};

// C = A B (Sign 1), or C -= A B (Sign -1, Add) and C += A B: m a multiple of 4, n of kBlock;
// 64-byte aligned rows.
template <int Sign, bool Add, class T>
FLASHMARK_INLINE void product(T* c, int64_t ldc, const T* a, int64_t lda, const T* b, int64_t ldb,
                              int64_t m, int64_t n, int64_t k) {
  using Vec = typename Lanes<T>::type;
  constexpr int64_t lanes = 64 / sizeof(T);
  for (int64_t j = 0; j < n; j += 2 * lanes) {
    for (int64_t i = 0; i < m; i += 4) {
      Vec acc[4][2] = {};
      for (int64_t p = 0; p < k; p++) {
        const Vec b0 = *reinterpret_cast<const Vec*>(b + p * ldb + j);
        const Vec b1 = *reinterpret_cast<const Vec*>(b + p * ldb + j + lanes);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          const T x = a[(i + r) * lda + p];
          acc[r][0] += x * b0;
          acc[r][1] += x * b1;
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        Vec* to = reinterpret_cast<Vec*>(c + (i + r) * ldc + j);
        to[0] = Add ? to[0] + Sign * acc[r][0] : Sign * acc[r][0];
        to[1] = Add ? to[1] + Sign * acc[r][1] : Sign * acc[r][1];
      }
    }
  }
}

template <class T>
FLASHMARK_INLINE void transpose(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows,
                                int64_t columns) {
  for (int64_t i0 = 0; i0 < rows; i0 += 8) {
    for (int64_t j = 0; j < columns; j++) {
      for (int64_t i = i0; i < std::min(rows, i0 + 8); i++)
        to[j * ld_to + i] = from[i * ld_from + j];
    }
  }
}

// Factor one diagonal block in place and write the inverse of its factor. False where a pivot is
// not above `floor`.
template <class T>
FLASHMARK_INLINE bool factor_block(T* block, int64_t ld, T* inverse, T floor) {
  constexpr int64_t n = kBlock<T>;
  alignas(64) T rest[n][n], column[n];
  for (int64_t i = 0; i < n; i++) std::copy_n(block + i * ld, n, rest[i]);
  for (int64_t j = 0; j < n; j++) {
    if (!(rest[j][j] > floor)) return false;
    const T root = std::sqrt(rest[j][j]), scale = 1 / root;
    for (int64_t i = 0; i < n; i++) column[i] = i < j ? T(0) : rest[i][j] * scale;
    column[j] = root;
    for (int64_t i = j + 1; i < n; i++) {
      const T x = column[i];
      for (int64_t c = 0; c < n; c++) rest[i][c] -= c > j ? x * column[c] : T(0);
    }
    for (int64_t i = j; i < n; i++) block[i * ld + j] = column[i];
  }
  for (int64_t i = 0; i < n; i++) {
    T* row = inverse + i * n;
    for (int64_t c = 0; c < n; c++) row[c] = c == i;
    for (int64_t p = 0; p < i; p++) {
      const T x = block[i * ld + p];
      for (int64_t c = 0; c < n; c++) row[c] -= x * inverse[p * n + c];
    }
    const T scale = 1 / block[i * ld + i];
    for (int64_t c = 0; c < n; c++) row[c] *= scale;
  }
  return true;
}

// Elements that `invert` needs beside the matrix and the result.
template <class T>
constexpr int64_t scratch_size(int64_t n) {
  return 2 * n * n + 3 * n * kBlock<T>;
}

// inverse = a^-1 for a symmetric positive definite (n, n), n a multiple of kBlock; the lower
// triangle of `a` is read and overwritten. False where it is not definite.
template <class T>
FLASHMARK_INLINE bool invert(T* a, int64_t n, T* inverse, T* scratch, T floor) {
  constexpr int64_t nb = kBlock<T>;
  T *w = scratch, *wt = w + n * n, *roots = wt + n * n, *panel = roots + n * nb,
    *strip = panel + n * nb;
  alignas(64) T flipped[nb * nb];
  // a = L L^T, block column by block column; `roots` holds the inverses of L's diagonal blocks
  for (int64_t k = 0; k < n; k += nb) {
    T* root = roots + k * nb;
    if (!factor_block(a + k * n + k, n, root, floor)) return false;
    transpose(root, nb, flipped, nb, nb, nb);
    for (int64_t i = k + nb; i < n; i += nb) {
      product<1, false>(strip, nb, a + i * n + k, n, flipped, nb, nb, nb, nb);
      for (int64_t r = 0; r < nb; r++) std::copy_n(strip + r * nb, nb, a + (i + r) * n + k);
      transpose(strip, nb, panel + i, n, nb, nb);
    }
    for (int64_t i = k + nb; i < n; i += nb) {
      product<-1, true>(a + i * n + k + nb, n, a + i * n + k, n, panel + k + nb, n, nb, i - k, nb);
    }
  }
  // w = L^-1 by forward substitution
  std::fill(w, w + n * n, T(0));
  for (int64_t k = 0; k < n; k += nb) {
    const T* root = roots + k * nb;
    std::fill(strip, strip + nb * n, T(0));
    for (int64_t p = 0; p < k; p += nb) {
      product<1, true>(strip, n, a + k * n + p, n, w + p * n, n, nb, p + nb, nb);
    }
    product<-1, false>(w + k * n, n, root, nb, strip, n, nb, k, nb);
    for (int64_t r = 0; r < nb; r++) std::copy_n(root + r * nb, nb, w + (k + r) * n + k);
  }
  // a^-1 = w^T w
  transpose(w, n, wt, n, n, n);
  for (int64_t i = 0; i < n; i += nb) {
    product<1, false>(inverse + i * n, n, wt + i * n + i, n, w + i * n, n, nb, i + nb, n - i);
  }
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < i; j++) inverse[j * n + i] = inverse[i * n + j];
  }
  return true;
}

// e^x to one rounding unit, without branches: loops over it become vectors. NaN stays.
FLASHMARK_INLINE double exponential(double x) {
  constexpr double magic = 0x1.8p52, log2e = 0x1.71547652b82fep0, ln2_high = 0x1.62e42fefa3800p-1,
                   ln2_low = 0x1.ef35793c76730p-45;
  x = x < -708.0 ? -708.0 : x;
  x = x > 709.0 ? 709.0 : x;
  const double shifted = x * log2e + magic, n = shifted - magic;
  const double r = (x - n * ln2_high) - n * ln2_low;
  double sum = 1.0 / 6227020800.0;  // Taylor: |r| <= ln 2 / 2, the next term is 4e-18
  for (const double term :
       {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
        1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0}) {
    sum = sum * r + term;
  }
  const int64_t exponent = std::bit_cast<int64_t>(shifted) - std::bit_cast<int64_t>(magic);
  return sum * std::bit_cast<double>((exponent + 1023) << 52);
}

}  // namespace flashmark::dense_blocks
