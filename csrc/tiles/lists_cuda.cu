// A grid of tile classes to CSR lists on a GPU: a warp a line, ballots for the places, one block
// for the offsets.
#include "../native_cuda.h"
#include "tiles.h"

namespace flashmark {
namespace {

struct Grid {
  const uint8_t* visible;
  const int* classes;
  const int64_t* area;
  int64_t v_stride[4], c_stride[4], heads, lines, blocks, size;
};

// The classes of visible tiles, line by line and block by block; what they hold is counted.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Grid g, int* rows, int* cols, unsigned long long* totals) {
  const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int tile = kEmpty;
  if (x < g.size) {
    const int64_t k = x % g.blocks, line = x / g.blocks % g.lines, bh = x / (g.blocks * g.lines);
    const int64_t b = bh / g.heads, h = bh % g.heads;
    if (g.visible[b * g.v_stride[0] + h * g.v_stride[1] + line * g.v_stride[2] +
                  k * g.v_stride[3]]) {
      tile = g.classes[b * g.c_stride[0] + h * g.c_stride[1] + line * g.c_stride[2] +
                       k * g.c_stride[3]];
    }
    rows[x] = tile;
    cols[(bh * g.blocks + k) * g.lines + line] = tile;
  }
  unsigned long long elements = tile > kEmpty ? g.area[tile + 2] : 0;
  for (int step = 16; step; step /= 2) elements += __shfl_xor_sync(~0u, elements, step);
  const int taken = __popc(__ballot_sync(~0u, tile > kEmpty));
  if (lane() == 0 && taken) {
    atomicAdd(totals, elements);
    atomicAdd(totals + 1, static_cast<unsigned long long>(taken));
  }
}

struct Lines {
  const int* grid;
  int64_t total, lines, blocks, capacity;
  int *run_offsets, *runs, *partial_offsets, *partials, *counts, *order;
};

__device__ int class_at(const Lines& l, int64_t x, int64_t k) {
  return k < l.blocks ? l.grid[x * l.blocks + k] : kEmpty;
}

__global__ void __launch_bounds__(kThreads) count_kernel(Lines l) {
  const int64_t x = warp_number();
  if (x >= l.total) return;
  int runs = 0, partials = 0, tiles = 0;
  unsigned before = 0;  // whether the last tile of the 32 before is FULL
  for (int64_t k = 0; k < l.blocks; k += 32) {
    const int tile = class_at(l, x, k + lane());
    const unsigned full = __ballot_sync(~0u, tile == kFull),
                   partial = __ballot_sync(~0u, tile >= 0);
    runs += __popc(full & ~(full << 1 | before));
    partials += __popc(partial);
    tiles += __popc(full | partial);
    before = full >> 31;
  }
  if (lane() == 0) {
    l.run_offsets[x + 1] = runs;
    l.partial_offsets[x + 1] = partials;
    l.counts[x] = tiles;
  }
}

__global__ void __launch_bounds__(kThreads) scan_kernel(Lines l) {  // one block a list
  __shared__ int sums[kWarps], carry;
  int* offsets = blockIdx.x ? l.partial_offsets : l.run_offsets;
  if (threadIdx.x == 0) carry = offsets[0] = 0;
  for (int64_t base = 0; base < l.total; base += kThreads) {
    const int64_t x = base + threadIdx.x;
    const int value = block_scan(x < l.total ? offsets[x + 1] : 0, sums) + carry;
    if (x < l.total) offsets[x + 1] = value;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) carry = value;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) fill_kernel(Lines l) {
  const int64_t x = warp_number();
  if (x >= l.total) return;
  int run = l.run_offsets[x], partial = l.partial_offsets[x], open_at = 0;
  unsigned before = 0;
  const unsigned below = (1u << lane()) - 1;
  for (int64_t k0 = 0; k0 < l.blocks; k0 += 32) {
    const int k = static_cast<int>(k0) + lane(), tile = class_at(l, x, k);
    const unsigned full = __ballot_sync(~0u, tile == kFull), some = __ballot_sync(~0u, tile >= 0);
    const unsigned starts = full & ~(full << 1 | before), up_to = starts & (below << 1 | 1);
    if (tile == kFull && class_at(l, x, k + 1) != kFull) {  // the end of a run
      const int first = up_to ? static_cast<int>(k0) + 31 - __clz(up_to) : open_at;
      const int place = run + __popc(up_to) - 1;
      if (place < l.capacity) {
        l.runs[2 * place] = first;
        l.runs[2 * place + 1] = k + 1 - first;
      }
    }
    if (tile >= 0) {
      const int place = partial + __popc(some & below);
      if (place < l.capacity) {
        l.partials[2 * place] = k;
        l.partials[2 * place + 1] = tile;
      }
    }
    if (starts) open_at = static_cast<int>(k0) + 31 - __clz(starts);
    run += __popc(starts);
    partial += __popc(some);
    before = full >> 31;
  }
}

// Heavy lines first: a line's place is the number of lines before it.
__global__ void __launch_bounds__(kThreads) order_kernel(Lines l) {
  __shared__ int others[kThreads];
  const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                start = blockIdx.y * l.lines;
  const int mine = x < l.lines ? l.counts[start + x] : 0;
  int place = 0;
  for (int64_t base = 0; base < l.lines; base += kThreads) {
    const int64_t y = base + threadIdx.x;
    __syncthreads();
    others[threadIdx.x] = y < l.lines ? l.counts[start + y] : -1;
    __syncthreads();
    for (int n = 0; n < kThreads; n++)
      place += others[n] > mine || (others[n] == mine && base + n < x);
  }
  if (x < l.lines) l.order[start + place] = static_cast<int>(x);
}

void lists_along(const Tensor& grid, int64_t batch, int64_t heads, int64_t lines, int64_t blocks,
                 int64_t capacity, cudaStream_t stream, std::vector<Tensor>& result) {
  const int64_t total = batch * heads * lines;
  const auto ints = [&](std::vector<int64_t> sizes) {
    return allocate(sizes, ScalarType::Int, grid);
  };
  const Tensor run_offsets = ints({total + 1}), runs = ints({capacity, 2}),
               partial_offsets = ints({total + 1});
  const Tensor partials = ints({capacity, 2}), counts = ints({batch, heads, lines}),
               order = ints({batch, heads, lines});
  const Lines l{in<int>(grid),
                total,
                lines,
                blocks,
                capacity,
                out<int>(run_offsets),
                out<int>(runs),
                out<int>(partial_offsets),
                out<int>(partials),
                out<int>(counts),
                out<int>(order)};
  set_bytes(runs, 0, stream);
  set_bytes(partials, 0, stream);
  const unsigned warps = blocks_for(total, kWarps);
  if (total) count_kernel<<<warps, kThreads, 0, stream>>>(l);
  scan_kernel<<<2, kThreads, 0, stream>>>(l);
  if (total) {
    fill_kernel<<<warps, kThreads, 0, stream>>>(l);
    const dim3 shape(blocks_for(lines, kThreads), static_cast<unsigned>(batch * heads));
    order_kernel<<<shape, kThreads, 0, stream>>>(l);
  }
  check_launch();
  result.insert(result.end(), {run_offsets, runs, partial_offsets, partials, counts, order});
}

}  // namespace

