// Scores of blocks for a tile of queries, a strip of blocks at a time, and the best of them.
//
// Scores lie as (landmarks of blocks, queries), so that the summaries are read where they lie, and
// sums over landmarks and heads run along vectors. The heads of a group choose by the mean of their
// probabilities: the scores of all blocks by each head are kept until their sum is known. A query
// keeps the blocks that beat its threshold in a short list; where the list is full, the best are
// kept and the threshold rises.
#include <functional>

#include "routed/log2.h"
#include "routed/problem.h"
#include "shared/pack.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

// Order of two is that of their scores, the lower block first of equal ones.
uint64_t ranked(float score, int64_t block) {
  const float value = score + 0.f;  // -0 + 0 is 0
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  bits ^= (bits >> 31) & 0x7fffffff;
  return static_cast<uint64_t>(static_cast<uint32_t>(bits) ^ 0x80000000u) << 32 |
         (0x7fffffffu - static_cast<uint32_t>(block));
}
int64_t block_of(uint64_t rank) { return 0x7fffffff - static_cast<int64_t>(rank & 0xffffffffu); }
float score_of(uint64_t rank) {
  int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(rank >> 32) ^ 0x80000000u);
  bits ^= (bits >> 31) & 0x7fffffff;
  float score;
  std::memcpy(&score, &bits, 4);
  return score;
}

// W columns: W queries, a tile of scores for each head; or, `together`, the queries of all heads.
template <typename T, int64_t W>
class ChoiceTile {
 public:
  ChoiceTile(const ChoiceProblem& problem, bool together)
      : p(problem),
        heads(together ? p.group() : 1),
        layers(p.group() / heads),
        strip(std::clamp<int64_t>(64 / p.marks, 1, p.blocks)),
        room(2 * p.best + 32),
        query_t(layers * p.dim * W),
        rows(W * p.dim),
        scores(layers * strip * p.marks * W),
        each(p.group() > 1 ? p.blocks * layers * W : 0),
        lists(W * room) {}
  ~ChoiceTile() { release_products<float>(); }

  static bool fits_together(const ChoiceProblem& p) { return p.q_len * p.group() <= W; }

  void run(int64_t b_, int64_t kv_head_, int64_t first_) {
    b = b_, kv_head = kv_head_, first = first_;
    count = std::min(W, p.q_len - first);
    place();
    if (begin < end) load_queries();
    for (int64_t block = begin / strip * strip; block < end; block += strip) take(block);
    if (p.group() > 1 && begin < end) choose_together();
    store();
  }

 private:
  static constexpr int64_t V = W / LANES;

  // The finished blocks [low, high) of each query.
  void place() {
    begin = p.blocks, end = 0, all_low = 0, all_high = p.blocks;
    for (int64_t q = 0; q < W; q++) {
      low[q] = high[q] = length[q] = 0;
      threshold[q] = NEG_INF;
      if (q >= count) continue;
      const int64_t at = p.places.position(b, first + q);
      if (at >= 0 && at < p.places.kv_len) {
        low[q] = p.base ? p.base[at] : 0;
        const int64_t own = (at - p.places.first(at)) / p.places.block_size;
        high[q] = std::min(p.blocks, low[q] + std::max<int64_t>(0, own - p.places.near));
      }
      if (low[q] < high[q]) begin = std::min(begin, low[q]), end = std::max(end, high[q]);
      all_low = std::max(all_low, low[q]), all_high = std::min(all_high, high[q]);
    }
    if (count < W && heads == 1) all_high = 0;  // columns without a query
  }

  void load_queries() {
    const T* query = static_cast<const T*>(p.query) + b * p.query_strides.batch +
                     kv_head * p.group() * p.query_strides.head + first * p.query_strides.row;
    if (heads == 1) {
      for (int64_t g = 0; g < layers; g++)
        pack_columns<T, float>(query + g * p.query_strides.head, p.query_strides.row, 0, count, W,
                               p.dim, query_t + g * p.dim * W, rows);
      return;
    }
    std::fill(rows + 0, rows + W * p.dim, 0.f);
    for (int64_t x = 0; x < heads * count; x++)
      convert_row<T, float>(
          query + x / count * p.query_strides.head + x % count * p.query_strides.row,
          rows + x * p.dim, p.dim);
    transpose_words(rows, p.dim, W, p.dim, query_t, W);
  }

