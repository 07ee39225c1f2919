// Totals of the new tokens of one chunk for all landmarks, and sums of totals.
#pragma once
#include "hybrid/keys.h"

namespace flashmark {

constexpr int64_t FEW = 8;  // with so few tokens, or rows, transposed tiles do not pay

inline void clear(const HybridProblem& p, const Total& to) {
  std::fill_n(to.n, p.marks, p.merge == Merge::SLOTS ? 0.f : NEG_INF);
  if (p.merge == Merge::SLOTS) std::fill_n(to.K, p.marks * p.dim, 0.f);
  std::fill_n(to.V, p.marks * p.v_dim, 0.f);
}

inline void copy_total(const HybridProblem& p, const Total& from, const Total& to) {
  if (!from) return clear(p, to);
  if (from.n == to.n) return;
  std::copy_n(from.n, p.marks, to.n);
  if (p.merge == Merge::SLOTS) std::copy_n(from.K, p.marks * p.dim, to.K);
  std::copy_n(from.V, p.marks * p.v_dim, to.V);
}

// right <- left + right. Log masses merge in float64 and round once.
inline void add_total(const HybridProblem& p, const Total& left, const Total& right) {
  if (!left) return;
  if (p.merge == Merge::SLOTS) {
    add_row(1.f, left.n, p.marks, right.n);
    add_row(1.f, left.K, p.marks * p.dim, right.K);
    add_row(1.f, left.V, p.marks * p.v_dim, right.V);
    return;
  }
  for (int64_t l = 0; l < p.marks; l++) {
    const double a = left.n[l], b = right.n[l], top = std::max(a, b);
    if (top == NEG_INF) continue;
    const double L = top + std::log(std::exp(a - top) + std::exp(b - top));
    float* V = right.V + l * p.v_dim;
    scale_row(static_cast<float>(std::exp(b - L)), p.v_dim, V);
    add_row(static_cast<float>(std::exp(a - L)), left.V + l * p.v_dim, p.v_dim, V);
    right.n[l] = static_cast<float>(L);
  }
}

template <typename T>
class ChunkTotal {
 public:
  explicit ChunkTotal(const HybridProblem& problem)
      : p(problem),
        keys(BLOCK * p.dim),
        keys_t(BLOCK * p.dim),
        values(BLOCK * p.v_dim),
        scores(std::max(whole_vectors(p.marks), p.marks * BLOCK)),
        tops(2 * p.marks) {}
  ~ChunkTotal() { release_products<float>(); }

  // `to` <- the total of the keys at `times`, new ones all of them.
  void sum(const Stream& s, int64_t h, Span times, const Total& to) {
    clear(p, to);
    const float* lq = p.lq + p.parameter(s.b, h) * p.marks * p.dim;
    if (times.size() <= FEW) return sum_one_by_one(s, h, times, lq, to);
    float *top = tops, *mass = tops + p.marks;
    std::fill_n(top, p.marks, NEG_INF);
    std::fill_n(mass, p.marks, 0.f);
    for (int64_t begin = times.begin; begin < times.end; begin += BLOCK) {
      const Span block{begin, std::min(times.end, begin + BLOCK)};
      const int64_t n = whole_vectors(block.size());
      gather_rows<T>(p, s, h, false, block, n, keys);
      gather_rows<T>(p, s, h, true, block, n, values);
      transpose_words(keys, p.dim, n, p.dim, keys_t, n);
      product<float>(p.marks, n, p.dim, lq, p.dim, keys_t, n, scores, n, false);
      std::fill_n(hidden, n, true);
      hidden_keys<T>(p, s, h, block, hidden);
      if (p.merge == Merge::SLOTS) {
        route(n, to.n);
        product<float>(p.marks, p.dim, n, scores, n, keys, p.dim, to.K, p.dim, true);
      } else {
        weigh(n, top, mass, to.V);
      }
      product<float>(p.marks, p.v_dim, n, scores, n, values, p.v_dim, to.V, p.v_dim, true);
    }
    if (p.merge != Merge::SLOTS) finish(top, mass, to);
  }

 private:
  static constexpr int64_t BLOCK = 128;  // keys at a time

