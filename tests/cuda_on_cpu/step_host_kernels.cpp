// The optimizer's kernels for the fake CUDA runtime.
#include "cuda_shim.h"
// After it: the headers need CUDA's words.
#include "cuda/fused_step.cuh"
#include "cuda/grad_norm.cuh"
// Last, it needs both.
#include "host_kernel.h"

HOST_KERNEL(sgdr::fused_step_kernel<false>);
HOST_KERNEL(sgdr::fused_step_kernel<true>);
HOST_KERNEL(sgdr::sum_of_squared_grads_kernel);
