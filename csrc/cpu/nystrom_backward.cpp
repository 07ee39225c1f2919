#include "nystrom_backward.h"

#include "schedule.h"

namespace flashmark {

template <typename T>
void nystrom_backward(const NystromProblem& p, const NystromGradients& x) {
  // A worker takes a (sample, key head) with all its packed sequences: their parameter gradients
  // share one sum.
  const int64_t rows = p.bounds ? p.sequences : 1;
  share_items(p.batch * p.kv_heads, [&](const auto& next) {
    BackwardWalk<T> walk(p, x);
    for (int64_t item = next(); item >= 0; item = next())
      for (int64_t row = 0; row < rows; row++)
        walk.run(p.bounds ? row : item / p.kv_heads, item % p.kv_heads);
    release_products<float>();
  });
}

template void nystrom_backward<float>(const NystromProblem&, const NystromGradients&);
template void nystrom_backward<Half>(const NystromProblem&, const NystromGradients&);
template void nystrom_backward<BFloat16>(const NystromProblem&, const NystromGradients&);

}  // namespace flashmark
