// A few queries (decoding) against the keys they see.
//
// A tile of products would be mostly padding, so each query's scores lie along the keys instead:
// dot products with rows of K and sums of rows of V, read where they lie and in the type they have.
// Query heads that share keys and a mask are taken together.
#pragma once
#include "block_sparse/kernels.h"
#include "block_sparse/logits.h"
#include "shared/philox.h"
#include "block_sparse/spans.h"

namespace flashmark {

template <typename T>
class ForwardRows {
 public:
  static constexpr int64_t MOST = 8;  // queries, over all heads taken together

  static int64_t heads_together(const Problem& p) {
    int64_t n = p.mask.heads > 1 ? 1 : std::min(p.group(), MOST / std::max<int64_t>(1, p.q_len));
    while (p.group() % n != 0) n--;
    return n;
  }

  ForwardRows(const Problem& problem, const ForwardOutputs& outputs)
      : p(problem),
        to(outputs),
        logits(needs_logits(problem)),
        units(problem),
        dim(whole_vectors(p.dim)),
        v_dim(whole_vectors(p.v_dim)),
        heads(heads_together(p)),
        queries(MOST * dim),
        scores(MOST * CHUNK),
        acc(MOST * v_dim),
        keep(p.dropout ? CHUNK : 0) {}

  void run(int64_t b_, int64_t h_, int64_t tile_) {
    visit(b_, h_, tile_, 0, p.kv_len);
    finish();
  }

  // Floats of what `run_part` stores: m and l of each row, then O.
  static int64_t part_size(const Problem& p) { return MOST * (2 + whole_vectors(p.v_dim)); }

  // Keys [begin, end) alone.
  void run_part(int64_t b_, int64_t h_, int64_t tile_, int64_t begin, int64_t end, float* part) {
    visit(b_, h_, tile_, begin, end);
    std::copy_n(m, MOST, part);
    std::copy_n(l, MOST, part + MOST);
    std::copy_n(acc + 0, MOST * v_dim, part + 2 * MOST);
  }

  // The rows from all their parts, in order.
  void merge_parts(int64_t b_, int64_t h_, int64_t tile_, const float* parts, int64_t n) {
    place(b_, h_, tile_);
    for (int64_t x = 0; x < n; x++) merge(parts + x * part_size(p));
    finish();
  }

 private:
  static constexpr int64_t CHUNK = 256;                 // keys of one online softmax step
  static constexpr int64_t BLOCK = LANES == 16 ? 4 : 2;  // vectors of V that sums in registers take

  static int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

  // Of row r.
  int64_t head(int64_t r) const { return h + r / width; }
  int64_t column(int64_t r) const { return columns.lo + r % width; }

  void place(int64_t b_, int64_t h_, int64_t tile_) {
    b = b_, h = h_, tile = tile_;
    columns = tile_columns(p, b, tile);
    width = columns.hi - columns.lo;
    rows = heads * width;
    std::fill_n(m, MOST, NEG_INF);
    std::fill_n(l, MOST, 0.f);
    std::fill_n(acc + 0, MOST * v_dim, 0.f);
  }

  void visit(int64_t b_, int64_t h_, int64_t tile_, int64_t begin, int64_t end) {
    place(b_, h_, tile_);
    const T* query = static_cast<const T*>(p.query) + b * p.query_strides.batch;
    std::fill_n(queries + 0, MOST * dim, 0.f);
    for (int64_t r = 0; r < rows; r++)
      convert_row<T, float>(query + head(r) * p.query_strides.head +
                                (columns.query0 + column(r)) * p.query_strides.row,
                            queries + r * dim, p.dim);
    visible_keys(p, b, h, tile, std::min(p.keys(b), end),
                 [&](int64_t first, int64_t n, const KeyBits& bits) {
                   for (int64_t j = std::clamp<int64_t>(begin - first, 0, n); j < n; j += CHUNK)
                     step(first + j, std::min(CHUNK, n - j), bits.from(j));
                 });
  }

