#include "nystrom_queries.h"
#include "schedule.h"

namespace flashmark {
namespace {

template <typename T>
class ForwardWalk {
 public:
  ForwardWalk(const NystromProblem& problem, const NystromOutputs& outputs)
      : p(problem),
        to(outputs),
        state(p),
        keys(p),
        queries(p),
        between(MAX_CHUNK * MAX_CHUNK),
        rows(MAX_CHUNK * p.v_dim),
        R(p.marks * p.v_dim) {}

  void run(int64_t row, int64_t h) {
    const int64_t b = p.bounds ? 0 : row;
    const int64_t begin = p.bounds ? p.bounds[row] : 0,
                  end = p.bounds ? p.bounds[row + 1] : p.tokens;
    state.load(p, row, h);
    for (int64_t first = begin; first < end; first += p.chunk) {
      keys.load(b, h, first, std::min(p.chunk, end - first), state);
      queries.weigh_states(keys, p.mass ? p.half + p.parameter(b, h) * p.width : nullptr);
      for (int64_t g = h * p.group(); g < (h + 1) * p.group(); g++) write_rows(b, g, first);
      keys.advance(state);
    }
    state.store(p, row, h, to.L, to.R);
  }

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
  RunningState state;
  KeyChunk<T> keys;
  QueryChunk<T> queries;
  Buffer between, rows, R;
};

}  // namespace

template <typename T>
void nystrom_forward(const NystromProblem& p, const NystromOutputs& to) {
  share_items(p.sequences * p.kv_heads, [&](const auto& next) {
    ForwardWalk<T> walk(p, to);
    for (int64_t item = next(); item >= 0; item = next())
      walk.run(item / p.kv_heads, item % p.kv_heads);
    release_products<float>();
  });
}

template void nystrom_forward<float>(const NystromProblem&, const NystromOutputs&);
template void nystrom_forward<Half>(const NystromProblem&, const NystromOutputs&);
template void nystrom_forward<BFloat16>(const NystromProblem&, const NystromOutputs&);

}  // namespace flashmark
