// The keys of a chunk of tokens under every landmark, and the state that runs over chunks.
//
// In chunk-relative time u_jl = q~_l . k_j + decay_l (j + 1). With ref = L0, or the first kept
// key's score where nothing is held: P = exp(u - ref), cum_i = exp(L0 - ref) + sum_{j <= i} P_j =
// exp(L(i) - ref). Nothing that a later token can change enters a row. Where a score rises by more
// than RISE above ref, rows from there on are computed token by token (`Recurrence`).
#pragma once
#include <vector>

#include "nystrom/problem.h"
#include "shared/pack.h"

namespace flashmark {

using Buffer = Scratch<float>;
constexpr int64_t MAX_CHUNK = 64;
constexpr float RISE = 64.f;

// exp(a - b), 0 where a = -inf.
inline float exp_difference(float a, float b) { return a == NEG_INF ? 0.f : std::exp(a - b); }

struct RunningState {  // of one sequence and key head; R is 0 where L = -inf
  RunningState(const NystromProblem& p) : L(p.marks), R(p.marks * p.v_dim) {}

  void clear() {  // nothing seen yet
    std::fill(L.begin(), L.end(), NEG_INF);
    std::fill(R.begin(), R.end(), 0.f);
  }
  void load(const NystromProblem& p, int64_t row, int64_t h) {
    const int64_t at = (row * p.kv_heads + h) * p.marks;
    for (int64_t l = 0; l < p.marks; l++) {
      L[l] = p.L0 ? p.L0[at + l] : NEG_INF;
      float* to = R.data() + l * p.v_dim;
      if (L[l] == NEG_INF) {
        std::fill(to, to + p.v_dim, 0.f);
      } else {
        std::copy_n(p.R0 + (at + l) * p.v_dim, p.v_dim, to);
      }
    }
  }
  void store(const NystromProblem& p, int64_t row, int64_t h, float* to_L, float* to_R) const {
    const int64_t at = (row * p.kv_heads + h) * p.marks;
    for (int64_t l = 0; l < p.marks; l++) to_L[at + l] = static_cast<float>(L[l]);
    std::copy(R.begin(), R.end(), to_R + at * p.v_dim);
  }

  std::vector<double> L;  // a thousand roundings of a growing logarithm would show in float32
  std::vector<float> R;
};

// Rows [first, first + n) as float32, in place where they are; a hidden row reads as 0.
template <typename T>
const float* float_rows(const T* from, int64_t ld, int64_t n, int64_t size, const bool* kept,
                        float* copy, int64_t& out_ld) {
  if constexpr (std::is_same_v<T, float>) {
    if (kept == nullptr) {
      out_ld = ld;
      return from;
    }
  }
  out_ld = size;
  for (int64_t j = 0; j < n; j++) {
    if (kept != nullptr && !kept[j]) {
      std::fill(copy + j * size, copy + (j + 1) * size, 0.f);
    } else {
      convert_row<T, float>(from + j * ld, copy + j * size, size);
    }
  }
  return copy;
}

inline void plain_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                          const float* b, int64_t ldb, float* c, int64_t ldc, bool add = false) {
  product<float>(m, n, k, a, lda, b, ldb, c, ldc, add);
}

// Token by token, no exponent ever positive: own = e^{u_i - L(i)}, fade = e^{L(i-1) - L(i)}, each
// (n, width).
struct Recurrence {
  explicit Recurrence(const NystromProblem& p)
      : own(MAX_CHUNK * p.width), fade(MAX_CHUNK * p.width), L(MAX_CHUNK * p.width) {}
  Buffer own, fade, L;
};

template <typename T>
class KeyChunk {
 public:
  explicit KeyChunk(const NystromProblem& problem)
      : p(problem),
        width(p.width),
        scores(MAX_CHUNK * width),
        P(MAX_CHUNK * width),
        P_t(width * MAX_CHUNK),
        inverse(MAX_CHUNK * width),
        ref(width),
        total(width),
        seen(width),
        exact(p),
        key_copy(MAX_CHUNK * p.dim),
        value_copy(MAX_CHUNK * p.v_dim),
        sums(p.marks * p.v_dim) {}

  // Tokens [first, first + n) after `state`.
  void load(int64_t b, int64_t h, int64_t first, int64_t count, const RunningState& state) {
    n = count;
    kept = p.key_mask ? p.key_mask + b * p.tokens + first : nullptr;
    const T* k = static_cast<const T*>(p.key) + b * p.key_strides.batch + h * p.key_strides.head;
    const T* v =
        static_cast<const T*>(p.value) + b * p.value_strides.batch + h * p.value_strides.head;
    keys = float_rows(k + first * p.key_strides.row, p.key_strides.row, n, p.dim, kept, key_copy,
                      key_ld);
    values = float_rows(v + first * p.value_strides.row, p.value_strides.row, n, p.v_dim, kept,
                        value_copy, value_ld);
    decay = p.decay ? p.decay + h * p.marks : nullptr;
    plain_product(n, width, p.dim, keys, key_ld, p.lq_t + p.parameter(b, h) * p.dim * width, width,
                  scores, width);
    for (int64_t j = 0; j < n; j++) {
      float* u = scores + j * width;
      if (kept != nullptr && !kept[j]) {
        std::fill(u, u + width, NEG_INF);
      } else if (decay != nullptr) {
        for (int64_t l = 0; l < p.marks; l++) u[l] += decay[l] * static_cast<float>(j + 1);
      }
    }
    choose_references(state);
    run_sums();
    if (rise < n) recur(state);
  }

