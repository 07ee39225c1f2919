#include "block_sparse/forward.h"

#include <atomic>

#include "block_sparse/forward_rows.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

// V^T of every (sample, key head) in blocks (v_dim, VALUE_BLOCK), 0 beyond the sample's keys; and
// the rows of K where the products cannot read them in place.
template <typename T, typename C>
void pack_keys_and_values(const Problem& p, const ForwardOutputs& to) {
  const int64_t blocks = (p.kv_len + VALUE_BLOCK - 1) / VALUE_BLOCK;
  at::parallel_for(0, p.batch * p.kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const int64_t b = x / blocks / p.kv_heads, h = x / blocks % p.kv_heads,
                    first = x % blocks * VALUE_BLOCK;
      const int64_t n = std::clamp<int64_t>(p.keys(b) - first, 0, VALUE_BLOCK);
      const T* value =
          static_cast<const T*>(p.value) + b * p.value_strides.batch + h * p.value_strides.head;
      C* value_t = static_cast<C*>(to.value_t) + x * p.v_dim * VALUE_BLOCK;
      transpose(value + first * p.value_strides.row, p.value_strides.row, n, p.v_dim, value_t,
                VALUE_BLOCK);
      if (PAIRED<C> && n % 2 != 0)
        for (int64_t d = 0; d < p.v_dim; d++) value_t[d * VALUE_BLOCK + n] = C(0.f);
      if (to.key_rows == nullptr) continue;
      const T* key =
          static_cast<const T*>(p.key) + b * p.key_strides.batch + h * p.key_strides.head;
      const int64_t dim = padded<C>(p.dim);
      C* rows = static_cast<C*>(to.key_rows) + ((b * p.kv_heads + h) * p.kv_len + first) * dim;
      for (int64_t j = 0; j < n; j++) {
        convert_row(key + (first + j) * p.key_strides.row, rows + j * dim, p.dim);
        std::fill(rows + j * dim + p.dim, rows + (j + 1) * dim, C(0.f));
      }
    }
  });
}

// The tile of queries at place `rank` of the heavy-first order, or -1 where there is none.
int64_t tile_at(const Problem& p, int64_t b, int64_t h, int64_t rank, int64_t tiles) {
  const BlockMaskView& mask = p.mask;
  if (mask.kind == MaskKind::SPARSE && p.query_offset == nullptr) {
    const int32_t* order = mask.by_query.order + mask.line(b, h, 0, mask.q_blocks);
    const int64_t tile = order[rank / mask.subs] * mask.subs + mask.subs - 1 - rank % mask.subs;
    return tile < p.tiles(b) ? tile : -1;
  }
  return rank < p.tiles(b) ? p.first_tile(b) + p.tiles(b) - 1 - rank : -1;
}

template <typename Worker>
void run(const Problem& p, const ForwardOutputs& to) {
  const bool ordered = p.mask.kind == MaskKind::SPARSE && p.query_offset == nullptr;
  const int64_t tiles = ordered ? p.mask.q_blocks * p.mask.subs : p.max_tiles();
  const int64_t each = Worker::heads_together(p), heads = p.heads / each;
  const int64_t items = p.batch * heads * tiles;
  // From the shapes alone: no result depends on the number of threads.
  const int64_t parts =
      items < FEW_TILES ? std::max<int64_t>(1, (p.kv_len + PART_KEYS - 1) / PART_KEYS) : 1;
  const int64_t size = Worker::part_size(p);
  const Scratch<float> held(parts > 1 ? items * parts * size : 0);
  std::vector<std::atomic<int64_t>> done(parts > 1 ? items : 0);  // parts of each item
  share_items(items * parts, [&](const auto& next) {
    Worker worker(p, to);
    for (int64_t x = next(); x >= 0; x = next()) {
      const int64_t item = x / parts, part = x % parts;
      const int64_t b = item / tiles / heads, h = item / tiles % heads * each;
      const int64_t tile = tile_at(p, b, h, item % tiles, tiles);
      if (tile < 0) continue;
      if (parts == 1) {
        worker.run(b, h, tile);
        continue;
      }
      const int64_t first = part * PART_KEYS;
      worker.run_part(b, h, tile, first, first + PART_KEYS, held + x * size);
      if (done[item].fetch_add(1, std::memory_order_acq_rel) == parts - 1)  // the last to finish
        worker.merge_parts(b, h, tile, held + item * parts * size, parts);
    }
  });
}

}  // namespace

template <typename T, typename C>
void block_sparse_forward(const Problem& p, const ForwardOutputs& to) {
  if (p.tile_q == 64) {
    pack_keys_and_values<T, C>(p, to);
    run<ForwardTile<T, C, 64>>(p, to);
  } else if (p.q_len <= ForwardRows<T>::MOST) {
    run<ForwardRows<T>>(p, to);
  } else {
    run<ForwardTile<T, float, 16>>(p, to);
  }
}

template void block_sparse_forward<float, float>(const Problem&, const ForwardOutputs&);
template void block_sparse_forward<Half, float>(const Problem&, const ForwardOutputs&);
template void block_sparse_forward<BFloat16, float>(const Problem&, const ForwardOutputs&);
#if defined(CPU_CAPABILITY_AVX512)
template void block_sparse_forward<BFloat16, BFloat16>(const Problem&, const ForwardOutputs&);
#endif

}  // namespace flashmark
