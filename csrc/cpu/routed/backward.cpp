// Queries are taken in chunks as in the forward. For each block that some of them read, tiles of
// gathered rows give
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - Delta), dV += P^T dO, dK += dS^T Q, dQ += dS K
//
// A segment is a run of chunks of one (sample, key head). One worker walks it in order, with a dK
// and dV of its own; those of all segments are then added in order. Segments depend on shapes
// alone: any number of threads gives the same bits. Only how many pairs are under way follows the
// threads, and with it the memory.
#include <atomic>

#include "block_sparse/backward_prepare.h"
#include "routed/piece.h"
#include "shared/schedule.h"

namespace flashmark {
namespace {

// Sums over keys of the segments under way, in float32.
struct KeySums {
  KeySums(const RoutedProblem& problem, int64_t pairs, int64_t segments_)
      : p(problem),
        segments(segments_),
        keys(pairs * segments * p.kv_len * p.dim),
        values(pairs * segments * p.kv_len * p.v_dim),
        touched(pairs * segments * p.blocks) {}

  // Of segment number n; zeros are written when a block is first met.
  void open(int64_t n, int64_t block) {
    uint8_t& known = touched[n * p.blocks + block];
    if (known) return;
    known = 1;
    const int64_t begin = p.opening(block), end = p.opening(block + 1);
    std::fill(dkey(n, begin), dkey(n, end), 0.f);
    std::fill(dvalue(n, begin), dvalue(n, end), 0.f);
  }
  float* dkey(int64_t n, int64_t token) const { return keys + (n * p.kv_len + token) * p.dim; }
  float* dvalue(int64_t n, int64_t token) const {
    return values + (n * p.kv_len + token) * p.v_dim;
  }

  const RoutedProblem& p;
  const int64_t segments;
  Scratch<float> keys, values;
  std::vector<uint8_t> touched;
};

template <typename T, typename C>
class BackwardChunk {
 public:
  BackwardChunk(const RoutedProblem& problem, const BackwardRows& tensors, KeySums& key_sums)
      : p(problem),
        x(tensors),
        sums(key_sums),
        logits(needs_logits(p)),
        group(p.group()),
        dim(padded<C>(p.dim)),
        v_dim(padded<C>(p.v_dim)),
        width(piece_width(p)),
        visits(p),
        keys(p, p.dim),
        queries(p.chunk() * group * dim),
        douts(p.chunk() * group * v_dim),
        dquery(p.chunk() * group * p.dim),
        lse(p.chunk() * group),
        delta(p.chunk() * group),
        key_t(dim * width),
        value_t(v_dim * width),
        copies(width * std::max(dim, v_dim)),
        tile_q(TILE * dim),
        tile_do(TILE * v_dim),
        pairs(PAIRED<C> ? TILE * std::max(p.dim, p.v_dim) : 0),
        scores(TILE * width),
        slopes(TILE * width),
        slope_rows(PAIRED<C> ? TILE * width : 0),
        turned(width * TILE),
        turned_rows(PAIRED<C> ? width * TILE : 0),
        tile_dq(TILE * p.dim) {}
  ~BackwardChunk() { release_products<C>(); }

  // Chunk from query `first_` on, into sums number `segment_`; dsinks (group,) of the segment.
  void run(int64_t b_, int64_t kv_head_, int64_t first_, int64_t segment_, double* dsinks) {
    b = b_, kv_head = kv_head_, first = first_, segment = segment_;
    count = std::min(p.chunk(), p.q_len - first);
    load_rows<T, C>(p, p.query, p.query_strides, b, kv_head, first, count, p.dim, queries);
    load_rows<T, C>(p, x.dout, x.dout_strides, b, kv_head, first, count, p.v_dim, douts);
    std::fill(dquery + 0, dquery + count * group * p.dim, 0.f);
    prepare(dsinks);
    visits.collect(b, kv_head, first, count);
    visits.for_each([&](int64_t block, const int32_t* readers, int64_t n) {
      sums.open(segment, block);
      each_piece(p, b, kv_head, block, [&](const Piece& piece) {
        load(piece);
        // whole tiles first: later queries that read the block move no earlier one to another tile
        for (int64_t r0 = 0; r0 < n * group; r0 += TILE)
          take(piece, readers, r0, std::min(TILE, n * group - r0));
      });
    });
    store();
  }

 private:
  // lse in the unit of the scores, and Delta, of each row.
  void prepare(double* dsinks) {
    const float unit = logits ? 1.f : LOG2E;
    float scratch[2 * 256];
    for (int64_t g = 0; g < group; g++) {
      const int64_t h = kv_head * group + g, row0 = (b * p.heads + h) * p.q_len + first;
      const T* dout = static_cast<const T*>(x.dout) + b * x.dout_strides.batch +
                      h * x.dout_strides.head + first * x.dout_strides.row;
      const T* out = static_cast<const T*>(x.out) + b * x.out_strides.batch +
                     h * x.out_strides.head + first * x.out_strides.row;
      for (int64_t q = 0; q < count; q++) {
        const int64_t row = q * group + g;
        const float own = x.lse[row0 + q];
        // A row that sees nothing weighs 2^(x - inf) = 0.
        lse[row] = own == NEG_INF ? std::numeric_limits<float>::infinity() : own * unit;
        delta[row] = 0.f;
        if (own == NEG_INF) continue;
        delta[row] = row_dot(dout + q * x.dout_strides.row, out + q * x.out_strides.row, p.v_dim,
                             scratch) -
                     (x.dlse ? x.dlse[row0 + q] : 0.f);
        if (p.sinks)
          dsinks[g] -= std::exp(static_cast<double>(p.sinks[h]) - own) * delta[row];
      }
    }
  }

