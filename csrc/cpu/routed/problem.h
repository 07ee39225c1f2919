// Arguments of the kernels of attention over chosen blocks, and of the choice.
#pragma once
#include <algorithm>

#include "shared/problem.h"

namespace flashmark {

constexpr int64_t PIECE = 64;  // keys of a product: a longer block is taken piece by piece

// Queries among the keys, and the blocks that keys lie in, numbered over all packed sequences.
struct BlockPlaces {
  int64_t kv_len, block_size, near;
  const int32_t* query_offset;  // per batch, or null: the queries are the last ones
  int64_t query_offset_stride;  // 0 when one offset serves all samples
  int64_t last_offset;          // kv_len - q_len
  const int32_t* starts;        // (kv_len,): first token of each token's sequence; or null: 0

  int64_t position(int64_t b, int64_t query) const {
    return query + (query_offset ? query_offset[b * query_offset_stride] : last_offset);
  }
  // First token of the sequence that position `at` lies in.
  int64_t first(int64_t at) const { return starts ? starts[at] : 0; }
};

struct RoutedProblem : Problem {
  BlockPlaces places;
  const int32_t* indices;  // (batch, kv_heads, q_len, choices)
  int64_t choices;
  const bool* key_mask;     // (batch, kv_len), or null
  const int32_t* number;    // (kv_len,): block of each token, with packed sequences; or null
  const int32_t* openings;  // (blocks + 1,): first token of each block, and kv_len; or null
  int64_t blocks;

  int64_t block_of(int64_t token) const { return number ? number[token] : token / places.block_size; }
  int64_t opening(int64_t block) const {
    return openings ? openings[block] : std::min(block * places.block_size, kv_len);
  }
  int64_t chunks() const { return (q_len + chunk() - 1) / chunk(); }
  // Queries whose sums are held at once. From the shapes alone: no bit depends on the threads.
  int64_t chunk() const;
};

// Blocks of highest score for queries, from the summaries of all blocks.
struct ChoiceProblem {
  int64_t batch, heads, kv_heads, q_len, dim, blocks, marks, best;
  const void* query;
  Strides query_strides;
  const float *keys, *log_counts;  // (batch, kv_heads, blocks, marks, dim), (..., marks)
  BlockPlaces places;
  const int64_t* base;  // (kv_len,): number of the first block of a token's sequence; or null: 0
  float scale;
  int32_t* found;  // (batch, kv_heads, q_len, best)

  int64_t group() const { return heads / kv_heads; }
};

template <typename T, typename C>
void block_topk_forward(const RoutedProblem& p, const ForwardOutputs& to);

template <typename T, typename C>
void block_topk_backward(const RoutedProblem& p, const BackwardRows& x);

template <typename T>
void choose_blocks(const ChoiceProblem& p);

}  // namespace flashmark
