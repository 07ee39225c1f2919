// One tile of queries against the keys it sees: online softmax in base 2 over transposed score
// tiles.
//
// Scores lie as S^T (keys, W queries), so that maxima, sums and rescaling run along vectors without
// reductions across lanes: S^T = K Q^T, O^T += V^T P^T. Only Q^T (once a tile) and V^T (once a
// head) are ever transposed. Narrow tiles (W = 16: decoding, and masks of small blocks) turn P^T
// instead, O += P V, and so read K and V where they lie; their products are in float32.
#pragma once
#include <vector>

#include "block_sparse/kernels.h"
#include "block_sparse/logits.h"
#include "shared/philox.h"
#include "block_sparse/spans.h"

namespace flashmark {

template <typename T, typename C, int64_t W>
class ForwardTile {
 public:
  ForwardTile(const Problem& problem, const ForwardOutputs& outputs)
      : p(problem),
        to(outputs),
        logits(needs_logits(problem)),
        units(problem),
        scores(CHUNK * W),
        bias(p.dense_bias ? CHUNK * W : 0),
        weights(PAIRED<C> || NARROW ? CHUNK * W : 0),
        copies(NARROW && !IN_PLACE ? CHUNK * std::max(p.dim, p.v_dim) : 0),
        query_t(padded<C>(p.dim) * W),
        rows(W * std::max(p.dim, p.v_dim) + W),
        acc(p.v_dim * W),
        out_rows(W * p.v_dim),
        keep(p.dropout ? CHUNK : 0) {
    direct_key = std::is_same_v<T, C> && padded<C>(p.dim) == p.dim;
    static_assert(!NARROW || std::is_same_v<C, float>);
  }
  ~ForwardTile() { release_products<C>(); }

  static int64_t heads_together(const Problem&) { return 1; }

  void run(int64_t b_, int64_t h_, int64_t tile_) {
    visit(b_, h_, tile_, 0, p.kv_len);
    finish();
  }

  // Floats of what `run_part` stores: m and l of each column, then O as it lies in `acc`.
  static int64_t part_size(const Problem& p) { return W * (2 + p.v_dim); }

  // Keys [begin, end) alone.
  void run_part(int64_t b_, int64_t h_, int64_t tile_, int64_t begin, int64_t end, float* part) {
    visit(b_, h_, tile_, begin, end);
    for (int64_t v = 0; v < NV; v++) {
      m[v].store(part + v * LANES);
      l[v].store(part + W + v * LANES);
    }
    if (started) std::copy_n(acc + 0, W * p.v_dim, part + 2 * W);
  }

  // The tile from all its parts, in order.
  void merge_parts(int64_t b_, int64_t h_, int64_t tile_, const float* parts, int64_t n) {
    place(b_, h_, tile_);
    for (int64_t x = 0; x < n; x++) merge(parts + x * part_size(p));
    finish();
  }

 private:
  static constexpr int64_t CHUNK = 256;  // keys of one online softmax step
  static constexpr int64_t NV = W / LANES;
  static constexpr bool NARROW = W == 16, IN_PLACE = std::is_same_v<T, float>;

  struct Range {  // keys [first, first + n) are rows [row, row + n) of the chunk
    int64_t first, n, row;
  };
  struct Masked {
    int64_t row, n;
    KeyBits bits;
  };

  void place(int64_t b_, int64_t h_, int64_t tile_) {
    b = b_, h = h_, tile = tile_, kv_head = h / p.group();
    columns = tile_columns(p, b, tile);
    for (int64_t v = 0; v < NV; v++) m[v] = Vec(NEG_INF), l[v] = Vec(0.f);
    started = false;
  }

