// One tile of queries against the keys it sees, with tangents: the online softmax of forward.h on
// pairs (x, its derivative along the tangents).
//
// Two tiles lie side by side: S^T | dS^T (keys, 2 W), and P^T | (P dS)^T after the softmax.
//   S^T | K dQ^T = K (Q^T | dQ^T),  dS^T = K dQ^T + dK Q^T
//   O^T | U^T += V^T (P^T | (P dS)^T),  U^T += dV^T P^T
// Without tangents of the scores the right halves of both are left out.
//   dlse = sum P dS + P_sink dsink,  dO = U - dlse O
#pragma once
#include <vector>

#include "block_sparse/logits.h"
#include "block_sparse/spans.h"
#include "shared/philox.h"

namespace flashmark {

// Operands are of the type C of the products, and have an even dim where that is paired.
struct JvpTensors {
  const void *tquery, *tkey;       // contiguous, in the shapes of query and key; or null
  const void *value_t, *tvalue_t;  // (batch, kv_heads, blocks, v_dim, block); tvalue_t or null
  int64_t blocks, block;            // keys of a block
  const float* tsinks;              // (heads,) or null
  const Problem* tbias;             // with the bias's tangents in place of the bias; or null
  float *out, *lse, *residual, *tout, *tlse;  // contiguous; residual may be null
};

template <typename C, int64_t W>
class JvpTile {
 public:
  JvpTile(const Problem& problem, const JvpTensors& tensors)
      : p(problem),
        x(tensors),
        logits(needs_logits(problem)),
        sloped(tensors.tquery || tensors.tkey || tensors.tbias),
        units(problem),
        scores(CHUNK * WIDTH),
        bias(p.dense_bias ? CHUNK * W : 0),
        weights(PAIRED<C> ? CHUNK * WIDTH : 0),
        queries(p.dim * WIDTH),
        query_rows(p.dim * W),
        acc(p.v_dim * WIDTH),
        rows(2 * W * p.v_dim),
        keep(p.dropout ? CHUNK : 0) {}
  ~JvpTile() { release_products<C>(); }

  void run(int64_t b_, int64_t h_, int64_t tile_) {
    b = b_, h = h_, tile = tile_, kv_head = h / p.group();
    columns = tile_columns(p, b, tile);
    for (int64_t v = 0; v < NV; v++) m[v] = Vec(NEG_INF), l[v] = Vec(0.f), t[v] = Vec(0.f);
    started = false;
    load_queries();
    visible_keys(p, b, h, tile, p.keys(b),
                 [&](int64_t first, int64_t n, const KeyBits& bits) { take(first, n, bits); });
    flush();
    finish();
  }

 private:
  static constexpr int64_t CHUNK = 256, NV = W / LANES, WIDTH = 2 * W;

  struct Range {  // keys [first, first + n) are rows [row, row + n) of the chunk
    int64_t first, n, row;
    KeyBits bits;
  };

  void load_queries() {
    const C* query = static_cast<const C*>(p.query) + b * p.query_strides.batch +
                     h * p.query_strides.head + columns.query0 * p.query_strides.row;
    pack_columns<C, C>(query, p.query_strides.row, columns.lo, columns.hi, W, p.dim, queries,
                       query_rows, WIDTH);
    if (!x.tquery) return;
    const C* tquery = static_cast<const C*>(x.tquery) +
                      ((b * p.heads + h) * p.q_len + columns.query0) * p.dim;
    pack_columns<C, C>(tquery, p.dim, columns.lo, columns.hi, W, p.dim,
                       queries + (PAIRED<C> ? 2 * W : W), query_rows, WIDTH);
  }

  void take(int64_t first, int64_t n, const KeyBits& bits) {
    for (int64_t j = 0; j < n;) {
      const int64_t block_left = x.block - (first + j) % x.block;
      const int64_t some = std::min({n - j, CHUNK - used, block_left});
      ranges.push_back({first + j, some, used, bits.masked() ? bits.from(j) : bits});
      used += some;
      j += some;
      if (used == CHUNK || (PAIRED<C> && used % 2 != 0)) flush();
    }
  }

  void flush() {
    if (used == 0) return;
    for (const Range& r : ranges) {
      multiply_keys(r);
      if (logits) form_logits(r);
      if (r.bits.masked()) hide(r);
      if (p.dropout) dropout_rows(p, b * p.heads + h, columns.query0, r.first, r.n, keep + r.row);
    }
    softmax_step();
    for (const Range& r : ranges) add_values(r);
    ranges.clear();
    used = 0;
  }

  void multiply_keys(const Range& r) {
    float* s = scores + r.row * WIDTH;
    const C* key = static_cast<const C*>(p.key) + b * p.key_strides.batch +
                   kv_head * p.key_strides.head + r.first * p.key_strides.row;
    product<C>(r.n, x.tquery ? WIDTH : W, p.dim, key, p.key_strides.row, queries, WIDTH, s, WIDTH,
               false);
    if (x.tkey) {
      const C* tkey = static_cast<const C*>(x.tkey) +
                      ((b * p.kv_heads + kv_head) * p.kv_len + r.first) * p.dim;
      product<C>(r.n, W, p.dim, tkey, p.dim, queries, WIDTH, s + W, WIDTH, x.tquery != nullptr);
    } else if (!x.tquery) {  // left for the bias's
      for (int64_t j = 0; j < r.n; j++) std::fill_n(s + j * WIDTH + W, W, 0.f);
    }
  }

