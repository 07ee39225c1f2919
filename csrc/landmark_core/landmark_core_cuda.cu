// The operators on a GPU: a block of threads a head, in one launch per direction. The inverse is by
// sweeps of a symmetric matrix, whose pivots are those of its Cholesky factor. Workspaces are
// shared memory where three matrices fit there.
#include <type_traits>

#include "solves.cuh"

namespace flashmark {
namespace {

// The core of the head whose U is s.a. `inverse` and `used` may be null.
template <class T, class IO>
__device__ void tied_forward(const Space<T>& s, int m, double jitter, bool softmax, IO* core,
                             T* inverse, double* used) {
  jitter = regularised_inverse(s.a, m, jitter, s.b, s.v->row);
  if (used && threadIdx.x == 0) used[blockIdx.x] = jitter;
  times(s.a, m, static_cast<T>(jitter), s.v->root, s.v->sums);
  for (int x = threadIdx.x; x < m * m; x += kThreads) {
    if (inverse) inverse[x] = s.b[x];
    s.a[x] = softmax ? s.b[x] * s.v->sums[x % m] / s.v->root[x / m] : s.b[x];
  }
  __syncthreads();
  if (softmax) move_row_sums(s.a, m, T(1), s.v->row);
  for (int x = threadIdx.x; x < m * m; x += kThreads) core[x] = static_cast<IO>(s.a[x]);
}

template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    tied_kernel(const IO* scores, int m, double jitter, bool softmax, IO* core, T* inverse,
                double* used, T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * m * m;
  unit_kernel(scores + at, m, s.a, s.v);
  tied_forward(s, m, jitter, softmax, core + at, inverse + at, used);
}

// s.a = U and s.v of landmarks X (m, dim), whose scores are scale X X^T; returns `unit_kernel`.
template <class T, class IO>
__device__ T unit_kernel_of(const IO* X, int m, int dim, double scale, const Space<T>& s) {
  T* scores = s.b;
  product<T>(
      m, m, dim, [=](int i, int k) { return static_cast<T>(scale) * static_cast<T>(X[i * dim + k]); },
      [=](int k, int j) { return static_cast<T>(X[j * dim + k]); },
      [=](int i, int j, T x) { scores[i * m + j] = x; });
  return unit_kernel(scores, m, s.a, s.v);
}

template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    landmarks_kernel(const IO* X, int m, int dim, double scale, double jitter, bool softmax,
                     IO* core, T* inverse, double* used, T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t head = blockIdx.x, at = head * m * m;
  unit_kernel_of(X + head * m * dim, m, dim, scale, s);
  tied_forward(s, m, jitter, softmax, core + at, inverse ? inverse + at : nullptr, used);
}

// What the normalisation adds: dP in place of the core's gradient G; dr and the gradient of log
// root, in `half`.
template <class T>
__device__ void normalisation_gradient(const Space<T>& s, const T* P, int m, T jitter, T most,
                                       T* G) {
  Vectors<T>* v = s.v;
  times(s.a, m, jitter, v->root, v->sums);
  move_row_sums(G, m, T(0), v->row);
  for (int i = threadIdx.x; i < m; i += kThreads) {
    T sum = 0, dr = 0;
    for (int l = 0; l < m; l++) {
      sum += G[i * m + l] * P[i * m + l] * v->sums[l];
      dr += G[l * m + i] * P[l * m + i] / v->root[l];
    }
    v->dlog[i] = -sum / v->root[i];
    v->dr[i] = dr;
  }
  __syncthreads();
  for (int x = threadIdx.x; x < m * m; x += kThreads) G[x] *= v->sums[x % m] / v->root[x / m];
  times(s.a, m, jitter, v->dr, v->row);
  for (int i = threadIdx.x; i < m; i += kThreads) {
    v->dlog[i] = v->half[i] - most >= static_cast<T>(kLeastRoot)
                     ? v->dlog[i] + v->root[i] * v->row[i]
                     : T(0);
  }
  __syncthreads();
  T total = 0, ties = 0;
  for (int i = 0; i < m; i++) {
    total += v->dlog[i];
    ties += v->half[i] == most;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < m; i += kThreads) {
    v->half[i] = v->dlog[i] - (v->half[i] == most ? total / ties : T(0));
  }
  __syncthreads();
}

// The gradient of the scores in s.b, from U in s.a and what else `unit_kernel` left, whose result is
// `most`.
template <class T, class IO>
__device__ void tied_backward(const Space<T>& s, const T* P, double jitter, T most,
                              const IO* dcore, int m, bool softmax) {
  Vectors<T>* v = s.v;
  for (int x = threadIdx.x; x < m * m; x += kThreads) s.b[x] = static_cast<T>(dcore[x]);
  __syncthreads();
  if (softmax) {
    normalisation_gradient(s, P, m, static_cast<T>(jitter), most, s.b);
  } else {
    for (int i = threadIdx.x; i < m; i += kThreads) v->half[i] = v->dr[i] = 0;
    __syncthreads();
  }
  T *dP = s.b, *first = s.c;
  product<T>(
      m, [=](int i, int k) { return P[k * m + i]; },
      [=](int k, int j) { return (dP[k * m + j] + dP[j * m + k]) / 2; },
      [=](int i, int j, T x) { first[i * m + j] = x; });
  const T* U = s.a;
  product<T>(
      m, [=](int i, int k) { return first[i * m + k]; }, [=](int k, int j) { return P[k * m + j]; },
      [=](int i, int j, T x) {
        dP[i * m + j] = ((v->dr[i] * v->root[j] + v->dr[j] * v->root[i]) / 2 - x) * U[i * m + j];
      });
  for (int i = threadIdx.x; i < m; i += kThreads) {
    T sum = 0;
    for (int j = 0; j < m; j++) sum += j == i ? T(0) : dP[j * m + i];
    dP[i * m + i] = v->half[i] / 2 - sum;  // the unit diagonal itself is constant
  }
  __syncthreads();
}

template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    tied_backward_kernel(const IO* scores, const T* inverse, const double* used, const IO* dcore,
                         int m, bool softmax, IO* dscores, T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * m * m;
  const T most = unit_kernel(scores + at, m, s.a, s.v);
  tied_backward(s, inverse + at, used[blockIdx.x], most, dcore + at, m, softmax);
  for (int x = threadIdx.x; x < m * m; x += kThreads) dscores[at + x] = static_cast<IO>(s.b[x]);
}

// dX = scale (dS + dS^T) X for the gradient dS of the scores.
template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    landmarks_backward_kernel(const IO* landmarks, const T* inverse, const double* used,
                              const IO* dcore, int m, int dim, double scale, bool softmax, IO* dX,
                              T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t head = blockIdx.x, at = head * m * m;
  const IO* X = landmarks + head * m * dim;
  IO* to = dX + head * m * dim;
  const T most = unit_kernel_of(X, m, dim, scale, s);
  tied_backward(s, inverse + at, used[head], most, dcore + at, m, softmax);
  const T* dS = s.b;
  product<T>(
      m, dim, m,
      [=](int i, int k) { return static_cast<T>(scale) * (dS[i * m + k] + dS[k * m + i]); },
      [=](int k, int j) { return static_cast<T>(X[k * dim + j]); },
      [=](int i, int j, T x) { to[i * dim + j] = static_cast<IO>(x); });
}

template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    tikhonov_kernel(const IO* matrix, int m, double jitter, bool unit_rows, IO* core, T* inverse,
                    double* used, T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * m * m;
  T *A = s.a, *normal = s.b, *P = s.c;
  for (int x = threadIdx.x; x < m * m; x += kThreads) A[x] = static_cast<T>(matrix[at + x]);
  __syncthreads();
  product<T>(
      m, [=](int i, int k) { return A[k * m + i]; }, [=](int k, int j) { return A[k * m + j]; },
      [=](int i, int j, T x) { normal[i * m + j] = x; });
  jitter = regularised_inverse(normal, m, jitter, P, s.v->row);
  if (threadIdx.x == 0) used[blockIdx.x] = jitter;
  product<T>(
      m, [=](int i, int k) { return P[k * m + i]; }, [=](int k, int j) { return A[j * m + k]; },
      [=](int i, int j, T x) { normal[i * m + j] = x; });
  if (unit_rows) move_row_sums(normal, m, T(1), s.v->row);
  for (int x = threadIdx.x; x < m * m; x += kThreads) {
    inverse[at + x] = P[x];
    core[at + x] = static_cast<IO>(normal[x]);
  }
}

template <class T, class IO>
__global__ void __launch_bounds__(kThreads, 1)
    tikhonov_backward_kernel(const IO* matrix, const T* inverse, const IO* dcore, int m,
                             bool unit_rows, IO* dmatrix, T* global) {
  const Space<T> s = workspace(global, m);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * m * m;
  const T* P = inverse + at;
  const IO* A = matrix + at;
  T *Q = s.a, *x = s.b, *y = s.c;
  for (int k = threadIdx.x; k < m * m; k += kThreads) x[k] = static_cast<T>(dcore[at + k]);
  __syncthreads();
  if (unit_rows) move_row_sums(x, m, T(0), s.v->row);
  product<T>(
      m, [=](int i, int k) { return P[k * m + i]; }, [=](int k, int j) { return x[k * m + j]; },
      [=](int i, int j, T sum) { Q[i * m + j] = sum; });
  product<T>(
      m, [=](int i, int k) { return Q[i * m + k]; },
      [=](int k, int j) { return static_cast<T>(A[k * m + j]); },
      [=](int i, int j, T sum) { x[i * m + j] = sum; });
  product<T>(
      m, [=](int i, int k) { return x[i * m + k]; }, [=](int k, int j) { return P[k * m + j]; },
      [=](int i, int j, T sum) { y[i * m + j] = sum; });
  IO* to = dmatrix + at;
  product<T>(
      m, [=](int i, int k) { return static_cast<T>(A[i * m + k]); },
      [=](int k, int j) { return y[k * m + j] + y[j * m + k]; },
      [=](int i, int j, T sum) { to[i * m + j] = static_cast<IO>(Q[j * m + i] - sum); });
}

template <class T>
constexpr ScalarType type_of() {
  return std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;
}

template <class T, class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Tensor& like, int64_t heads, int64_t m,
            Arguments... arguments) {
  int most = 0;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                               like.get_device_index()));
  const int64_t elements = kMatrices * m * m, whole = sizeof(Vectors<T>) + elements * sizeof(T);
  const bool fits = whole <= most;
  const int64_t bytes = fits ? whole : sizeof(Vectors<T>);
  const Tensor space = allocate({fits ? 0 : heads * elements}, type_of<T>(), like);
  if (heads == 0) return;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute,
                             static_cast<int>(bytes)));
  T* global = fits ? nullptr : out<T>(space);
  kernel<<<static_cast<unsigned>(heads), kThreads, bytes, current_stream(like)>>>(arguments...,
                                                                                  global);
  check_launch();
}

