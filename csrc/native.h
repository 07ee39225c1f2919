// Shared by the stable-ABI operators: tensors, checks, clones of hot loops for newer processors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

// One copy of a function per instruction set, chosen when the library is loaded; FLASHMARK_LEVEL is
// that of x86-64 on the one machine that it is built for.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__)
#if FLASHMARK_LEVEL == 4
#define FLASHMARK_CLONES __attribute__((target_clones("arch=x86-64-v4", "default")))
#elif FLASHMARK_LEVEL == 3
#define FLASHMARK_CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FLASHMARK_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#else
#define FLASHMARK_CLONES
#endif
#define FLASHMARK_INLINE inline __attribute__((always_inline))

namespace flashmark {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor allocate(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace flashmark
