// How the tokens are cut into parts for the workers, and how the states of parts merge.
//
// Where sequences and key heads are few, a sequence is cut every PART_TOKENS tokens from its start; else
// a part is a whole sequence. The cuts follow from the shapes alone, never from the number of
// threads, and a longer sequence has the same cuts as a shorter one: no later token moves them.
#pragma once
#include <vector>

#include "nystrom/keys.h"

namespace flashmark {

// (sequence, key head) pairs below which sequences are cut: that costs about 1.3 times the work.
constexpr int64_t FEW_ROWS = 8;
constexpr int64_t PART_TOKENS = 1024;  // whole chunks of every size
constexpr int64_t BUNDLES = 64;  // at most about as many sums of the parameters' gradients a head

struct Part {  // tokens [first, end) of a sequence of sample b
  int64_t row, b, first, end;
  bool opens, closes;  // the sequence begins, ends here
};

inline std::vector<Part> cut_parts(const NystromProblem& p) {
  const bool few = p.sequences * p.kv_heads < FEW_ROWS;
  std::vector<Part> parts;
  for (int64_t row = 0; row < p.sequences; row++) {
    const int64_t b = p.bounds ? 0 : row, begin = p.bounds ? p.bounds[row] : 0,
                  end = p.bounds ? p.bounds[row + 1] : p.tokens;
    int64_t first = begin;
    do {
      const int64_t next = few ? std::min(end, first + PART_TOKENS) : end;
      parts.push_back({row, b, first, next, first == begin, next == end});
      first = next;
    } while (first < end);
  }
  return parts;
}

// Parts in a row that share one sum of the parameters' gradients: [bundles[i], bundles[i + 1]).
// As many for every sample; a sample's lie together.
inline std::vector<int64_t> bundle_parts(const NystromProblem& p,
                                          const std::vector<Part>& parts) {
  const bool few = p.batch * p.kv_heads < FEW_ROWS;
  const int64_t wanted = std::max(PART_TOKENS, (p.tokens + BUNDLES - 1) / BUNDLES);
  std::vector<int64_t> bundles;
  int64_t held = 0;
  for (size_t i = 0; i < parts.size(); i++) {
    if (i == 0 || parts[i].b != parts[i - 1].b || (few && held >= wanted)) {
      bundles.push_back(static_cast<int64_t>(i));
      held = 0;
    }
    held += parts[i].end - parts[i].first;
  }
  bundles.push_back(static_cast<int64_t>(parts.size()));
  return bundles;
}

// `right`, the state of `tokens` tokens alone, becomes the state after them where `left` precedes.
inline void merge_states(const NystromProblem& p, int64_t h, const RunningState& left,
                         int64_t tokens, RunningState& right) {
  for (int64_t l = 0; l < p.marks; l++) {
    const double fade = p.decay ? static_cast<double>(p.decay[h * p.marks + l]) * tokens : 0.0;
    const double before = left.L[l] - fade, own = right.L[l];
    if (left.L[l] == NEG_INF) continue;
    const double top = std::max(before, own);
    const double L = top + std::log(std::exp(before - top) + std::exp(own - top));
    const float a = static_cast<float>(std::exp(before - L)),
                c = static_cast<float>(std::exp(own - L));
    const float* from = left.R.data() + l * p.v_dim;
    float* to = right.R.data() + l * p.v_dim;
    for (int64_t d = 0; d < p.v_dim; d++) to[d] = a * from[d] + c * to[d];
    right.L[l] = L;
  }
}

// From the states of parts alone (of a sequence's first part: after it) to those after them; the
// last part of a sequence is left out. States lie as (parts, kv_heads).
inline void scan_states(const NystromProblem& p, const std::vector<Part>& parts,
                        std::vector<RunningState>& after) {
  for (size_t i = 0; i < parts.size(); i++) {
    if (parts[i].opens || parts[i].closes) continue;
    for (int64_t h = 0; h < p.kv_heads; h++) {
      const size_t at = i * p.kv_heads + h;
      merge_states(p, h, after[at - p.kv_heads], parts[i].end - parts[i].first, after[at]);
    }
  }
}

inline bool any_cut(const std::vector<Part>& parts) {
  return std::any_of(parts.begin(), parts.end(), [](const Part& x) { return !x.closes; });
}

}  // namespace flashmark
