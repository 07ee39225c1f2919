// Products, and their operands: conversion, transposition and the pairing of rows that bfloat16
// products need.
#pragma once
#include <ATen/native/CPUBlas.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "shared/product.h"
#include "shared/vec_math.h"

namespace flashmark {

using c10::BFloat16;
using c10::Half;

template <typename C>
constexpr bool PAIRED = !std::is_same_v<C, float>;  // second operands lie as [K / 2][N][2]

template <typename C>
int64_t padded(int64_t n) {  // inner dimensions of a paired product are even
  return PAIRED<C> ? (n + 1) / 2 * 2 : n;
}

// Aligned scratch of one thread.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(c10::alloc_cpu(std::max<int64_t>(n, 1) * sizeof(T)))) {}
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { c10::free_cpu(p); }
  };
  std::unique_ptr<T, Free> data_;
};

// c (m, n) = or += a (m, k) b (k, n); b paired for bfloat16.
template <typename C>
inline void product(int64_t m, int64_t n, int64_t k, const C* a, int64_t lda, const C* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
#if defined(__x86_64__) && !defined(CPU_CAPABILITY_DEFAULT)
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIRED<C>);
#else
  vector_product(m, n, k, a, lda, b, ldb, c, ldc, add);
#endif
}

template <typename C>
inline void release_products() {
#if defined(__x86_64__) && !defined(CPU_CAPABILITY_DEFAULT)
  at::native::cpublas::brgemm_release(PAIRED<C>);
#endif
}

template <typename T, typename C>
inline void convert_row(const T* from, C* to, int64_t n) {
  if constexpr (std::is_same_v<T, C>) {
    std::memcpy(to, from, n * sizeof(T));
  } else {
    at::vec::convert(from, to, n);
  }
}

// The next LANES elements as float32; only `n` of them are read, the others are 0.
template <typename T>
inline Vec load_floats(const T* from, int64_t n) {
  if (n < LANES) {
    float some[LANES] = {};
    for (int64_t k = 0; k < n; k++) some[k] = static_cast<float>(from[k]);
    return Vec::loadu(some);
  }
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(from);
  } else {
    Vec wide;
    at::vec::load_to_float<T>(from, wide);
    return wide;
  }
}

// to[c][r] = from[r][c] for 32-bit words.
inline void transpose_words(const float* from, int64_t ld_from, int64_t rows, int64_t cols,
                            float* to, int64_t ld_to) {
  const int64_t full_rows = rows / 16 * 16, full_cols = cols / 16 * 16;
  for (int64_t r = 0; r < full_rows; r += 16)
    for (int64_t c = 0; c < full_cols; c += 16)
      at::vec::transpose_mxn<float, 16, 16>(from + r * ld_from + c, ld_from, to + c * ld_to + r,
                                            ld_to);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = r < full_rows ? full_cols : 0; c < cols; c++)
      std::memcpy(to + c * ld_to + r, from + r * ld_from + c, 4);
}

// to[c][r] = from[r][c] in the type of the products.
template <typename T, typename C>
void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t cols, C* to, int64_t ld_to) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<C, float>) {
    transpose_words(from, ld_from, rows, cols, to, ld_to);
  } else if constexpr (std::is_same_v<C, float>) {
    float block[16 * 256];
    for (int64_t r = 0; r < rows; r += 16) {
      const int64_t n = std::min<int64_t>(16, rows - r);
      for (int64_t x = 0; x < n; x++) convert_row(from + (r + x) * ld_from, block + x * cols, cols);
      transpose_words(block, cols, n, cols, to + r, ld_to);
    }
  } else {
    const int64_t full_rows = rows / 16 * 16, full_cols = cols / 16 * 16;
#if defined(CPU_CAPABILITY_AVX512)
    for (int64_t r = 0; r < full_rows; r += 16)
      for (int64_t c = 0; c < full_cols; c += 16)
        at::vec::transpose_mxn<C, 16, 16>(from + r * ld_from + c, ld_from, to + c * ld_to + r,
                                          ld_to);
#endif
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = r < full_rows ? full_cols : 0; c < cols; c++)
        to[c * ld_to + r] = from[r * ld_from + c];
  }
}

// Second operand of a product over the rows: [rows][cols], or [rows / 2][cols][2] with a zero row
// at an odd end.
template <typename T, typename C>
void pack_rows(const T* from, int64_t ld_from, int64_t rows, int64_t cols, C* to) {
  if constexpr (!PAIRED<C>) {
    for (int64_t r = 0; r < rows; r++) convert_row(from + r * ld_from, to + r * cols, cols);
  } else {
    for (int64_t r = 0; r < rows; r += 2) {
      const T *even = from + r * ld_from, *odd = even + ld_from;
      C* pair = to + r * cols;
      if (r + 1 < rows) {
        for (int64_t c = 0; c < cols; c++) pair[2 * c] = even[c], pair[2 * c + 1] = odd[c];
      } else {
        for (int64_t c = 0; c < cols; c++) pair[2 * c] = even[c], pair[2 * c + 1] = C(0.f);
      }
    }
  }
}

// Second operand of a product over the columns: the transpose of `width` rows of `cols` elements,
// of which only [lo, hi) are read and the others are 0. [cols][width], or [cols / 2][width][2]
// padded with a zero column. `rows` (width, padded(cols)) is scratch; `to` has rows of ld_to, or
// pairs of rows of 2 ld_to, elements.
template <typename T, typename C>
void pack_columns(const T* from, int64_t ld_from, int64_t lo, int64_t hi, int64_t width,
                  int64_t cols, C* to, C* rows, int64_t ld_to) {
  const int64_t even = padded<C>(cols);
  if constexpr (std::is_same_v<T, float>) {
    if (lo == 0 && hi == width) return transpose_words(from, ld_from, width, cols, to, ld_to);
  }
  for (int64_t r = 0; r < width; r++) {
    C* row = rows + r * even;
    if (r < lo || r >= hi) {
      std::fill(row, row + even, C(0.f));
    } else {
      convert_row(from + r * ld_from, row, cols);
      std::fill(row + cols, row + even, C(0.f));
    }
  }
  const int64_t words = even * static_cast<int64_t>(sizeof(C)) / 4;
  transpose_words(reinterpret_cast<const float*>(rows), words, width, words,
                  reinterpret_cast<float*>(to), ld_to);
}

template <typename T, typename C>
void pack_columns(const T* from, int64_t ld_from, int64_t lo, int64_t hi, int64_t width,
                  int64_t cols, C* to, C* rows) {
  pack_columns(from, ld_from, lo, hi, width, cols, to, rows, width);
}

}  // namespace flashmark