  void step(int64_t first, int64_t n, const KeyBits& bits) {
    const int64_t kv_head = h / p.group();
    const T* keys = static_cast<const T*>(p.key) + b * p.key_strides.batch +
                    kv_head * p.key_strides.head + first * p.key_strides.row;
    const T* values = static_cast<const T*>(p.value) + b * p.value_strides.batch +
                      kv_head * p.value_strides.head + first * p.value_strides.row;
    by_rows([&](auto count, int64_t r) { dot_products<count>(keys, n, r); });
    for (int64_t r = 0; r < rows; r++) {
      if (p.dropout && column(r) == columns.lo)
        dropout_rows(p, b * p.heads + head(r), columns.query0, first, n, keep);
      if (logits) make_row_logits(r, first, n);
      softmax_row(r, n, bits);
    }
    by_rows([&](auto count, int64_t r) { add_values<count>(values, n, r); });
  }

  // work(N, r) for rows [r, r + N), the last of which may be padding.
  template <typename Work>
  void by_rows(const Work& work) const {
    int64_t r = 0;
    for (; rows - r > 2; r += 4) work(std::integral_constant<int64_t, 4>{}, r);
    if (rows - r == 2) work(std::integral_constant<int64_t, 2>{}, r);
    if (rows - r == 1) work(std::integral_constant<int64_t, 1>{}, r);
  }

  // Partial sums of LANES keys are turned, so that one key's sum needs no reduction across lanes.
  template <int64_t N>
  void dot_products(const T* keys, int64_t n, int64_t r0) {
    float partial[N][LANES * LANES], turned[LANES * LANES];
    for (int64_t j = 0; j < n; j += LANES) {
      for (int64_t x = 0; x < LANES; x++) {
        const T* key = keys + std::min(j + x, n - 1) * p.key_strides.row;
        Vec sum[N];
        for (int64_t r = 0; r < N; r++) sum[r] = Vec(0.f);
        for (int64_t d = 0; d < p.dim; d += LANES) {
          const Vec k = load_floats(key + d, p.dim - d);
          for (int64_t r = 0; r < N; r++)
            sum[r] = at::vec::fmadd(k, Vec::loadu(queries + (r0 + r) * dim + d), sum[r]);
        }
        for (int64_t r = 0; r < N; r++) sum[r].store(partial[r] + x * LANES);
      }
      for (int64_t r = 0; r < N; r++) {
        at::vec::transpose_mxn<float, LANES, LANES>(partial[r], LANES, turned, LANES);
        Vec total = Vec::loadu(turned);
        for (int64_t x = 1; x < LANES; x++) total = total + Vec::loadu(turned + x * LANES);
        total.store(scores + (r0 + r) * CHUNK + j);
      }
    }
  }

  // As make_logits, for one query.
  void make_row_logits(int64_t r, int64_t first, int64_t n) {
    const int64_t c = column(r), own = head(r);
    const Vec scale(p.scale), inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f), outer(p.softcap);
    float* s = scores + r * CHUNK;
    for (int64_t j = 0; j < n; j += LANES) {
      const Vec x = Vec::loadu(s + j);
      (p.softcap > 0.f ? (x * inner).tanh() * outer : x * scale).store(s + j);
    }
    if (p.relative_bias) {
      const float* bias = p.relative_bias + own * (p.relative_size + p.tile_q) + tile * p.tile_q +
                          c + p.kv_len - 1 - first;
      for (int64_t j = 0; j < n; j++) s[j] += bias[-j];
    }
    if (p.dense_bias) {
      const int64_t* stride = p.dense_strides;
      const float* bias = p.dense_bias + b * stride[0] + own * stride[1] +
                          (columns.query0 + c) * stride[2] + first * stride[3];
      for (int64_t j = 0; j < n; j++) s[j] += bias[j * stride[3]];
    }
  }

