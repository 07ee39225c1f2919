// Data of each tile of queries for the backward, made once: Q and dO as operands, lse, Delta.
#pragma once
#include <utility>
#include <vector>

#include "block_sparse/kernels.h"
#include "block_sparse/logits.h"
#include "shared/pack.h"

namespace flashmark {

struct Pair {  // a key head of a sample, and the query heads of its group
  int64_t b, kv_head;
};

// Pointers to the parts of a tile of queries.
template <typename T, typename C, int64_t W>
struct QueryTiles {
  // float32 products read rows of Q and dO in place.
  static constexpr bool DIRECT = std::is_same_v<T, float>;

  QueryTiles(const Problem& problem, const BackwardTensors& tensors)
      : p(problem), x(tensors), max_tiles(problem.max_tiles()), places(p.batch * p.kv_heads) {}

  // From here on the workspaces belong to these pairs.
  void take(std::vector<Pair> next) {
    pairs = std::move(next);
    for (size_t n = 0; n < pairs.size(); n++)
      places[pairs[n].b * p.kv_heads + pairs[n].kv_head] = static_cast<int64_t>(n);
    std::fill_n(x.touched, heads() * x.segments * max_tiles, 0);
  }
  // Query heads of the pairs, and the sample and head that are number n of them.
  int64_t heads() const { return static_cast<int64_t>(pairs.size()) * p.group(); }
  std::pair<int64_t, int64_t> head(int64_t n) const {
    const Pair& pair = pairs[n / p.group()];
    return {pair.b, pair.kv_head * p.group() + n % p.group()};
  }
  int64_t place(int64_t b, int64_t h) const {
    return places[b * p.kv_heads + h / p.group()] * p.group() + h % p.group();
  }

  int64_t index(int64_t b, int64_t h, int64_t tile) const {
    return place(b, h) * max_tiles + tile - p.first_tile(b);
  }
  int64_t part(int64_t b, int64_t h, int64_t segment, int64_t tile) const {
    return (place(b, h) * x.segments + segment) * max_tiles + tile - p.first_tile(b);
  }
  int64_t row(int64_t b, int64_t h, int64_t tile) const {
    return ((b * p.heads + h) * max_tiles + tile - p.first_tile(b)) * W;
  }
  C* query_t(int64_t i) const { return static_cast<C*>(x.query_t) + i * padded<C>(p.dim) * W; }
  C* dout_t(int64_t i) const { return static_cast<C*>(x.dout_t) + i * padded<C>(p.v_dim) * W; }
  C* query_rows(int64_t i) const { return static_cast<C*>(x.query_rows) + i * W * p.dim; }
  C* dout_rows(int64_t i) const { return static_cast<C*>(x.dout_rows) + i * W * p.v_dim; }

  const T* query(int64_t b, int64_t h) const {
    return static_cast<const T*>(p.query) + b * p.query_strides.batch + h * p.query_strides.head;
  }
  const T* dout(int64_t b, int64_t h) const {
    return static_cast<const T*>(x.dout) + b * x.dout_strides.batch + h * x.dout_strides.head;
  }

  const Problem& p;
  const BackwardTensors& x;
  const int64_t max_tiles;
  std::vector<Pair> pairs;

 private:
  std::vector<int64_t> places;  // of each pair that is under way
};

template <typename T>
float row_dot(const T* a, const T* b, int64_t n, float* scratch) {
  const float *fa, *fb;
  if constexpr (std::is_same_v<T, float>) {
    fa = a, fb = b;
  } else {
    convert_row(a, scratch, n);
    convert_row(b, scratch + n, n);
    fa = scratch, fb = scratch + n;
  }
  Vec sum(0.f);
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES)
    sum = at::vec::fmadd(Vec::loadu(fa + d), Vec::loadu(fb + d), sum);
  float total = sum_lanes(sum);
  for (; d < n; d++) total += fa[d] * fb[d];
  return total;
}

// One operand pair of a tile: the transpose, and the rows where they cannot be read in place.
template <typename T, typename C, int64_t W>
void pack_both(const T* from, int64_t ld, const TileColumns& columns, int64_t dim, C* transposed,
               C* rows, C* scratch) {
  pack_columns<T, C>(from + columns.query0 * ld, ld, columns.lo, columns.hi, W, dim, transposed,
                     scratch);
  if constexpr (!std::is_same_v<T, float>) pack_rows<C, C>(scratch, padded<C>(dim), W, dim, rows);
}

template <typename T, typename C, int64_t W>
void prepare_tile(const QueryTiles<T, C, W>& tiles, int64_t b, int64_t h, int64_t tile, C* scratch,
                  float* floats) {
  const Problem& p = tiles.p;
  const BackwardTensors& x = tiles.x;
  const TileColumns columns = tile_columns(p, b, tile);
  const int64_t i = tiles.index(b, h, tile);
  const T* dout = tiles.dout(b, h);
  pack_both<T, C, W>(tiles.query(b, h), p.query_strides.row, columns, p.dim, tiles.query_t(i),
                     tiles.query_rows(i), scratch);
  pack_both<T, C, W>(dout, x.dout_strides.row, columns, p.v_dim, tiles.dout_t(i),
                     tiles.dout_rows(i), scratch);
  const T* out = static_cast<const T*>(x.out) + b * x.out_strides.batch + h * x.out_strides.head;
  const int64_t row0 = (b * p.heads + h) * p.q_len + columns.query0;
  const int64_t to = tiles.row(b, h, tile);
  float *lse = x.row_lse + to, *residual = x.row_residual + to, *delta = x.delta + to;
  const float unit = needs_logits(p) ? 1.f : LOG2E;
  for (int64_t c = 0; c < W; c++) {
    // A column without a query, or whose query sees nothing, weighs 2^(x - inf) = 0.
    lse[c] = std::numeric_limits<float>::infinity();
    residual[c] = delta[c] = 0.f;
    if (c < columns.lo || c >= columns.hi || x.lse[row0 + c] == NEG_INF) continue;
    const int64_t q = columns.query0 + c;
    lse[c] = x.lse[row0 + c] * unit;
    if (x.residual) residual[c] = x.residual[row0 + c] * LOG2E;
    delta[c] =
        row_dot(dout + q * x.dout_strides.row, out + q * x.out_strides.row, p.v_dim, floats) -
        (x.dlse ? x.dlse[row0 + c] : 0.f);
  }
}

}  // namespace flashmark
