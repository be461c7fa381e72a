#include <c10/cuda/CUDAGraphsC10Utils.h>

#include "fused_step.cuh"
#include "gpu.h"

namespace sgdr::cuda {

void fused_step(int8_t gpu, const Step& step) {
  const CurrentGpu current(gpu);
  LaunchArgs args;
  args.grad_scale = step.grad_scale;
  args.found_inf = step.found_inf;
  args.sum_of_squares = step.sum_of_squares;
  args.grad_norm = step.grad_norm;
  args.max_grad_norm = step.max_grad_norm;
  args.skip_nonfinite = step.skip_nonfinite;
  args.ticket = &reinterpret_cast<GroupMemory*>(step.groups[0].state)->ticket;
  const auto launch = [&](const LaunchArgs& filled) {
    const auto kernel = filled.has_extras ? fused_step_kernel<true> : fused_step_kernel<false>;
    kernel<<<block_count(filled, current.multiprocessors), kThreadsPerBlock, 0, current.stream>>>(
        filled);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for_each_launch(args, step.groups, step.tensors, launch);
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace sgdr::cuda
