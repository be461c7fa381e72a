// The optimizer's kernel for the fake CUDA runtime.
#include "cuda_shim.h"

#include "cuda/fused_step.cuh"
#include "host_kernel.h"

HOST_KERNEL(sgdr::fused_step_kernel);
