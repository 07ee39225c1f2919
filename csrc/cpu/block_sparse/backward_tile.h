// One tile of keys against the queries that see it: dK and dV of the tile, and its part of dQ.
//
// Tiles are transposed as in the forward: P^T and dS^T are (keys, W queries).
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - Delta), dV = P^T dO, dK = dS^T Q, dQ^T = K^T dS^T
#pragma once
#include "block_sparse/backward_prepare.h"
#include "block_sparse/logits.h"
#include "shared/philox.h"
#include "block_sparse/spans.h"

namespace flashmark {

template <typename T, typename C, int64_t W>
class KeyTile {
 public:
  KeyTile(const QueryTiles<T, C, W>& query_tiles)
      : tiles(query_tiles),
        p(query_tiles.p),
        x(query_tiles.x),
        logits(needs_logits(p)),
        general(logits || p.dropout),
        dim(padded<C>(p.dim)),
        v_dim(padded<C>(p.v_dim)),
        scores(x.key_tile * W),
        slopes(x.key_tile * W),
        extra(general ? x.key_tile * W : 0),
        tanhs(p.softcap > 0.f ? x.key_tile * W : 0),
        diagonals(x.drelative ? COPIES * (x.key_tile + W) : 0),
        keep(p.dropout ? x.key_tile : 0),
        dkey(x.key_tile * p.dim),
        dvalue(x.key_tile * p.v_dim),
        key_t(p.dim * (x.key_tile + 1)),
        key_copy(x.key_tile * dim),
        value_copy(x.key_tile * v_dim),
        weights(PAIRED<C> ? x.key_tile * W : 0),
        slope_rows(PAIRED<C> ? x.key_tile * W : 0),
        slope_pairs(PAIRED<C> ? (x.key_tile + 1) * W : 0) {}

  void run(int64_t b_, int64_t kv_head_, int64_t segment_, int64_t key_tile) {
    b = b_, kv_head = kv_head_, segment = segment_;
    key0 = key_tile * x.key_tile;
    const int64_t all = std::min(x.key_tile, p.kv_len - key0),
                  n = std::clamp<int64_t>(p.keys(b) - key0, 0, all);
    std::fill(dkey + 0, dkey + all * p.dim, 0.f);
    std::fill(dvalue + 0, dvalue + all * p.v_dim, 0.f);
    if (n > 0) {
      load_keys(n);
      for (h = kv_head * p.group(); h < (kv_head + 1) * p.group(); h++) {
        visible_queries(p, b, h, key0, n,
                        [&](int64_t tile, int64_t lo, int64_t hi, const KeyBits& bits) {
                          visit(tile, lo, hi - lo, bits);
                        });
      }
    }
    const int64_t row = (b * p.kv_heads + kv_head) * p.kv_len + key0;
    const Vec scale(p.scale);
    at::vec::map<float>([scale](Vec v) { return v * scale; }, dkey, dkey, all * p.dim);
    convert_row<float, T>(dkey, static_cast<T*>(x.dkey) + row * p.dim, all * p.dim);
    convert_row<float, T>(dvalue, static_cast<T*>(x.dvalue) + row * p.v_dim, all * p.v_dim);
  }

 private:
  static constexpr int64_t COPIES = 4;

  void load_keys(int64_t n) {
    const T* key = static_cast<const T*>(p.key) + b * p.key_strides.batch +
                   kv_head * p.key_strides.head + key0 * p.key_strides.row;
    const T* value = static_cast<const T*>(p.value) + b * p.value_strides.batch +
                     kv_head * p.value_strides.head + key0 * p.value_strides.row;
    transpose<T, C>(key, p.key_strides.row, n, p.dim, key_t, x.key_tile + 1);
    if (n % 2 != 0)
      for (int64_t d = 0; d < p.dim; d++) key_t[d * (x.key_tile + 1) + n] = C(0.f);
    load_rows(key, p.key_strides.row, n, p.dim, key_copy, key_rows, key_ld);
    load_rows(value, p.value_strides.row, n, p.v_dim, value_copy, value_rows, value_ld);
  }

  static void load_rows(const T* from, int64_t ld, int64_t n, int64_t size, C* copy, const C*& rows,
                        int64_t& rows_ld) {
    const int64_t even = padded<C>(size);
    if constexpr (std::is_same_v<T, C>) {
      if (even == size) {
        rows = from, rows_ld = ld;
        return;
      }
    }
    for (int64_t j = 0; j < n; j++) {
      convert_row(from + j * ld, copy + j * even, size);
      std::fill(copy + j * even + size, copy + (j + 1) * even, C(0.f));
    }
    rows = copy, rows_ld = even;
  }