  // scale, softcap and bias, in that order, and their tangents.
  void form_logits(const Range& r) {
    const Vec scale(p.scale), inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f), outer(p.softcap);
    for (int64_t j = 0; j < r.n; j++) {
      float* s = scores + (r.row + j) * WIDTH;
      for (int64_t c = 0; c < W; c += LANES) {
        Vec logit = Vec::loadu(s + c), slope = Vec::loadu(s + W + c) * scale;
        if (p.softcap > 0.f) {
          const Vec tanh = (logit * inner).tanh();
          logit = tanh * outer;
          slope = slope * (Vec(1.f) - tanh * tanh);
        } else {
          logit = logit * scale;
        }
        logit.store(s + c);
        slope.store(s + W + c);
      }
    }
    add_bias(p, r, 0);
    if (x.tbias) add_bias(*x.tbias, r, W);
  }

  void add_bias(const Problem& from, const Range& r, int64_t column) {
    if (from.dense_bias) gather_dense_bias<W>(from, b, h, columns, r.first, r.n, bias);
    const float* relative = from.relative_bias
                                ? from.relative_bias + h * (from.relative_size + W) + tile * W +
                                      from.kv_len - 1 - r.first
                                : nullptr;
    if (!relative && !from.dense_bias) return;
    for (int64_t j = 0; j < r.n; j++) {
      const float* add = relative ? relative - j : bias + j * W;
      float* s = scores + (r.row + j) * WIDTH + column;
      for (int64_t c = 0; c < W; c += LANES) (Vec::loadu(s + c) + Vec::loadu(add + c)).store(s + c);
    }
  }

  void hide(const Range& r) {  // what a hidden key holds, NaN included, reaches no tangent
    const Vec hidden(NEG_INF), zero(0.f);
    for (int64_t j = 0; j < r.n; j++) {
      const uint64_t bits = r.bits(j);
      if ((bits & all_columns(W)) == all_columns(W)) continue;
      float* s = scores + (r.row + j) * WIDTH;
      for (int64_t c = 0; c < W; c += LANES) {
        select_bits(bits, c, Vec::loadu(s + c), hidden).store(s + c);
        select_bits(bits, c, Vec::loadu(s + W + c), zero).store(s + W + c);
      }
    }
  }

  // Weights of the chunk against the running reference m; sums follow when m moves.
  void softmax_step() {
    const Vec factor(units.product), unit(units.to_base2), slope(logits ? 1.f : p.scale);
    Vec top[NV], shift[NV];
    for (int64_t v = 0; v < NV; v++) top[v] = Vec(NEG_INF);
    for (int64_t j = 0; j < used; j++)
      for (int64_t v = 0; v < NV; v++)
        top[v] = max_vec(top[v], Vec::loadu(scores + j * WIDTH + v * LANES));
    bool moved = false;
    for (int64_t v = 0; v < NV; v++) {
      const Vec grown = top[v] * factor;
      const Vec moves = (grown - m[v]) > Vec(units.lazy);
      const Vec next = Vec::blendv(m[v], grown, moves);
      shift[v] = Vec::blendv(next, Vec(0.f), next == Vec(NEG_INF));
      Vec shrink(1.f);
      if (moves.zero_mask() != (1 << LANES) - 1) {
        shrink = Vec::blendv(shrink, exp2_vec((m[v] - next) * unit), moves);
        l[v] = l[v] * shrink;
        t[v] = t[v] * shrink;
        moved = true;
      }
      shrink.store(alpha + v * LANES);
      m[v] = next;
    }
    if (moved && started) scale_sums();
    if (p.dropout) {
      logits ? weigh<true, true>(unit, shift, slope) : weigh<true, false>(factor, shift, slope);
    } else {
      logits ? weigh<false, true>(unit, shift, slope) : weigh<false, false>(factor, shift, slope);
    }
  }

