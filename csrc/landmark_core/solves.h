// One head: the core and its gradient. T is the type of the arithmetic, IO that of the tensors.
#pragma once

#include <limits>

#include "dense.h"
#include "landmark_core.h"

namespace flashmark::dense_blocks {

constexpr int64_t kMatrices = 4;  // padded matrices a head needs beside `scratch_size`

template <class T>
constexpr int64_t padded(int64_t m) {
  return ceil_div(m, kBlock<T>) * kBlock<T>;
}

template <class T>
constexpr int64_t space_size(int64_t m) {
  const int64_t n = padded<T>(m);
  return kMatrices * n * n + scratch_size<T>(n) +
         8 * n * static_cast<int64_t>(sizeof(double) / sizeof(T));
}

template <class T>
struct Space {  // cut from one buffer
  int64_t n;
  T *a, *b, *c, *d, *scratch;
  double* rows[8];
  Space(T* buffer, int64_t m) : n(padded<T>(m)) {
    a = buffer, b = a + n * n, c = b + n * n, d = c + n * n, scratch = d + n * n;
    for (int k = 0; k < 8; k++)
      rows[k] = reinterpret_cast<double*>(scratch + scratch_size<T>(n)) + k * n;
  }
};

template <class T, class From>
FLASHMARK_INLINE void load(const From* from, int64_t m, T* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < m && i < m; j++) to[i * n + j] = static_cast<T>(from[i * m + j]);
    std::fill(to + i * n + (i < m ? m : 0), to + (i + 1) * n, T(0));
  }
}

// P = (a + jitter)^-1 for the lower triangle of a (m of n rows); returns the jitter that it took,
// NaN where none did.
template <class T>
FLASHMARK_INLINE double regularised_inverse(const T* a, int64_t m, int64_t n, double jitter,
                                            T* work, T* P, T* scratch) {
  T largest = 0;
  for (int64_t i = 0; i < m; i++) largest = std::max(largest, a[i * n + i]);
  const T floor = std::numeric_limits<T>::epsilon() * static_cast<T>(m) * largest;
  const int attempts = jitter > 0 ? kAttempts : 1;
  for (int attempt = 0; attempt < attempts; attempt++, jitter *= 10) {
    for (int64_t i = 0; i < n; i++) {
      for (int64_t j = 0; j < n; j++) work[i * n + j] = i < m && j < m ? a[i * n + j] : T(0);
      work[i * n + i] = i < m ? a[i * n + i] + static_cast<T>(jitter) : largest + 1;
    }
    if (invert(work, n, P, scratch, floor)) return jitter;
  }
  std::fill(P, P + n * n, std::numeric_limits<T>::quiet_NaN());
  return std::numeric_limits<double>::quiet_NaN();
}

// U_ij = exp(s_ij - s_ii / 2 - s_jj / 2), lower triangle, and root_i = exp(s_ii / 2 - their
// maximum), of scores whose rows are `ld` apart.
template <class T, class S>
FLASHMARK_INLINE void unit_kernel(const S* scores, int64_t ld, int64_t m, T* U, int64_t n,
                                  double* half, double* root, double* row) {
  double most = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < m; i++) {
    half[i] = 0.5 * scores[i * ld + i];
    most = std::max(most, half[i]);
  }
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j <= i; j++) row[j] = scores[i * ld + j] - half[i] - half[j];
    for (int64_t j = 0; j <= i; j++) U[i * n + j] = static_cast<T>(exponential(row[j]));
  }
  for (int64_t i = 0; i < m; i++) root[i] = exponential(std::max(half[i] - most, kLeastRoot));
}

// y = (A + shift) x for a symmetric A given by its lower triangle.
template <class T>
FLASHMARK_INLINE void symmetric_times(const T* A, int64_t m, int64_t n, double shift,
                                      const double* x, double* y) {
  for (int64_t i = 0; i < m; i++) y[i] = (A[i * n + i] + shift) * x[i];
  for (int64_t i = 0; i < m; i++) {
    double sum = 0;
    const double xi = x[i];
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < i; j++) {
      y[j] += A[i * n + j] * xi;
      sum += A[i * n + j] * x[j];
    }
    y[i] += sum;
  }
}

// One row of the core, or of its gradient: a constant moves every row's sum to 1, or to 0.
template <class IO>
FLASHMARK_INLINE void store_row(const double* row, int64_t m, bool to_sum, double wanted, IO* out) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; j++) sum += row[j];
  const double shift = to_sum ? (wanted - sum) / m : 0;
  for (int64_t j = 0; j < m; j++) out[j] = static_cast<IO>(row[j] + shift);
}