  // scores (M, n) <- softmax over the landmarks of each key, 0 where hidden; sums of them
  void route(int64_t n, float* held) {
    const Vec factor(p.scale * LOG2E);
    for (int64_t j = 0; j < n; j += LANES) {
      Vec top(NEG_INF), sum(0.f);
      for (int64_t l = 0; l < p.marks; l++) top = max_vec(top, Vec::loadu(scores + l * n + j));
      top = top * factor;
      for (int64_t l = 0; l < p.marks; l++) {
        const Vec w = exp2_vec(at::vec::fmsub(Vec::loadu(scores + l * n + j), factor, top));
        w.store(scores + l * n + j);
        sum = sum + w;
      }
      float share[LANES];
      (Vec(1.f) / sum).store(share);
      for (int64_t c = 0; c < LANES; c++) share[c] = hidden[j + c] ? 0.f : share[c];
      const Vec shares = Vec::loadu(share);
      for (int64_t l = 0; l < p.marks; l++)
        (Vec::loadu(scores + l * n + j) * shares).store(scores + l * n + j);
    }
    for (int64_t l = 0; l < p.marks; l++) {
      Vec sum(0.f);
      for (int64_t j = 0; j < n; j += LANES) sum = sum + Vec::loadu(scores + l * n + j);
      held[l] += sum_lanes(sum);
    }
  }

  // scores (M, n) <- 2^(score - top); sums and V follow where the top of a landmark rises
  void weigh(int64_t n, float* top, float* mass, float* V) {
    const float factor = p.scale * LOG2E;
    for (int64_t l = 0; l < p.marks; l++) {
      float* row = scores + l * n;
      for (int64_t j = 0; j < n; j++) row[j] = hidden[j] ? NEG_INF : row[j] * factor;
      const float next = std::max(top[l], highest(row, n));
      if (next != top[l] && top[l] != NEG_INF) {
        const float shrink = std::exp2(top[l] - next);
        mass[l] *= shrink;
        scale_row(shrink, p.v_dim, V + l * p.v_dim);
      }
      mass[l] += exponentials(row, n, next);
      top[l] = next;
    }
  }

  void finish(const float* top, const float* mass, const Total& to) {
    for (int64_t l = 0; l < p.marks; l++) {
      if (mass[l] == 0.f) continue;
      to.n[l] = top[l] * LN2 + std::log(mass[l]);
      scale_row(1.f / mass[l], p.v_dim, to.V + l * p.v_dim);
    }
  }

  // A few keys, each read where it lies.
  void sum_one_by_one(const Stream& s, int64_t h, Span times, const float* lq, const Total& to) {
    const float factor = p.scale * LOG2E;
    for (int64_t t = times.begin; t < times.end; t++) {
      visit_rows<T>(p, s, h, false, {t, t + 1}, [&](const Rows<T>& row) {
        if (!row.kept(0)) return;
        convert_row<T, float>(row.first, keys, p.dim);
        for (int64_t l = 0; l < p.marks; l++)
          scores[l] = factor * dot(lq + l * p.dim, static_cast<const float*>(keys), p.dim);
        visit_rows<T>(p, s, h, true, {t, t + 1}, [&](const Rows<T>& value) {
          convert_row<T, float>(value.first, values, p.v_dim);
        });
        if (p.merge == Merge::SLOTS) {
          const float share = 1.f / exponentials(scores, p.marks, highest(scores, p.marks));
          for (int64_t l = 0; l < p.marks; l++) {
            const float a = scores[l] * share;
            to.n[l] += a;
            add_row(a, static_cast<const float*>(keys), p.dim, to.K + l * p.dim);
            add_row(a, static_cast<const float*>(values), p.v_dim, to.V + l * p.v_dim);
          }
          return;
        }
        for (int64_t l = 0; l < p.marks; l++) {
          const float own = scores[l] * LN2, top = std::max(own, to.n[l]);
          const float L = top + std::log(std::exp(own - top) + std::exp(to.n[l] - top));
          float* V = to.V + l * p.v_dim;
          scale_row(std::exp(to.n[l] - L), p.v_dim, V);
          add_row(std::exp(own - L), static_cast<const float*>(values), p.v_dim, V);
          to.n[l] = L;
        }
      });
    }
  }

  const HybridProblem& p;
  Scratch<float> keys, keys_t, values, scores, tops;
  bool hidden[BLOCK];
};

}  // namespace flashmark
