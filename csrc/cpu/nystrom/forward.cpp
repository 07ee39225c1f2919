#include "nystrom/parts.h"
#include "nystrom/queries.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

template <typename T>
class ForwardWalk {
 public:
  ForwardWalk(const NystromProblem& problem, const NystromOutputs& outputs)
      : state(problem),
        p(problem),
        to(outputs),
        keys(p),
        queries(p),
        between(MAX_CHUNK * MAX_CHUNK),
        rows(MAX_CHUNK * p.v_dim),
        R(p.marks * p.v_dim) {}

  // Rows of `out`, from the state before the part; `state` moves behind it.
  void write(const Part& part, int64_t h) {
    for (int64_t first = part.first; first < part.end; first += p.chunk) {
      keys.load(part.b, h, first, std::min(p.chunk, part.end - first), state);
      queries.weigh_states(keys, p.mass ? p.half + p.parameter(part.b, h) * p.width : nullptr);
      for (int64_t g = h * p.group(); g < (h + 1) * p.group(); g++) write_rows(part.b, g, first);
      keys.advance(state);
    }
    if (part.closes) state.store(p, part.row, h, to.L, to.R);
  }

  void skip(const Part& part, int64_t h) {
    for (int64_t first = part.first; first < part.end; first += p.chunk) {
      keys.load(part.b, h, first, std::min(p.chunk, part.end - first), state);
      keys.advance(state);
    }
  }

  RunningState state;

 private:
  // out = (W e^{L0-L}) R0 + [(W e^{ref-L}) P^T where j <= i] V
  void write_rows(int64_t b, int64_t g, int64_t first) {
    const int64_t n = keys.n;
    queries.load(b, g, first, keys);
    T* out = static_cast<T*>(to.out) + ((b * p.heads + g) * p.tokens + first) * p.v_dim;
    float* sums = rows;
    if constexpr (std::is_same_v<T, float>) sums = out;
    plain_product(n, p.v_dim, p.marks, queries.weights, p.width, state.R.data(), p.v_dim, sums,
                  p.v_dim);
    plain_product(n, n, p.marks, queries.weights, p.width, keys.P_t, MAX_CHUNK, between, MAX_CHUNK);
    keep_lower(between, n);
    plain_product(n, p.v_dim, n, between, MAX_CHUNK, keys.values, keys.value_ld, sums, p.v_dim,
                  true);
    if (keys.rise < n) recur_rows(sums);
    if constexpr (!std::is_same_v<T, float>) convert_row<float, T>(sums, out, n * p.v_dim);
  }

  void recur_rows(float* sums) {
    std::copy(state.R.begin(), state.R.end(), R + 0);
    for (int64_t i = 0; i < keys.n; i++) {
      keys.recur_state(i, R);
      if (i < keys.rise) continue;
      plain_product(1, p.v_dim, p.marks, queries.W + i * p.width, p.width, R, p.v_dim,
                    sums + i * p.v_dim, p.v_dim);
    }
  }

  const NystromProblem& p;
  const NystromOutputs& to;
  KeyChunk<T> keys;
  QueryChunk<T> queries;
  Buffer between, rows, R;
};

}  // namespace

template <typename T>
void nystrom_forward(const NystromProblem& p, const NystromOutputs& to) {
  const std::vector<Part> parts = cut_parts(p);
  const bool cut = any_cut(parts);
  const int64_t items = static_cast<int64_t>(parts.size()) * p.kv_heads;
  std::vector<RunningState> after(cut ? items : 0, RunningState(p));  // (parts, kv_heads)
  const auto visit = [&](const auto& one) {
    share_items(items, [&](const auto& next) {
      ForwardWalk<T> walk(p, to);
      for (int64_t item = next(); item >= 0; item = next())
        one(walk, parts[item / p.kv_heads], item, item % p.kv_heads);
      release_products<float>();
    });
  };
  // Parts that open a sequence whole, and the states of those between from nothing.
  visit([&](ForwardWalk<T>& walk, const Part& part, int64_t item, int64_t h) {
    if (part.opens) {
      walk.state.load(p, part.row, h);
      walk.write(part, h);
    } else if (!part.closes) {
      walk.state.clear();
      walk.skip(part, h);
    }
    if (!part.closes) after[item] = walk.state;
  });
  if (!cut) return;
  scan_states(p, parts, after);
  visit([&](ForwardWalk<T>& walk, const Part& part, int64_t item, int64_t h) {
    if (part.opens) return;
    walk.state = after[item - p.kv_heads];
    walk.write(part, h);
  });
}

template void nystrom_forward<float>(const NystromProblem&, const NystromOutputs&);
template void nystrom_forward<Half>(const NystromProblem&, const NystromOutputs&);
template void nystrom_forward<BFloat16>(const NystromProblem&, const NystromOutputs&);

}  // namespace flashmark
