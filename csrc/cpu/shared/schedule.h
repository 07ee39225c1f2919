// Work is handed out one item at a time, in the order given; no result depends on who takes what.
#pragma once
#include <ATen/Parallel.h>

#include <atomic>

namespace flashmark {

// worker(next): `next()` yields 0 .. items - 1, each once over all threads, then -1. One worker a
// thread.
template <typename Worker>
void share_items(int64_t items, const Worker& worker) {
  if (items <= 0) return;
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t item = taken.fetch_add(1, std::memory_order_relaxed);
    return item < items ? item : -1;
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), items);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) worker(next);
  });
}

}  // namespace flashmark
