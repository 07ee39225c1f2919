// The core of Nyström attention and its gradient: one positive definite solve a head, (n, M, M) at
// a time.
#pragma once

#include <tuple>

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

// tied_core with wide from the landmarks (..., M, D) themselves: the scores are scale X X^T.
Tensor landmarks_core_cpu(const Tensor& landmarks, double scale, double jitter, bool softmax);

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

}  // namespace flashmark
