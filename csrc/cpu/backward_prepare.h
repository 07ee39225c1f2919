// What the backward needs of each tile of queries, made once: Q and dO as operands, lse in base 2,
// Delta.
#pragma once
#include "kernels.h"
#include "pack.h"

namespace flashmark {

// Where the parts of tile `index` = (b * heads + h) * max_tiles + (tile - first tile) lie.
template <typename T, typename C, int64_t W>
struct QueryTiles {
  // float32 products read rows of Q and dO in place.
  static constexpr bool DIRECT = std::is_same_v<T, float>;

  QueryTiles(const Problem& problem, const BackwardTensors& tensors)
      : p(problem), x(tensors), max_tiles(problem.max_tiles()) {}

  int64_t index(int64_t b, int64_t h, int64_t tile) const {
    return (b * p.heads + h) * max_tiles + tile - p.first_tile(b);
  }
  C* query_t(int64_t i) const { return static_cast<C*>(x.query_t) + i * padded<C>(p.dim) * W; }
  C* dout_t(int64_t i) const { return static_cast<C*>(x.dout_t) + i * padded<C>(p.v_dim) * W; }
  C* query_rows(int64_t i) const { return static_cast<C*>(x.query_rows) + i * W * p.dim; }
  C* dout_rows(int64_t i) const { return static_cast<C*>(x.dout_rows) + i * W * p.v_dim; }
  float* lse2(int64_t i) const { return x.lse2 + i * W; }
  float* delta(int64_t i) const { return x.delta + i * W; }

  const T* query(int64_t b, int64_t h) const {
    return static_cast<const T*>(p.query) + b * p.query_strides.batch + h * p.query_strides.head;
  }
  const T* dout(int64_t b, int64_t h) const {
    return static_cast<const T*>(x.dout) + b * x.dout_strides.batch + h * x.dout_strides.head;
  }

  const Problem& p;
  const BackwardTensors& x;
  const int64_t max_tiles;
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
  for (int64_t c = 0; c < W; c++) {
    // A column without a query, or whose query sees nothing, weighs 2^(x - inf) = 0.
    tiles.lse2(i)[c] = std::numeric_limits<float>::infinity();
    tiles.delta(i)[c] = 0.f;
    if (c < columns.lo || c >= columns.hi || x.lse[row0 + c] == NEG_INF) continue;
    const int64_t q = columns.query0 + c;
    tiles.lse2(i)[c] = x.lse[row0 + c] * LOG2E;
    tiles.delta(i)[c] =
        row_dot(dout + q * x.dout_strides.row, out + q * x.out_strides.row, p.v_dim, floats) -
        (x.dlse ? x.dlse[row0 + c] : 0.f);
  }
}

}  // namespace flashmark
