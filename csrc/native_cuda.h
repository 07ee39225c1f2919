// Shared by the CUDA versions: the current stream, errors of a launch, workspaces. Nothing here
// waits for the device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>  // the stable macro is not in torch 2.11

#include "native.h"

namespace flashmark {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

inline void check_launch() { check(cudaGetLastError()); }

inline void set_bytes(const Tensor& tensor, int value, cudaStream_t stream) {
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes) check(cudaMemsetAsync(tensor.mutable_data_ptr(), value, bytes, stream));
}

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

constexpr int kThreads = 256, kWarps = kThreads / 32;

inline unsigned blocks_for(int64_t n, int64_t each) {
  return static_cast<unsigned>(ceil_div(n, each));
}

__device__ inline int lane() { return threadIdx.x & 31; }
__device__ inline int64_t warp_number() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
}

// Inclusive scan of one int a thread over the block; `sums` holds kWarps ints.
__device__ inline int block_scan(int value, int* sums) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, value, step);
    if (lane() >= step) value += other;
  }
  __syncthreads();
  if (lane() == 31) sums[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < static_cast<int>(threadIdx.x / 32); w++) value += sums[w];
  return value;
}

}  // namespace flashmark
