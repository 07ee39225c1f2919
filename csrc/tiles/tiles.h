// Tile compaction: from visible elements to the tiles and lists that the attention kernels read.
//
// Tile classes are -2 EMPTY, -1 FULL, else the row of `tile_bits`. Bits: key 32 w + k of a query is
// bit k of word w.
#pragma once

#include <tuple>

#include "../native.h"

namespace flashmark {

using PackedTiles = std::tuple<Tensor, Tensor>;  // bits (n, block_q, words), counts (n,)
using DistinctTiles =
    std::tuple<Tensor, Tensor, Tensor, Tensor>;  // classes, tile_bits, visible, found

// bool (n, block_q, block_kv) -> int32 bits and the visible elements of each tile.
PackedTiles pack_tiles_cpu(const Tensor& elements);
PackedTiles pack_tiles_cuda(const Tensor& elements);

// bool (B, H, q_len, kv_len) -> the same for its tiles in order (b, h, query block, key block).
PackedTiles pack_dense_cpu(const Tensor& visible, int64_t block_q, int64_t block_kv);
PackedTiles pack_dense_cuda(const Tensor& visible, int64_t block_q, int64_t block_kv);

// The distinct tiles that are neither empty nor full (`area` elements): classes (n,) int32,
// tile_bits, visible elements of each row, and how many there are. Rows are in lexicographic order
// on a CPU, in order of first appearance on a GPU. `max_tiles` < 0 means as many as there are, on a
// CPU only.
DistinctTiles distinct_tiles_cpu(const Tensor& bits, const Tensor& counts, int64_t area,
                                 int64_t max_tiles);
DistinctTiles distinct_tiles_cuda(const Tensor& bits, const Tensor& counts, int64_t area,
                                  int64_t max_tiles);

// Where `visible` (B, H, lines, blocks) holds a tile has its class in `classes` (same shape),
// elsewhere it is EMPTY. `area` (U + 2,) int64: visible elements of EMPTY, FULL and of each row.
// Returns the six lists of the query blocks, the six of the key blocks, the visible elements and
// the number of tiles. Runs and partial tiles lie in buffers of `capacity` entries, zero behind the
// last; `capacity` < 0 means as many as there are, on a CPU only.
std::vector<Tensor> tile_lists_cpu(const Tensor& visible, const Tensor& classes, const Tensor& area,
                                   int64_t capacity);
std::vector<Tensor> tile_lists_cuda(const Tensor& visible, const Tensor& classes,
                                    const Tensor& area, int64_t capacity);

constexpr int32_t kEmpty = -2, kFull = -1;

}  // namespace flashmark