  // Weights and their products with the tangents, in place of the scores or in `weights`.
  template <bool DROPOUT, bool NATURAL>
  void weigh(Vec factor, const Vec* shift, Vec slope) {
    Vec sum[NV], slopes[NV];  // in registers
    for (int64_t v = 0; v < NV; v++) sum[v] = l[v], slopes[v] = t[v];
    const auto weight = [&](int64_t j, int64_t v, Vec& w, Vec& d) {
      const float* s = scores + j * WIDTH + v * LANES;
      const Vec logit = Vec::loadu(s);
      w = exp2_vec(NATURAL ? (logit - shift[v]) * factor
                           : at::vec::fmsub(logit, factor, shift[v]));
      d = w * (Vec::loadu(s + W) * slope);
      sum[v] = sum[v] + w;
      slopes[v] = slopes[v] + d;
      if constexpr (DROPOUT) {
        w = select_bits(keep[j], v * LANES, w, Vec(0.f));
        d = select_bits(keep[j], v * LANES, d, Vec(0.f));
      }
    };
    if constexpr (PAIRED<C>) {
#if defined(CPU_CAPABILITY_AVX512)
      for (int64_t j = 0; j < used; j += 2) {
        for (int64_t v = 0; v < NV; v++) {
          Vec w[2] = {Vec(0.f), Vec(0.f)}, d[2] = {Vec(0.f), Vec(0.f)};
          for (int64_t k = 0; k < std::min<int64_t>(2, used - j); k++) weight(j + k, v, w[k], d[k]);
          C* to = weights + j * WIDTH + v * LANES * 2;
          store_pairs(to, round_bfloat16(w[0]), round_bfloat16(w[1]));
          store_pairs(to + 2 * W, round_bfloat16(d[0]), round_bfloat16(d[1]));
        }
      }
#endif
    } else {
      for (int64_t j = 0; j < used; j++) {
        for (int64_t v = 0; v < NV; v++) {
          Vec w, d;
          weight(j, v, w, d);
          w.store(scores + j * WIDTH + v * LANES);
          d.store(scores + j * WIDTH + W + v * LANES);
        }
      }
    }
    for (int64_t v = 0; v < NV; v++) l[v] = sum[v], t[v] = slopes[v];
  }

  void scale_sums() {  // by alpha; 0 where that is 0, even where a masked key was not finite
    for (int64_t d = 0; d < p.v_dim; d++) {
      for (int64_t c = 0; c < WIDTH; c += LANES) {
        const Vec factor = Vec::loadu(alpha + c % W), scaled = Vec::loadu(acc + d * WIDTH + c);
        Vec::blendv(scaled * factor, Vec(0.f), factor == Vec(0.f)).store(acc + d * WIDTH + c);
      }
    }
  }

  void add_values(const Range& r) {
    const int64_t at = (((b * p.kv_heads + kv_head) * x.blocks + r.first / x.block) * p.v_dim) *
                           x.block + r.first % x.block;
    const C* second;
    if constexpr (PAIRED<C>) {
      second = weights + r.row * WIDTH;
    } else {
      second = scores + r.row * WIDTH;
    }
    const int64_t n = padded<C>(r.n);
    const C* value_t = static_cast<const C*>(x.value_t) + at;
    product<C>(p.v_dim, sloped ? WIDTH : W, n, value_t, x.block, second, WIDTH, acc, WIDTH,
               started);
    if (x.tvalue_t) {
      const C* tvalue_t = static_cast<const C*>(x.tvalue_t) + at;
      product<C>(p.v_dim, W, n, tvalue_t, x.block, second, WIDTH, acc + W, WIDTH,
                 started || sloped);
    } else if (!sloped && !started) {
      for (int64_t d = 0; d < p.v_dim; d++) std::fill_n(acc + d * WIDTH + W, W, 0.f);
    }
    started = true;
  }

  void finish() {
    float top[W], sum[W], slopes[W];
    for (int64_t v = 0; v < NV; v++) {
      m[v].store(top + v * LANES);
      l[v].store(sum + v * LANES);
      t[v].store(slopes + v * LANES);
    }
    const int64_t row0 = (b * p.heads + h) * p.q_len + columns.query0;
    if (started) {
      transpose_words(acc, WIDTH, p.v_dim, W, rows, p.v_dim);
      transpose_words(acc + W, WIDTH, p.v_dim, W, rows + W * p.v_dim, p.v_dim);
    }
    for (int64_t c = columns.lo; c < columns.hi; c++) {
      const RowEnd end = end_row(p, h, top[c], sum[c]);
      x.lse[row0 + c] = end.lse;
      if (x.residual) x.residual[row0 + c] = end.residual;
      float slope = end.factor == 0.f ? 0.f : slopes[c] * end.factor;
      if (p.dropout) slope /= p.keep_scale;
      if (x.tsinks) slope += std::exp(p.sinks[h] - end.lse - end.residual) * x.tsinks[h];
      x.tlse[row0 + c] = slope;
      float *out = x.out + (row0 + c) * p.v_dim, *tout = x.tout + (row0 + c) * p.v_dim;
      const bool some = started && end.factor != 0.f;
      for (int64_t d = 0; d < p.v_dim; d++) {
        out[d] = some ? rows[c * p.v_dim + d] * end.factor : 0.f;
        tout[d] = some ? rows[(W + c) * p.v_dim + d] * end.factor - slope * out[d] : 0.f;
      }
    }
  }

  const Problem& p;
  const JvpTensors& x;
  const bool logits, sloped;
  const Units units;
  bool started = false;
  int64_t b = 0, h = 0, tile = 0, kv_head = 0, used = 0;
  TileColumns columns{};
  std::vector<Range> ranges;
  Vec m[NV], l[NV], t[NV];
  float alpha[W];
  Scratch<float> scores, bias;
  Scratch<C> weights, queries, query_rows;
  Scratch<float> acc, rows;
  Scratch<uint64_t> keep;
};

}  // namespace flashmark
