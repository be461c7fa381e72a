#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "fused_step.cuh"
#include "launcher.h"

namespace sgdr {

void fused_step_cuda(int8_t gpu, const CudaStep& step) {
  const c10::cuda::CUDAGuard guard(gpu);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(gpu);
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, gpu));

  LaunchArgs args;
  args.grad_scale = step.grad_scale;
  args.found_inf = step.found_inf;
  args.ticket = &reinterpret_cast<GroupMemory*>(step.groups[0].state)->ticket;
  const auto launch = [&](const LaunchArgs& filled) {
    const uint32_t blocks = block_count(filled, static_cast<uint32_t>(multiprocessors));
    fused_step_kernel<<<blocks, kThreadsPerBlock, 0, stream>>>(filled);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for_each_launch(args, step.groups, step.tensors, step.param_indices, launch);
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace sgdr