template <class T, class S, class IO>
FLASHMARK_INLINE double tied_forward(const S* scores, int64_t ld, int64_t m, double jitter,
                                     bool softmax, T* buffer, IO* core, T* inverse) {
  const Space<T> s(buffer, m);
  const int64_t n = s.n;
  T *U = s.a, *work = s.b, *P = s.c;
  double *half = s.rows[0], *root = s.rows[1], *sums = s.rows[2], *row = s.rows[3];
  unit_kernel(scores, ld, m, U, n, half, root, row);
  jitter = regularised_inverse(U, m, n, jitter, work, P, s.scratch);
  symmetric_times(U, m, n, jitter, root, sums);
  for (int64_t i = 0; i < m; i++) {
    if (inverse != nullptr) std::copy_n(P + i * n, m, inverse + i * m);
    const double scale = 1 / root[i];
    for (int64_t l = 0; l < m; l++)
      row[l] = softmax ? P[i * n + l] * sums[l] * scale : P[i * n + l];
    store_row(row, m, softmax, 1.0, core + i * m);
  }
  return jitter;
}

// Elements that functions of landmarks need beside `space_size`: the landmarks by rows and by
// columns, and a gradient of the scores.
template <class T>
constexpr int64_t landmark_size(int64_t m, int64_t dim) {
  return 2 * padded<T>(m) * dim + padded<T>(m) * padded<T>(m);
}

// scale X X^T of landmarks X (m, dim), whose rows are n apart; X by columns and scale X by rows are
// left behind `space_size`.
template <class T, class IO>
FLASHMARK_INLINE const T* scores_of(const IO* X, int64_t m, int64_t dim, double scale, T* buffer) {
  const Space<T> s(buffer, m);
  const int64_t n = s.n;
  T *columns = buffer + space_size<T>(m), *rows = columns + n * dim, *scores = s.d;
  std::fill(columns, columns + 2 * n * dim, T(0));
  for (int64_t i = 0; i < m; i++) {
    for (int64_t k = 0; k < dim; k++) {
      const T x = static_cast<T>(X[i * dim + k]);
      columns[k * n + i] = x;
      rows[i * dim + k] = static_cast<T>(scale) * x;
    }
  }
  product<1, false>(scores, n, rows, dim, columns, n, ceil_div(m, 4) * 4, n, dim);
  return scores;
}

template <class T, class IO>
FLASHMARK_INLINE double landmarks_forward(const IO* X, int64_t m, int64_t dim, double scale,
                                          double jitter, bool softmax, T* buffer, IO* core,
                                          T* inverse) {
  const T* scores = scores_of(X, m, dim, scale, buffer);
  return tied_forward<T>(scores, padded<T>(m), m, jitter, softmax, buffer, core, inverse);
}

// With r = (U + jitter) root: core_il = P_il r_l / root_i, and dK = -P dP P.
template <class T, class S, class IO, class Out>
FLASHMARK_INLINE void tied_backward(const S* scores, int64_t ld, const T* inverse, double jitter,
                                    const IO* dcore, int64_t m, bool softmax, T* buffer,
                                    Out* dscores) {
  const Space<T> s(buffer, m);
  const int64_t n = s.n;
  T *U = s.a, *P = s.b, *H = s.c, *E = s.d, *first = s.scratch, *G = s.scratch + n * n;
  double *half = s.rows[0], *root = s.rows[1], *r = s.rows[2], *row = s.rows[3];
  double *dr = s.rows[4], *dlog = s.rows[5], *dhalf = s.rows[6], *v = s.rows[7];
  unit_kernel(scores, ld, m, U, n, half, root, row);
  load(inverse, m, P, n);
  load(dcore, m, G, n);
  std::fill(dr, dr + m, 0.0);
  std::fill(dhalf, dhalf + m, 0.0);
  if (softmax) {
    symmetric_times(U, m, n, jitter, root, r);
    for (int64_t i = 0; i < m; i++) {
      double mean = 0, sum = 0;
      const double scale = 1 / root[i];
#pragma omp simd reduction(+ : mean)
      for (int64_t l = 0; l < m; l++) mean += G[i * n + l];
      mean /= m;
#pragma omp simd reduction(+ : sum)
      for (int64_t l = 0; l < m; l++) {
        const double g = (G[i * n + l] - mean) * scale, gp = g * P[i * n + l];
        dr[l] += gp;
        sum += gp * r[l];
        G[i * n + l] = static_cast<T>(g * r[l]);  // dP
      }
      dlog[i] = -sum;
    }
    symmetric_times(U, m, n, jitter, dr, v);
    double most = half[0], total = 0, ties = 0;
    for (int64_t i = 1; i < m; i++) most = std::max(most, half[i]);
    for (int64_t i = 0; i < m; i++) {
      const double dc = half[i] - most >= kLeastRoot ? dlog[i] + root[i] * v[i] : 0;
      dhalf[i] += dc;
      total += dc;
      ties += half[i] == most;
    }
    for (int64_t i = 0; i < m; i++) dhalf[i] -= half[i] == most ? total / ties : 0;
  }
  transpose(G, n, H, n, n, n);
  for (int64_t k = 0; k < n * n; k++) H[k] = (H[k] + G[k]) / 2;
  product<1, false>(first, n, P, n, H, n, n, n, n);
  for (int64_t i = 0; i < n; i += kBlock<T>) {
    product<-1, false>(E + i * n, n, first + i * n, n, P, n, kBlock<T>, i + kBlock<T>, n);
  }
  for (int64_t i = 0; i < m; i++) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < i; j++) {
      const double e = E[i * n + j] + 0.5 * (softmax ? dr[i] * root[j] + dr[j] * root[i] : 0.0);
      row[j] = e * U[i * n + j];
      sum += row[j];
      dhalf[j] -= 2 * row[j];
    }
    dhalf[i] -= 2 * sum;
    for (int64_t j = 0; j < i; j++) E[i * n + j] = static_cast<T>(row[j]);
  }
  for (int64_t i = 0; i < m; i++) {  // the unit diagonal itself is constant
    for (int64_t j = 0; j < i; j++)
      dscores[i * m + j] = dscores[j * m + i] = static_cast<Out>(E[i * n + j]);
    dscores[i * m + i] = static_cast<Out>(0.5 * dhalf[i]);
  }
}

