// (sample, key head) pairs are taken a few at once, each in three sweeps: prepare the tiles of
// queries; walk the tiles of keys; sum the parts of dQ.
//
// A segment is a run of key tiles of one pair. One worker walks it, over all query heads of the
// group and in a fixed order, so dK, dV and the segment's own part of dQ need no atomics; the parts
// are then added in order. Segments depend on shapes and the mask alone: any number of threads
// gives the same bits. Only how many pairs are under way follows the threads, and with it the
// memory.
#include "block_sparse/backward_tile.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

template <typename T, typename C, int64_t W>
void prepare(const QueryTiles<T, C, W>& tiles) {
  const Problem& p = tiles.p;
  const int64_t wide = std::max(p.dim, p.v_dim) + 1;
  at::parallel_for(0, tiles.heads() * tiles.max_tiles, 4, [&](int64_t begin, int64_t end) {
    const Scratch<C> scratch(W * wide);
    const Scratch<float> floats(2 * wide);
    for (int64_t item = begin; item < end; item++) {
      const auto [b, h] = tiles.head(item / tiles.max_tiles);
      const int64_t tile = item % tiles.max_tiles;
      if (tile < p.tiles(b))
        prepare_tile<T, C, W>(tiles, b, h, p.first_tile(b) + tile, scratch, floats);
    }
  });
}

template <typename T, typename C, int64_t W>
void walk_keys(const QueryTiles<T, C, W>& tiles) {
  const BackwardTensors& x = tiles.x;
  share_items(static_cast<int64_t>(tiles.pairs.size()) * x.segments, [&](const auto& next) {
    KeyTile<T, C, W> worker(tiles);
    for (int64_t item = next(); item >= 0; item = next()) {
      const int64_t s = item % x.segments;
      const Pair& pair = tiles.pairs[item / x.segments];
      const int32_t* starts =
          x.segment_starts + (pair.b * tiles.p.kv_heads + pair.kv_head) * (x.segments + 1);
      for (int64_t tile = starts[s]; tile < starts[s + 1]; tile++)
        worker.run(pair.b, pair.kv_head, s, tile);
    }
    release_products<C>();
  });
}

template <typename T, typename C, int64_t W>
void sum_dquery(const QueryTiles<T, C, W>& tiles) {
  const Problem& p = tiles.p;
  const BackwardTensors& x = tiles.x;
  const int64_t size = p.dim * W;
  at::parallel_for(0, tiles.heads() * tiles.max_tiles, 4, [&](int64_t begin, int64_t end) {
    const Scratch<float> sum(size), rows(size);
    const Vec scale(p.scale);
    for (int64_t item = begin; item < end; item++) {
      const auto [b, h] = tiles.head(item / tiles.max_tiles);
      const int64_t tile = p.first_tile(b) + item % tiles.max_tiles;
      if (tile >= p.first_tile(b) + p.tiles(b)) continue;
      std::fill(sum + 0, sum + size, 0.f);
      for (int64_t s = 0; s < x.segments; s++) {
        const int64_t part = tiles.part(b, h, s, tile);
        if (!x.touched[part]) continue;
        at::vec::map2<float>([](Vec a, Vec c) { return a + c; }, sum, sum, x.dquery_t + part * size,
                             size);
      }
      at::vec::map<float>([scale](Vec v) { return v * scale; }, sum, sum, size);
      transpose_words(sum, W, p.dim, W, rows, p.dim);
      const TileColumns columns = tile_columns(p, b, tile);
      T* to =
          static_cast<T*>(x.dquery) + ((b * p.heads + h) * p.q_len + columns.query0) * p.dim;
      convert_row<float, T>(rows + columns.lo * p.dim, to + columns.lo * p.dim,
                            (columns.hi - columns.lo) * p.dim);
    }
  });
}

// dsink = -sum over queries of e^(sink - lse) Delta
template <typename T, typename C, int64_t W>
void sum_dsinks(const QueryTiles<T, C, W>& tiles) {
  const Problem& p = tiles.p;
  const float unit = needs_logits(p) ? LOG2E : 1.f, sink_unit = needs_logits(p) ? 1.f : LOG2E;
  at::parallel_for(0, p.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      double sum = 0.0;
      for (int64_t b = 0; b < p.batch; b++) {
        for (int64_t tile = 0; tile < p.tiles(b); tile++) {
          const int64_t row = tiles.row(b, h, p.first_tile(b) + tile);
          for (int64_t i = row; i < row + W; i++)
            sum += std::exp2((p.sinks[h] * sink_unit - tiles.x.row_lse[i]) * unit -
                             tiles.x.row_residual[i]) *
                   static_cast<double>(tiles.x.delta[i]);
        }
      }
      tiles.x.dsinks[h] = static_cast<float>(-sum);
    }
  });
}

// Pairs that add to the same elements of a dense bias's gradient are never under way together.
std::vector<std::vector<Pair>> waves(const Problem& p, const BackwardTensors& x) {
  const int64_t batch_turns = x.one_batch ? p.batch : 1, head_turns = x.one_head ? p.kv_heads : 1;
  std::vector<std::vector<Pair>> waves;
  for (int64_t turn = 0; turn < batch_turns * head_turns; turn++) {
    int64_t left = 0;
    for (int64_t b = turn / head_turns; b < p.batch; b += batch_turns) {
      for (int64_t h = turn % head_turns; h < p.kv_heads; h += head_turns) {
        if (left == 0) waves.emplace_back(), left = x.at_once;
        waves.back().push_back({b, h});
        left--;
      }
    }
  }
  return waves;
}

template <typename T, typename C, int64_t W>
void run(const Problem& p, const BackwardTensors& x) {
  QueryTiles<T, C, W> tiles(p, x);
  for (std::vector<Pair>& pairs : waves(p, x)) {
    tiles.take(std::move(pairs));
    prepare(tiles);
    walk_keys(tiles);
    sum_dquery(tiles);
  }
  if (x.dsinks) sum_dsinks(tiles);
}

}  // namespace

template <typename T, typename C>
void block_sparse_backward(const Problem& p, const BackwardTensors& x) {
  if (p.tile_q == 64) {
    run<T, C, 64>(p, x);
  } else {
    run<T, C, 16>(p, x);
  }
}

template void block_sparse_backward<float, float>(const Problem&, const BackwardTensors&);
template void block_sparse_backward<Half, float>(const Problem&, const BackwardTensors&);
template void block_sparse_backward<BFloat16, float>(const Problem&, const BackwardTensors&);
#if defined(CPU_CAPABILITY_AVX512)
template void block_sparse_backward<BFloat16, BFloat16>(const Problem&, const BackwardTensors&);
#endif

}  // namespace flashmark
