#include "gpu.h"
#include "grad_norm.cuh"
#include "launcher.h"

namespace sgdr {

void sum_of_squared_grads_cuda(int8_t gpu, const NormStep& step) {
  const CurrentGpu current(gpu);
  NormArgs args;
  args.chunk_sums = step.chunk_sums;
  args.sum_of_squares = step.sum_of_squares;
  args.ticket = step.ticket;
  for_each_norm_launch(args, step.tensors, [&](const NormArgs& filled) {
    const uint32_t blocks = block_count(filled, current.multiprocessors);
    sum_of_squared_grads_kernel<<<blocks, kThreadsPerBlock, 0, current.stream>>>(filled);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace sgdr
