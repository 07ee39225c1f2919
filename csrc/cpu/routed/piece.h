// A piece of a block's keys as operands of products, and the rows of queries that meet it.
#pragma once
#include "block_sparse/logits.h"
#include "routed/visits.h"
#include "shared/pack.h"

namespace flashmark {

constexpr int64_t TILE = 64;  // rows of queries of a product

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Width of score tiles: keys of a piece, padded to whole vectors.
inline int64_t piece_width(const RoutedProblem& p) {
  return round_up(std::min(p.places.block_size, PIECE), 16);
}

struct Piece {
  int64_t b, kv_head, first, n;  // keys [first, first + n)
  uint64_t seen;                 // bit j: key first + j takes part
};

// take(piece) for the pieces of a block; keys beyond the sample's are never read.
template <typename Take>
void each_piece(const RoutedProblem& p, int64_t b, int64_t kv_head, int64_t block,
                const Take& take) {
  const int64_t end = std::min(p.opening(block + 1), p.keys(b));
  for (int64_t first = p.opening(block); first < end; first += PIECE) {
    const int64_t n = std::min(PIECE, end - first);
    uint64_t seen = n < 64 ? (uint64_t{1} << n) - 1 : ~uint64_t{0};
    if (p.key_mask)
      for (int64_t j = 0; j < n; j++)
        if (!p.key_mask[b * p.kv_len + first + j]) seen &= ~(uint64_t{1} << j);
    if (seen != 0) take(Piece{b, kv_head, first, n, seen});
  }
}

// Bits of the keys that position `at` sees.
inline uint64_t causal_bits(const Piece& piece, int64_t at) {
  const int64_t n = at - piece.first + 1;
  return n >= 64 ? piece.seen : n <= 0 ? 0 : piece.seen & ((uint64_t{1} << n) - 1);
}

// Rows of K or V as the second operand of a product over keys: where they lie, or a copy in which
// hidden rows are 0, for these may hold anything.
template <typename T, typename C>
struct RowsOperand {
  RowsOperand(const RoutedProblem& p, int64_t size_)
      : size(size_), direct(std::is_same_v<T, float> && !p.key_mask), rows(direct ? 0 : PIECE * size),
        kept(direct ? 0 : PIECE * size) {}

  void load(const T* from, int64_t stride, const Piece& piece) {
    if constexpr (std::is_same_v<T, C> && !PAIRED<C>) {
      if (direct) {
        data = from, ld = stride;
        return;
      }
    }
    for (int64_t j = 0; j < piece.n; j++) {
      T* row = kept + j * size;
      if (piece.seen >> j & 1) {
        std::copy_n(from + j * stride, size, row);
      } else {
        std::fill(row, row + size, T(0.f));
      }
    }
    pack_rows<T, C>(kept, size, piece.n, size, rows);
    data = rows, ld = size;
  }

  const int64_t size;
  const bool direct;
  const C* data = nullptr;
  int64_t ld = 0;

 private:
  Scratch<C> rows;
  Scratch<T> kept;
};

// Rows of a chunk in the type of the products, query by query and head by head of a group.
template <typename T, typename C>
void load_rows(const RoutedProblem& p, const void* tensor, const Strides& strides, int64_t b,
               int64_t kv_head, int64_t first, int64_t count, int64_t size, C* to) {
  const int64_t group = p.group(), even = padded<C>(size);
  for (int64_t g = 0; g < group; g++) {
    const T* from = static_cast<const T*>(tensor) + b * strides.batch +
                    (kv_head * group + g) * strides.head + first * strides.row;
    for (int64_t q = 0; q < count; q++) {
      C* row = to + (q * group + g) * even;
      convert_row(from + q * strides.row, row, size);
      std::fill(row + size, row + even, C(0.f));
    }
  }
}

// Rows [r0, r0 + n) of a visit: of query r / group, head r % group.
inline void tile_rows(const int32_t* queries, int64_t group, int64_t r0, int64_t n, int64_t* rows) {
  for (int64_t r = 0; r < n; r++) rows[r] = queries[(r0 + r) / group] * group + (r0 + r) % group;
}

template <typename C>
void gather_rows(const C* from, int64_t size, const int64_t* rows, int64_t n, int64_t padded_n,
                 C* to) {
  for (int64_t r = 0; r < n; r++) std::memcpy(to + r * size, from + rows[r] * size, size * sizeof(C));
  std::fill(to + n * size, to + padded_n * size, C(0.f));
}

// tile(r0, n) over the rows of a visit, in parts of about one size.
template <typename F>
void each_tile(int64_t rows, const F& tile) {
  const int64_t tiles = (rows + TILE - 1) / TILE, size = round_up((rows + tiles - 1) / tiles, 8);
  for (int64_t r0 = 0; r0 < rows; r0 += size) tile(r0, std::min(size, rows - r0));
}

}  // namespace flashmark
