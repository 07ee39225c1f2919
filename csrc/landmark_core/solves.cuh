// Device functions of one head: products, inverse by sweeps, the kernel matrix and row sums. A
// block of threads a head.
#pragma once

#include <limits>

#include "../native_cuda.h"
#include "landmark_core.h"

namespace flashmark {
namespace {

constexpr int kMost = 256;
constexpr int kMatrices = 3;
template <class T>
constexpr T kRounding = std::numeric_limits<T>::epsilon();

template <class T>
struct Vectors {  // in shared memory
  T half[kMost], root[kMost], sums[kMost], dr[kMost], dlog[kMost], row[kMost];
};

template <class T>
struct Space {
  T *a, *b, *c;
  Vectors<T>* v;
};

template <class T>
__device__ Space<T> workspace(T* global, int64_t m) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* vectors = reinterpret_cast<Vectors<T>*>(memory);
  T* first = global ? global + blockIdx.x * kMatrices * m * m : reinterpret_cast<T*>(vectors + 1);
  return {first, first + m * m, first + 2 * m * m, vectors};
}

// C = A B, (m, n) with `inner` products each, element (i, k) of A at a(i, k): sixteen elements of C
// a thread at a time.
template <class T, class A, class B, class Store>
__device__ void product(int m, int n, int inner, A a, B b, Store store) {
  const int high = (m + 3) / 4, wide = (n + 3) / 4;
  for (int item = threadIdx.x; item < high * wide; item += kThreads) {
    const int i0 = item / wide * 4, j0 = item % wide * 4;
    T acc[4][4] = {};
    for (int k = 0; k < inner; k++) {
      T x[4], y[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        x[c] = a(min(i0 + c, m - 1), k);
        y[c] = b(k, min(j0 + c, n - 1));
      }
#pragma unroll
      for (int r = 0; r < 4; r++) {
#pragma unroll
        for (int c = 0; c < 4; c++) acc[r][c] += x[r] * y[c];
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int c = 0; c < 4; c++) {
        if (i0 + r < m && j0 + c < n) store(i0 + r, j0 + c, acc[r][c]);
      }
    }
  }
  __syncthreads();
}

template <class T, class A, class B, class Store>
__device__ void product(int m, A a, B b, Store store) {
  product<T>(m, m, m, a, b, store);
}

// P = (given + jitter)^-1 for a symmetric matrix; false, the same on all threads, where a pivot is
// not above `floor`.
template <class T>
__device__ bool sweep(const T* given, int m, T jitter, T floor, T* P, T* row) {
  for (int x = threadIdx.x; x < m * m; x += kThreads)
    P[x] = given[x] + (x / m == x % m ? jitter : T(0));
  __syncthreads();
  for (int k = 0; k < m; k++) {
    for (int j = threadIdx.x; j < m; j += kThreads) row[j] = P[k * m + j];
    __syncthreads();
    const T pivot = row[k];
    if (!(pivot > floor)) return false;
    const T inverse = 1 / pivot;
    for (int x = threadIdx.x; x < m * m; x += kThreads) {
      const int i = x / m, j = x % m;
      if (i == k || j == k) {
        P[x] = i == j ? -inverse : row[i == k ? j : i] * inverse;
      } else {
        P[x] -= row[i] * row[j] * inverse;
      }
    }
    __syncthreads();
  }
  for (int x = threadIdx.x; x < m * m; x += kThreads) P[x] = -P[x];
  __syncthreads();
  return true;
}

// As on a CPU: ten times the jitter after each failure. Returns the jitter that it took.
template <class T>
__device__ double regularised_inverse(const T* given, int m, double jitter, T* P, T* row) {
  T largest = 0;
  for (int i = 0; i < m; i++) largest = max(largest, given[i * m + i]);
  const T floor = kRounding<T> * m * largest;
  const int attempts = jitter > 0 ? kAttempts : 1;
  for (int attempt = 0; attempt < attempts; attempt++, jitter *= 10) {
    if (sweep(given, m, static_cast<T>(jitter), floor, P, row)) return jitter;
    __syncthreads();
  }
  for (int x = threadIdx.x; x < m * m; x += kThreads) P[x] = static_cast<T>(nan(""));
  __syncthreads();
  return nan("");
}

// U_ij = exp(s_ij - s_ii / 2 - s_jj / 2) and root_i = exp(s_ii / 2 - their maximum); returns the
// maximum.
template <class T, class IO>
__device__ T unit_kernel(const IO* scores, int m, T* U, Vectors<T>* v) {
  for (int i = threadIdx.x; i < m; i += kThreads)
    v->half[i] = static_cast<T>(scores[i * m + i]) / 2;
  __syncthreads();
  T most = v->half[0];
  for (int i = 1; i < m; i++) most = max(most, v->half[i]);
  for (int i = threadIdx.x; i < m; i += kThreads)
    v->root[i] = exp(max(v->half[i] - most, static_cast<T>(kLeastRoot)));
  for (int x = threadIdx.x; x < m * m; x += kThreads) {
    const int i = max(x / m, x % m), j = min(x / m, x % m);
    U[x] = exp(static_cast<T>(scores[i * m + j]) - v->half[i] - v->half[j]);
  }
  __syncthreads();
  return most;
}

// y = (U + shift) x, a row a thread
template <class T>
__device__ void times(const T* U, int m, T shift, const T* x, T* y) {
  for (int i = threadIdx.x; i < m; i += kThreads) {
    T sum = shift * x[i];
    for (int j = 0; j < m; j++) sum += U[j * m + i] * x[j];
    y[i] = sum;
  }
  __syncthreads();
}

// A constant moves the sum of each row of x to `wanted`.
template <class T>
__device__ void move_row_sums(T* x, int m, T wanted, T* row) {
  for (int i = threadIdx.x; i < m; i += kThreads) {
    T sum = 0;
    for (int j = 0; j < m; j++) sum += x[i * m + j];
    row[i] = (wanted - sum) / m;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < m * m; k += kThreads) x[k] += row[k / m];
  __syncthreads();
}

}  // namespace
}  // namespace flashmark
