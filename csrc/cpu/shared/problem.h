// Arguments of the CPU kernels: plain pointers, sizes and strides, filled in from tensors by
// block_sparse.cpp.
#pragma once
#include <cstdint>

namespace flashmark {

enum class MaskKind { SPARSE, CAUSAL, DENSE };

struct Strides {  // in elements; the last dimension has stride 1
  int64_t batch, head, row;
};

// The tiles along the lines of a block mask, as flashmark.masks.block_mask.TileLists lays them out.
struct TileLists {
  const int32_t* run_offsets;
  const int32_t* runs;
  const int32_t* partial_offsets;
  const int32_t* partials;
  const int32_t* counts;
  const int32_t* order;
};

// The key rows of a partial tile that some query of a sub-tile sees: [lo, hi), in steps of 16 keys.
struct Extent {
  int32_t lo, hi;
};

struct BlockMaskView {
  MaskKind kind;
  int64_t rows;  // queries of the mask; its keys are Problem::kv_len
  int64_t block_q, block_kv, q_blocks, kv_blocks;
  int64_t batch, heads;  // 1 where shared
  TileLists by_query, by_key;
  // Bits transposed for the kernels: bit c of tile_rows[(u * subs + x) * block_kv + j] says that
  // query x * tile_q + c of partial tile u sees key j. `subs` sub-tiles of tile_q queries make a
  // block.
  int64_t subs;
  const uint64_t* tile_rows;
  const Extent* extents;

  int64_t line(int64_t b, int64_t h, int64_t x, int64_t lines) const {
    return ((batch > 1 ? b : 0) * heads + (heads > 1 ? h : 0)) * lines + x;
  }
};

struct Problem {
  int64_t batch, heads, kv_heads, q_len, kv_len, dim, v_dim;
  const void *query, *key, *value;
  Strides query_strides, key_strides, value_strides;
  BlockMaskView mask;
  int64_t tile_q;               // queries of a tile: 16 or 64
  const int32_t* query_offset;  // per batch, or null
  int64_t query_offset_stride;  // 0 when one offset serves all samples
  const int32_t* kv_lengths;    // (batch,), or null
  const float* relative_bias;   // (heads, relative_size): the bias, entries reversed; or null
  int64_t relative_size;        // mask.rows + kv_len - 1, and tile_q entries of padding
  const float* dense_bias;      // or null
  int64_t dense_strides[4];     // 0 along a broadcast dimension
  const float* sinks;           // (heads,), or null
  float scale, softcap;         // softcap 0: none
  bool dropout;
  float keep_scale;     // 1 / (1 - p)
  uint64_t drop_below;  // a probability is kept iff its word >= floor(p * 2^32)
  uint64_t seed;

  int64_t group() const { return heads / kv_heads; }
  int64_t offset(int64_t b) const {
    return query_offset ? query_offset[b * query_offset_stride] : 0;
  }
  int64_t keys(int64_t b) const {
    const int64_t n = kv_lengths ? kv_lengths[b] : kv_len;
    return n < 0 ? 0 : (n < kv_len ? n : kv_len);
  }
  // Tiles of queries lie on the rows of the mask: tile t of sample b holds rows [t, t + 1) *
  // tile_q.
  int64_t first_tile(int64_t b) const { return offset(b) / tile_q; }
  int64_t tiles(int64_t b) const {
    return q_len == 0 ? 0 : (offset(b) + q_len - 1) / tile_q - first_tile(b) + 1;
  }
  int64_t max_tiles() const {
    int64_t most = 0;
    for (int64_t b = 0; b < batch; b++) most = tiles(b) > most ? tiles(b) : most;
    return most;
  }
};

// The valid columns [lo, hi) of a query tile, and the query of column 0.
struct TileColumns {
  int64_t lo, hi, query0;
};

inline TileColumns tile_columns(const Problem& p, int64_t b, int64_t tile) {
  const int64_t query0 = tile * p.tile_q - p.offset(b);
  const int64_t lo = query0 < 0 ? -query0 : 0;
  const int64_t hi = p.q_len - query0 < p.tile_q ? p.q_len - query0 : p.tile_q;
  return {lo, hi, query0};
}

struct ForwardOutputs {
  void* out;      // (batch, heads, q_len, v_dim)
  float *lse, *residual;  // (batch, heads, q_len); residual may be null
  void* value_t;  // workspace: see forward.cpp
  void* key_rows;

  void store(int64_t row, float log_sum, float rest) const {
    lse[row] = log_sum;
    if (residual) residual[row] = rest;
  }
};

// Outputs of a forward and their gradients, and the gradients of its inputs.
struct BackwardRows {
  const void *dout, *out;
  Strides dout_strides, out_strides;
  const float *lse, *dlse;       // (batch, heads, q_len); dlse may be null
  void *dquery, *dkey, *dvalue;  // contiguous
  float* dsinks;                 // (heads,), or null
};

struct BackwardTensors : BackwardRows {
  const float* residual;  // (batch, heads, q_len), or null
  float* drelative;  // (batch, segments, heads, relative_size + tile_q) zeros, entries reversed; or
                     // null
  float* ddense;     // zeros; or null
  int64_t ddense_strides[5];  // segment, batch, head, query, key; 0 along a broadcast dimension
  bool one_batch, one_head;   // the samples (the key heads) share a ddense and must take turns
  int64_t key_tile;           // keys of a tile
  int64_t segments;  // segment s of a key head: tiles [segment_starts[s], segment_starts[s + 1])
  const int32_t* segment_starts;  // (batch, kv_heads, segments + 1)
  // Workspaces (batch, heads, max_tiles, tile_q): lse in the unit of the scores, its residual in
  // base 2.
  float *row_lse, *row_residual, *delta;
  // Workspaces (at_once, group, max_tiles, ...), of the (sample, key head) pairs under way.
  int64_t at_once;
  void *query_t, *dout_t, *query_rows, *dout_rows;
  float* dquery_t;   // (at_once, group, segments, max_tiles, dim, tile_q)
  uint8_t* touched;  // parts of dquery_t that hold something
};

}  // namespace flashmark