  // The queries of `tile` against keys [lo, lo + n) of this one.
  void visit(int64_t tile, int64_t lo, int64_t n, const KeyBits& bits) {
    const int64_t i = tiles.index(b, h, tile);
    const TileColumns columns = tile_columns(p, b, tile);
    product<C>(n, W, dim, key_rows + lo * key_ld, key_ld, tiles.query_t(i), W, scores, W, false);
    product<C>(n, W, v_dim, value_rows + lo * value_ld, value_ld, tiles.dout_t(i), W, slopes, W,
               false);
    if (logits)
      make_logits<W>(p, b, h, tile, key0 + lo, n, scores, p.softcap > 0.f ? +tanhs : nullptr,
                     extra);
    if (p.dropout) dropout_rows(p, b * p.heads + h, columns.query0, key0 + lo, n, keep);
    if (general) {
      weigh<true>(tile, n, bits);
      if (x.drelative) add_diagonals(tile, lo, n);
      if (x.ddense) add_dense(columns, lo, n);
      if (p.softcap > 0.f) uncap(n);
      if constexpr (PAIRED<C>) pair_up(n);
    } else {
      weigh<false>(tile, n, bits);
    }
    const C *p_rows, *ds_rows, *ds_second;
    if constexpr (PAIRED<C>) {
      p_rows = weights, ds_rows = slope_rows, ds_second = slope_pairs;
    } else {
      p_rows = scores, ds_rows = slopes, ds_second = slopes;
    }
    if constexpr (QueryTiles<T, C, W>::DIRECT) {
      const int64_t q = columns.query0 + columns.lo, width = columns.hi - columns.lo;
      product<C>(n, p.v_dim, width, p_rows + columns.lo, W,
                 tiles.dout(b, h) + q * x.dout_strides.row, x.dout_strides.row,
                 dvalue + lo * p.v_dim, p.v_dim, true);
      product<C>(n, p.dim, width, ds_rows + columns.lo, W,
                 tiles.query(b, h) + q * p.query_strides.row, p.query_strides.row,
                 dkey + lo * p.dim, p.dim, true);
    } else {
      product<C>(n, p.v_dim, W, p_rows, W, tiles.dout_rows(i), p.v_dim, dvalue + lo * p.v_dim,
                 p.v_dim, true);
      product<C>(n, p.dim, W, ds_rows, W, tiles.query_rows(i), p.dim, dkey + lo * p.dim, p.dim,
                 true);
    }
    const int64_t part = tiles.part(b, h, segment, tile);
    product<C>(p.dim, W, padded<C>(n), key_t + lo, x.key_tile + 1, ds_second, W,
               x.dquery_t + part * p.dim * W, W, x.touched[part]);
    x.touched[part] = 1;
  }

  // P^T and dS^T of n keys, from S^T and dP^T; general: dropout, and left in float32.
  template <bool GENERAL>
  void weigh(int64_t tile, int64_t n, const KeyBits& bits) {
    const Vec factor(p.scale * LOG2E), log2e(LOG2E), zero(0.f), keep_scale(p.keep_scale);
    const int64_t row = tiles.row(b, h, tile);
    const float *lse = x.row_lse + row, *residual = x.row_residual + row, *delta = x.delta + row;
    const auto element = [&](int64_t j, int64_t c, uint64_t seen, Vec& weight, Vec& slope) {
      const Vec s = Vec::loadu(scores + j * W + c), low = Vec::loadu(residual + c);
      const Vec top = Vec::loadu(lse + c);
      weight = GENERAL && logits ? exp2_vec(at::vec::fmsub(s - top, log2e, low))
                                 : exp2_vec(at::vec::fmsub(s, factor, top));
      Vec dp = Vec::loadu(slopes + j * W + c);
      Vec kept = weight;
      if (GENERAL && p.dropout) {
        dp = select_bits(keep[j], c, dp * keep_scale, zero);
        kept = select_bits(keep[j], c, weight * keep_scale, zero);
      }
      slope = weight * (dp - Vec::loadu(delta + c));
      weight = kept;
      if (seen != ~uint64_t{0}) {  // by select: a masked score may be anything
        weight = select_bits(seen, c, weight, zero);
        slope = select_bits(seen, c, slope, zero);
      }
    };
    const bool masked = bits.masked();
    if constexpr (PAIRED<C> && !GENERAL) {
      for (int64_t j = 0; j < n; j += 2) {
        const uint64_t seen0 = masked ? bits(j) : ~uint64_t{0};
        const uint64_t seen1 = masked && j + 1 < n ? bits(j + 1) : ~uint64_t{0};
        for (int64_t c = 0; c < W; c += LANES) {
          Vec w0, s0, w1(0.f), s1(0.f);
          element(j, c, seen0, w0, s0);
          if (j + 1 < n) element(j + 1, c, seen1, w1, s1);
          store_operands(j, c, n, w0, s0, w1, s1);
        }
      }
    } else {
      for (int64_t j = 0; j < n; j++) {
        const uint64_t seen = masked ? bits(j) : ~uint64_t{0};
        for (int64_t c = 0; c < W; c += LANES) {
          Vec w, s;
          element(j, c, seen, w, s);
          w.store(scores + j * W + c);
          s.store(slopes + j * W + c);
        }
      }
    }
  }