  void load(const Piece& piece) {
    const T* key = static_cast<const T*>(p.key) + b * p.key_strides.batch +
                   kv_head * p.key_strides.head + piece.first * p.key_strides.row;
    const T* value = static_cast<const T*>(p.value) + b * p.value_strides.batch +
                     kv_head * p.value_strides.head + piece.first * p.value_strides.row;
    pack_columns<T, C>(key, p.key_strides.row, 0, piece.n, width, p.dim, key_t, copies);
    pack_columns<T, C>(value, p.value_strides.row, 0, piece.n, width, p.v_dim, value_t, copies);
    keys.load(key, p.key_strides.row, piece);
  }

  void take(const Piece& piece, const int32_t* readers, int64_t r0, int64_t n) {
    const int64_t all = round_up(n, 16);
    tile_rows(readers, group, r0, n, rows);
    gather_rows<C>(queries, dim, rows, n, all, tile_q);
    gather_rows<C>(douts, v_dim, rows, n, all, tile_do);
    product<C>(all, width, dim, tile_q, dim, key_t, width, scores, width, false);
    product<C>(all, width, v_dim, tile_do, v_dim, value_t, width, slopes, width, false);
    logits ? weigh<true>(piece, n) : weigh<false>(piece, n);
    std::fill(scores + n * width, scores + all * width, 0.f);
    std::fill(slopes + n * width, slopes + all * width, 0.f);
    add_to_keys(scores, tile_do, v_dim, p.v_dim, piece.n, all, sums.dvalue(segment, piece.first));
    add_to_keys(slopes, tile_q, dim, p.dim, piece.n, all, sums.dkey(segment, piece.first));
    const C* second;
    if constexpr (PAIRED<C>) {
      convert_row<float, C>(slopes, slope_rows, all * width);
      second = slope_rows;
    } else {
      second = slopes;
    }
    product<C>(all, p.dim, padded<C>(piece.n), second, width, keys.data, keys.ld, tile_dq, p.dim,
               false);
    for (int64_t r = 0; r < n; r++) {
      float* row = dquery + rows[r] * p.dim;
      at::vec::map2<float>([](Vec a, Vec c) { return a + c; }, row, row, tile_dq + r * p.dim,
                           p.dim);
    }
  }

  // to (n keys, size) += weights^T (keys, all) rows (all, size)
  void add_to_keys(const float* from, const C* tile, int64_t ld, int64_t size, int64_t n,
                   int64_t all, float* to) {
    transpose_words(from, width, all, width, turned, TILE);
    if constexpr (PAIRED<C>) {
      convert_row<float, C>(turned, turned_rows, width * TILE);
      pack_rows<C, C>(tile, ld, all, size, pairs);
      product<C>(n, size, all, turned_rows, TILE, pairs, size, to, size, true);
    } else {
      product<C>(n, size, all, turned, TILE, tile, ld, to, size, true);
    }
  }

  // P and dS of the tile, from S and dP.
  template <bool LOGITS>
  void weigh(const Piece& piece, int64_t n) {
    const Vec factor(p.scale * LOG2E), log2e(LOG2E), zero(0.f), one(1.f);
    const Vec inner(p.softcap > 0.f ? p.scale / p.softcap : 0.f);
    for (int64_t r = 0; r < n; r++) {
      const int64_t row = rows[r];
      const uint64_t seen = causal_bits(piece, p.places.position(b, first + row / group));
      const Vec top(lse[row]), rest(delta[row]);
      for (int64_t j = 0; j < width; j += LANES) {
        float *s = scores + r * width + j, *dp = slopes + r * width + j;
        Vec x = Vec::loadu(s), slope = one, w;
        if constexpr (LOGITS) {
          if (p.softcap > 0.f) {
            const Vec t = (x * inner).tanh();
            slope = one - t * t;
            x = t * Vec(p.softcap);
          } else {
            x = x * Vec(p.scale);
          }
          w = exp2_vec((x - top) * log2e);
        } else {
          w = exp2_vec(at::vec::fmsub(x, factor, top));
        }
        slope = w * (Vec::loadu(dp) - rest) * slope;
        if (seen != ~uint64_t{0}) {  // by select: a masked score may be anything
          w = select_bits(seen, j, w, zero);
          slope = select_bits(seen, j, slope, zero);
        }
        w.store(s);
        slope.store(dp);
      }
    }
  }

