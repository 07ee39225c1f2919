// The core of Nyström attention and its gradient: one positive definite solve a head, (n, M, M) at
// a time.
#pragma once

#include <tuple>
#include <vector>

#include "../native.h"

namespace flashmark {

using Core = std::tuple<Tensor, Tensor,
                        Tensor>;  // core, inverse (M, M) of each head, jitter that was used (n,)

// scores (n, M, M) symmetric (the lower triangle is read), float32 or float64. U = exp(scores)
// scaled to a unit diagonal, P = (U + jitter)^-1. softmax: the core is P with its rows normalised
// by the system's own row sums; else P. wide: float64 inside for float32 scores. A head whose
// factorisation fails takes 10 times the jitter, and again.
Core tied_core_cpu(const Tensor& scores, double jitter, bool softmax, bool wide);
Core tied_core_cuda(const Tensor& scores, double jitter, bool softmax, bool wide);
Tensor tied_core_backward_cpu(const Tensor& scores, const Tensor& inverse, const Tensor& jitter,
                              const Tensor& dcore, bool softmax);
Tensor tied_core_backward_cuda(const Tensor& scores, const Tensor& inverse, const Tensor& jitter,
                               const Tensor& dcore, bool softmax);

// tied_core with wide from the landmarks (..., M, D) themselves: the scores are scale X X^T. Alone,
// or with what the gradient needs.
Tensor landmarks_core_cpu(const Tensor& landmarks, double scale, double jitter, bool softmax);
Tensor landmarks_core_cuda(const Tensor& landmarks, double scale, double jitter, bool softmax);
Core landmarks_core_saving_cpu(const Tensor& landmarks, double scale, double jitter, bool softmax);
Core landmarks_core_saving_cuda(const Tensor& landmarks, double scale, double jitter, bool softmax);
Tensor landmarks_core_backward_cpu(const Tensor& landmarks, const Tensor& inverse,
                                   const Tensor& jitter, const Tensor& dcore, double scale,
                                   bool softmax);
Tensor landmarks_core_backward_cuda(const Tensor& landmarks, const Tensor& inverse,
                                    const Tensor& jitter, const Tensor& dcore, double scale,
                                    bool softmax);

// matrix A (n, M, M): the core is P A^T with P = (A^T A + jitter)^-1; unit_rows: what its rows lack
// to 1 is spread over them.
Core tikhonov_core_cpu(const Tensor& matrix, double jitter, bool unit_rows, bool wide);
Core tikhonov_core_cuda(const Tensor& matrix, double jitter, bool unit_rows, bool wide);
Tensor tikhonov_core_backward_cpu(const Tensor& matrix, const Tensor& inverse, const Tensor& dcore,
                                  bool unit_rows);
Tensor tikhonov_core_backward_cuda(const Tensor& matrix, const Tensor& inverse, const Tensor& dcore,
                                   bool unit_rows);

// Roots of the diagonal are kept within e^-40 of the largest: no float holds more.
constexpr double kLeastRoot = -40.0;
// Each failed factorisation multiplies the jitter by 10, this many times at most; then the head is
// NaN.
constexpr int kAttempts = 24;

// Sizes of landmarks (..., M, D) and of their core.
struct Landmarks {
  int64_t heads = 1, m, dim;
  std::vector<int64_t> landmarks, core;
  explicit Landmarks(const Tensor& X) : m(X.size(X.dim() - 2)), dim(X.size(X.dim() - 1)) {
    for (int64_t n = 0; n < X.dim() - 2; n++) {
      landmarks.push_back(X.size(n));
      heads *= X.size(n);
    }
    core = landmarks;
    landmarks.insert(landmarks.end(), {m, dim});
    core.insert(core.end(), {m, m});
  }
};

}  // namespace flashmark
