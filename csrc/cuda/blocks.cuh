// What both kernels' blocks share: how they divide a launch's chunks, and which block is the last.
#pragma once

#include <cstdint>

namespace sgdr {
namespace cuda {

// The index of the chunk's tensor. A tensor without elements has no chunk, and begins where the
// next one does; so the last tensor that begins at the chunk or before it is the one.
template <class Args>
__device__ __forceinline__ uint32_t tensor_of_chunk(const Args& args, uint32_t chunk) {
  uint32_t first = 0, last = args.tensor_count - 1;
  while (first < last) {
    const uint32_t middle = (first + last + 1) / 2;
    if (args.tensor(middle).first_chunk <= chunk)
      first = middle;
    else
      last = middle - 1;
  }
  return first;
}

// Whether this block draws the last ticket of the launch. All reads and writes of the other blocks
// come before: a block's barrier orders them before its fence, the fence before its ticket, and
// here the other way round. So the last block may write what others have read, and read what they
// have written. The last draw sets the ticket back to 0.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(ticket, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace cuda
}  // namespace sgdr