  // The tile's keys in [begin, end): m, l and acc, unnormalised.
  void visit(int64_t b_, int64_t h_, int64_t tile_, int64_t begin, int64_t end) {
    place(b_, h_, tile_);
    const T* query =
        static_cast<const T*>(p.query) + b * p.query_strides.batch + h * p.query_strides.head;
    pack_columns<T, C>(query + columns.query0 * p.query_strides.row, p.query_strides.row,
                       columns.lo, columns.hi, W, p.dim, query_t, rows);
    visible_keys(p, b, h, tile, std::min(p.keys(b), end),
                 [&](int64_t first, int64_t n, const KeyBits& bits) {
                   const int64_t before = std::clamp<int64_t>(begin - first, 0, n);
                   take_span(first + before, n - before, bits.masked() ? bits.from(before) : bits);
                 });
    flush();
  }

  void take_span(int64_t first, int64_t n, const KeyBits& bits) {
    for (int64_t j = 0; j < n;) {
      const int64_t block_left = NARROW ? n : VALUE_BLOCK - (first + j) % VALUE_BLOCK;
      const int64_t take = std::min({n - j, CHUNK - used, block_left});
      append(first + j, take, bits.masked() ? bits.from(j) : bits);
      j += take;
      if (used == CHUNK || used % 2 != 0) flush();
    }
  }

  void append(int64_t first, int64_t n, const KeyBits& bits) {
    const bool extends = !ranges.empty() && ranges.back().first + ranges.back().n == first &&
                         (NARROW || first % VALUE_BLOCK != 0);
    if (extends) {
      ranges.back().n += n;
    } else {
      ranges.push_back({first, n, used});
    }
    if (bits.masked()) masks.push_back({used, n, bits});
    used += n;
  }

  // Rows [first, first + n) of a tensor as float32; ld is the distance of two rows.
  const float* float_rows(const void* tensor, const Strides& strides, int64_t first, int64_t n,
                          int64_t size, int64_t& ld) {
    const T* from = static_cast<const T*>(tensor) + b * strides.batch + kv_head * strides.head +
                    first * strides.row;
    if constexpr (IN_PLACE) {
      ld = strides.row;
      return from;
    } else {
      ld = size;
      for (int64_t j = 0; j < n; j++)
        convert_row<T, float>(from + j * strides.row, copies + j * size, size);
      return copies;
    }
  }

  const C* key_rows(const Range& r, int64_t& ld) {
    if constexpr (NARROW) return float_rows(p.key, p.key_strides, r.first, r.n, p.dim, ld);
    if (direct_key) {
      ld = p.key_strides.row;
      return static_cast<const C*>(p.key) + b * p.key_strides.batch + kv_head * p.key_strides.head +
             r.first * ld;
    }
    ld = padded<C>(p.dim);
    return static_cast<const C*>(to.key_rows) +
           ((b * p.kv_heads + kv_head) * p.kv_len + r.first) * ld;
  }

  // O += P V in the layout of the tile: O^T (v_dim, W), or O (W, v_dim) where it is narrow.
  void add_values() {
    if constexpr (NARROW) {
      transpose_words(scores, W, used, W, weights, CHUNK);
      for (const Range& r : ranges) {
        int64_t ld;
        const float* values = float_rows(p.value, p.value_strides, r.first, r.n, p.v_dim, ld);
        product<float>(W, p.v_dim, r.n, weights + r.row, CHUNK, values, ld, acc, p.v_dim, started);
        started = true;
      }
      return;
    }
    const int64_t blocks = (p.kv_len + VALUE_BLOCK - 1) / VALUE_BLOCK;
    const C* second;
    if constexpr (PAIRED<C>) {
      second = weights;
    } else {
      second = scores;
    }
    for (const Range& r : ranges) {
      const C* value_t =
          static_cast<const C*>(to.value_t) +
          (((b * p.kv_heads + kv_head) * blocks + r.first / VALUE_BLOCK) * p.v_dim) * VALUE_BLOCK +
          r.first % VALUE_BLOCK;
      product<C>(p.v_dim, W, padded<C>(r.n), value_t, VALUE_BLOCK, second + r.row * W, W, acc, W,
                 started);
      started = true;
    }
  }