  // Weights of row r against its running reference m; l and O follow when m moves.
  void softmax_row(int64_t r, int64_t n, const KeyBits& bits) {
    const int64_t c = column(r), whole = whole_vectors(n);
    const float factor = units.product, unit = units.to_base2;
    float* s = scores + r * CHUNK;
    if (bits.masked())
      for (int64_t j = 0; j < n; j++)
        if ((bits(j) >> c & 1) == 0) s[j] = NEG_INF;
    std::fill(s + n, s + whole, NEG_INF);
    Vec top(NEG_INF);
    for (int64_t j = 0; j < whole; j += LANES) top = max_vec(top, Vec::loadu(s + j));
    const float grown = factor * at::vec::vec_reduce_all<float>(max_vec, top);
    if (grown - m[r] > units.lazy) {
      const float shrink = std::exp2((m[r] - grown) * unit);
      l[r] *= shrink;
      scale_row(r, shrink);
      m[r] = grown;
    }
    const Vec shift(m[r] == NEG_INF ? 0.f : m[r]);
    Vec sum(0.f);
    for (int64_t j = 0; j < whole; j += LANES) {
      const Vec x = Vec::loadu(s + j);
      const Vec w =
          exp2_vec(logits ? (x - shift) * Vec(unit) : at::vec::fmsub(x, Vec(factor), shift));
      sum = sum + w;
      w.store(s + j);
    }
    l[r] += sum_lanes(sum);
    if (p.dropout)
      for (int64_t j = 0; j < n; j++)
        if ((keep[j] >> c & 1) == 0) s[j] = 0.f;
  }

  void scale_row(int64_t r, float factor) {  // 0 stays 0, even where a masked key was not finite
    float* row = acc + r * v_dim;
    for (int64_t d = 0; d < v_dim; d++) row[d] = factor == 0.f ? 0.f : row[d] * factor;
  }

  template <int64_t N>
  void add_values(const T* values, int64_t n, int64_t r) {
    int64_t d = 0;
    for (; d + BLOCK * LANES <= p.v_dim; d += BLOCK * LANES) add_block<N, BLOCK>(values, n, r, d);
    for (; d < p.v_dim; d += LANES) add_block<N, 1>(values, n, r, d);
  }

  template <int64_t N, int64_t X>
  void add_block(const T* values, int64_t n, int64_t r0, int64_t d) {
    const float* w = scores + r0 * CHUNK;
    float* to_rows = acc + r0 * v_dim + d;
    Vec sum[N][X];
    for (int64_t r = 0; r < N; r++)
      for (int64_t x = 0; x < X; x++) sum[r][x] = Vec::loadu(to_rows + r * v_dim + x * LANES);
    for (int64_t j = 0; j < n; j++) {
      const T* value = values + j * p.value_strides.row + d;
      for (int64_t x = 0; x < X; x++) {
        const Vec v = load_floats(value + x * LANES, p.v_dim - d - x * LANES);
        for (int64_t r = 0; r < N; r++)
          sum[r][x] = at::vec::fmadd(v, Vec(w[r * CHUNK + j]), sum[r][x]);
      }
    }
    for (int64_t r = 0; r < N; r++)
      for (int64_t x = 0; x < X; x++) sum[r][x].store(to_rows + r * v_dim + x * LANES);
  }

  // Adds a part's sums; rows that see none of its keys keep their bits.
  void merge(const float* part) {
    for (int64_t r = 0; r < rows; r++) {
      const float top = part[r], next = std::max(m[r], top);
      if (top == NEG_INF) continue;
      const float share = top == next ? 1.f : std::exp2((top - next) * units.to_base2);
      if (m[r] != next) {
        const float shrink = std::exp2((m[r] - next) * units.to_base2);
        l[r] *= shrink;
        scale_row(r, shrink);
      }
      l[r] += part[MOST + r] * share;
      m[r] = next;
      const float* from = part + 2 * MOST + r * v_dim;
      float* row = acc + r * v_dim;
      for (int64_t d = 0; d < v_dim; d++) row[d] += share == 0.f ? 0.f : share * from[d];
    }
  }

  void finish() {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = (b * p.heads + head(r)) * p.q_len + columns.query0 + column(r);
      const RowEnd end = end_row(p, head(r), m[r], l[r]);
      to.store(row, end.lse, end.residual);
      scale_row(r, end.factor);
      convert_row(acc + r * v_dim, static_cast<T*>(to.out) + row * p.v_dim, p.v_dim);
    }
  }

  const Problem& p;
  const ForwardOutputs& to;
  const bool logits;
  const Units units;
  const int64_t dim, v_dim;  // padded to whole vectors
  const int64_t heads;       // taken together, from h on
  int64_t b = 0, h = 0, tile = 0, width = 0, rows = 0;
  TileColumns columns{};
  float m[MOST], l[MOST];
  Scratch<float> queries, scores, acc;
  Scratch<uint64_t> keep;
};

}  // namespace flashmark
