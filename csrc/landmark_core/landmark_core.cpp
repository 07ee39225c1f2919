// The operators: heads in parallel, one workspace a thread.
#include "landmark_core.h"

#include <memory>
#include <new>

#include "heads.h"

namespace flashmark {
namespace {

using namespace dense_blocks;

template <class F>
auto choose(const Tensor& outer, bool wide, F&& run) {
  if (outer.scalar_type() == ScalarType::Double) return run(Wide{});
  return wide ? run(Mixed{}) : run(Narrow{});
}

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

constexpr int64_t kWorthAThread = 65536;  // products of a solve; to start a thread takes as long

struct Aligned {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};

// run(head, workspace of space_size + more) for every head
template <class T, class F>
void for_heads(int64_t heads, int64_t m, int64_t more, F&& run) {
  const int64_t n = padded<T>(m), grain = 1 + kWorthAThread / (n * n * n);
  torch::stable::parallel_for(0, heads, grain, [&](int64_t begin, int64_t end) {
    void* memory = ::operator new[]((space_size<T>(m) + more) * sizeof(T), std::align_val_t(64));
    const std::unique_ptr<void, Aligned> owner(memory);
    for (int64_t x = begin; x < end; x++) run(x, static_cast<T*>(memory));
  });
}

template <class Solve>
Core forward(const Tensor& given, bool wide, Solve&& solve) {
  const Tensor matrix = dense(given);
  const int64_t heads = matrix.size(0), m = matrix.size(2);
  const bool inner_double = wide || matrix.scalar_type() == ScalarType::Double;
  const Tensor core = allocate({heads, m, m}, matrix.scalar_type(), given);
  const Tensor inverse =
      allocate({heads, m, m}, inner_double ? ScalarType::Double : ScalarType::Float, given);
  const Tensor used = allocate({heads}, ScalarType::Double, given);
  choose(matrix, wide, [&](auto head) {
    using Head = decltype(head);
    using IO = typename Head::Outer;
    using T = typename Head::Inner;
    for_heads<T>(heads, m, 0, [&](int64_t x, T* space) {
      const int64_t at = x * m * m;
      out<double>(used)[x] =
          solve(head, in<IO>(matrix) + at, m, space, out<IO>(core) + at, out<T>(inverse) + at);
    });
  });
  return {core, inverse, used};
}

template <class Solve>
Tensor backward(const Tensor& given, const Tensor& inverse, const Tensor& gradient, Solve&& solve) {
  const Tensor matrix = dense(given), dcore = dense(gradient);
  const int64_t heads = matrix.size(0), m = matrix.size(2);
  const Tensor result = allocate({heads, m, m}, matrix.scalar_type(), given);
  choose(matrix, inverse.scalar_type() == ScalarType::Double, [&](auto head) {
    using Head = decltype(head);
    using IO = typename Head::Outer;
    using T = typename Head::Inner;
    for_heads<T>(heads, m, 0, [&](int64_t x, T* space) {
      const int64_t at = x * m * m;
      solve(head, x, in<IO>(matrix) + at, in<T>(inverse) + at, in<IO>(dcore) + at, m, space,
            out<IO>(result) + at);
    });
  });
  return result;
}

}  // namespace

Core tied_core_cpu(const Tensor& scores, double jitter, bool softmax, bool wide) {
  return forward(scores, wide,
                 [&](auto head, auto* matrix, int64_t m, auto* space, auto* core, auto* inverse) {
                   return head.tied(matrix, m, jitter, softmax, space, core, inverse);
                 });
}

Tensor landmarks_core_cpu(const Tensor& landmarks, double scale, double jitter, bool softmax) {
  const Tensor X = dense(landmarks);
  const Landmarks sizes(X);
  const Tensor core = allocate(sizes.core, X.scalar_type(), X);
  choose(X, true, [&](auto head) {
    using Head = decltype(head);
    using IO = typename Head::Outer;
    using T = typename Head::Inner;
    const int64_t m = sizes.m, dim = sizes.dim;
    for_heads<T>(sizes.heads, m, landmark_size<T>(m, dim), [&](int64_t x, T* space) {
      head.landmarks(in<IO>(X) + x * m * dim, m, dim, scale, jitter, softmax, space,
                     out<IO>(core) + x * m * m, static_cast<T*>(nullptr));
    });
  });
  return core;
}

Core landmarks_core_saving_cpu(const Tensor& landmarks, double scale, double jitter, bool softmax) {
  const Tensor X = dense(landmarks);
  const Landmarks sizes(X);
  const Tensor core = allocate(sizes.core, X.scalar_type(), X);
  const Tensor inverse = allocate(sizes.core, ScalarType::Double, X);
  const Tensor used = allocate({sizes.heads}, ScalarType::Double, X);
  choose(X, true, [&](auto head) {
    using Head = decltype(head);
    using IO = typename Head::Outer;
    using T = typename Head::Inner;
    const int64_t m = sizes.m, dim = sizes.dim;
    for_heads<T>(sizes.heads, m, landmark_size<T>(m, dim), [&](int64_t x, T* space) {
      out<double>(used)[x] =
          head.landmarks(in<IO>(X) + x * m * dim, m, dim, scale, jitter, softmax, space,
                         out<IO>(core) + x * m * m, out<T>(inverse) + x * m * m);
    });
  });
  return {core, inverse, used};
}

Tensor landmarks_core_backward_cpu(const Tensor& landmarks, const Tensor& inverse,
                                   const Tensor& jitter, const Tensor& gradient, double scale,
                                   bool softmax) {
  const Tensor X = dense(landmarks), dcore = dense(gradient);
  const Landmarks sizes(X);
  const Tensor dX = allocate(sizes.landmarks, X.scalar_type(), X);
  const auto* used = in<double>(jitter);
  choose(X, true, [&](auto head) {
    using Head = decltype(head);
    using IO = typename Head::Outer;
    using T = typename Head::Inner;
    const int64_t m = sizes.m, dim = sizes.dim;
    for_heads<T>(sizes.heads, m, landmark_size<T>(m, dim), [&](int64_t x, T* space) {
      head.landmarks_gradient(in<IO>(X) + x * m * dim, dim, scale, in<T>(inverse) + x * m * m,
                              used[x], in<IO>(dcore) + x * m * m, m, softmax, space,
                              out<IO>(dX) + x * m * dim);
    });
  });
  return dX;
}

Tensor tied_core_backward_cpu(const Tensor& scores, const Tensor& inverse, const Tensor& jitter,
                              const Tensor& dcore, bool softmax) {
  const auto* used = in<double>(jitter);
  return backward(
      scores, inverse, dcore,
      [&](auto head, int64_t x, auto* matrix, auto* P, auto* gradient, int64_t m, auto* space,
          auto* to) { head.tied_gradient(matrix, P, used[x], gradient, m, softmax, space, to); });
}

Core tikhonov_core_cpu(const Tensor& matrix, double jitter, bool unit_rows, bool wide) {
  return forward(matrix, wide,
                 [&](auto head, auto* from, int64_t m, auto* space, auto* core, auto* inverse) {
                   return head.tikhonov(from, m, jitter, unit_rows, space, core, inverse);
                 });
}

Tensor tikhonov_core_backward_cpu(const Tensor& matrix, const Tensor& inverse, const Tensor& dcore,
                                  bool unit_rows) {
  return backward(
      matrix, inverse, dcore,
      [&](auto head, int64_t, auto* from, auto* P, auto* gradient, int64_t m, auto* space,
          auto* to) { head.tikhonov_gradient(from, P, gradient, m, unit_rows, space, to); });
}

}  // namespace flashmark