  void take(int64_t block) {
    const int64_t n = std::min(strip, p.blocks - block), row = (b * p.kv_heads + kv_head) * p.blocks;
    for (int64_t g = 0; g < layers; g++)
      product<float>(n * p.marks, W, p.dim, p.keys + (row + block) * p.marks * p.dim, p.dim,
                     query_t + g * p.dim * W, W, scores + g * strip * p.marks * W, W, false);
    for (int64_t c = std::max(block, begin); c < std::min(block + n, end); c++) {
      const float *s = scores + (c - block) * p.marks * W, *logs = p.log_counts + (row + c) * p.marks;
      if (p.group() > 1) {
        store_heads(c, s, logs);
        continue;
      }
      float found[W];
      for (int64_t v = 0; v < V; v++) score(s + v * LANES, logs).store(found + v * LANES);
      offer(c, found);
    }
  }

  bool inside(int64_t c) const { return c >= all_low && c < all_high; }
  int64_t query_of(int64_t column) const { return heads == 1 ? column : column % count; }

  static uint32_t set_lanes(Vec test) { return ~test.zero_mask() & ((uint32_t{1} << LANES) - 1); }

  // Those of the tile's queries take block c that may choose it and have no better ones.
  void offer(int64_t c, const float* found) {
    for (int64_t v = 0; v < V; v++) {
      uint32_t hits = set_lanes(Vec::loadu(found + v * LANES) > Vec::loadu(threshold + v * LANES));
      for (; hits != 0; hits &= hits - 1) {
        const int64_t q = v * LANES + __builtin_ctz(hits);
        if (inside(c) || (c >= low[q] && c < high[q])) keep(q, found[q], c);
      }
    }
  }

  Vec logit(const float* s, float log_count) const {
    return at::vec::fmadd(Vec::loadu(s), Vec(p.scale * LOG2E), Vec(log_count * LOG2E));
  }
  static Vec finite(Vec top) { return Vec::blendv(top, Vec(0.f), top == Vec(NEG_INF)); }

  // log2 of the sum of all landmarks, in LANES columns.
  Vec score(const float* s, const float* logs) const {
    if (p.marks == 1) return logit(s, logs[0]);
    Vec top(NEG_INF);
    for (int64_t l = 0; l < p.marks; l++) top = max_vec(top, logit(s + l * W, logs[l]));
    const Vec from = finite(top);
    Vec sum(0.f);
    for (int64_t l = 0; l < p.marks; l++) sum = sum + exp2_vec(logit(s + l * W, logs[l]) - from);
    const Vec found = log2_vec(sum) + from;
    if (set_lanes(top == Vec(-NEG_INF)) == 0) return found;
    Vec largest(0.f);  // +inf, or NaN where there is one besides
    for (int64_t l = 0; l < p.marks; l++)
      largest = largest + max_vec(Vec(0.f), logit(s + l * W, logs[l]));
    return Vec::blendv(found, largest, top == Vec(-NEG_INF));
  }

  // The scores of block c by each head; -inf for a query that may not choose it, and for one whose
  // score by a head is NaN. +inf becomes the largest number.
  void store_heads(int64_t c, const float* s, const float* logs) {
    float* r = each + (c - begin) * layers * W;
    uint32_t none = 0;
    for (int64_t g = 0; g < layers; g++)
      for (int64_t v = 0; v < V; v++) {
        const Vec x = score(s + g * strip * p.marks * W + v * LANES, logs);
        none |= set_lanes(x != x);
        at::vec::minimum(x, Vec(std::numeric_limits<float>::max())).store(r + g * W + v * LANES);
      }
    if (none == 0 && inside(c)) return;
    bool without[W];
    for (int64_t q = 0; q < W; q++) without[q] = c < low[q] || c >= high[q];
    const int64_t columns = heads == 1 ? W : heads * count;  // the others belong to no query
    for (int64_t g = 0; g < layers; g++)
      for (int64_t x = 0; x < columns; x++)
        if (std::isnan(r[g * W + x])) without[query_of(x)] = true;
    for (int64_t g = 0; g < layers; g++)
      for (int64_t x = 0; x < columns; x++)
        if (without[query_of(x)]) r[g * W + x] = NEG_INF;
  }

