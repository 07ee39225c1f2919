// The queries of a chunk by the blocks that they read: a counting sort.
#pragma once
#include <vector>

#include "routed/problem.h"

namespace flashmark {

inline int64_t RoutedProblem::chunk() const {
  // About 128 rows of products a block where choices are spread evenly, in sums that stay in cache.
  const int64_t each = choices + places.near + 1, rows = 64 * blocks / each;
  return std::clamp<int64_t>(std::clamp<int64_t>(rows, 1024, 4096) / group(), 1, q_len);
}

class Visits {
 public:
  explicit Visits(const RoutedProblem& problem) : p(problem), offsets(p.blocks + 2) {}

  // Queries [first, first + count) of a sample, as those of a key head choose.
  void collect(int64_t b_, int64_t kv_head_, int64_t first_, int64_t count) {
    b = b_, kv_head = kv_head_, first = first_;
    begin = p.blocks, end = 0;
    for (int64_t q = 0; q < count; q++) {
      each_block(q, [&](int64_t block) {
        begin = std::min(begin, block), end = std::max(end, block + 1);
      });
    }
    if (begin >= end) return;
    std::fill(offsets.begin() + begin, offsets.begin() + end + 2, 0);
    for (int64_t q = 0; q < count; q++)
      each_block(q, [&](int64_t block) { offsets[block + 2]++; });
    for (int64_t block = begin; block < end; block++) offsets[block + 2] += offsets[block + 1];
    entries.resize(offsets[end + 1]);
    for (int64_t q = 0; q < count; q++)
      each_block(q, [&](int64_t block) {
        entries[offsets[block + 1]++] = static_cast<int32_t>(q);
      });
  }

  // visit(block, queries, n) for each block that is read, in ascending order; the queries counted
  // from the chunk's first, ascending too.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (int64_t block = begin; block < end; block++) {
      const int64_t n = offsets[block + 1] - offsets[block];
      if (n > 0) visit(block, entries.data() + offsets[block], n);
    }
  }

 private:
  template <typename F>
  void each_block(int64_t q, const F& f) const {
    const int64_t at = p.places.position(b, first + q);
    if (at < 0 || at >= p.kv_len) return;
    const int64_t base = p.block_of(p.places.first(at)), own = p.block_of(at) - base;
    const int32_t* chosen =
        p.indices + ((b * p.kv_heads + kv_head) * p.q_len + first + q) * p.choices;
    const int64_t near = std::max<int64_t>(0, own - p.places.near);
    for (int64_t n = 0; n < p.choices; n++)
      if (chosen[n] >= 0 && chosen[n] < near) f(base + chosen[n]);
    for (int64_t block = near; block <= own; block++) f(base + block);
  }

  const RoutedProblem& p;
  int64_t b = 0, kv_head = 0, first = 0, begin = 0, end = 0;
  std::vector<int32_t> offsets, entries;
};

}  // namespace flashmark