std::vector<Tensor> tile_lists_cuda(const Tensor& visible, const Tensor& classes,
                                    const Tensor& area, int64_t capacity) {
  STD_TORCH_CHECK(capacity >= 0, "capacity: expected a bound for tensors on a GPU, got ", capacity);
  const int64_t batch = visible.size(0), heads = visible.size(1), lines = visible.size(2),
                blocks = visible.size(3);
  STD_TORCH_CHECK(batch * heads < 65536, "visible: expected fewer than 65536 heads in all, got ",
                  batch * heads);
  const DeviceGuard guard(visible.get_device_index());
  const auto stream = current_stream(visible);
  const Tensor areas = dense(area);
  Grid g{in<uint8_t>(visible),
         in<int>(classes),
         in<int64_t>(areas),
         {},
         {},
         heads,
         lines,
         blocks,
         batch * heads * lines * blocks};
  for (int d = 0; d < 4; d++) {
    g.v_stride[d] = visible.stride(d);
    g.c_stride[d] = classes.stride(d);
  }
  const Tensor rows = allocate({g.size}, ScalarType::Int, visible),
               cols = allocate({g.size}, ScalarType::Int, visible);
  const Tensor kept = allocate({}, ScalarType::Long, visible),
               taken = allocate({}, ScalarType::Long, visible);
  const Tensor totals = allocate({2}, ScalarType::Long, visible);
  set_bytes(totals, 0, stream);
  if (g.size) {
    combine_kernel<<<blocks_for(g.size, kThreads), kThreads, 0, stream>>>(
        g, out<int>(rows), out<int>(cols), out<unsigned long long>(totals));
    check_launch();
  }
  const auto* total = in<int64_t>(totals);
  check(cudaMemcpyAsync(out<int64_t>(kept), total, 8, cudaMemcpyDeviceToDevice, stream));
  check(cudaMemcpyAsync(out<int64_t>(taken), total + 1, 8, cudaMemcpyDeviceToDevice, stream));
  std::vector<Tensor> result;
  lists_along(rows, batch, heads, lines, blocks, capacity, stream, result);
  lists_along(cols, batch, heads, blocks, lines, capacity, stream, result);
  result.push_back(kept);
  result.push_back(taken);
  return result;
}

}  // namespace flashmark