  // Rows j and j + 1 as bfloat16: P and dS by rows, dS once more in pairs.
  void store_operands(int64_t j, int64_t c, int64_t n, Vec w0, Vec s0, Vec w1, Vec s1) {
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (PAIRED<C>) {
      const __m512i slope0 = round_bfloat16(s0), slope1 = round_bfloat16(s1);
      store_row(weights + j * W + c, round_bfloat16(w0));
      store_row(slope_rows + j * W + c, slope0);
      if (j + 1 < n) {
        store_row(weights + (j + 1) * W + c, round_bfloat16(w1));
        store_row(slope_rows + (j + 1) * W + c, slope1);
      }
      store_pairs(slope_pairs + j * W + 2 * c, slope0, slope1);
    }
#endif
  }

  void pair_up(int64_t n) {
    for (int64_t j = 0; j < n; j += 2) {
      for (int64_t c = 0; c < W; c += LANES) {
        const bool both = j + 1 < n;
        const int64_t at = j * W + c;
        store_operands(j, c, n, Vec::loadu(scores + at), Vec::loadu(slopes + at),
                       both ? Vec::loadu(scores + at + W) : Vec(0.f),
                       both ? Vec::loadu(slopes + at + W) : Vec(0.f));
      }
    }
  }

  void uncap(int64_t n) {  // d tanh(u) = 1 - tanh(u)^2
    for (int64_t k = 0; k < n * W; k += LANES) {
      const Vec t = Vec::loadu(tanhs + k);
      (Vec::loadu(slopes + k) * (Vec(1.f) - t * t)).store(slopes + k);
    }
  }

  // Sums dS along the diagonals of the tile. Copies taken in turn keep a row's loads clear of the
  // last stores.
  void add_diagonals(int64_t tile, int64_t lo, int64_t n) {
    const int64_t size = x.key_tile + W;
    std::fill(diagonals + 0, diagonals + COPIES * size, 0.f);
    for (int64_t j = 0; j < n; j++) {
      float* sums = diagonals + j % COPIES * size + n - 1 - j;
      for (int64_t c = 0; c < W; c += LANES)
        (Vec::loadu(sums + c) + Vec::loadu(slopes + j * W + c)).store(sums + c);
    }
    float* to = x.drelative + ((b * x.segments + segment) * p.heads + h) * (p.relative_size + W) +
                tile * W + p.kv_len - 1 - (key0 + lo) - (n - 1);
    for (int64_t k = 0; k < n + W - 1; k++) {
      float sum = 0.f;
      for (int64_t copy = 0; copy < COPIES; copy++) sum += diagonals[copy * size + k];
      to[k] += sum;
    }
  }

  void add_dense(const TileColumns& columns, int64_t lo, int64_t n) {
    const int64_t* stride = x.ddense_strides;
    transpose_words(slopes, W, n, W, extra, n);
    for (int64_t c = columns.lo; c < columns.hi; c++) {
      float* to = x.ddense + segment * stride[0] + b * stride[1] + h * stride[2] +
                  (columns.query0 + c) * stride[3] + (key0 + lo) * stride[4];
      const float* from = extra + c * n;
      if (stride[4] != 0) {
        for (int64_t j = 0; j < n; j++) to[j] += from[j];
      } else {
        for (int64_t j = 0; j < n; j++) to[0] += from[j];
      }
    }
  }

  const QueryTiles<T, C, W>& tiles;
  const Problem& p;
  const BackwardTensors& x;
  const bool logits, general;
  const int64_t dim, v_dim;
  int64_t b = 0, kv_head = 0, h = 0, segment = 0, key0 = 0, key_ld = 0, value_ld = 0;
  const C *key_rows = nullptr, *value_rows = nullptr;
  Scratch<float> scores, slopes, extra, tanhs, diagonals;
  Scratch<uint64_t> keep;
  Scratch<float> dkey, dvalue;
  Scratch<C> key_t, key_copy, value_copy, weights, slope_rows, slope_pairs;
};

}  // namespace flashmark
