// Far field of a chunk as its rows read it, and how a row merges it with its near keys.
#pragma once
#include "hybrid/totals.h"

namespace flashmark {

constexpr float LEAST_HELD = 1e-30f;  // a slot that holds less counts as empty

// Weights of each landmark: slots have log2 n and 1 / n; "mass" has exp(L - half - top),
// and half in base 2.
class FarWeights {
 public:
  explicit FarWeights(const HybridProblem& problem)
      : p(problem), held(whole_vectors(p.marks)), other(p.marks) {}

  // Whether the total holds anything at all.
  bool prepare(const Total& total, int64_t parameter) {
    if (!total) return false;
    if (p.merge == Merge::SLOTS) {
      for (int64_t l = 0; l < p.marks; l++) {
        const bool empty = total.n[l] < LEAST_HELD;
        held[l] = empty ? NEG_INF : std::log2(total.n[l]);
        other[l] = empty ? 0.f : 1.f / total.n[l];
      }
      return true;
    }
    if (highest(total.n, p.marks) == NEG_INF && total.n[0] == NEG_INF) return false;
    if (p.merge == Merge::GATE) return true;
    const float* x = p.lq + parameter * p.marks * p.dim;
    for (int64_t l = 0; l < p.marks; l++) {
      other[l] = 0.5f * p.scale * LOG2E * dot(x + l * p.dim, x + l * p.dim, p.dim);
      held[l] = total.n[l] * LOG2E - other[l];
    }
    top = highest(held, p.marks);
    exponentials(held, p.marks, top);
    return true;
  }

  const HybridProblem& p;
  Scratch<float> held, other;
  float top = 0.f;  // base 2
};

// Weights of a row: out = near * (near sums) + far * (far sums).
struct Shares {
  float near, far;
};

// "mass": one denominator. The near sums are relative to 2^m, the far ones to 2^reference; a far
// mass that is not positive is dropped.
inline Shares one_denominator(float m, float sum, float reference, float mass) {
  const bool dropped = !(mass > 0.f);
  float top = dropped ? m : std::max(m, reference);
  if (top == NEG_INF) top = 0.f;
  const float near = std::exp2(m - top), far = dropped ? 0.f : std::exp2(reference - top);
  const float total = near * sum + (dropped ? 0.f : far * mass);
  const float scale = 1.f / (total == 0.f ? 1.f : total);
  return {near * scale, far * scale};
}

inline Shares gated(float gate, float sum) {
  return {gate / (sum == 0.f ? 1.f : sum), 1.f - gate};
}

inline float gate_of(const HybridProblem& p, int64_t b, int64_t head, int64_t token) {
  return p.gate[b * p.gate_strides[0] + head * p.gate_strides[1] + token * p.gate_strides[2]];
}

struct RowBlock {  // columns [begin, end) of the rows of a chunk: token by token, head by head
  const Stream* stream;
  int64_t kv_head, begin, end;
  Span tokens;  // of the whole chunk
  Span near;    // times of the near keys of its last row
  Total far;

  int64_t time(const HybridProblem& p, int64_t column) const {
    return tokens.begin + column / p.group();
  }
  int64_t head(const HybridProblem& p, int64_t column) const {
    return kv_head * p.group() + column % p.group();
  }
  int64_t token(const HybridProblem& p, int64_t column) const {  // of its sample
    return stream->first + time(p, column) - stream->position;
  }
  template <typename T>
  const T* query(const HybridProblem& p, int64_t column) const {
    return static_cast<const T*>(p.query) + stream->b * p.query_strides.batch +
           head(p, column) * p.query_strides.head + token(p, column) * p.query_strides.row;
  }
  template <typename T>
  T* out(const HybridProblem& p, void* out, int64_t column) const {
    return static_cast<T*>(out) +
           ((stream->b * p.heads + head(p, column)) * p.tokens + token(p, column)) * p.v_dim;
  }
};

}  // namespace flashmark
