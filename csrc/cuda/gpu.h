// Makes a GPU the current one for as long as the object lives, and launches kernels on it.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "launch.h"

namespace sgdr {

struct CurrentGpu {
  explicit CurrentGpu(int8_t gpu) : guard(gpu), stream(c10::cuda::getCurrentCUDAStream(gpu)) {}

  // On the GPU's current stream. `args` begins with an Args. <<<>>> would copy the argument twice
  // before CUDA copies it.
  template <class Args>
  void launch(void (*kernel)(Args), uint32_t blocks, const void* args) const {
    void* arguments[] = {const_cast<void*>(args)};
    C10_CUDA_CHECK(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                    dim3(kThreadsPerBlock), arguments, 0, stream));
  }

  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

}  // namespace sgdr