  void flush() {
    if (used == 0) return;
    for (const Range& r : ranges) {
      int64_t ld;
      const C* keys = key_rows(r, ld);
      product<C>(r.n, W, padded<C>(p.dim), keys, ld, query_t, W, scores + r.row * W, W, false);
      if (logits) make_logits<W>(p, b, h, tile, r.first, r.n, scores + r.row * W, nullptr, bias);
      if (p.dropout) dropout_rows(p, b * p.heads + h, columns.query0, r.first, r.n, keep + r.row);
    }
    for (const Masked& x : masks) hide(x);
    softmax_step();
    add_values();
    ranges.clear();
    masks.clear();
    used = 0;
  }

  void hide(const Masked& x) {
    const Vec hidden(NEG_INF);
    for (int64_t j = 0; j < x.n; j++) {
      const uint64_t bits = x.bits(j);
      if ((bits & all_columns(W)) == all_columns(W)) continue;
      float* s = scores + (x.row + j) * W;
      for (int64_t c = 0; c < W; c += LANES)
        select_bits(bits, c, Vec::loadu(s + c), hidden).store(s + c);
    }
  }

  // Weights of the chunk against the running reference m; l and O^T follow when m moves.
  void softmax_step() {
    const Vec factor(units.product), unit(units.to_base2);
    Vec top[NV], shift[NV];
    for (int64_t v = 0; v < NV; v++) top[v] = Vec(NEG_INF);
    for (int64_t j = 0; j < used; j++)
      for (int64_t v = 0; v < NV; v++)
        top[v] = max_vec(top[v], Vec::loadu(scores + j * W + v * LANES));
    bool moved = false;
    for (int64_t v = 0; v < NV; v++) {
      const Vec grown = top[v] * factor;
      const Vec moves = (grown - m[v]) > Vec(units.lazy);
      const Vec next = Vec::blendv(m[v], grown, moves);
      shift[v] = Vec::blendv(next, Vec(0.f), next == Vec(NEG_INF));
      if (moves.zero_mask() != (1 << LANES) - 1) {
        const Vec shrink = Vec::blendv(Vec(1.f), exp2_vec((m[v] - next) * unit), moves);
        l[v] = l[v] * shrink;
        shrink.store(alpha + v * LANES);
        moved = true;
      } else {
        Vec(1.f).store(alpha + v * LANES);
      }
      m[v] = next;
    }
    if (moved && started) scale_output();
    if (logits) {
      p.dropout ? weigh<true, true>(unit, shift) : weigh<false, true>(unit, shift);
    } else {
      p.dropout ? weigh<true, false>(factor, shift) : weigh<false, false>(factor, shift);
    }
  }

  void scale_output() {  // by alpha; 0 where that is 0, even where a masked key was not finite
    if constexpr (NARROW) {
      for (int64_t c = 0; c < W; c++) {
        const Vec factor(alpha[c]);
        float* row = acc + c * p.v_dim;
        if (alpha[c] == 0.f) {
          std::fill(row, row + p.v_dim, 0.f);
        } else {
          at::vec::map<float>([factor](Vec x) { return x * factor; }, row, row, p.v_dim);
        }
      }
      return;
    }
    for (int64_t d = 0; d < p.v_dim; d++) {
      for (int64_t c = 0; c < W; c += LANES) {
        const Vec factor = Vec::loadu(alpha + c), scaled = Vec::loadu(acc + d * W + c) * factor;
        Vec::blendv(scaled, Vec(0.f), factor == Vec(0.f)).store(acc + d * W + c);
      }
    }
  }

  template <bool DROPOUT, bool NATURAL>
  Vec weight(int64_t j, int64_t v, Vec factor, const Vec* shift) {
    const Vec s = Vec::loadu(scores + j * W + v * LANES);
    const Vec w = exp2_vec(NATURAL ? (s - shift[v]) * factor
                                   : at::vec::fmsub(s, factor, shift[v]));
    l[v] = l[v] + w;
    if constexpr (DROPOUT) return select_bits(keep[j], v * LANES, w, Vec(0.f));
    return w;
  }

