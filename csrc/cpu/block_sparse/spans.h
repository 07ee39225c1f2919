// Walks the visible part of a tile of queries (forward) or of keys (backward), whatever the kind of
// the mask.
#pragma once
#include <algorithm>

#include "shared/problem.h"

namespace flashmark {

// Queries of a tile that see key j of a span: bit c for column c. At most one of the two forms is
// in use.
struct KeyBits {
  const uint64_t* rows = nullptr;
  bool causal = false;
  int64_t limit = 0;  // causal: key j is seen by columns c >= limit + j

  bool masked() const { return rows != nullptr || causal; }
  uint64_t operator()(int64_t j) const {
    if (rows != nullptr) return rows[j];
    const int64_t lim = limit + j;
    return lim <= 0 ? ~uint64_t{0} : (lim >= 64 ? 0 : ~uint64_t{0} << lim);
  }
  KeyBits from(int64_t j) const { return {rows ? rows + j : nullptr, causal, limit + j}; }
};

inline uint64_t all_columns(int64_t n) { return n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

// emit(first key, number of keys, bits) in ascending order of keys; every key below `keys`.
template <typename Emit>
void visible_keys(const Problem& p, int64_t b, int64_t h, int64_t tile, int64_t keys,
                  const Emit& emit) {
  const BlockMaskView& mask = p.mask;
  const int64_t row0 = tile * p.tile_q;
  if (mask.kind == MaskKind::DENSE) {
    if (keys > 0) emit(0, keys, KeyBits{});
    return;
  }
  if (mask.kind == MaskKind::CAUSAL) {
    const int64_t position = row0 + p.kv_len - mask.rows;  // of the tile's first row among the keys
    const int64_t full = std::clamp<int64_t>((position + 1) / 16 * 16, 0, keys);
    const int64_t end = std::clamp<int64_t>(position + p.tile_q, 0, keys);
    if (full > 0) emit(0, full, KeyBits{});
    if (end > full) emit(full, end - full, KeyBits{nullptr, true, full - position});
    return;
  }
  const int64_t block = row0 / mask.block_q, sub = row0 % mask.block_q / p.tile_q;
  const int64_t line = mask.line(b, h, block, mask.q_blocks);
  const TileLists& lists = mask.by_query;
  int64_t run = lists.run_offsets[line], partial = lists.partial_offsets[line];
  const int64_t runs_end = lists.run_offsets[line + 1],
                partials_end = lists.partial_offsets[line + 1];
  while (run < runs_end || partial < partials_end) {
    const bool take_run = partial == partials_end ||
                          (run < runs_end && lists.runs[2 * run] < lists.partials[2 * partial]);
    if (take_run) {
      const int64_t first = lists.runs[2 * run] * mask.block_kv;
      const int64_t end = std::min(keys, first + lists.runs[2 * run + 1] * mask.block_kv);
      if (first < end) emit(first, end - first, KeyBits{});
      run++;
      continue;
    }
    const int64_t start = lists.partials[2 * partial] * mask.block_kv;
    const int64_t table = static_cast<int64_t>(lists.partials[2 * partial + 1]) * mask.subs + sub;
    const Extent extent = mask.extents[table];
    const int64_t end = std::min(keys, start + extent.hi);
    if (start + extent.lo < end) {
      const uint64_t* rows = mask.tile_rows + table * mask.block_kv + extent.lo;
      emit(start + extent.lo, end - start - extent.lo, KeyBits{rows});
    }
    partial++;
  }
}

// emit(tile of queries, first key, end key, bits of the first key): keys counted from key0, inside
// [0, n). Ascending order of tiles within each of full and partial; only tiles with a query of
// sample b.
template <typename Emit>
void visible_queries(const Problem& p, int64_t b, int64_t h, int64_t key0, int64_t n,
                     const Emit& emit) {
  const BlockMaskView& mask = p.mask;
  const int64_t begin = p.first_tile(b), end = begin + p.tiles(b);
  if (mask.kind == MaskKind::DENSE) {
    for (int64_t t = begin; t < end; t++) emit(t, 0, n, KeyBits{});
    return;
  }
  if (mask.kind == MaskKind::CAUSAL) {
    const int64_t shift = p.kv_len - mask.rows;
    for (int64_t t = std::max(begin, (key0 - shift) / p.tile_q - 1); t < end; t++) {
      const int64_t position = t * p.tile_q + shift;
      const int64_t hi = std::min(n, (position + p.tile_q - key0 + 15) / 16 * 16);
      if (position + p.tile_q <= key0) continue;
      const bool full = position >= key0 + hi - 1;
      emit(t, 0, hi, full ? KeyBits{} : KeyBits{nullptr, true, key0 - position});
    }
    return;
  }
  const int64_t block = key0 / mask.block_kv, inside = key0 % mask.block_kv;
  const int64_t line = mask.line(b, h, block, mask.kv_blocks);
  const TileLists& lists = mask.by_key;
  for (int64_t run = lists.run_offsets[line]; run < lists.run_offsets[line + 1]; run++) {
    const int64_t first = lists.runs[2 * run] * mask.subs;
    const int64_t last = first + lists.runs[2 * run + 1] * mask.subs;
    for (int64_t t = std::max(begin, first); t < std::min(end, last); t++) emit(t, 0, n, KeyBits{});
  }
  for (int64_t x = lists.partial_offsets[line]; x < lists.partial_offsets[line + 1]; x++) {
    for (int64_t sub = 0; sub < mask.subs; sub++) {
      const int64_t t = lists.partials[2 * x] * mask.subs + sub;
      const int64_t table = static_cast<int64_t>(lists.partials[2 * x + 1]) * mask.subs + sub;
      const int64_t lo = std::max<int64_t>(0, mask.extents[table].lo - inside);
      const int64_t hi = std::min<int64_t>(n, mask.extents[table].hi - inside);
      if (t < begin || t >= end || lo >= hi) continue;
      emit(t, lo, hi, KeyBits{mask.tile_rows + table * mask.block_kv + inside + lo});
    }
  }
}

}  // namespace flashmark
