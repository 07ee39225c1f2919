// Elements to bits on a GPU: a block of threads a tile, a ballot a word.
#include "../native_cuda.h"
#include "tiles.h"

namespace flashmark {
namespace {

struct Elements {
  const uint8_t* data;
  int64_t batch_stride, head_stride, row_stride, key_stride, heads, q_len, kv_len, lines, blocks;
  int block_q, block_kv, words;
};

__global__ void __launch_bounds__(kThreads)
    pack_kernel(Elements e, uint32_t* bits, int64_t* counts) {
  __shared__ int visible;
  const int64_t tile = blockIdx.x, block = tile % e.blocks, line = tile / e.blocks % e.lines;
  const int64_t bh = tile / (e.blocks * e.lines);
  const uint8_t* from = e.data + bh / e.heads * e.batch_stride + bh % e.heads * e.head_stride;
  const int items = e.block_q * e.words;
  uint32_t* to = bits + tile * items;
  if (threadIdx.x == 0) visible = 0;
  __syncthreads();
  int mine = 0;
#pragma unroll 4
  for (int item = threadIdx.x / 32; item < items; item += kWarps) {
    const int r = item / e.words, key = item % e.words * 32 + lane();
    const int64_t i = line * e.block_q + r, j = block * e.block_kv + key;
    const bool inside = key < e.block_kv && i < e.q_len && j < e.kv_len;
    const unsigned word = __ballot_sync(~0u, inside && from[i * e.row_stride + j * e.key_stride]);
    if (lane() == 0) {
      to[item] = word;
      mine += __popc(word);
    }
  }
  if (lane() == 0) atomicAdd(&visible, mine);
  __syncthreads();
  if (threadIdx.x == 0) counts[tile] = visible;
}

PackedTiles pack(Elements e, int64_t tiles, const Tensor& like) {
  const DeviceGuard guard(like.get_device_index());
  e.words = static_cast<int>(ceil_div(e.block_kv, 32));
  const Tensor bits = allocate({tiles, e.block_q, e.words}, ScalarType::Int, like);
  const Tensor counts = allocate({tiles}, ScalarType::Long, like);
  if (tiles) {
    const auto stream = current_stream(like);
    pack_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(e, out<uint32_t>(bits),
                                                                       out<int64_t>(counts));
    check_launch();
  }
  return {bits, counts};
}

}  // namespace

PackedTiles pack_dense_cuda(const Tensor& v, int64_t block_q, int64_t block_kv) {
  const int64_t lines = ceil_div(v.size(2), block_q), blocks = ceil_div(v.size(3), block_kv);
  const Elements e{in<uint8_t>(v),
                   v.stride(0),
                   v.stride(1),
                   v.stride(2),
                   v.stride(3),
                   v.size(1),
                   v.size(2),
                   v.size(3),
                   lines,
                   blocks,
                   static_cast<int>(block_q),
                   static_cast<int>(block_kv),
                   0};
  return pack(e, v.size(0) * v.size(1) * lines * blocks, v);
}

PackedTiles pack_tiles_cuda(const Tensor& t) {
  const Elements e{in<uint8_t>(t),
                   t.stride(0),
                   0,
                   t.stride(1),
                   t.stride(2),
                   1,
                   t.size(1),
                   t.size(2),
                   1,
                   1,
                   static_cast<int>(t.size(1)),
                   static_cast<int>(t.size(2)),
                   0};
  return pack(e, t.size(0), t);
}

}  // namespace flashmark
