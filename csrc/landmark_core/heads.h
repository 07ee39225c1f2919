// The functions of one head, for a type of tensors and one of arithmetic. Each pair of types has a
// source file of its own, and each function its clones.
#pragma once

#include "solves.h"

namespace flashmark::dense_blocks {

#define FLASHMARK_DECLARE_HEAD(NAME, IO, T)                                                        \
  struct NAME {                                                                                    \
    using Outer = IO;                                                                              \
    using Inner = T;                                                                               \
    static double tied(const IO* scores, int64_t m, double jitter, bool softmax, T* space,         \
                       IO* core, T* inverse);                                                      \
    static double landmarks(const IO* X, int64_t m, int64_t dim, double scale, double jitter,      \
                            bool softmax, T* space, IO* core, T* inverse);                         \
    static void landmarks_gradient(const IO* X, int64_t dim, double scale, const T* inverse,       \
                                   double jitter, const IO* dcore, int64_t m, bool softmax,        \
                                   T* space, IO* dX);                                              \
    static void tied_gradient(const IO* scores, const T* inverse, double jitter, const IO* dcore,  \
                              int64_t m, bool softmax, T* space, IO* dscores);                     \
    static double tikhonov(const IO* matrix, int64_t m, double jitter, bool unit_rows, T* space,   \
                           IO* core, T* inverse);                                                  \
    static void tikhonov_gradient(const IO* matrix, const T* inverse, const IO* dcore, int64_t m,  \
                                  bool unit_rows, T* space, IO* dmatrix);                          \
  }

FLASHMARK_DECLARE_HEAD(Narrow, float, float);
FLASHMARK_DECLARE_HEAD(Mixed, float, double);
FLASHMARK_DECLARE_HEAD(Wide, double, double);

#define FLASHMARK_DEFINE_HEAD(NAME, IO, T)                                                         \
  FLASHMARK_CLONES double NAME::tied(const IO* scores, int64_t m, double jitter, bool softmax,     \
                                     T* space, IO* core, T* inverse) {                             \
    return tied_forward<T>(scores, m, m, jitter, softmax, space, core, inverse);                   \
  }                                                                                                \
  FLASHMARK_CLONES double NAME::landmarks(const IO* X, int64_t m, int64_t dim, double scale,       \
                                          double jitter, bool softmax, T* space, IO* core,         \
                                          T* inverse) {                                            \
    return landmarks_forward<T, IO>(X, m, dim, scale, jitter, softmax, space, core, inverse);      \
  }                                                                                                \
  FLASHMARK_CLONES void NAME::landmarks_gradient(const IO* X, int64_t dim, double scale,           \
                                                 const T* inverse, double jitter, const IO* dcore, \
                                                 int64_t m, bool softmax, T* space, IO* dX) {      \
    landmarks_backward<T, IO>(X, dim, scale, inverse, jitter, dcore, m, softmax, space, dX);       \
  }                                                                                                \
  FLASHMARK_CLONES void NAME::tied_gradient(const IO* scores, const T* inverse, double jitter,     \
                                            const IO* dcore, int64_t m, bool softmax, T* space,    \
                                            IO* dscores) {                                         \
    tied_backward<T>(scores, m, inverse, jitter, dcore, m, softmax, space, dscores);               \
  }                                                                                                \
  FLASHMARK_CLONES double NAME::tikhonov(const IO* matrix, int64_t m, double jitter,               \
                                         bool unit_rows, T* space, IO* core, T* inverse) {         \
    return tikhonov_forward<T, IO>(matrix, m, jitter, unit_rows, space, core, inverse);            \
  }                                                                                                \
  FLASHMARK_CLONES void NAME::tikhonov_gradient(const IO* matrix, const T* inverse,                \
                                                const IO* dcore, int64_t m, bool unit_rows,        \
                                                T* space, IO* dmatrix) {                           \
    tikhonov_backward<T, IO>(matrix, inverse, dcore, m, unit_rows, space, dmatrix);                \
  }

}  // namespace flashmark::dense_blocks
