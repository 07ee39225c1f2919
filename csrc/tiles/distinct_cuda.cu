// Equal tiles are stored once: a hash table in global memory whose entries are compared word by
// word, so it is exact. Rows are numbered by first appearance: the same on every run, whatever
// order the threads come in.
#include "../native_cuda.h"
#include "tiles.h"

namespace flashmark {
namespace {

struct Tiles {
  const uint32_t* bits;
  const int64_t* counts;
  int64_t tiles, words, area, buckets, max_tiles;
  unsigned long long* hashes;
  int *table, *lowest, *bucket_of, *rank_of;  // table and lowest by bucket, the others by tile
};

__device__ bool is_partial(const Tiles& t, int64_t x) {
  return t.counts[x] > 0 && t.counts[x] < t.area;
}

__device__ unsigned long long mix(unsigned long long h) {
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ h >> 27) * 0x94d049bb133111ebull;
  return h ^ h >> 31;
}

__global__ void __launch_bounds__(kThreads) hash_kernel(Tiles t) {  // a warp a tile
  const int64_t x = warp_number();
  if (x >= t.tiles || !is_partial(t, x)) return;
  unsigned long long hash = 0;
  for (int64_t k = lane(); k < t.words; k += 32) {
    hash += mix((static_cast<unsigned long long>(k + 1) << 32) + t.bits[x * t.words + k]);
  }
  for (int step = 16; step; step /= 2) hash += __shfl_xor_sync(~0u, hash, step);
  if (lane() == 0) t.hashes[x] = mix(hash);
}

__global__ void __launch_bounds__(kThreads) insert_kernel(Tiles t) {  // a warp a tile
  const int64_t x = warp_number();
  if (x >= t.tiles || !is_partial(t, x)) return;
  const unsigned long long hash = t.hashes[x];
  for (int64_t bucket = hash & (t.buckets - 1);; bucket = (bucket + 1) & (t.buckets - 1)) {
    int owner = 0;
    if (lane() == 0) owner = atomicCAS(t.table + bucket, -1, static_cast<int>(x));
    owner = __shfl_sync(~0u, owner, 0);
    bool same = owner < 0 || t.hashes[owner] == hash;
    if (owner >= 0 && same) {
      for (int64_t k = lane(); k < t.words; k += 32) {
        same &= t.bits[owner * t.words + k] == t.bits[x * t.words + k];
      }
    }
    if (__all_sync(~0u, same)) {
      if (lane() == 0) {
        atomicMin(t.lowest + bucket, static_cast<int>(x));
        t.bucket_of[x] = static_cast<int>(bucket);
      }
      return;
    }
  }
}

__global__ void __launch_bounds__(kThreads) rank_kernel(Tiles t, int64_t* found) {  // one block
  __shared__ int sums[kWarps], carry;
  if (threadIdx.x == 0) carry = 0;
  for (int64_t base = 0; base < t.tiles; base += kThreads) {
    const int64_t x = base + threadIdx.x;
    const bool first = x < t.tiles && is_partial(t, x) && t.lowest[t.bucket_of[x]] == x;
    const int rank = block_scan(first, sums) + carry;
    if (first) t.rank_of[x] = rank - 1;
    __syncthreads();
    if (threadIdx.x == kThreads - 1) carry = rank;
    __syncthreads();
  }
  if (threadIdx.x == 0) *found = carry;
}

__global__ void __launch_bounds__(kThreads)
    gather_kernel(Tiles t, int* classes, uint32_t* tile_bits, int64_t* visible) {
  const int64_t x = warp_number();
  if (x >= t.tiles) return;
  if (!is_partial(t, x)) {
    if (lane() == 0) classes[x] = t.counts[x] ? kFull : kEmpty;
    return;
  }
  const int first = t.lowest[t.bucket_of[x]], row = t.rank_of[first];
  if (lane() == 0) classes[x] = row;
  if (first != x || row >= t.max_tiles) return;
  if (lane() == 0) visible[row] = t.counts[x];
  for (int64_t k = lane(); k < t.words; k += 32)
    tile_bits[row * t.words + k] = t.bits[x * t.words + k];
}

}  // namespace

DistinctTiles distinct_tiles_cuda(const Tensor& packed, const Tensor& visible, int64_t area,
                                  int64_t max_tiles) {
  STD_TORCH_CHECK(max_tiles >= 0, "max_tiles: expected a bound for tensors on a GPU, got ",
                  max_tiles);
  const Tensor bits = dense(packed), counts = dense(visible);
  const DeviceGuard guard(packed.get_device_index());
  const auto stream = current_stream(packed);
  Tiles t{};
  t.bits = in<uint32_t>(bits), t.counts = in<int64_t>(counts);
  t.tiles = bits.size(0), t.words = bits.size(1) * bits.size(2), t.area = area,
  t.max_tiles = max_tiles;
  for (t.buckets = 1; t.buckets < 2 * t.tiles + 1;) t.buckets *= 2;
  const Tensor hashes = allocate({t.tiles}, ScalarType::Long, packed);
  const Tensor table = allocate({t.buckets}, ScalarType::Int, packed);
  const Tensor lowest = allocate({t.buckets}, ScalarType::Int, packed);
  const Tensor numbers = allocate({2, t.tiles}, ScalarType::Int, packed);
  t.hashes = out<unsigned long long>(hashes), t.table = out<int>(table),
  t.lowest = out<int>(lowest);
  t.bucket_of = out<int>(numbers), t.rank_of = t.bucket_of + t.tiles;

  const Tensor classes = allocate({t.tiles}, ScalarType::Int, packed);
  const Tensor tile_bits =
      allocate({max_tiles, bits.size(1), bits.size(2)}, ScalarType::Int, packed);
  const Tensor visible_of_row = allocate({max_tiles}, ScalarType::Long, packed);
  const Tensor found = allocate({1}, ScalarType::Long, packed);
  set_bytes(table, 0xff, stream);   // -1: free
  set_bytes(lowest, 0x7f, stream);  // above every tile
  for (const Tensor* result : {&tile_bits, &visible_of_row, &found}) set_bytes(*result, 0, stream);
  if (t.tiles) {
    const unsigned warps = blocks_for(t.tiles, kWarps);
    hash_kernel<<<warps, kThreads, 0, stream>>>(t);
    insert_kernel<<<warps, kThreads, 0, stream>>>(t);
    rank_kernel<<<1, kThreads, 0, stream>>>(t, out<int64_t>(found));
    gather_kernel<<<warps, kThreads, 0, stream>>>(t, out<int>(classes), out<uint32_t>(tile_bits),
                                                  out<int64_t>(visible_of_row));
    check_launch();
  }
  return {classes, tile_bits, visible_of_row, found};
}

}  // namespace flashmark
