// The optimizer's kernel for the fake CUDA runtime.
#include "cuda_shim.h"
// After it: the header needs CUDA's words.
#include "cuda/fused_step.cuh"
// Last, it needs both.
#include "host_kernel.h"

HOST_KERNEL(sgdr::fused_step_kernel);
