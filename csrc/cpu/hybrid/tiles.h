// Many rows of a chunk: tiles of up to 64 of them against blocks of keys, online softmax in base 2.
//
// Scores lie as S^T (keys, W rows), so that maxima, sums and rescaling run along vectors:
// S^T = K Q^T, O^T += V^T P^T. Slots are a block of keys whose logits have log2 n added.
#pragma once
#include "hybrid/far.h"

namespace flashmark {

template <typename T>
class RowTiles {
 public:
  static constexpr int64_t WIDTH = 64, MOST = 256;  // rows of a tile, of a block of rows

  explicit RowTiles(const HybridProblem& problem)
      : p(problem),
        far(p),
        marks(whole_vectors(p.marks)),
        scores(BLOCK * WIDTH),
        mixed(p.merge == Merge::SLOTS ? 0 : p.marks * WIDTH),
        rows(BLOCK * std::max(p.dim, p.v_dim)),
        keys(BLOCK * p.dim),
        values_t(BLOCK * p.v_dim),
        queries_t(MOST * p.dim),
        acc(MOST * p.v_dim),
        distant(p.merge == Merge::SLOTS ? 0 : WIDTH * p.v_dim),
        tops(MOST),
        sums(MOST) {}
  ~RowTiles() { release_products<float>(); }

  void run(const RowBlock& block, void* out) {
    x = &block;
    parameter = p.parameter(x->stream->b, x->kv_head);
    take_queries();
    any_far = far.prepare(x->far, parameter);
    if (any_far && p.merge == Merge::SLOTS) add_slots();
    const Span all{x->near.begin, x->time(p, x->end - 1) + 1};
    for (int64_t begin = all.begin; begin < all.end; begin += BLOCK)
      add_keys({begin, std::min(all.end, begin + BLOCK)});
    if (any_far && p.merge != Merge::SLOTS) transpose_far();
    for (int64_t t = 0; t < tiles; t++) finish(t, out);
  }

 private:
  static constexpr int64_t BLOCK = 256;  // keys at a time

  void take_queries() {
    const int64_t count = x->end - x->begin;
    tiles = (count + WIDTH - 1) / WIDTH;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t n = std::min(WIDTH, count - t * WIDTH);
      width[t] = whole_vectors(n);
      for (int64_t c = 0; c < n; c++)
        convert_row<T, float>(x->query<T>(p, x->begin + t * WIDTH + c), rows + c * p.dim, p.dim);
      std::fill(rows + n * p.dim, rows + width[t] * p.dim, 0.f);
      transpose_words(rows, p.dim, width[t], p.dim, queries_t + t * WIDTH * p.dim, width[t]);
      started[t] = false;
    }
    std::fill_n(tops + 0, MOST, NEG_INF);
    std::fill_n(sums + 0, MOST, 0.f);
  }

  void add_slots() {
    const int64_t n = p.marks;
    for (int64_t l = 0; l < n; l++)
      for (int64_t d = 0; d < p.dim; d++)
        keys[l * p.dim + d] = far.other[l] == 0.f ? 0.f : x->far.K[l * p.dim + d] * far.other[l];
    for (int64_t l = 0; l < n; l++)
      for (int64_t d = 0; d < p.v_dim; d++)
        rows[l * p.v_dim + d] = far.other[l] == 0.f ? 0.f : x->far.V[l * p.v_dim + d] * far.other[l];
    std::fill(rows + n * p.v_dim, rows + marks * p.v_dim, 0.f);
    transpose_words(rows, p.v_dim, marks, p.v_dim, values_t, marks);
    const Vec factor(p.scale * LOG2E);
    for (int64_t t = 0; t < tiles; t++) {
      score(t, n);
      for (int64_t l = 0; l < n; l++) {
        const Vec held(far.held[l]);
        for (int64_t c = 0; c < width[t]; c += LANES) {
          float* at = scores + l * width[t] + c;
          (far.held[l] == NEG_INF ? held : at::vec::fmadd(Vec::loadu(at), factor, held)).store(at);
        }
      }
      add_block(t, n, marks, 1.f);
    }
  }

