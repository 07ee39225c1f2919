// A call in four sweeps: the total of each chunk alone; running totals along each stream; the rows;
// the state. The first and third are shared out chunk by chunk, so that no result depends on the
// number of threads.
#include <optional>

#include "hybrid/rows.h"
#include "hybrid/tiles.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

constexpr int64_t SMALL = 1 << 20;  // multiply-adds; below this one thread is faster

// Totals of a stream by number: number 0 holds all chunks before the last two of the state, number n
// all chunks before chunk n - 1. Before the running sums, number n + 2 holds chunk n of the call.
class Totals {
 public:
  explicit Totals(const HybridProblem& problem) : p(problem), data(place()) {}

  int64_t lowest() const { return p.before ? 1 : 2; }
  int64_t end(const Stream& s) const { return p.after ? s.chunks + 2 : s.chunks; }

  Total at(size_t stream, int64_t h, int64_t number) const {
    const Stream& s = p.streams[stream];
    if (number < lowest() || (number >= end(s) && number > 1))
      return number == 0 ? p.state_total(p.before, s.row, h, 0) : Total{};
    const int64_t entry = first[stream] + (number - lowest()) * p.kv_heads + h;
    float* from = data + entry * p.total_size();
    float* K = p.merge == Merge::SLOTS ? from + p.marks : nullptr;
    return {from, K, from + p.marks * (1 + (K ? p.dim : 0))};
  }

  // Inclusive running totals of a pair, as the rows and the state read them.
  void run(size_t stream, int64_t h) const {
    const Stream& s = p.streams[stream];
    const int64_t last = std::max(s.chunks - 1, p.after ? s.entered : 0);
    if (p.before && last >= 1) {
      copy_total(p, p.state_total(p.before, s.row, h, 1), at(stream, h, 1));
      add_total(p, at(stream, h, 0), at(stream, h, 1));
    }
    if (p.before && at(stream, h, 2))
      add_total(p, p.state_total(p.before, s.row, h, 2), at(stream, h, 2));
    for (int64_t n = 2; n <= last; n++) add_total(p, at(stream, h, n - 1), at(stream, h, n));
  }

 private:
  int64_t place() {
    int64_t entries = 0;
    for (const Stream& s : p.streams) {
      first.push_back(entries);
      entries += std::max<int64_t>(p.before ? 1 : 0, end(s) - lowest()) * p.kv_heads;
    }
    return entries * p.total_size();
  }

  const HybridProblem& p;
  std::vector<int64_t> first;
  Scratch<float> data;
};

struct Part {  // columns [begin, end) of the rows of chunk k
  size_t stream;
  int64_t k, begin, end;
};

template <typename Worker>
void share(bool small, int64_t items, const Worker& worker) {
  if (!small) return share_items(items, worker);
  int64_t taken = 0;
  const auto next = [&]() -> int64_t { return taken < items ? taken++ : -1; };
  if (items > 0) worker(next);
}

template <typename T>
void sum_chunks(const HybridProblem& p, const Totals& totals, bool small) {
  std::vector<Part> parts;
  for (size_t s = 0; s < p.streams.size(); s++)
    for (int64_t k = 0; k + 2 < totals.end(p.streams[s]); k++) parts.push_back({s, k, 0, 0});
  share(small, static_cast<int64_t>(parts.size()) * p.kv_heads, [&](const auto& next) {
    ChunkTotal<T> worker(p);
    for (int64_t item = next(); item >= 0; item = next()) {
      const Part& part = parts[item / p.kv_heads];
      const int64_t h = item % p.kv_heads;
      const Stream& stream = p.streams[part.stream];
      worker.sum(stream, h, chunk_tokens(p, stream, part.k), totals.at(part.stream, h, part.k + 2));
    }
  });
}

template <typename T>
void write_rows(const HybridProblem& p, const Totals& totals, bool small, void* out) {
  std::vector<Part> parts;
  for (size_t s = 0; s < p.streams.size(); s++) {
    for (int64_t k = 0; k < p.streams[s].chunks; k++) {
      const int64_t columns = chunk_tokens(p, p.streams[s], k).size() * p.group();
      for (int64_t begin = 0; begin < columns; begin += RowTiles<T>::MOST)
        parts.push_back({s, k, begin, std::min(columns, begin + RowTiles<T>::MOST)});
    }
  }
  share(small, static_cast<int64_t>(parts.size()) * p.kv_heads, [&](const auto& next) {
    std::optional<RowByRow<T>> rows;
    std::optional<RowTiles<T>> tiles;
    for (int64_t item = next(); item >= 0; item = next()) {
      const Part& part = parts[item / p.kv_heads];
      const int64_t h = item % p.kv_heads;
      const Stream& stream = p.streams[part.stream];
      const RowBlock block{&stream, h, part.begin, part.end, chunk_tokens(p, stream, part.k),
                           near_keys(p, stream, part.k), totals.at(part.stream, h, part.k)};
      if (block.tokens.size() * p.group() <= FEW) {
        if (!rows) rows.emplace(p);
        rows->run(block, out);
      } else {
        if (!tiles) tiles.emplace(p);
        tiles->run(block, out);
      }
    }
  });
}

