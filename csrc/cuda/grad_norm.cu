#include "gpu.h"
#include "grad_norm.cuh"

namespace sgdr::cuda {

void grad_norm(int8_t gpu, const NormStep& step) {
  const CurrentGpu current(gpu);
  FilledNormLaunch args;
  for_each_norm_launch(args, step, [&](const FilledNormLaunch& filled) {
    with_norm_args_type(filled, [&]<class Args>(std::type_identity<Args>) {
      current.launch(grad_norm_kernel<Args>, block_count(filled), &filled);
    });
  });
}

}  // namespace sgdr::cuda