  template <bool DROPOUT, bool NATURAL>
  void weigh(Vec factor, const Vec* shift) {
    if constexpr (PAIRED<C>) {
#if defined(CPU_CAPABILITY_AVX512)
      for (int64_t j = 0; j < used; j += 2) {
        for (int64_t v = 0; v < NV; v++) {
          const __m512i even = round_bfloat16(weight<DROPOUT, NATURAL>(j, v, factor, shift));
          const __m512i odd = j + 1 < used
                                  ? round_bfloat16(weight<DROPOUT, NATURAL>(j + 1, v, factor, shift))
                                  : _mm512_setzero_si512();
          store_pairs(weights + j * W + v * LANES * 2, even, odd);
        }
      }
#endif
    } else {
      for (int64_t j = 0; j < used; j++)
        for (int64_t v = 0; v < NV; v++)
          weight<DROPOUT, NATURAL>(j, v, factor, shift).store(scores + j * W + v * LANES);
    }
  }

  // Adds a part's sums; columns that see none of its keys keep their bits.
  void merge(const float* part) {
    const Vec zero(0.f), none(NEG_INF), unit(units.to_base2);
    float own[W];
    bool empty = true;
    for (int64_t v = 0; v < NV; v++) {
      const Vec top = Vec::loadu(part + v * LANES), next = max_vec(m[v], top);
      const Vec old = Vec::blendv(exp2_vec((m[v] - next) * unit), Vec(1.f), m[v] == next);
      const Vec add = Vec::blendv(exp2_vec((top - next) * unit), Vec(1.f), top == next);
      const Vec share = Vec::blendv(add, zero, top == none);
      l[v] = l[v] * old + Vec::loadu(part + W + v * LANES) * share;
      m[v] = next;
      old.store(alpha + v * LANES);
      share.store(own + v * LANES);
      empty &= (top == none).zero_mask() == 0;
    }
    if (empty) return;
    if (started) scale_output();
    const float* from = part + 2 * W;
    for (int64_t r = 0; r < (NARROW ? W : p.v_dim); r++) {
      const int64_t size = NARROW ? p.v_dim : W;
      for (int64_t c = 0; c < size; c++) {
        const float share = own[NARROW ? r : c], old = started ? acc[r * size + c] : 0.f;
        acc[r * size + c] = share == 0.f ? old : old + share * from[r * size + c];
      }
    }
    started = true;
  }

  void finish() {
    float top[W], sum[W];
    for (int64_t v = 0; v < NV; v++) m[v].store(top + v * LANES), l[v].store(sum + v * LANES);
    const int64_t row0 = (b * p.heads + h) * p.q_len + columns.query0;
    for (int64_t c = 0; c < W; c++) {
      const RowEnd end = end_row(p, h, top[c], sum[c]);
      alpha[c] = end.factor;
      if (c >= columns.lo && c < columns.hi) to.store(row0 + c, end.lse, end.residual);
    }
    T* out = static_cast<T*>(to.out) + row0 * p.v_dim;
    if (!started) {
      std::fill(out + columns.lo * p.v_dim, out + columns.hi * p.v_dim, T(0.f));
      return;
    }
    scale_output();
    const float* rows_of_out = acc;
    if constexpr (!NARROW) {
      transpose_words(acc, W, p.v_dim, W, out_rows, p.v_dim);
      rows_of_out = out_rows;
    }
    for (int64_t c = columns.lo; c < columns.hi; c++)
      convert_row(rows_of_out + c * p.v_dim, out + c * p.v_dim, p.v_dim);
  }

  const Problem& p;
  const ForwardOutputs& to;
  const bool logits;
  const Units units;
  bool direct_key, started = false;
  int64_t b = 0, h = 0, tile = 0, kv_head = 0, used = 0;
  TileColumns columns{};
  std::vector<Range> ranges;
  std::vector<Masked> masks;
  Vec m[NV], l[NV];
  float alpha[W];
  Scratch<float> scores, bias;
  Scratch<C> weights;
  Scratch<float> copies;
  Scratch<C> query_t, rows;
  Scratch<float> acc, out_rows;
  Scratch<uint64_t> keep;
};

}  // namespace flashmark
