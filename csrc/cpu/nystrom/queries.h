// How the queries of a chunk read the landmarks: F, the weights W on R, and for "mass" the factor
// between them.
#pragma once
#include "nystrom/keys.h"

namespace flashmark {

template <typename T>
class QueryChunk {
 public:
  explicit QueryChunk(const NystromProblem& problem)
      : p(problem),
        width(p.width),
        F(MAX_CHUNK * width),
        W(MAX_CHUNK * width),
        weights(MAX_CHUNK * width),
        factor(p.mass ? MAX_CHUNK * width : 0),
        held(p.mass ? MAX_CHUNK * width : 0),
        copy(MAX_CHUNK * p.dim) {}

  // "mass": exp(L - half) of the chunk, up to a factor of the row. Once for all query heads of a
  // group.
  void weigh_states(const KeyChunk<T>& chunk, const float* half) {
    if (!p.mass) return;
    chunk.true_L(held);
    for (int64_t i = 0; i < chunk.n; i++) {
      float* row = held + i * width;
      float top = NEG_INF;
      for (int64_t l = 0; l < p.marks; l++) row[l] -= half[l], top = std::max(top, row[l]);
      for (int64_t l = 0; l < width; l++) row[l] = l < p.marks ? exp_difference(row[l], top) : 0.f;
    }
  }

  void load(int64_t b, int64_t h, int64_t first, const KeyChunk<T>& chunk) {
    const int64_t n = chunk.n, parameter = p.parameter(b, h / p.group());
    const T* q =
        static_cast<const T*>(p.query) + b * p.query_strides.batch + h * p.query_strides.head;
    queries = float_rows<T>(q + first * p.query_strides.row, p.query_strides.row, n, p.dim, nullptr,
                            copy, query_ld);
    plain_product(n, width, p.dim, queries, query_ld, p.lk_t + parameter * p.dim * width, width, F,
                  width);
    for (int64_t i = 0; i < n; i++)
      softmax(F + i * width, p.mass ? p.half + parameter * width : nullptr);
    plain_product(n, width, p.marks, F, width, p.core + parameter * p.marks * width, width, W,
                  width);
    if (p.mass)
      for (int64_t i = 0; i < n; i++) normalise_by_mass(i);
    for (int64_t k = 0; k < n * width; k += LANES)
      (Vec::loadu(W + k) * Vec::loadu(chunk.inverse + k)).store(weights + k);
  }

  const NystromProblem& p;
  const int64_t width;
  const float* queries = nullptr;
  int64_t query_ld = 0;
  Buffer F, W, weights, factor;  // (n, width); weights = W e^{ref - L}

 private:
  // Over the landmarks; with `half`, exp(x - half) scaled to a maximum of 1 instead.
  void softmax(float* row, const float* half) const {
    float top = NEG_INF;
    for (int64_t l = 0; l < p.marks; l++) {
      if (half) row[l] -= half[l];
      top = std::max(top, row[l]);
    }
    for (int64_t l = p.marks; l < width; l++) row[l] = NEG_INF;
    const Vec reference(top), log2e(LOG2E);
    Vec sum(0.f);
    for (int64_t l = 0; l < width; l += LANES) {
      const Vec weight = exp2_vec((Vec::loadu(row + l) - reference) * log2e);
      sum = sum + weight;
      weight.store(row + l);
    }
    if (half) return;
    const Vec scale(1.f / sum_lanes(sum));
    for (int64_t l = 0; l < width; l += LANES) (Vec::loadu(row + l) * scale).store(row + l);
  }

  // W = G held / sum(G held); a row with no key: 0
  void normalise_by_mass(int64_t i) {
    float *row = W + i * width, *ratio = factor + i * width;
    const float* weight = held + i * width;
    float mass = 0.f;
    bool any = false;
    for (int64_t l = 0; l < p.marks; l++) mass += row[l] * weight[l], any |= weight[l] != 0.f;
    for (int64_t l = 0; l < width; l++) {
      ratio[l] = weight[l] / (any ? mass : 1.f);
      row[l] *= ratio[l];
    }
  }

  Buffer held, copy;
};

// Entries above the diagonal of (n, MAX_CHUNK) become 0, whatever they were.
inline void keep_lower(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) std::fill(x + i * MAX_CHUNK + i + 1, x + i * MAX_CHUNK + n, 0.f);
}

}  // namespace flashmark