// Keys (values, flags) of the chunk of the next token and of the one before it. Row by row upwards:
// `to` may be the state that the rows come from.
template <typename T>
void keep_rows(const HybridProblem& p, const Stream& s, int64_t h, bool values) {
  const int64_t size = values ? p.v_dim : p.dim, w = p.window;
  T* to = static_cast<T*>(values ? p.after.value : p.after.key) +
          (s.row * p.kv_heads + h) * 2 * w * size;
  const int64_t start = (s.position / w + s.entered - 1) * w, end = s.end() - start;
  const bool in_place = p.before.key == p.after.key && s.entered == 0;
  const int64_t begin = std::max<int64_t>(std::max<int64_t>(0, -start),
                                          in_place ? s.position - start : 0);
  if (!in_place) std::fill_n(to, begin * size, T(0.f));
  T* row = to + begin * size;
  visit_rows<T>(p, s, h, values, {start + begin, start + end}, [&](const Rows<T>& rows) {
    for (int64_t j = 0; j < rows.n; j++, row += size) {
      if (rows.kept(j)) {
        std::memmove(row, rows.first + j * rows.stride, size * sizeof(T));
      } else {
        std::fill_n(row, size, T(0.f));
      }
    }
  });
  if (!in_place) std::fill(row, to + 2 * w * size, T(0.f));
}

template <typename T>
void keep_flags(const HybridProblem& p, const Stream& s) {
  const int64_t w = p.window, start = (s.position / w + s.entered - 1) * w;
  bool *to = p.after.keep + s.row * 2 * w, *row = to + std::max<int64_t>(0, -start);
  std::fill(to, row, false);
  visit_rows<T>(p, s, 0, false, {std::max<int64_t>(0, start), s.end()}, [&](const Rows<T>& rows) {
    for (int64_t j = 0; j < rows.n; j++) *row++ = rows.kept(j);
  });
  std::fill(row, to + 2 * w, false);
}

template <typename T>
void write_state(const HybridProblem& p, const Totals& totals) {
  for (size_t n = 0; n < p.streams.size(); n++) {
    const Stream& s = p.streams[n];
    for (int64_t h = 0; h < p.kv_heads; h++) {
      const auto to = [&](int64_t place) { return p.state_total(p.after, s.row, h, place); };
      const auto before = [&](int64_t place) { return p.state_total(p.before, s.row, h, place); };
      const int64_t e = s.entered;
      copy_total(p, e ? totals.at(n, h, e) : before(0), to(0));
      copy_total(p, e ? totals.at(n, h, e + 1) : before(1), to(1));
      copy_total(p, s.chunks > e ? totals.at(n, h, e + 2) : e ? Total{} : before(2), to(2));
      keep_rows<T>(p, s, h, false);
      keep_rows<T>(p, s, h, true);
    }
    keep_flags<T>(p, s);  // last: the rows above still read the old flags
    p.after.position[s.row] = s.end();
  }
}

}  // namespace

template <typename T>
void hybrid_forward(const HybridProblem& p, void* out) {
  const int64_t rows = p.batch * p.tokens * p.heads;
  const bool small = rows * (p.most_near + p.marks) * (p.dim + p.v_dim) < SMALL;
  const Totals totals(p);
  sum_chunks<T>(p, totals, small);
  share(small, static_cast<int64_t>(p.streams.size()) * p.kv_heads, [&](const auto& next) {
    for (int64_t item = next(); item >= 0; item = next())
      totals.run(item / p.kv_heads, item % p.kv_heads);
  });
  write_rows<T>(p, totals, small, out);
  if (p.after) write_state<T>(p, totals);
}

template void hybrid_forward<float>(const HybridProblem&, void*);
template void hybrid_forward<Half>(const HybridProblem&, void*);
template void hybrid_forward<BFloat16>(const HybridProblem&, void*);

}  // namespace flashmark