  // log2 of each head's sum over all blocks, then of the sum of the heads' probabilities.
  void choose_together() {
    const int64_t size = layers * W, blocks = end - begin;
    Scratch<float> totals(size);
    for (int64_t x = 0; x < size; x += LANES) {
      Vec top(NEG_INF), sum(0.f);
      for (int64_t c = 0; c < blocks; c++) top = max_vec(top, Vec::loadu(each + c * size + x));
      top = finite(top);
      for (int64_t c = 0; c < blocks; c++)
        sum = sum + exp2_vec(Vec::loadu(each + c * size + x) - top);
      (top + finite(log2_vec(sum))).store(totals + x);
    }
    float found[W];
    for (int64_t c = 0; c < blocks; c++) {
      const float* r = each + c * size;
      if (heads == 1) {
        for (int64_t x = 0; x < W; x += LANES) add_layers(r + x, totals + x).store(found + x);
      } else {
        add_columns(r, totals, found);
      }
      offer(begin + c, found);
    }
  }

  Vec add_layers(const float* r, const float* totals) const {
    Vec top(NEG_INF), sum(0.f);
    for (int64_t g = 0; g < layers; g++)
      top = max_vec(top, Vec::loadu(r + g * W) - Vec::loadu(totals + g * W));
    top = finite(top);
    for (int64_t g = 0; g < layers; g++)
      sum = sum + exp2_vec(Vec::loadu(r + g * W) - Vec::loadu(totals + g * W) - top);
    return log2_vec(sum) + top;
  }

  // The same where columns are the queries of all heads: there are few queries.
  void add_columns(const float* r, const float* totals, float* found) const {
    std::fill(found, found + W, NEG_INF);
    for (int64_t q = 0; q < count; q++) {
      float top = NEG_INF, sum = 0.f;
      for (int64_t g = 0; g < heads; g++)
        top = std::max(top, r[g * count + q] - totals[g * count + q]);
      if (top == NEG_INF) continue;
      for (int64_t g = 0; g < heads; g++)
        sum += std::exp2(r[g * count + q] - totals[g * count + q] - top);
      found[q] = std::log2(sum) + top;
    }
  }

  void keep(int64_t q, float score, int64_t block) {
    uint64_t* list = lists + q * room;
    list[length[q]++] = ranked(score, block);
    if (length[q] < room) return;
    std::nth_element(list, list + p.best - 1, list + room, std::greater<uint64_t>());
    length[q] = p.best;
    threshold[q] = score_of(list[p.best - 1]);
  }

  void store() {
    for (int64_t q = 0; q < count; q++) {
      uint64_t* list = lists + q * room;
      const int64_t n = std::min<int64_t>(length[q], p.best);
      std::partial_sort(list, list + n, list + length[q], std::greater<uint64_t>());
      int32_t* to = p.found + ((b * p.kv_heads + kv_head) * p.q_len + first + q) * p.best;
      for (int64_t k = 0; k < n; k++) to[k] = static_cast<int32_t>(block_of(list[k]) - low[q]);
      std::fill(to + n, to + p.best, -1);
    }
  }

  const ChoiceProblem& p;
  const int64_t heads, layers;  // heads side by side in a tile of scores, and tiles of scores
  const int64_t strip, room;    // blocks of a product, blocks of a list
  int64_t b = 0, kv_head = 0, first = 0, count = 0, begin = 0, end = 0, all_low = 0, all_high = 0;
  int64_t low[W], high[W], length[W];
  float threshold[W];
  Scratch<float> query_t, rows, scores;
  Scratch<float> each;  // scores (end - begin, layers, W) by each head of a group
  Scratch<uint64_t> lists;
};

template <typename T, int64_t W>
void run(const ChoiceProblem& p) {
  const int64_t tiles = (p.q_len + W - 1) / W;
  share_items(p.batch * p.kv_heads * tiles, [&](const auto& next) {
    ChoiceTile<T, W> worker(p, ChoiceTile<T, W>::fits_together(p));
    for (int64_t x = next(); x >= 0; x = next())  // the last tiles, which see most blocks, first
      worker.run(x / tiles / p.kv_heads, x / tiles % p.kv_heads, (tiles - 1 - x % tiles) * W);
  });
}

}  // namespace

template <typename T>
void choose_blocks(const ChoiceProblem& p) {
  p.q_len > 16 ? run<T, 64>(p) : run<T, 16>(p);
}

template void choose_blocks<float>(const ChoiceProblem&);
template void choose_blocks<Half>(const ChoiceProblem&);
template void choose_blocks<BFloat16>(const ChoiceProblem&);

}  // namespace flashmark
