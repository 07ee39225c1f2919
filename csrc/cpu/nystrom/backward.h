// The backward of one part of a sequence and key head: states of its chunks forwards, then
// gradients backwards.
//
// A reverse state (G, g) runs against time, referenced to the chunk's end, rho = L there:
//   dW_il = dO_i . R_l(i),  centre = dW, or W . dW of the row with "mass"
//   G_l = sum_{i later} W_il e^{rho - L_l(i)} dO_i,  g_l likewise with centre_il
//   ds_jl = e^{s_jl - rho} (G_l . v_j - g_l) + sum_{i >= j} W_il e^{s_jl - L_l(i)} (dO_i . v_j -
//   centre_il) dv_j = sum_l e^{s_jl - rho} G_l + sum_{i >= j} sum_l W_il e^{s_jl - L_l(i)} dO_i
#pragma once
#include "nystrom/parts.h"
#include "nystrom/queries.h"

namespace flashmark {

struct ReverseState {  // (G, g)
  explicit ReverseState(const NystromProblem& p) : G(p.marks * p.v_dim), g(p.marks) {}
  std::vector<float> G, g;
};

template <typename T>
class BackwardWalk {
 public:
  BackwardWalk(const NystromProblem& problem, const NystromGradients& gradients)
      : state(problem),
        p(problem),
        x(gradients),
        width(p.width),
        keys(p),
        queries(p),
        G(p.marks * p.v_dim),
        g(p.marks),
        own_G(p.marks * p.v_dim),
        R_t(p.v_dim * width),
        G_t(p.v_dim * width),
        pairs(MAX_CHUNK * MAX_CHUNK),
        between(MAX_CHUNK * MAX_CHUNK),
        square_t(MAX_CHUNK * MAX_CHUNK),
        dW(MAX_CHUNK * width),
        centre(MAX_CHUNK * width),
        ds(MAX_CHUNK * width),
        pulls(MAX_CHUNK * width),
        wide_t(width * MAX_CHUNK),
        value_t(p.v_dim * MAX_CHUNK),
        dvalue(MAX_CHUNK * p.v_dim),
        dkey(MAX_CHUNK * p.dim),
        dquery(MAX_CHUNK * p.dim),
        dF(MAX_CHUNK * width),
        dout_copy(MAX_CHUNK * p.v_dim),
        R(p.marks * p.v_dim) {}

  // Moves `state` over the part, keeping what it was before each chunk.
  void forwards(const Part& part, int64_t h_) {
    b = part.b, h = h_;
    starts.clear();
    for (int64_t first = part.first; first < part.end; first += p.chunk) {
      starts.push_back(state);
      keys.load(b, h, first, std::min(p.chunk, part.end - first), state);
      keys.advance(state);
    }
  }

  // As after `forwards`, from what that left.
  void resume(const Part& part, int64_t h_, std::vector<RunningState>&& starts_,
              const RunningState& end) {
    b = part.b, h = h_;
    starts = std::move(starts_), state = end;
  }

  // All gradients of the part, parameters into sum `sums_`; `behind` is (G, g) at the part's end,
  // null where the sequence ends too.
  void backwards(const Part& part, int64_t sums_, const ReverseState* behind) {
    sums = sums_, only_reverse = false;
    if (behind) {
      std::copy(behind->G.begin(), behind->G.end(), G + 0);
      std::copy(behind->g.begin(), behind->g.end(), g + 0);
    } else {
      start_reverse(part.row);
    }
    steps(part);
    if (part.opens && x.dL0) finish_reverse(part.row);
  }

  // Of (G, g) alone what the part itself adds, at its start.
  void own_reverse(const Part& part) {
    only_reverse = true;
    std::fill(G + 0, G + p.marks * p.v_dim, 0.f);
    std::fill(g + 0, g + p.marks, 0.f);
    steps(part);
  }

  // (G, g) at the start of the part visited last.
  void store_reverse(ReverseState& to) const {
    std::copy_n(G + 0, p.marks * p.v_dim, to.G.begin());
    std::copy_n(g + 0, p.marks, to.g.begin());
  }

  RunningState state;
  std::vector<RunningState> starts;

 private:
  void steps(const Part& part) {
    for (int64_t c = static_cast<int64_t>(starts.size()) - 1; c >= 0; c--) {
      next_R =
          c + 1 < static_cast<int64_t>(starts.size()) ? starts[c + 1].R.data() : state.R.data();
      step(part.first + c * p.chunk, part.end, starts[c]);
    }
  }

