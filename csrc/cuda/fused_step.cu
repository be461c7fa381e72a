#include <c10/cuda/CUDAGraphsC10Utils.h>

#include "fused_step.cuh"
#include "gpu.h"

namespace sgdr::cuda {

void fused_step(int8_t gpu, const Step& step) {
  const CurrentGpu current(gpu);
  FilledLaunch args;
  args.grad_scale = step.grad_scale;
  args.found_inf = step.found_inf;
  args.grad_norm = step.grad_norm;
  args.skip_nonfinite = step.skip_nonfinite;
  args.ticket = &step.groups[0].memory->ticket;
  for_each_launch(args, step.groups, step.tensors, [&](const FilledLaunch& filled) {
    with_args_type(filled, [&]<class Args>(std::type_identity<Args>) {
      current.launch(fused_step_kernel<Args>, filled.block_count(), &filled);
    });
  });
}

bool is_capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

}  // namespace sgdr::cuda
