// A grid of tile classes to CSR lists along its lines and, transposed, along its blocks.
#include <algorithm>
#include <atomic>
#include <memory>

#include "tiles.h"

namespace flashmark {
namespace {

struct LineCounts {
  int32_t runs, partials, tiles;
};

FLASHMARK_CLONES LineCounts count_line(const int32_t* line, int64_t blocks) {
  int32_t full = 0, joined = 0, partials = 0;
  for (int64_t k = 0; k < blocks; k++) {
    full += line[k] == kFull;
    partials += line[k] >= 0;
  }
  for (int64_t k = 1; k < blocks; k++) joined += (line[k] == kFull) & (line[k - 1] == kFull);
  return {full - joined, partials, full + partials};
}

// Entries that do not fit the capacity are left out.
void fill_line(const int32_t* line, int64_t blocks, int32_t* runs, int64_t run_room,
               int32_t* partials, int64_t partial_room) {
  int64_t run = -1, partial = 0;
  bool open = false;
  for (int64_t k = 0; k < blocks; k++) {
    const int32_t tile = line[k];
    if (tile == kFull) {
      if (!open && ++run < run_room) {
        runs[2 * run] = static_cast<int32_t>(k);
        runs[2 * run + 1] = 0;
      }
      if (run < run_room) runs[2 * run + 1]++;
    } else if (tile >= 0) {
      if (partial < partial_room) {
        partials[2 * partial] = static_cast<int32_t>(k);
        partials[2 * partial + 1] = tile;
      }
      partial++;
    }
    open = tile == kFull;
  }
}

// Counting sort: lines by falling count, ties in natural order.
void heavy_first(const int32_t* counts, int64_t lines, int64_t blocks, int32_t* order) {
  std::vector<int32_t> place(blocks + 2, 0);
  for (int64_t x = 0; x < lines; x++) place[blocks - counts[x] + 1]++;
  for (int64_t k = 0; k <= blocks; k++) place[k + 1] += place[k];
  for (int64_t x = 0; x < lines; x++) order[place[blocks - counts[x]]++] = static_cast<int32_t>(x);
}

int32_t* ints(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }

void lists_along(const int32_t* grid, const Tensor& like, int64_t batch, int64_t heads,
                 int64_t lines, int64_t blocks, int64_t capacity, std::vector<Tensor>& result) {
  const int64_t leading = batch * heads, total = leading * lines;
  const Tensor run_offsets = allocate({total + 1}, ScalarType::Int, like);
  const Tensor partial_offsets = allocate({total + 1}, ScalarType::Int, like);
  const Tensor counts = allocate({batch, heads, lines}, ScalarType::Int, like);
  const Tensor order = allocate({batch, heads, lines}, ScalarType::Int, like);
  int32_t *run_offset = ints(run_offsets), *partial_offset = ints(partial_offsets),
          *count = ints(counts);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, blocks));
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      const LineCounts found = count_line(grid + x * blocks, blocks);
      run_offset[x + 1] = found.runs;
      partial_offset[x + 1] = found.partials;
      count[x] = found.tiles;
    }
  });
  run_offset[0] = partial_offset[0] = 0;
  for (int64_t x = 0; x < total; x++) {
    run_offset[x + 1] += run_offset[x];
    partial_offset[x + 1] += partial_offset[x];
  }

  const int64_t run_size = capacity < 0 ? run_offset[total] : capacity;
  const int64_t partial_size = capacity < 0 ? partial_offset[total] : capacity;
  const Tensor runs = allocate({run_size, 2}, ScalarType::Int, like);
  const Tensor partials = allocate({partial_size, 2}, ScalarType::Int, like);
  int32_t *run = ints(runs), *partial = ints(partials), *line_order = ints(order);
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++) {
      fill_line(grid + x * blocks, blocks, run + 2 * run_offset[x], run_size - run_offset[x],
                partial + 2 * partial_offset[x], partial_size - partial_offset[x]);
    }
  });
  const int64_t run_end = std::min<int64_t>(run_size, run_offset[total]);
  const int64_t partial_end = std::min<int64_t>(partial_size, partial_offset[total]);
  std::fill(run + 2 * run_end, run + 2 * run_size, 0);
  std::fill(partial + 2 * partial_end, partial + 2 * partial_size, 0);
  torch::stable::parallel_for(0, leading, 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = begin; x < end; x++)
      heavy_first(count + x * lines, lines, blocks, line_order + x * lines);
  });
  result.insert(result.end(), {run_offsets, runs, partial_offsets, partials, counts, order});
}