  void start_reverse(int64_t row) {
    const int64_t at = (row * p.kv_heads + h) * p.marks;
    for (int64_t l = 0; l < p.marks; l++) {
      float dot = 0.f;
      for (int64_t d = 0; d < p.v_dim; d++) {
        G[l * p.v_dim + d] = x.dR ? x.dR[(at + l) * p.v_dim + d] : 0.f;
        dot += G[l * p.v_dim + d] * state.R[l * p.v_dim + d];
      }
      g[l] = dot - (x.dL ? x.dL[at + l] : 0.f);
    }
  }

  void finish_reverse(int64_t row) {
    const int64_t at = (row * p.kv_heads + h) * p.marks;
    state.load(p, row, h);
    for (int64_t l = 0; l < p.marks; l++) {
      const bool held = state.L[l] != NEG_INF;
      float dot = 0.f;
      for (int64_t d = 0; d < p.v_dim; d++) {
        dot += G[l * p.v_dim + d] * state.R[l * p.v_dim + d];
        x.dR0[(at + l) * p.v_dim + d] = held ? G[l * p.v_dim + d] : 0.f;
      }
      x.dL0[at + l] = held ? dot - g[l] : 0.f;
    }
  }

  // One chunk: all query heads of the group, then the keys; (G, g) moves from its end to its start.
  void step(int64_t first, int64_t end, const RunningState& start) {
    keys.load(b, h, first, std::min(p.chunk, end - first), start);
    const int64_t n = keys.n;
    const bool steep = keys.rise < n;
    const int64_t parameter = p.parameter(b, h);
    queries.weigh_states(keys, p.mass ? p.half + parameter * width : nullptr);
    transpose_words(start.R.data(), p.v_dim, p.marks, p.v_dim, R_t, width);
    for (int64_t d = 0; d < p.v_dim; d++)
      std::fill(R_t + d * width + p.marks, R_t + (d + 1) * width, 0.f);
    transpose_words(keys.values, keys.value_ld, n, p.v_dim, value_t, MAX_CHUNK);
    if (x.ddecay && !only_reverse) decay_of_end();
    std::fill(own_G + 0, own_G + p.marks * p.v_dim, 0.f);
    std::fill(pulls + 0, pulls + n * width, 0.f);
    std::fill(ds + 0, ds + n * width, 0.f);
    std::fill(dvalue + 0, dvalue + n * p.v_dim, 0.f);
    steep_rows.clear();
    for (int64_t head = h * p.group(); head < (h + 1) * p.group(); head++)
      visit_queries(head, first, start, steep);
    if (steep) {
      steep_keys();
    } else {
      key_gradients();
    }
    if (!only_reverse) write_keys(first);
  }

  // dL_end of the chunk is G . R_end - g; time shifts it by decay for each token.
  void decay_of_end() {
    double* to = x.ddecay + sums * p.marks;
    for (int64_t l = 0; l < p.marks; l++) {
      float dot = 0.f;
      for (int64_t d = 0; d < p.v_dim; d++) dot += G[l * p.v_dim + d] * next_R[l * p.v_dim + d];
      to[l] -= static_cast<double>(keys.n) * (static_cast<double>(dot) - g[l]);
    }
  }

  void visit_queries(int64_t head, int64_t first, const RunningState& start, bool steep) {
    const int64_t n = keys.n;
    queries.load(b, head, first, keys);
    const T* from =
        static_cast<const T*>(x.dout) + b * x.dout_strides.batch + head * x.dout_strides.head;
    dout = float_rows<T>(from + first * x.dout_strides.row, x.dout_strides.row, n, p.v_dim, nullptr,
                         dout_copy, dout_ld);
    if (steep) {
      std::copy(start.R.begin(), start.R.end(), R + 0);
      for (int64_t i = 0; i < n; i++) {
        keys.recur_state(i, R);
        for (int64_t l = 0; l < width; l++)
          dW[i * width + l] = l < p.marks ? dot(dout + i * dout_ld, R + l * p.v_dim) : 0.f;
      }
    } else {
      plain_product(n, n, p.v_dim, dout, dout_ld, value_t, MAX_CHUNK, pairs, MAX_CHUNK);
      keep_lower(pairs, n);
      plain_product(n, width, p.v_dim, dout, dout_ld, R_t, width, dW, width);
      plain_product(n, width, n, pairs, MAX_CHUNK, keys.P, width, dW, width, true);
      for (int64_t k = 0; k < n * width; k += LANES)
        (Vec::loadu(dW + k) * Vec::loadu(keys.inverse + k)).store(dW + k);
    }
    centre_rows();
    if (steep) {
      steep_rows.emplace_back();
      SteepRows& rows = steep_rows.back();
      rows.W.assign(queries.W + 0, queries.W + n * width);
      rows.centre.assign(centre + 0, centre + n * width);
      for (int64_t i = 0; i < n; i++)
        rows.dout.insert(rows.dout.end(), dout + i * dout_ld, dout + i * dout_ld + p.v_dim);
    } else {
      pull_on_keys();
    }
    if (!only_reverse) query_gradients(head, first);
  }

