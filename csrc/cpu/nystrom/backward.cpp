#include "nystrom/backward.h"

#include "shared/schedule.h"

namespace flashmark {

namespace {

// (G, g) behind a part that `next` follows: what `own` the next part adds at its start, and what
// its end passes on through it, e^{L_start - L_end} of the landmark.
void pass_back(const NystromProblem& p, const Part& next, int64_t h, const RunningState& start,
               const RunningState& end, const ReverseState& behind, ReverseState& own) {
  for (int64_t l = 0; l < p.marks; l++) {
    if (start.L[l] == NEG_INF) continue;
    const double tokens = static_cast<double>(next.end - next.first);
    const double fade = p.decay ? p.decay[h * p.marks + l] * tokens : 0.0;
    const float keep = static_cast<float>(std::exp(start.L[l] - fade - end.L[l]));
    own.g[l] += keep * behind.g[l];
    for (int64_t d = l * p.v_dim; d < (l + 1) * p.v_dim; d++) own.G[d] += keep * behind.G[d];
  }
}

}  // namespace

template <typename T>
void nystrom_backward(const NystromProblem& p, const NystromGradients& x) {
  const std::vector<Part> parts = cut_parts(p);
  const std::vector<int64_t> bundles = bundle_parts(p, parts);
  const bool cut = any_cut(parts);
  const int64_t count = static_cast<int64_t>(parts.size()), heads = p.kv_heads;
  // (parts, kv_heads): the state after a part, and (G, g) at its start
  std::vector<RunningState> after(cut ? count * heads : 0, RunningState(p));
  std::vector<ReverseState> before(cut ? count * heads : 0, ReverseState(p));
  std::vector<std::vector<RunningState>> starts(cut ? count * heads : 0);  // of a part's chunks
  if (cut) {
    share_items(count * heads, [&](const auto& next) {
      BackwardWalk<T> walk(p, x);
      for (int64_t item = next(); item >= 0; item = next()) {
        const Part& part = parts[item / heads];
        if (part.closes) continue;
        walk.state.clear();
        if (part.opens) walk.state.load(p, part.row, item % heads);
        walk.forwards(part, item % heads);
        after[item] = walk.state;
        if (part.opens) starts[item] = std::move(walk.starts);
      }
      release_products<float>();
    });
    scan_states(p, parts, after);
  }
  // The last part of a sequence whole; of those between, what they add to (G, g). A bundle's
  // parts share their sums and so one worker.
  const auto visit = [&](const auto& one) {
    share_items(static_cast<int64_t>(bundles.size() - 1) * heads, [&](const auto& next) {
      BackwardWalk<T> walk(p, x);
      for (int64_t item = next(); item >= 0; item = next())
        for (int64_t i = bundles[item / heads]; i < bundles[item / heads + 1]; i++)
          one(walk, i, item % heads, item);
      release_products<float>();
    });
  };
  visit([&](BackwardWalk<T>& walk, int64_t i, int64_t h, int64_t sums) {
    const Part& part = parts[i];
    const int64_t at = i * heads + h;
    if (part.opens && !part.closes) return;
    if (part.opens) {
      walk.state.load(p, part.row, h);
    } else {
      walk.state = after[at - heads];
    }
    walk.forwards(part, h);
    if (part.closes) {
      walk.backwards(part, sums, nullptr);
    } else {
      walk.own_reverse(part);
      starts[at] = std::move(walk.starts);
    }
    if (!part.opens) walk.store_reverse(before[at]);
  });
  if (!cut) return;
  for (int64_t i = count - 1; i >= 0; i--) {
    if (parts[i].opens || parts[i].closes) continue;
    for (int64_t h = 0; h < heads; h++) {
      const int64_t at = i * heads + h;
      pass_back(p, parts[i], h, after[at - heads], after[at], before[at + heads], before[at]);
    }
  }
  visit([&](BackwardWalk<T>& walk, int64_t i, int64_t h, int64_t sums) {
    if (parts[i].closes) return;
    const int64_t at = i * heads + h;
    walk.resume(parts[i], h, std::move(starts[at]), after[at]);
    walk.backwards(parts[i], sums, &before[at + heads]);
  });
}

template void nystrom_backward<float>(const NystromProblem&, const NystromGradients&);
template void nystrom_backward<Half>(const NystromProblem&, const NystromGradients&);
template void nystrom_backward<BFloat16>(const NystromProblem&, const NystromGradients&);

}  // namespace flashmark