  void add_keys(Span times) {
    const int64_t n = times.size(), padded = whole_vectors(n);
    gather_rows<T>(p, *x->stream, x->kv_head, false, times, padded, keys);
    gather_rows<T>(p, *x->stream, x->kv_head, true, times, padded, rows);
    transpose_words(rows, p.v_dim, padded, p.v_dim, values_t, padded);
    const bool masked = hidden_keys<T>(p, *x->stream, x->kv_head, times, hidden);
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t first = x->begin + t * WIDTH, last = std::min(first + WIDTH, x->end) - 1;
      const int64_t seen = std::min(n, x->time(p, last) + 1 - times.begin);
      if (seen <= 0) continue;
      score(t, seen);
      hide(t, seen, times.begin, masked);
      add_block(t, seen, padded, p.scale * LOG2E);
    }
  }

  void score(int64_t t, int64_t n) {
    product<float>(whole_vectors(n) > BLOCK ? BLOCK : whole_vectors(n), width[t], p.dim, keys, p.dim,
                   queries_t + t * WIDTH * p.dim, width[t], scores, width[t], false);
  }

  // Keys after a row, and those left out.
  void hide(int64_t t, int64_t n, int64_t key_time, bool masked) {
    const int64_t W = width[t], first = x->begin + t * WIDTH;
    const Vec none(NEG_INF);
    for (int64_t j = 0; j < n; j++) {
      float* row = scores + j * W;
      if (masked && hidden[j]) {
        std::fill_n(row, W, NEG_INF);
        continue;
      }
      const int64_t ahead = (key_time + j - x->tokens.begin) * p.group() - first;
      if (ahead <= 0) continue;
      const uint64_t visible = ahead >= 64 ? 0 : ~uint64_t{0} << ahead;
      for (int64_t c = 0; c < W; c += LANES)
        select_bits(visible, c, Vec::loadu(row + c), none).store(row + c);
    }
  }

  // Rows [0, n) of the scores join the softmax; values_t has `ld` columns.
  void add_block(int64_t t, int64_t n, int64_t ld, float scale) {
    const int64_t W = width[t];
    const Vec factor(scale);
    float shrinks[WIDTH];
    bool moved = false;
    for (int64_t c = 0; c < W; c += LANES) {
      Vec top(NEG_INF);
      for (int64_t j = 0; j < n; j++) top = max_vec(top, Vec::loadu(scores + j * W + c));
      float *m = tops + t * WIDTH + c, *l = sums + t * WIDTH + c;
      const Vec old = Vec::loadu(m), next = max_vec(old, top * factor);
      const Vec shift = Vec::blendv(next, Vec(0.f), next == Vec(NEG_INF));
      // Exactly 1 where the maximum stays: whether others move must change no bit of this row.
      const Vec shrink = Vec::blendv(exp2_vec(old - shift), Vec(1.f), next == old);
      Vec sum = Vec::loadu(l) * shrink;
      for (int64_t j = 0; j < n; j++) {
        float* at = scores + j * W + c;
        const Vec w = exp2_vec(at::vec::fmsub(Vec::loadu(at), factor, shift));
        w.store(at);
        sum = sum + w;
      }
      next.store(m);
      sum.store(l);
      shrink.store(shrinks + c);
      moved |= (next == old).zero_mask() != 0;
    }
    const int64_t padded = whole_vectors(n);
    std::fill(scores + n * W, scores + padded * W, 0.f);
    float* O = acc + t * WIDTH * p.v_dim;
    if (moved && started[t])
      for (int64_t d = 0; d < p.v_dim; d++)
        for (int64_t c = 0; c < W; c += LANES)
          (Vec::loadu(O + d * W + c) * Vec::loadu(shrinks + c)).store(O + d * W + c);
    product<float>(p.v_dim, W, padded, values_t, ld, scores, W, O, W, started[t]);
    started[t] = true;
  }

  // values_t <- V of the far field, (v_dim, marks)
  void transpose_far() {
    std::copy_n(x->far.V, p.marks * p.v_dim, rows + 0);
    std::fill(rows + p.marks * p.v_dim, rows + marks * p.v_dim, 0.f);
    transpose_words(rows, p.v_dim, marks, p.v_dim, values_t, marks);
  }

  // distant (v_dim, W) <- the rows' outputs through the landmarks
  void read(int64_t t, float* references, float* masses) {
    const int64_t W = width[t], M = p.marks;
    const Vec factor(p.scale * LOG2E);
    const bool mass = p.merge == Merge::MASS;
    product<float>(M, W, p.dim, p.lk + parameter * M * p.dim, p.dim,
                   queries_t + t * WIDTH * p.dim, W, scores, W, false);
    for (int64_t c = 0; c < W; c += LANES) {
      Vec top(NEG_INF), sum(0.f);
      for (int64_t l = 0; l < M; l++) {
        Vec s = Vec::loadu(scores + l * W + c) * factor;
        if (mass) s = s - Vec(far.other[l]);
        s.store(scores + l * W + c);
        top = max_vec(top, s);
      }
      for (int64_t l = 0; l < M; l++) {
        const Vec w = exp2_vec(Vec::loadu(scores + l * W + c) - top);
        w.store(scores + l * W + c);
        sum = sum + w;
      }
      (top + Vec(far.top)).store(references + c);
      const Vec share = mass ? Vec(1.f) : Vec(1.f) / sum;
      for (int64_t l = 0; l < M; l++)
        (Vec::loadu(scores + l * W + c) * share).store(scores + l * W + c);
    }
    product<float>(M, W, M, p.core_t + parameter * M * M, M, scores, W, mixed, W, false);
    if (mass) {
      for (int64_t c = 0; c < W; c += LANES) {
        Vec sum(0.f);
        for (int64_t l = 0; l < M; l++) {
          const Vec w = Vec::loadu(mixed + l * W + c) * Vec(far.held[l]);
          w.store(mixed + l * W + c);
          sum = sum + w;
        }
        sum.store(masses + c);
      }
    }
    product<float>(p.v_dim, W, M, values_t, marks, mixed, W, distant, W, false);
  }

  void finish(int64_t t, void* out) {
    const int64_t W = width[t], first = x->begin + t * WIDTH, n = std::min(WIDTH, x->end - first);
    const bool merged = any_far && p.merge != Merge::SLOTS;
    float references[WIDTH], masses[WIDTH], near[WIDTH], other[WIDTH];
    if (merged) read(t, references, masses);
    for (int64_t c = 0; c < W; c++) {
      const float sum = sums[t * WIDTH + c];
      Shares shares{1.f / (sum == 0.f ? 1.f : sum), 0.f};
      if (merged && c < n)
        shares = p.merge == Merge::MASS
                     ? one_denominator(tops[t * WIDTH + c], sum, references[c], masses[c])
                     : gated(gate_of(p, x->stream->b, x->head(p, first + c), x->token(p, first + c)),
                             sum);
      near[c] = shares.near, other[c] = shares.far;
    }
    float* O = acc + t * WIDTH * p.v_dim;
    for (int64_t d = 0; d < p.v_dim; d++) {
      for (int64_t c = 0; c < W; c += LANES) {
        Vec o = Vec::loadu(O + d * W + c) * Vec::loadu(near + c);
        if (merged) {
          const Vec share = Vec::loadu(other + c);
          const Vec from = Vec::blendv(Vec::loadu(distant + d * W + c), Vec(0.f),
                                       share == Vec(0.f));  // dropped: not even its NaN
          o = at::vec::fmadd(from, share, o);
        }
        o.store(O + d * W + c);
      }
    }
    transpose_words(O, W, p.v_dim, W, rows, p.v_dim);
    for (int64_t c = 0; c < n; c++)
      convert_row<float, T>(rows + c * p.v_dim, x->out<T>(p, out, first + c), p.v_dim);
  }

  const HybridProblem& p;
  FarWeights far;
  const RowBlock* x = nullptr;
  const int64_t marks;
  int64_t parameter = 0, tiles = 0, width[MOST / WIDTH];
  bool any_far = false, started[MOST / WIDTH], hidden[BLOCK];
  // (keys, W); (M, W); (keys, D | Dv); (keys, D); (v_dim, keys); (D, W) and (v_dim, W) of each tile
  Scratch<float> scores, mixed, rows, keys, values_t, queries_t, acc, distant, tops, sums;
};

}  // namespace flashmark
