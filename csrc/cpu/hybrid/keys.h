// Keys and values of a stream by time: those that the state holds, then the new ones.
#pragma once
#include <algorithm>

#include "hybrid/problem.h"
#include "shared/pack.h"

namespace flashmark {

template <typename T>
struct Rows {  // n consecutive keys or values; `keep` null where all take part
  const T* first;
  int64_t stride, n;
  const bool* keep;
  bool kept(int64_t j) const { return keep == nullptr || keep[j]; }
};

// f(rows) for the keys (values) at times [begin, end), in order.
template <typename T, typename F>
void visit_rows(const HybridProblem& p, const Stream& s, int64_t h, bool values, Span times,
                const F& f) {
  const int64_t size = values ? p.v_dim : p.dim;
  const int64_t held = std::min(times.end, s.position);
  if (times.begin < held) {
    const int64_t row = times.begin - (s.position / p.window - 1) * p.window;
    const T* from = static_cast<const T*>(values ? p.before.value : p.before.key) +
                    ((s.row * p.kv_heads + h) * 2 * p.window + row) * size;
    f(Rows<T>{from, size, held - times.begin, p.before.keep + s.row * 2 * p.window + row});
  }
  const int64_t begin = std::max(times.begin, s.position);
  if (begin < times.end) {
    const int64_t token = s.first + begin - s.position;
    const Strides& strides = values ? p.value_strides : p.key_strides;
    const T* from = static_cast<const T*>(values ? p.value : p.key) + s.b * strides.batch +
                    h * strides.head + token * strides.row;
    f(Rows<T>{from, strides.row, times.end - begin,
              p.key_mask ? p.key_mask + s.b * p.tokens + token : nullptr});
  }
}

// Rows as float32, one below the other; hidden ones, and those up to `padded`, are 0.
template <typename T>
void gather_rows(const HybridProblem& p, const Stream& s, int64_t h, bool values, Span times,
                 int64_t padded, float* to) {
  const int64_t size = values ? p.v_dim : p.dim;
  float* at = to;
  visit_rows<T>(p, s, h, values, times, [&](const Rows<T>& rows) {
    for (int64_t j = 0; j < rows.n; j++, at += size) {
      if (rows.kept(j)) {
        convert_row<T, float>(rows.first + j * rows.stride, at, size);
      } else {
        std::fill_n(at, size, 0.f);
      }
    }
  });
  std::fill(at, to + padded * size, 0.f);
}

// hidden[j]: whether the key at times.begin + j is to be left out; returns whether any is.
template <typename T>
bool hidden_keys(const HybridProblem& p, const Stream& s, int64_t h, Span times, bool* hidden) {
  bool any = false;
  visit_rows<T>(p, s, h, false, times, [&](const Rows<T>& rows) {
    for (int64_t j = 0; j < rows.n; j++) any |= *hidden++ = !rows.kept(j);
  });
  return any;
}

inline int64_t whole_vectors(int64_t n) { return (n + 15) / 16 * 16; }

// a . b of n elements.
template <typename T>
float dot(const float* a, const T* b, int64_t n) {
  Vec sum(0.f);
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES)
    sum = at::vec::fmadd(Vec::loadu(a + d), load_floats(b + d, LANES), sum);
  float rest = 0.f;
  for (; d < n; d++) rest += a[d] * static_cast<float>(b[d]);
  return (n >= LANES ? sum_lanes(sum) : 0.f) + rest;
}

// to += weight * from
template <typename T>
void add_row(float weight, const T* from, int64_t n, float* to) {
  const Vec w(weight);
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES)
    at::vec::fmadd(w, load_floats(from + d, LANES), Vec::loadu(to + d)).store(to + d);
  for (; d < n; d++) to[d] += weight * static_cast<float>(from[d]);
}

inline void scale_row(float weight, int64_t n, float* row) {
  const Vec w(weight);
  at::vec::map<float>([w](Vec x) { return x * w; }, row, row, n);
}

inline float highest(const float* x, int64_t n) {
  float top = NEG_INF;
  for (int64_t j = 0; j < n; j++) top = x[j] > top ? x[j] : top;
  return top;
}

// x <- 2^(x - shift), 0 for all of them where shift = -inf; returns the sum. `x` has room for whole
// vectors.
inline float exponentials(float* x, int64_t n, float shift) {
  const Vec top(shift == NEG_INF ? 0.f : shift);
  for (int64_t j = n; j < whole_vectors(n); j++) x[j] = NEG_INF;
  Vec sum(0.f);
  for (int64_t j = 0; j < n; j += LANES) {
    const Vec w = exp2_vec(Vec::loadu(x + j) - top);
    w.store(x + j);
    sum = sum + w;
  }
  return sum_lanes(sum);
}

}  // namespace flashmark
