#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>

#include "block_sparse/kernels.h"

namespace flashmark {

void transpose_tile_bits(const int32_t* tile_bits, int64_t tiles, int64_t block_q, int64_t block_kv,
                         int64_t tile_q, uint64_t* tile_rows, Extent* extents) {
  const int64_t words = (block_kv + 31) / 32, subs = block_q / tile_q;
  at::parallel_for(0, tiles * subs, 8, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const int32_t* from = tile_bits + x * tile_q * words;
      uint64_t* to = tile_rows + x * block_kv;
      std::fill(to, to + block_kv, 0);
      int64_t lo = block_kv, hi = 0;
      for (int64_t c = 0; c < tile_q; c++) {
        for (int64_t w = 0; w < words; w++) {
          const uint32_t word = static_cast<uint32_t>(from[c * words + w]);
          if (word == 0) continue;
          lo = std::min<int64_t>(lo, w * 32 + std::countr_zero(word));
          hi = std::max<int64_t>(hi, w * 32 + 32 - std::countl_zero(word));
          const int64_t keys = std::min<int64_t>(32, block_kv - w * 32);
          for (int64_t k = 0; k < keys; k++)
            to[w * 32 + k] |= static_cast<uint64_t>(word >> k & 1) << c;
        }
      }
      lo = lo / 16 * 16;
      hi = std::min(block_kv, (hi + 15) / 16 * 16);
      extents[x] = {static_cast<int32_t>(std::min(lo, hi)), static_cast<int32_t>(hi)};
    }
  });
}

}  // namespace flashmark
