// Queries are taken in chunks, whose sums stay in cache. For each block that some of them read, in
// ascending order, their rows are gathered into tiles: S = Q K^T, an online softmax in base 2
// against each row's own reference, O = P V, which is added to the row's sum.
//
// What a row gets depends on its own query and blocks alone, not on the rows beside it.
#include "routed/piece.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

template <typename T, typename C>
class ForwardChunk {
 public:
  ForwardChunk(const RoutedProblem& problem, const ForwardOutputs& outputs)
      : p(problem),
        to(outputs),
        logits(needs_logits(p)),
        units(p),
        group(p.group()),
        dim(padded<C>(p.dim)),
        width(piece_width(p)),
        visits(p),
        values(p, p.v_dim),
        queries(p.chunk() * group * dim),
        acc(p.chunk() * group * p.v_dim),
        m(p.chunk() * group),
        l(p.chunk() * group),
        key_t(dim * width),
        key_rows(width * dim),
        tile_q(TILE * dim),
        scores(TILE * width),
        weights(PAIRED<C> ? TILE * width : 0),
        tile_out(TILE * p.v_dim) {}
  ~ForwardChunk() { release_products<C>(); }

  void run(int64_t b_, int64_t kv_head_, int64_t first_) {
    b = b_, kv_head = kv_head_, first = first_;
    count = std::min(p.chunk(), p.q_len - first);
    const int64_t rows = count * group;
    load_rows<T, C>(p, p.query, p.query_strides, b, kv_head, first, count, p.dim, queries);
    std::fill(acc + 0, acc + rows * p.v_dim, 0.f);
    std::fill(m + 0, m + rows, NEG_INF);
    std::fill(l + 0, l + rows, 0.f);
    visits.collect(b, kv_head, first, count);
    visits.for_each([&](int64_t block, const int32_t* readers, int64_t n) {
      each_piece(p, b, kv_head, block, [&](const Piece& piece) {
        load(piece);
        each_tile(n * group, [&](int64_t r0, int64_t size) {
          take(piece, readers, r0, size);
        });
      });
    });
    finish();
  }

 private:
  void load(const Piece& piece) {
    const T* key = static_cast<const T*>(p.key) + b * p.key_strides.batch +
                   kv_head * p.key_strides.head + piece.first * p.key_strides.row;
    const T* value = static_cast<const T*>(p.value) + b * p.value_strides.batch +
                     kv_head * p.value_strides.head + piece.first * p.value_strides.row;
    pack_columns<T, C>(key, p.key_strides.row, 0, piece.n, width, p.dim, key_t, key_rows);
    values.load(value, p.value_strides.row, piece);
  }

  void take(const Piece& piece, const int32_t* readers, int64_t r0, int64_t n) {
    const int64_t all = round_up(n, 8);
    tile_rows(readers, group, r0, n, rows);
    gather_rows<C>(queries, dim, rows, n, all, tile_q);
    product<C>(all, width, dim, tile_q, dim, key_t, width, scores, width, false);
    switch (width) {
      case 16: weigh<16 / LANES>(piece, n); break;
      case 32: weigh<32 / LANES>(piece, n); break;
      case 48: weigh<48 / LANES>(piece, n); break;
      default: weigh<PIECE / LANES>(piece, n);
    }
    const C* second;
    if constexpr (PAIRED<C>) {
      second = weights;
    } else {
      second = scores;
    }
    product<C>(all, p.v_dim, padded<C>(piece.n), second, width, values.data, values.ld, tile_out,
               p.v_dim, false);
    for (int64_t r = 0; r < n; r++) add(acc + rows[r] * p.v_dim, tile_out + r * p.v_dim, alpha[r]);
  }

