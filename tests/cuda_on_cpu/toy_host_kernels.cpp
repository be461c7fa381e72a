// The toy kernel's host version, for the fake CUDA runtime.
#include "cuda_shim.h"
// After it: the header needs CUDA's words.
#include "toy_kernels.cuh"
// Last, it needs both.
#include "host_kernel.h"

HOST_KERNEL((toy::saxpy_and_sum_kernel<float, 4>));
HOST_KERNEL((toy::saxpy_and_sum_kernel<float, 4, toy::Bug::kOutOfBounds>));
HOST_KERNEL((toy::saxpy_and_sum_kernel<float, 4, toy::Bug::kDivergentBarrier>));