  void store() {
    const Vec scale(p.scale);
    for (int64_t q = 0; q < count; q++) {
      for (int64_t g = 0; g < group; g++) {
        float* row = dquery + (q * group + g) * p.dim;
        at::vec::map<float>([scale](Vec v) { return v * scale; }, row, row, p.dim);
        convert_row(row, static_cast<T*>(x.dquery) +
                             ((b * p.heads + kv_head * group + g) * p.q_len + first + q) * p.dim,
                    p.dim);
      }
    }
  }

  const RoutedProblem& p;
  const BackwardRows& x;
  KeySums& sums;
  const bool logits;
  const int64_t group, dim, v_dim, width;
  Visits visits;
  RowsOperand<T, C> keys;
  int64_t b = 0, kv_head = 0, first = 0, count = 0, segment = 0;
  int64_t rows[TILE];
  Scratch<C> queries, douts;
  Scratch<float> dquery, lse, delta;
  Scratch<C> key_t, value_t, copies, tile_q, tile_do, pairs;
  Scratch<float> scores, slopes;
  Scratch<C> slope_rows;
  Scratch<float> turned;
  Scratch<C> turned_rows;
  Scratch<float> tile_dq;
};

// dK and dV of the pairs [pair0, pair0 + pairs) from their segments.
template <typename T>
void sum_segments(const RoutedProblem& p, const BackwardRows& x, const KeySums& sums,
                  int64_t pair0, int64_t pairs) {
  const auto add = [&](int64_t n, int64_t block, const auto& part, int64_t size, float factor,
                       T* to, float* total) {
    const int64_t begin = p.opening(block), elements = (p.opening(block + 1) - begin) * size;
    std::fill(total, total + elements, 0.f);
    for (int64_t s = n * sums.segments; s < (n + 1) * sums.segments; s++)
      if (sums.touched[s * p.blocks + block])
        at::vec::map2<float>([](Vec a, Vec c) { return a + c; }, total, total, part(s, begin),
                             elements);
    const Vec scale(factor);
    at::vec::map<float>([scale](Vec v) { return v * scale; }, total, total, elements);
    convert_row(total, to + ((pair0 + n) * p.kv_len + begin) * size, elements);
  };
  at::parallel_for(0, pairs * p.blocks, 1, [&](int64_t first, int64_t last) {
    const Scratch<float> total(p.places.block_size * std::max(p.dim, p.v_dim));
    for (int64_t item = first; item < last; item++) {
      const int64_t n = item / p.blocks, block = item % p.blocks;
      add(n, block, [&](int64_t s, int64_t t) { return sums.dkey(s, t); }, p.dim, p.scale,
          static_cast<T*>(x.dkey), total);
      add(n, block, [&](int64_t s, int64_t t) { return sums.dvalue(s, t); }, p.v_dim, 1.f,
          static_cast<T*>(x.dvalue), total);
    }
  });
}

}  // namespace

template <typename T, typename C>
void block_topk_backward(const RoutedProblem& p, const BackwardRows& x) {
  const int64_t all = p.batch * p.kv_heads, chunks = p.chunks();
  // Enough segments for 16 workers, at most 4: each holds a dK and a dV.
  const int64_t segments = std::clamp<int64_t>(std::min((15 + all) / all, chunks), 1, 4);
  const int64_t at_once =
      std::min<int64_t>(all, (2 * at::get_num_threads() + segments - 1) / segments);
  KeySums sums(p, at_once, segments);
  std::vector<double> dsinks(all * segments * p.group());
  for (int64_t pair0 = 0; pair0 < all; pair0 += at_once) {
    const int64_t pairs = std::min(at_once, all - pair0);
    std::fill(sums.touched.begin(), sums.touched.end(), 0);
    share_items(pairs * segments, [&](const auto& next) {
      BackwardChunk<T, C> worker(p, x, sums);
      for (int64_t item = next(); item >= 0; item = next()) {
        const int64_t pair = pair0 + item / segments, s = item % segments;
        for (int64_t chunk = s * chunks / segments; chunk < (s + 1) * chunks / segments; chunk++)
          worker.run(pair / p.kv_heads, pair % p.kv_heads, chunk * p.chunk(), item,
                     dsinks.data() + (pair0 * segments + item) * p.group());
      }
    });
    sum_segments<T>(p, x, sums, pair0, pairs);
  }
  if (!x.dsinks) return;
  for (int64_t h = 0; h < p.heads; h++) {
    double sum = 0.0;
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t s = 0; s < segments; s++)
        sum += dsinks[((b * p.kv_heads + h / p.group()) * segments + s) * p.group() +
                      h % p.group()];
    x.dsinks[h] = static_cast<float>(sum);
  }
}

template void block_topk_backward<float, float>(const RoutedProblem&, const BackwardRows&);
template void block_topk_backward<Half, float>(const RoutedProblem&, const BackwardRows&);
template void block_topk_backward<BFloat16, float>(const RoutedProblem&, const BackwardRows&);
#if defined(CPU_CAPABILITY_AVX512)
template void block_topk_backward<BFloat16, BFloat16>(const RoutedProblem&, const BackwardRows&);
#endif

}  // namespace flashmark
