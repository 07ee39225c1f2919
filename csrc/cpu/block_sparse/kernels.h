// Entry points of the kernels, one per pair (type of the tensors, type of the products).
#pragma once
#include "shared/problem.h"

namespace flashmark {

constexpr int64_t VALUE_BLOCK = 512;   // keys of a block of transposed values
constexpr int64_t FEW_TILES = 64;      // of queries; with fewer, their keys are split too
constexpr int64_t PART_KEYS = 2048;    // then: keys of a part
constexpr int64_t KEY_TILE = 128;      // keys of a tile of the backward
constexpr int64_t ITEMS_A_THREAD = 2;  // segments under way at once in the backward

template <typename T, typename C>
void block_sparse_forward(const Problem& p, const ForwardOutputs& to);

template <typename T, typename C>
void block_sparse_backward(const Problem& p, const BackwardTensors& x);

// Fills BlockMaskView::tile_rows and extents from tile_bits (tiles, block_q, ceil(block_kv / 32)).
void transpose_tile_bits(const int32_t* tile_bits, int64_t tiles, int64_t block_q, int64_t block_kv,
                         int64_t tile_q, uint64_t* tile_rows, Extent* extents);

}  // namespace flashmark
