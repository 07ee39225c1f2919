// Splits the key tiles of each (sample, key head) into segments of about equal work: see
// backward.cpp.
#pragma once
#include <vector>

#include "shared/problem.h"

namespace flashmark {

// Enough segments for 32 workers, at most 4: each holds a float32 part of dQ.
inline int64_t count_segments(int64_t independent, int64_t key_tiles) {
  const int64_t wanted = (32 + independent - 1) / std::max<int64_t>(1, independent);
  return std::clamp<int64_t>(std::min(wanted, key_tiles), 1, 4);
}

inline std::vector<int32_t> segment_starts(const Problem& p, int64_t key_tile, int64_t segments) {
  const BlockMaskView& mask = p.mask;
  const int64_t tiles = (p.kv_len + key_tile - 1) / key_tile;
  std::vector<int32_t> starts;
  std::vector<int64_t> work(tiles);
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t kv_head = 0; kv_head < p.kv_heads; kv_head++) {
      int64_t total = 0;
      for (int64_t t = 0; t < tiles; t++) {
        int64_t w = p.tiles(b);
        if (mask.kind == MaskKind::CAUSAL) {
          const int64_t first = (t * key_tile - p.kv_len + mask.rows) / p.tile_q;
          w = std::clamp<int64_t>(p.first_tile(b) + w - first, 0, w);
        } else if (mask.kind == MaskKind::SPARSE) {
          w = 0;
          for (int64_t h = kv_head * p.group(); h < (kv_head + 1) * p.group(); h++)
            w += mask.by_key.counts[mask.line(b, h, t * key_tile / mask.block_kv, mask.kv_blocks)];
        }
        work[t] = w + 1;
        total += work[t];
      }
      int64_t before = 0, t = 0;
      for (int64_t s = 0; s < segments; s++) {
        starts.push_back(static_cast<int32_t>(t));
        while (t < tiles && (2 * before + work[t]) * segments < 2 * (s + 1) * total)
          before += work[t++];
      }
      starts.push_back(static_cast<int32_t>(tiles));
    }
  }
  return starts;
}

}  // namespace flashmark
