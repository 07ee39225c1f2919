// Problem of the hybrid attention kernels: exact attention to near keys, landmarks for the others.
//
// A stream is one sample or one packed sequence. Its tokens are counted from its start, in chunks of
// `window`; chunk k of a call is the k-th one that the call's tokens lie in. A total is the
// landmarks' sums over some chunks of a (stream, key head) pair.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "shared/problem.h"

namespace flashmark {

enum class Merge { SLOTS, MASS, GATE };

struct Stream {
  int64_t row;              // of the states
  int64_t b, first;         // its tokens are [first, first + tokens) of sample b
  int64_t tokens, position; // new ones, and those that the state holds
  int64_t chunks;           // that the new tokens lie in
  int64_t entered;          // chunks between the first and the next token
  int64_t end() const { return position + tokens; }
};

// Slots: n (M,), sums K (M, D) and V (M, Dv). Else log masses n (M,) and mean values V (M, Dv).
struct Total {
  float *n = nullptr, *K = nullptr, *V = nullptr;
  explicit operator bool() const { return n != nullptr; }  // no pointer: a total of nothing
};

struct HybridStateView {  // contiguous, as flashmark.HybridState; all null where there is none
  int64_t* position;      // (rows,)
  bool* keep;             // (rows, 2 window)
  void *key, *value;      // (rows, kv_heads, 2 window, D | Dv)
  float *n, *K, *V;       // (rows, kv_heads, 3, M, ...)
  explicit operator bool() const { return position != nullptr; }
};

struct HybridProblem {
  int64_t batch, heads, kv_heads, tokens, dim, v_dim, marks, window;
  Merge merge;
  float scale;
  const void *query, *key, *value;
  Strides query_strides, key_strides, value_strides;
  // Parameters over (batch | 1, kv_heads): batched_parameters says which.
  bool batched_parameters;
  const float *lq, *lk;  // (M, D)
  const float *core, *core_t;  // (M, M) and its transpose; not for slots
  const float* gate;     // or null
  int64_t gate_strides[3];
  const bool* key_mask;  // (batch, tokens), true = takes part, or null
  std::vector<Stream> streams;
  HybridStateView before, after;  // may share memory
  int64_t most_near;              // keys that a row may see

  int64_t group() const { return heads / kv_heads; }
  int64_t parameter(int64_t b, int64_t h) const {
    return (batched_parameters ? b : 0) * kv_heads + h;
  }
  int64_t total_size() const {
    return marks * (1 + v_dim + (merge == Merge::SLOTS ? dim : 0));
  }
  Total state_total(const HybridStateView& state, int64_t row, int64_t h, int64_t place) const {
    if (!state) return {};
    const int64_t at = ((row * kv_heads + h) * 3 + place) * marks;
    return {state.n + at, merge == Merge::SLOTS ? state.K + at * dim : nullptr,
            state.V + at * v_dim};
  }
};

struct Span {  // of times of a stream, or of chunks
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The new tokens of chunk k, as times.
inline Span chunk_tokens(const HybridProblem& p, const Stream& s, int64_t k) {
  const int64_t start = (s.position / p.window + k) * p.window;
  return {std::max(s.position, start), std::min(s.end(), start + p.window)};
}

// Times of the keys that the last row of chunk k sees.
inline Span near_keys(const HybridProblem& p, const Stream& s, int64_t k) {
  const int64_t start = (s.position / p.window + k - 1) * p.window;
  return {std::max<int64_t>(0, start), chunk_tokens(p, s, k).end};
}

template <typename T>
void hybrid_forward(const HybridProblem& p, void* out);  // (batch, heads, tokens, v_dim)

}  // namespace flashmark