// dX = 2 scale dS X, for the symmetric gradient dS of the scores.
template <class T, class IO>
FLASHMARK_INLINE void landmarks_backward(const IO* X, int64_t dim, double scale, const T* inverse,
                                         double jitter, const IO* dcore, int64_t m, bool softmax,
                                         T* buffer, IO* dX) {
  const int64_t n = padded<T>(m);
  const T* scores = scores_of(X, m, dim, scale, buffer);
  T *row = buffer + space_size<T>(m), *rows = row + n * dim, *dscores = rows + n * dim;
  tied_backward<T>(scores, n, inverse, jitter, dcore, m, softmax, buffer, dscores);
  for (int64_t i = 0; i < m; i++) {
    std::fill(row, row + dim, T(0));
    for (int64_t j = 0; j < m; j++) {
      const T x = 2 * dscores[i * m + j];
      for (int64_t k = 0; k < dim; k++) row[k] += x * rows[j * dim + k];
    }
    for (int64_t k = 0; k < dim; k++) dX[i * dim + k] = static_cast<IO>(row[k]);
  }
}

template <class T, class IO>
FLASHMARK_INLINE double tikhonov_forward(const IO* matrix, int64_t m, double jitter, bool unit_rows,
                                         T* buffer, IO* core, T* inverse) {
  const Space<T> s(buffer, m);
  const int64_t n = s.n;
  T *A = s.a, *normal = s.b, *P = s.c, *work = s.d, *flipped = s.scratch;
  load(matrix, m, A, n);
  transpose(A, n, flipped, n, n, n);
  product<1, false>(normal, n, flipped, n, A, n, n, n, n);
  jitter = regularised_inverse(normal, m, n, jitter, work, P, s.scratch);
  transpose(A, n, flipped, n, n, n);
  product<1, false>(work, n, P, n, flipped, n, n, n, n);
  double* row = s.rows[0];
  for (int64_t i = 0; i < m; i++) {
    std::copy_n(P + i * n, m, inverse + i * m);
    for (int64_t j = 0; j < m; j++) row[j] = work[i * n + j];
    store_row(row, m, unit_rows, 1.0, core + i * m);
  }
  return jitter;
}

// Q = P dC: dA = Q^T - A (T + T^T), T = Q A P.
template <class T, class IO>
FLASHMARK_INLINE void tikhonov_backward(const IO* matrix, const T* inverse, const IO* dcore,
                                        int64_t m, bool unit_rows, T* buffer, IO* dmatrix) {
  const Space<T> s(buffer, m);
  const int64_t n = s.n;
  T *A = s.a, *P = s.b, *Q = s.c, *G = s.d, *x = s.scratch, *y = s.scratch + n * n;
  double* row = s.rows[0];
  load(matrix, m, A, n);
  load(inverse, m, P, n);
  load(dcore, m, G, n);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < m; j++) row[j] = G[i * n + j];
    store_row(row, m, unit_rows, 0.0, G + i * n);
  }
  product<1, false>(Q, n, P, n, G, n, n, n, n);
  product<1, false>(x, n, Q, n, A, n, n, n, n);
  product<1, false>(y, n, x, n, P, n, n, n, n);
  transpose(y, n, x, n, n, n);
  for (int64_t k = 0; k < n * n; k++) x[k] += y[k];
  transpose(Q, n, y, n, n, n);
  product<-1, true>(y, n, A, n, x, n, n, n, n);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < m; j++) dmatrix[i * m + j] = static_cast<IO>(y[i * n + j]);
  }
}

}  // namespace flashmark::dense_blocks
