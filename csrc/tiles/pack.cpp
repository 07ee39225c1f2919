// Elements to bits: one pass over the mask, sixteen elements an instruction.
#include <algorithm>
#include <bit>
#include <cstring>

#include "tiles.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace flashmark {
namespace {

FLASHMARK_INLINE uint32_t pack_word(const uint8_t* from) {
#ifdef __SSE2__
  const __m128i zero = _mm_setzero_si128();
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16));
  const uint32_t hidden = static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(low, zero))) |
                          static_cast<uint32_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(high, zero)))
                              << 16;
  return ~hidden;
#else
  uint32_t word = 0;
  for (int k = 0; k < 32; k++) word |= static_cast<uint32_t>(from[k] != 0) << k;
  return word;
#endif
}

// `n` elements into ceil(n / 32) words; returns how many are visible.
FLASHMARK_INLINE int64_t pack_row(const uint8_t* from, int64_t n, uint32_t* to) {
  int64_t visible = 0, w = 0;
  for (; w < n / 32; w++) {
    to[w] = pack_word(from + w * 32);
    visible += std::popcount(to[w]);
  }
  if (n % 32) {
    uint8_t rest[32] = {};
    std::memcpy(rest, from + w * 32, n % 32);
    to[w] = pack_word(rest);
    visible += std::popcount(to[w]);
  }
  return visible;
}

struct Band {  // one row of tiles of a dense mask
  const uint8_t* first;
  int64_t row_stride, rows, kv_len, block_q, block_kv, words;
};

FLASHMARK_CLONES void pack_band(const Band& band, uint32_t* bits, int64_t* counts) {
  const int64_t tiles = ceil_div(band.kv_len, band.block_kv),
                tile_words = band.block_q * band.words;
  if (band.rows < band.block_q || band.kv_len % band.block_kv)
    std::memset(bits, 0, tiles * tile_words * 4);
  std::fill(counts, counts + tiles, 0);
  for (int64_t r = 0; r < band.rows; r++) {
    const uint8_t* row = band.first + r * band.row_stride;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t begin = t * band.block_kv, n = std::min(band.block_kv, band.kv_len - begin);
      counts[t] += pack_row(row + begin, n, bits + t * tile_words + r * band.words);
    }
  }
}

Tensor with_dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor
                                                            : torch::stable::contiguous(tensor);
}

}  // namespace

PackedTiles pack_dense_cpu(const Tensor& mask, int64_t block_q, int64_t block_kv) {
  const Tensor visible = with_dense_rows(mask);
  const int64_t heads = visible.size(1), q_len = visible.size(2), kv_len = visible.size(3);
  const int64_t leading = visible.size(0) * heads, words = ceil_div(block_kv, 32);
  const int64_t lines = ceil_div(q_len, block_q), blocks = ceil_div(kv_len, block_kv);
  const Tensor bits = allocate({leading * lines * blocks, block_q, words}, ScalarType::Int, mask);
  const Tensor counts = allocate({leading * lines * blocks}, ScalarType::Long, mask);
  const auto* from = static_cast<const uint8_t*>(visible.const_data_ptr());
  auto* to = static_cast<uint32_t*>(bits.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  const int64_t b_stride = visible.stride(0), h_stride = visible.stride(1),
                row_stride = visible.stride(2);
  torch::stable::parallel_for(0, leading * lines, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const int64_t bh = x / lines, i = x % lines * block_q;
      const uint8_t* first = from + bh / heads * b_stride + bh % heads * h_stride + i * row_stride;
      const Band band{first,    row_stride, std::min(block_q, q_len - i), kv_len, block_q,
                      block_kv, words};
      pack_band(band, to + x * blocks * block_q * words, count + x * blocks);
    }
  });
  return {bits, counts};
}

PackedTiles pack_tiles_cpu(const Tensor& elements) {
  const Tensor tiles = dense(elements);
  const int64_t n = tiles.size(0), block_q = tiles.size(1), block_kv = tiles.size(2),
                words = ceil_div(block_kv, 32);
  const Tensor bits = allocate({n, block_q, words}, ScalarType::Int, elements);
  const Tensor counts = allocate({n}, ScalarType::Long, elements);
  const auto* from = static_cast<const uint8_t*>(tiles.const_data_ptr());
  auto* to = static_cast<uint32_t*>(bits.mutable_data_ptr());
  auto* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  torch::stable::parallel_for(0, n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const Band band{
          from + x * block_q * block_kv, block_kv, block_q, block_kv, block_q, block_kv, words};
      pack_band(band, to + x * block_q * words, count + x);
    }
  });
  return {bits, counts};
}

}  // namespace flashmark