struct View {  // (leading, lines, blocks) by strides
  int64_t batch, head, line, block;
  explicit View(const Tensor& t)
      : batch(t.stride(0)), head(t.stride(1)), line(t.stride(2)), block(t.stride(3)) {}
  int64_t at(int64_t bh, int64_t heads, int64_t x) const {
    return bh / heads * batch + bh % heads * head + x * line;
  }
};

// The grid and its transpose, a square of tiles at a time.
FLASHMARK_CLONES void transpose_grid(const int32_t* from, int64_t lines, int64_t blocks,
                                     int32_t* to) {
  constexpr int64_t side = 32;
  for (int64_t x0 = 0; x0 < lines; x0 += side) {
    for (int64_t y0 = 0; y0 < blocks; y0 += side) {
      for (int64_t y = y0; y < std::min(blocks, y0 + side); y++) {
        for (int64_t x = x0; x < std::min(lines, x0 + side); x++)
          to[y * lines + x] = from[x * blocks + y];
      }
    }
  }
}

}  // namespace

std::vector<Tensor> tile_lists_cpu(const Tensor& visible, const Tensor& classes, const Tensor& area,
                                   int64_t capacity) {
  const int64_t batch = visible.size(0), heads = visible.size(1), lines = visible.size(2),
                blocks = visible.size(3);
  const int64_t leading = batch * heads, size = lines * blocks;
  const auto grid = std::make_unique_for_overwrite<int32_t[]>(leading * size);
  const auto transposed = std::make_unique_for_overwrite<int32_t[]>(leading * size);
  const auto* seen = static_cast<const uint8_t*>(visible.const_data_ptr());
  const auto* form = static_cast<const int32_t*>(classes.const_data_ptr());
  const Tensor areas = dense(area);
  const auto* area_of = static_cast<const int64_t*>(areas.const_data_ptr()) + 2;
  const View seen_at(visible), form_at(classes);
  std::atomic<int64_t> kept{0}, taken{0};
  torch::stable::parallel_for(0, leading, 1, [&](int64_t begin, int64_t end) {
    int64_t elements = 0, tiles = 0;
    for (int64_t bh = begin; bh < end; bh++) {
      for (int64_t x = 0; x < lines; x++) {
        const uint8_t* s = seen + seen_at.at(bh, heads, x);
        const int32_t* f = form + form_at.at(bh, heads, x);
        int32_t* line = grid.get() + bh * size + x * blocks;
        for (int64_t k = 0; k < blocks; k++) {
          const int32_t tile = s[k * seen_at.block] ? f[k * form_at.block] : kEmpty;
          line[k] = tile;
          tiles += tile > kEmpty;
          if (tile > kEmpty) elements += area_of[tile];
        }
      }
      transpose_grid(grid.get() + bh * size, lines, blocks, transposed.get() + bh * size);
    }
    kept += elements;
    taken += tiles;
  });

  std::vector<Tensor> result;
  lists_along(grid.get(), visible, batch, heads, lines, blocks, capacity, result);
  lists_along(transposed.get(), visible, batch, heads, blocks, lines, capacity, result);
  for (const int64_t number : {kept.load(), taken.load()}) {
    const Tensor scalar = allocate({}, ScalarType::Long, visible);
    *static_cast<int64_t*>(scalar.mutable_data_ptr()) = number;
    result.push_back(scalar);
  }
  return result;
}

}  // namespace flashmark
