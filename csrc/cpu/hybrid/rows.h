// A few rows of a chunk, one at a time: decoding, and small chunks. Keys are read where they lie.
#pragma once
#include "hybrid/far.h"

namespace flashmark {

template <typename T>
class RowByRow {
 public:
  explicit RowByRow(const HybridProblem& problem)
      : p(problem),
        far(p),
        weights(whole_vectors(p.most_near + p.marks)),
        reading(2 * whole_vectors(p.marks)),
        query(p.dim),
        near(p.v_dim),
        distant(p.v_dim) {}

  void run(const RowBlock& x, void* out) {
    const int64_t parameter = p.parameter(x.stream->b, x.kv_head);
    const bool any = far.prepare(x.far, parameter);
    for (int64_t c = x.begin; c < x.end; c++) {
      convert_row<T, float>(x.query<T>(p, c), query, p.dim);
      row(x, c, any, parameter);
      convert_row<float, T>(near, x.out<T>(p, out, c), p.v_dim);
    }
  }

 private:
  // near <- the output of one row
  void row(const RowBlock& x, int64_t c, bool any, int64_t parameter) {
    const float factor = p.scale * LOG2E;
    const Span times{x.near.begin, x.time(p, c) + 1};
    int64_t n = 0;
    visit_rows<T>(p, *x.stream, x.kv_head, false, times, [&](const Rows<T>& keys) {
      for (int64_t j = 0; j < keys.n; j++)
        weights[n++] =
            keys.kept(j) ? factor * dot(query + 0, keys.first + j * keys.stride, p.dim) : NEG_INF;
    });
    const int64_t slots = any && p.merge == Merge::SLOTS ? p.marks : 0;
    for (int64_t l = 0; l < slots; l++) {
      const bool empty = far.held[l] == NEG_INF;
      weights[n + l] = empty ? NEG_INF
                             : factor * far.other[l] *
                                       dot(query + 0, x.far.K + l * p.dim, p.dim) +
                                   far.held[l];
    }
    const float top = highest(weights, n + slots);
    const float sum = exponentials(weights, n + slots, top);

    std::fill_n(near + 0, p.v_dim, 0.f);
    n = 0;
    visit_rows<T>(p, *x.stream, x.kv_head, true, times, [&](const Rows<T>& values) {
      for (int64_t j = 0; j < values.n; j++, n++)
        if (values.kept(j)) add_row(weights[n], values.first + j * values.stride, p.v_dim, near);
    });
    for (int64_t l = 0; l < slots; l++)
      if (far.held[l] != NEG_INF)
        add_row(weights[n + l] * far.other[l], x.far.V + l * p.v_dim, p.v_dim, near);
    if (!any || p.merge == Merge::SLOTS) return scale_row(1.f / (sum == 0.f ? 1.f : sum), p.v_dim, near);

    float reference, mass;
    read(x.far, parameter, reference, mass);
    const Shares shares =
        p.merge == Merge::MASS
            ? one_denominator(top, sum, reference, mass)
            : gated(gate_of(p, x.stream->b, x.head(p, c), x.token(p, c)), sum);
    scale_row(shares.near, p.v_dim, near);
    if (shares.far != 0.f)
      add_row(shares.far, static_cast<const float*>(distant), p.v_dim, near);
  }

  // distant <- the query's output through the landmarks; "mass": not divided by `mass`
  void read(const Total& total, int64_t parameter, float& reference, float& mass) {
    const float factor = p.scale * LOG2E;
    const float *lk = p.lk + parameter * p.marks * p.dim,
                *core = p.core + parameter * p.marks * p.marks;
    float *F = reading, *U = reading + whole_vectors(p.marks);
    for (int64_t l = 0; l < p.marks; l++) {
      F[l] = factor * dot(query + 0, lk + l * p.dim, p.dim);
      if (p.merge == Merge::MASS) F[l] -= far.other[l];
    }
    const float top = highest(F, p.marks);
    const float sum = exponentials(F, p.marks, top);
    if (p.merge == Merge::GATE) scale_row(1.f / sum, p.marks, F);
    std::fill_n(U, p.marks, 0.f);
    for (int64_t l = 0; l < p.marks; l++) add_row(F[l], core + l * p.marks, p.marks, U);
    mass = 0.f;
    reference = top + far.top;
    std::fill_n(distant + 0, p.v_dim, 0.f);
    for (int64_t l = 0; l < p.marks; l++) {
      const float weight = p.merge == Merge::MASS ? U[l] * far.held[l] : U[l];
      mass += weight;
      add_row(weight, total.V + l * p.v_dim, p.v_dim, distant);
    }
  }

  const HybridProblem& p;
  FarWeights far;
  Scratch<float> weights, reading, query, near, distant;
};

}  // namespace flashmark
