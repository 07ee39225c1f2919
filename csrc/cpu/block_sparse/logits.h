// From raw products to logits: scale, softcap, bias, in that order and each rounded to float32, so
// that a bias of any size means what it means in PyTorch. Tiles are transposed: row j is a key,
// column c a query.
#pragma once
#include "shared/pack.h"
#include "shared/problem.h"

namespace flashmark {

// True where logits are more than a positive multiple of the products. They are formed then, and
// a tile's running maxima are natural logits; else both are products in base 2.
inline bool needs_logits(const Problem& p) {
  return p.softcap > 0.f || p.relative_bias || p.dense_bias || !(p.scale > 0.f);
}

// The reference of an online softmax follows the maximum only when that grew by 2^LAZY.
constexpr float LAZY = 8.f;

// Units of a row's maxima and sums.
struct Units {
  float to_base2;  // of a difference of maxima
  float product;   // a product, as it is compared with a maximum
  float lazy;
  explicit Units(const Problem& p)
      : to_base2(needs_logits(p) ? LOG2E : 1.f),
        product(needs_logits(p) ? 1.f : p.scale * LOG2E),
        lazy(needs_logits(p) ? LAZY * LN2 : LAZY) {}
};

struct RowEnd {
  float factor;         // of the row's sum of values
  float lse, residual;  // natural log, and its rounding residual
};

// From a row's reference and sum of weights.
inline RowEnd end_row(const Problem& p, int64_t h, float top, float sum) {
  const bool natural = needs_logits(p);
  const float unit = natural ? LOG2E : 1.f;
  float reference = top, total = sum, factor = 1.f;
  if (p.sinks) {  // one more logit, in the denominator only
    const float sink = natural ? p.sinks[h] : p.sinks[h] * LOG2E;
    reference = std::max(top, sink);
    factor = top == NEG_INF ? 0.f : std::exp2((top - reference) * unit);
    total = reference == NEG_INF ? 0.f : total * factor + std::exp2((sink - reference) * unit);
  }
  if (reference == NEG_INF) return {0.f, NEG_INF, 0.f};
  const float whole = natural ? reference : reference * LN2, part = std::log(total);
  const float lse = whole + part;
  return {factor * (p.dropout ? p.keep_scale : 1.f) / total, lse, (whole - lse) + part};
}

// The dense bias of keys [key0, key0 + n) for a tile of queries, as to (n, W).
template <int64_t W>
void gather_dense_bias(const Problem& p, int64_t b, int64_t h, const TileColumns& tile,
                       int64_t key0, int64_t n, float* to) {
  const int64_t* stride = p.dense_strides;
  const float* bias = p.dense_bias + b * stride[0] + h * stride[1];
  const float* first = bias + (tile.query0 + tile.lo) * stride[2] + key0 * stride[3];
  if (tile.lo > 0 || tile.hi < W) std::fill(to, to + n * W, 0.f);
  if (stride[3] != 0) {
    transpose_words(first, stride[2], tile.hi - tile.lo, n, to + tile.lo, W);
    return;
  }
  for (int64_t j = 0; j < n; j++)
    for (int64_t c = tile.lo; c < tile.hi; c++) to[j * W + c] = first[(c - tile.lo) * stride[2]];
}

// s (n, W) <- logits. `capped`, when given, receives tanh of the softcap. `bias` (n, W)
// is scratch.
template <int64_t W>
void make_logits(const Problem& p, int64_t b, int64_t h, int64_t tile, int64_t key0, int64_t n,
                 float* s, float* capped, float* bias) {
  const TileColumns columns = tile_columns(p, b, tile);
  if (p.dense_bias) gather_dense_bias<W>(p, b, h, columns, key0, n, bias);
  const float* relative =
      p.relative_bias ? p.relative_bias + h * (p.relative_size + W) + tile * W + p.kv_len - 1 - key0
                      : nullptr;
  const Vec scale(p.scale), inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f), outer(p.softcap);
  for (int64_t j = 0; j < n; j++) {
    for (int64_t c = 0; c < W; c += LANES) {
      float* at = s + j * W + c;
      Vec x = Vec::loadu(at);
      if (p.softcap > 0.f) {
        x = (x * inner).tanh();
        if (capped) x.store(capped + j * W + c);
        x = x * outer;
      } else {
        x = x * scale;
      }
      if (relative) x = x + Vec::loadu(relative - j + c);
      if (p.dense_bias) x = x + Vec::loadu(bias + j * W + c);
      x.store(at);
    }
  }
}

}  // namespace flashmark
