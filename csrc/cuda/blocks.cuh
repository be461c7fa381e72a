// What the kernels' blocks have in common: how they share a launch's chunks, and which is the last.
#pragma once

#include <cstdint>

namespace sgdr {
namespace cuda {

// The last tensor that begins at the chunk or before it: those without elements have none.
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

// The block that draws the last ticket comes after all that the others have read and written: their
// barrier orders it before their fence, the fence before their ticket, and so on back up here. So
// it may write what they have read, and read what they have written. Drawing the last ticket sets
// the ticket to 0 again.
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
