#include "gpu.h"
#include "grad_norm.cuh"

namespace sgdr::cuda {

void sum_of_squared_grads(int8_t gpu, std::span<const TensorEntry> tensors,
                          const NormMemory& memory) {
  const CurrentGpu current(gpu);
  NormArgs args;
  args.chunk_sums = memory.chunk_sums;
  args.sum_of_squares = memory.sum_of_squares;
  args.ticket = memory.ticket;
  for_each_norm_launch(args, tensors, [&](const NormArgs& filled) {
    const uint32_t blocks = block_count(filled, current.multiprocessors);
    sum_of_squared_grads_kernel<<<blocks, kThreadsPerBlock, 0, current.stream>>>(filled);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace sgdr::cuda
