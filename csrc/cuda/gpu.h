// Makes a GPU the current one for as long as the object lives.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace sgdr {

struct CurrentGpu {
  explicit CurrentGpu(int8_t gpu) : guard(gpu), stream(c10::cuda::getCurrentCUDAStream(gpu)) {
    int count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, gpu));
    multiprocessors = static_cast<uint32_t>(count);
  }

  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;  // the GPU's current stream
  uint32_t multiprocessors;
};

}  // namespace sgdr