// run(a value of the tensors' type, a value of the type inside)
template <class F>
void choose(const Tensor& outer, bool wide, F&& run) {
  if (outer.scalar_type() == ScalarType::Double) return run(double(), double());
  if (wide) return run(float(), double());
  return run(float(), float());
}

Core results(const Tensor& matrix, bool wide) {
  const std::vector<int64_t> shape{matrix.size(0), matrix.size(1), matrix.size(2)};
  const auto outer = matrix.scalar_type(), inner = wide ? ScalarType::Double : outer;
  return {allocate(shape, outer, matrix), allocate(shape, inner, matrix),
          allocate({matrix.size(0)}, ScalarType::Double, matrix)};
}

}  // namespace

Core tied_core_cuda(const Tensor& given, double jitter, bool softmax, bool wide) {
  const DeviceGuard guard(given.get_device_index());
  const Tensor scores = dense(given);
  const int64_t heads = scores.size(0), m = scores.size(2);
  Core result = results(scores, wide);
  const auto& [core, inverse, used] = result;
  choose(scores, wide, [&, &core = core, &inverse = inverse, &used = used](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(tied_kernel<T, IO>, scores, heads, m, in<IO>(scores), static_cast<int>(m), jitter,
              softmax, out<IO>(core), out<T>(inverse), out<double>(used));
  });
  return result;
}

