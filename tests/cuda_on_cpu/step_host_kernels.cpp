// The optimizer's kernels for the fake CUDA runtime.
#include "cuda_shim.h"
// After it: the headers need CUDA's words.
#include "cuda/fused_step.cuh"
#include "cuda/grad_norm.cuh"
// Last, it needs both.
#include "host_kernel.h"

namespace sgdr {

HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kNone, kSmallPayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kNone, kMediumPayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kNone, kLargePayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kAverages, kLargePayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kRounding, kLargePayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kMasters, kLargePayload>>));
HOST_KERNEL((fused_step_kernel<LaunchArgs<Extras::kAll, kLargePayload>>));
HOST_KERNEL((grad_norm_kernel<NormArgs<kFewNormTensors>>));
HOST_KERNEL((grad_norm_kernel<NormArgs<kMoreNormTensors>>));
HOST_KERNEL((grad_norm_kernel<NormArgs<kMostNormTensors>>));

}  // namespace sgdr