  float dot(const float* a, const float* c) const {
    float sum = 0.f;
    for (int64_t d = 0; d < p.v_dim; d++) sum += a[d] * c[d];
    return sum;
  }

  void centre_rows() {
    for (int64_t i = 0; i < keys.n; i++) {
      const float *w = queries.W + i * width, *from = dW + i * width;
      float* to = centre + i * width;
      if (!p.mass) {
        std::copy_n(from, width, to);
        continue;
      }
      float sum = 0.f;
      for (int64_t l = 0; l < p.marks; l++) sum += w[l] * from[l];
      std::fill(to, to + width, sum);
    }
  }

  // What these query rows add to ds, dv and to the reverse state at the chunk's start.
  void pull_on_keys() {
    const int64_t n = keys.n;
    transpose_words(queries.weights, width, n, width, wide_t, MAX_CHUNK);
    plain_product(p.marks, p.v_dim, n, wide_t, MAX_CHUNK, dout, dout_ld, own_G, p.v_dim, true);
    for (int64_t k = 0; k < n * width; k += LANES)
      at::vec::fmadd(Vec::loadu(queries.weights + k), Vec::loadu(centre + k), Vec::loadu(pulls + k))
          .store(pulls + k);
    if (only_reverse) return;
    plain_product(n, n, p.marks, queries.weights, width, keys.P_t, MAX_CHUNK, between, MAX_CHUNK);
    keep_lower(between, n);
    transpose_words(between, MAX_CHUNK, n, n, square_t, MAX_CHUNK);
    plain_product(n, p.v_dim, n, square_t, MAX_CHUNK, dout, dout_ld, dvalue, p.v_dim, true);
    transpose_words(pairs, MAX_CHUNK, n, n, square_t, MAX_CHUNK);
    plain_product(n, width, n, square_t, MAX_CHUNK, queries.weights, width, ds, width, true);
  }

  void key_gradients() {
    const int64_t n = keys.n;
    const float* last = keys.inverse + (n - 1) * width;  // 1 / cum at the end: e^{ref - rho}
    for (int64_t l = 0; l < p.marks; l++) {
      const Vec scale(last[l]);
      float* row = G + l * p.v_dim;
      at::vec::map<float>([scale](Vec v) { return v * scale; }, row, row, p.v_dim);
      g[l] *= last[l];
    }
    if (!only_reverse) {
      transpose_words(G, p.v_dim, p.marks, p.v_dim, G_t, width);
      for (int64_t d = 0; d < p.v_dim; d++)
        std::fill(G_t + d * width + p.marks, G_t + (d + 1) * width, 0.f);
      plain_product(n, width, p.v_dim, keys.values, keys.value_ld, G_t, width, ds, width, true);
      plain_product(n, p.v_dim, p.marks, keys.P, width, G, p.v_dim, dvalue, p.v_dim, true);
    }
    for (int64_t l = 0; l < width; l += LANES) {
      float tail[LANES];
      for (int64_t k = 0; k < LANES; k++) tail[k] = l + k < p.marks ? g[l + k] : 0.f;
      Vec after = Vec::loadu(tail);
      for (int64_t j = n - 1; j >= 0; j--) {
        const int64_t at = j * width + l;
        after = after + Vec::loadu(pulls + at);
        ((Vec::loadu(ds + at) - after) * Vec::loadu(keys.P + at)).store(ds + at);
      }
      after.store(tail);  // g and all pulls of the chunk, referenced to ref
      for (int64_t k = 0; k < LANES && l + k < p.marks; k++) g[l + k] = keys.seen[l + k] * tail[k];
    }
    for (int64_t l = 0; l < p.marks; l++) {
      const Vec held(keys.seen[l]);
      at::vec::map2<float>([held](Vec old, Vec own) { return held * (old + own); }, G + l * p.v_dim,
                           G + l * p.v_dim, own_G + l * p.v_dim, p.v_dim);
    }
  }

  // The reverse recurrence, token after token.
  void steep_keys() {
    for (int64_t i = keys.n - 1; i >= 0; i--) {
      const float* v = keys.values + i * keys.value_ld;
      for (int64_t l = 0; l < p.marks; l++) {
        float* row = G + l * p.v_dim;
        for (const SteepRows& q : steep_rows) {
          const float w = q.W[i * width + l];
          for (int64_t d = 0; d < p.v_dim; d++) row[d] += w * q.dout[i * p.v_dim + d];
          g[l] += w * q.centre[i * width + l];
        }
        const float own = keys.exact.own[i * width + l], fade = keys.exact.fade[i * width + l];
        ds[i * width + l] = own * (dot(row, v) - g[l]);
        for (int64_t d = 0; d < p.v_dim; d++) {
          dvalue[i * p.v_dim + d] += own * row[d];
          row[d] *= fade;
        }
        g[l] *= fade;
      }
    }
  }