  // Weights of the tile's rows against their references m; alpha and l follow when m moves.
  template <int64_t V>
  void weigh(const Piece& piece, int64_t n) {
    const float factor = units.product, unit = units.to_base2;
    const Vec hidden(NEG_INF), inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f);
    for (int64_t r = 0; r < n; r++) {
      const int64_t row = rows[r];
      float* s = scores + r * width;
      const uint64_t seen = causal_bits(piece, p.places.position(b, first + row / group));
      Vec x[V];
      for (int64_t v = 0; v < V; v++) {
        x[v] = Vec::loadu(s + v * LANES);
        if (logits)
          x[v] = p.softcap > 0.f ? (x[v] * inner).tanh() * Vec(p.softcap) : x[v] * Vec(p.scale);
      }
      if (seen != all_keys)
        for (int64_t v = 0; v < V; v++) x[v] = select_bits(seen, v * LANES, x[v], hidden);
      Vec top = x[0];
      for (int64_t v = 1; v < V; v++) top = max_vec(top, x[v]);
      const float grown = factor * at::vec::vec_reduce_all<float>(max_vec, top);
      alpha[r] = 1.f;
      if (grown - m[row] > units.lazy) {
        alpha[r] = std::exp2((m[row] - grown) * unit);
        l[row] *= alpha[r];
        m[row] = grown;
      }
      const Vec shift(m[row] == NEG_INF ? 0.f : m[row]);
      Vec sum(0.f);
      for (int64_t v = 0; v < V; v++) {
        const Vec w = exp2_vec(logits ? (x[v] - shift) * Vec(unit)
                                      : at::vec::fmsub(x[v], Vec(factor), shift));
        sum = sum + w;
        if constexpr (PAIRED<C>) {
#if defined(CPU_CAPABILITY_AVX512)
          store_row(weights + r * width + v * LANES, round_bfloat16(w));
#endif
        } else {
          w.store(s + v * LANES);
        }
      }
      l[row] += sum_lanes(sum);
    }
  }

  // row <- factor row + more
  void add(float* row, const float* more, float factor) const {
    const Vec scale(factor);
    int64_t d = 0;
    for (; d + LANES <= p.v_dim; d += LANES)
      at::vec::fmadd(Vec::loadu(row + d), scale, Vec::loadu(more + d)).store(row + d);
    for (; d < p.v_dim; d++) row[d] = std::fma(row[d], factor, more[d]);
  }

  void finish() {
    for (int64_t g = 0; g < group; g++) {
      const int64_t h = kv_head * group + g, row0 = (b * p.heads + h) * p.q_len + first;
      for (int64_t q = 0; q < count; q++) {
        const int64_t row = q * group + g;
        const RowEnd end = end_row(p, h, m[row], l[row]);
        to.store(row0 + q, end.lse, end.residual);
        float* sum = acc + row * p.v_dim;
        const Vec factor(end.factor);
        at::vec::map<float>([factor](Vec x) { return x * factor; }, sum, sum, p.v_dim);
        convert_row(sum, static_cast<T*>(to.out) + (row0 + q) * p.v_dim, p.v_dim);
      }
    }
  }

  static constexpr uint64_t all_keys = ~uint64_t{0};
  const RoutedProblem& p;
  const ForwardOutputs& to;
  const bool logits;
  const Units units;
  const int64_t group, dim, width;
  Visits visits;
  RowsOperand<T, C> values;
  int64_t b = 0, kv_head = 0, first = 0, count = 0;
  int64_t rows[TILE];
  float alpha[TILE];
  Scratch<C> queries;
  Scratch<float> acc, m, l;
  Scratch<C> key_t, key_rows, tile_q;
  Scratch<float> scores;
  Scratch<C> weights;
  Scratch<float> tile_out;
};

}  // namespace

template <typename T, typename C>
void block_topk_forward(const RoutedProblem& p, const ForwardOutputs& to) {
  const int64_t chunks = p.chunks();
  share_items(p.batch * p.kv_heads * chunks, [&](const auto& next) {
    ForwardChunk<T, C> worker(p, to);
    for (int64_t x = next(); x >= 0; x = next())
      worker.run(x / chunks / p.kv_heads, x / chunks % p.kv_heads, x % chunks * p.chunk());
  });
}

template void block_topk_forward<float, float>(const RoutedProblem&, const ForwardOutputs&);
template void block_topk_forward<Half, float>(const RoutedProblem&, const ForwardOutputs&);
template void block_topk_forward<BFloat16, float>(const RoutedProblem&, const ForwardOutputs&);
#if defined(CPU_CAPABILITY_AVX512)
template void block_topk_forward<BFloat16, BFloat16>(const RoutedProblem&, const ForwardOutputs&);
#endif

}  // namespace flashmark