Tensor tied_core_backward_cuda(const Tensor& given, const Tensor& inverse, const Tensor& jitter,
                               const Tensor& gradient, bool softmax) {
  const DeviceGuard guard(given.get_device_index());
  const Tensor scores = dense(given), dcore = dense(gradient);
  const int64_t heads = scores.size(0), m = scores.size(2);
  const Tensor result = allocate({heads, m, m}, scores.scalar_type(), scores);
  choose(scores, inverse.scalar_type() == ScalarType::Double, [&](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(tied_backward_kernel<T, IO>, scores, heads, m, in<IO>(scores), in<T>(inverse),
              in<double>(jitter), in<IO>(dcore), static_cast<int>(m), softmax, out<IO>(result));
  });
  return result;
}

Tensor landmarks_core_cuda(const Tensor& landmarks, double scale, double jitter, bool softmax) {
  const DeviceGuard guard(landmarks.get_device_index());
  const Tensor X = dense(landmarks);
  const Landmarks sizes(X);
  const Tensor core = allocate(sizes.core, X.scalar_type(), X);
  choose(X, true, [&](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(landmarks_kernel<T, IO>, X, sizes.heads, sizes.m, in<IO>(X),
              static_cast<int>(sizes.m), static_cast<int>(sizes.dim), scale, jitter, softmax,
              out<IO>(core), static_cast<T*>(nullptr), static_cast<double*>(nullptr));
  });
  return core;
}