  void query_gradients(int64_t head, int64_t first) {
    const int64_t n = keys.n, parameter = p.parameter(b, h);
    if (p.mass) {
      double* decays = x.ddecay ? x.ddecay + sums * p.marks : nullptr;
      for (int64_t i = 0; i < n; i++) {
        for (int64_t l = 0; l < p.marks; l++) {
          const int64_t at = i * width + l;
          const float away = dW[at] - centre[at], dlog = queries.W[at] * away;
          dW[at] = queries.factor[at] * away;
          x.dhalf[sums * width + l] -= dlog;
          if (decays) decays[l] -= static_cast<double>(i + 1) * dlog;
        }
      }
    }
    // dF = dG core^T, dcore = F^T dG
    plain_product(n, width, p.marks, dW, width, p.core_t + parameter * p.marks * width, width, dF,
                  width);
    transpose_words(queries.F, width, n, width, wide_t, MAX_CHUNK);
    plain_product(p.marks, width, n, wide_t, MAX_CHUNK, dW, width, x.dcore + sums * p.marks * width,
                  width, true);
    for (int64_t i = 0; i < n; i++) {
      const float* f = queries.F + i * width;
      float* df = dF + i * width;
      Vec sum(0.f);
      for (int64_t l = 0; l < width; l += LANES)
        sum = at::vec::fmadd(Vec::loadu(f + l), Vec::loadu(df + l), sum);
      const Vec mean(p.mass ? 0.f : sum_lanes(sum));
      for (int64_t l = 0; l < width; l += LANES)
        (Vec::loadu(f + l) * (Vec::loadu(df + l) - mean)).store(df + l);
      if (p.mass)
        for (int64_t l = 0; l < p.marks; l++) x.dhalf[sums * width + l] -= df[l];
    }
    T* to = static_cast<T*>(x.dquery) + ((b * p.heads + head) * p.tokens + first) * p.dim;
    plain_product(n, p.dim, p.marks, dF, width, p.lk + parameter * p.marks * p.dim, p.dim, dquery,
                  p.dim);
    convert_row<float, T>(dquery, to, n * p.dim);
    transpose_words(dF, width, n, width, wide_t, MAX_CHUNK);
    plain_product(p.marks, p.dim, n, wide_t, MAX_CHUNK, queries.queries, queries.query_ld,
                  x.dlk + sums * p.marks * p.dim, p.dim, true);
  }

  void write_keys(int64_t first) {
    const int64_t n = keys.n, parameter = p.parameter(b, h);
    if (x.ddecay) {
      for (int64_t l = 0; l < p.marks; l++) {
        float sum = 0.f;
        for (int64_t j = 0; j < n; j++) sum += static_cast<float>(j + 1) * ds[j * width + l];
        x.ddecay[sums * p.marks + l] += sum;
      }
    }
    plain_product(n, p.dim, p.marks, ds, width, p.lq + parameter * p.marks * p.dim, p.dim, dkey,
                  p.dim);
    transpose_words(ds, width, n, width, wide_t, MAX_CHUNK);
    plain_product(p.marks, p.dim, n, wide_t, MAX_CHUNK, keys.keys, keys.key_ld,
                  x.dlq + sums * p.marks * p.dim, p.dim, true);
    const int64_t row = (b * p.kv_heads + h) * p.tokens + first;
    for (int64_t j = 0; j < n && keys.kept != nullptr; j++) {
      if (keys.kept[j]) continue;
      std::fill(dkey + j * p.dim, dkey + (j + 1) * p.dim, 0.f);
      std::fill(dvalue + j * p.v_dim, dvalue + (j + 1) * p.v_dim, 0.f);
    }
    convert_row<float, T>(dkey, static_cast<T*>(x.dkey) + row * p.dim, n * p.dim);
    convert_row<float, T>(dvalue, static_cast<T*>(x.dvalue) + row * p.v_dim, n * p.v_dim);
  }

  struct SteepRows {  // of one query head
    std::vector<float> W, centre, dout;
  };

  const NystromProblem& p;
  const NystromGradients& x;
  const int64_t width;
  int64_t b = 0, h = 0, sums = 0, dout_ld = 0;
  bool only_reverse = false;
  const float *next_R = nullptr, *dout = nullptr;
  std::vector<SteepRows> steep_rows;
  KeyChunk<T> keys;
  QueryChunk<T> queries;
  Buffer G, g, own_G, R_t, G_t, pairs, between, square_t, dW, centre, ds, pulls, wide_t, value_t;
  Buffer dvalue, dkey, dquery, dF, dout_copy, R;
};

}  // namespace flashmark