  // Moves the state to the chunk's end.
  void advance(RunningState& state) {
    const float* last = scores + 0;
    if (rise < n) {
      for (int64_t i = 0; i < n; i++) recur_state(i, state.R.data());
      last = exact.L + (n - 1) * width;
      for (int64_t l = 0; l < p.marks; l++) state.L[l] = last[l] - shift(l);
      return;
    }
    plain_product(p.marks, p.v_dim, n, P_t, MAX_CHUNK, values, value_ld, sums, p.v_dim);
    for (int64_t l = 0; l < p.marks; l++) {
      const float inv = inverse[(n - 1) * width + l];
      // R + (sum P v - total R) / cum: rounds with the increment, not with R
      const Vec scale(inv), old(total[l] * inv);
      at::vec::map2<float>([scale, old](Vec r, Vec s) { return r + (s * scale - r * old); },
                           &state.R[l * p.v_dim], &state.R[l * p.v_dim], sums + l * p.v_dim,
                           p.v_dim);
      const double sum = total[l];
      if (seen[l] != 0.f) {
        state.L[l] += std::log1p(sum) - shift(l);
      } else if (sum > 0.0) {
        state.L[l] = ref[l] + std::log(sum) - shift(l);
      }
    }
  }

  // R after token i, from R after token i - 1.
  void recur_state(int64_t i, float* R) const {
    for (int64_t l = 0; l < p.marks; l++) {
      const float own = exact.own[i * width + l], fade = exact.fade[i * width + l];
      float* r = R + l * p.v_dim;
      const float* v = values + i * value_ld;
      for (int64_t d = 0; d < p.v_dim; d++) r[d] = fade * r[d] + own * v[d];
    }
  }

  // L_l(i) without the decay that u leaves out, (n, width); -inf in the padding.
  void true_L(float* to) const {
    for (int64_t i = 0; i < n; i++) {
      for (int64_t l = 0; l < width; l += LANES) {
        const Vec inv = Vec::loadu(inverse + i * width + l);
        const Vec L = Vec::loadu(ref + l) - inv.log();
        Vec::blendv(L, Vec(NEG_INF), inv == Vec(0.f)).store(to + i * width + l);
      }
      if (i >= rise) std::copy_n(exact.L + i * width, p.marks, to + i * width);
      if (decay != nullptr)
        for (int64_t l = 0; l < p.marks; l++)
          to[i * width + l] -= decay[l] * static_cast<float>(i + 1);
    }
  }

  double shift(int64_t l) const {
    return decay ? static_cast<double>(decay[l]) * static_cast<double>(n) : 0.0;
  }

  const NystromProblem& p;
  const int64_t width;
  int64_t n = 0, key_ld = 0, value_ld = 0;
  int64_t rise = 0;  // first token whose row needs the recurrence; n where none does
  const bool* kept = nullptr;
  const float *keys = nullptr, *values = nullptr, *decay = nullptr;
  Buffer scores, P, P_t, inverse;  // u, P (n, width), P^T (width, MAX_CHUNK), 1 / cum or 0
  Buffer ref, total, seen;         // (width,): total = sum_j P_j, seen = exp(L0 - ref): 1 or 0
  Recurrence exact;

 private:
  void choose_references(const RunningState& state) {
    int64_t first = 0;
    while (first < n && kept != nullptr && !kept[first]) first++;
    for (int64_t l = 0; l < width; l++) {
      const bool held = l < p.marks && state.L[l] != NEG_INF;
      seen[l] = held ? 1.f : 0.f;
      if (held) {
        ref[l] = static_cast<float>(state.L[l]);
      } else if (l < p.marks) {
        ref[l] = first < n ? scores[first * width + l] : 0.f;
      } else {
        ref[l] = std::numeric_limits<float>::infinity();  // P = 0 in the padding
      }
    }
  }

  void run_sums() {
    const Vec log2e(LOG2E), zero(0.f), limit(RISE);
    rise = n;
    for (int64_t l = 0; l < width; l += LANES) {
      const Vec reference = Vec::loadu(ref + l), start = Vec::loadu(seen + l);
      Vec sum(0.f);
      for (int64_t j = 0; j < n; j++) {
        const Vec above = Vec::loadu(scores + j * width + l) - reference;
        // Not (above <= limit): a NaN takes the slow way too.
        if (j < rise && (above <= limit).zero_mask() != 0) rise = j;
        const Vec weight = exp2_vec(above * log2e);
        sum = sum + weight;
        const Vec cum = sum + start;
        weight.store(P + j * width + l);
        Vec::blendv(Vec(1.f) / cum, zero, cum == zero).store(inverse + j * width + l);
      }
      sum.store(total + l);
    }
    transpose_words(P, width, n, width, P_t, MAX_CHUNK);
  }

  void recur(const RunningState& state) {
    for (int64_t l = 0; l < p.marks; l++) {
      float top = static_cast<float>(state.L[l]), sum = top == NEG_INF ? 0.f : 1.f, before = top;
      for (int64_t i = 0; i < n; i++) {
        const float u = scores[i * width + l], higher = std::max(top, u);
        sum = sum * exp_difference(top, higher) + exp_difference(u, higher);
        top = higher;
        const float L = sum > 0.f ? top + std::log(sum) : (top == NEG_INF ? NEG_INF : top);
        exact.own[i * width + l] = exp_difference(u, L);
        exact.fade[i * width + l] = exp_difference(before, L);
        exact.L[i * width + l] = L;
        before = L;
      }
    }
  }

  Buffer key_copy, value_copy, sums;
};

}  // namespace flashmark
