// Launches the toy kernel as an extension would. Compiled by nvcc and called from Python by ctypes.
#include "toy_kernels.cuh"

using toy::Bug;

extern "C" int toy_launch(float* y, const float* x, float a, int n, float* block_sums, float* total,
                          unsigned* ticket, cudaStream_t stream, int bug) {
  const unsigned blocks = (n + 4 * toy::kThreads - 1) / (4 * toy::kThreads);
  toy::SaxpyArgs args = {y, x, a, n, block_sums, total, ticket, {}, toy::kCanary};
  switch (static_cast<Bug>(bug)) {
    case Bug::kNone:
      toy::saxpy_and_sum_kernel<float, 4><<<blocks, toy::kThreads, 0, stream>>>(args);
      break;
    case Bug::kOutOfBounds:
      toy::saxpy_and_sum_kernel<float, 4, Bug::kOutOfBounds>
          <<<blocks, toy::kThreads, 0, stream>>>(args);
      break;
    case Bug::kDivergentBarrier:
      toy::saxpy_and_sum_kernel<float, 4, Bug::kDivergentBarrier>
          <<<blocks, toy::kThreads, 0, stream>>>(args);
      break;
    default:  // it has no host version
      toy::saxpy_and_sum_kernel<float, 1><<<blocks, toy::kThreads, 0, stream>>>(args);
  }
  args.canary = 0;  // the launch has its own copy
  return cudaGetLastError();
}