Core landmarks_core_saving_cuda(const Tensor& landmarks, double scale, double jitter,
                                bool softmax) {
  const DeviceGuard guard(landmarks.get_device_index());
  const Tensor X = dense(landmarks);
  const Landmarks sizes(X);
  const Tensor core = allocate(sizes.core, X.scalar_type(), X);
  const Tensor inverse = allocate(sizes.core, ScalarType::Double, X);
  const Tensor used = allocate({sizes.heads}, ScalarType::Double, X);
  choose(X, true, [&](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(landmarks_kernel<T, IO>, X, sizes.heads, sizes.m, in<IO>(X),
              static_cast<int>(sizes.m), static_cast<int>(sizes.dim), scale, jitter, softmax,
              out<IO>(core), out<T>(inverse), out<double>(used));
  });
  return {core, inverse, used};
}

Tensor landmarks_core_backward_cuda(const Tensor& landmarks, const Tensor& inverse,
                                    const Tensor& jitter, const Tensor& gradient, double scale,
                                    bool softmax) {
  const DeviceGuard guard(landmarks.get_device_index());
  const Tensor X = dense(landmarks), dcore = dense(gradient);
  const Landmarks sizes(X);
  const Tensor dX = allocate(sizes.landmarks, X.scalar_type(), X);
  choose(X, true, [&](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(landmarks_backward_kernel<T, IO>, X, sizes.heads, sizes.m, in<IO>(X), in<T>(inverse),
              in<double>(jitter), in<IO>(dcore), static_cast<int>(sizes.m),
              static_cast<int>(sizes.dim), scale, softmax, out<IO>(dX));
  });
  return dX;
}

Core tikhonov_core_cuda(const Tensor& given, double jitter, bool unit_rows, bool wide) {
  const DeviceGuard guard(given.get_device_index());
  const Tensor matrix = dense(given);
  const int64_t heads = matrix.size(0), m = matrix.size(2);
  Core result = results(matrix, wide);
  const auto& [core, inverse, used] = result;
  choose(matrix, wide, [&, &core = core, &inverse = inverse, &used = used](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(tikhonov_kernel<T, IO>, matrix, heads, m, in<IO>(matrix), static_cast<int>(m), jitter,
              unit_rows, out<IO>(core), out<T>(inverse), out<double>(used));
  });
  return result;
}

Tensor tikhonov_core_backward_cuda(const Tensor& given, const Tensor& inverse,
                                   const Tensor& gradient, bool unit_rows) {
  const DeviceGuard guard(given.get_device_index());
  const Tensor matrix = dense(given), dcore = dense(gradient);
  const int64_t heads = matrix.size(0), m = matrix.size(2);
  const Tensor result = allocate({heads, m, m}, matrix.scalar_type(), matrix);
  choose(matrix, inverse.scalar_type() == ScalarType::Double, [&](auto outer, auto inner) {
    using IO = decltype(outer);
    using T = decltype(inner);
    launch<T>(tikhonov_backward_kernel<T, IO>, matrix, heads, m, in<IO>(matrix), in<T>(inverse),
              in<IO>(dcore), static_cast<int>(m), unit_rows, out<IO>(result));
  });
  return result;
}

}  // namespace flashmark
