// Runs the toy kernel under the shim: toy_main BUG(a number) SEEDS N. Exit status 0 if every seed
// gave the right result.
#include "cuda_shim.h"
// After it: the header needs CUDA's words.
#include "toy_kernels.cuh"

namespace {

using toy::Bug;
using Kernel = void (*)(toy::SaxpyArgs);

template <unsigned char... bug>
Kernel kernel_with(unsigned char wanted, std::integer_sequence<unsigned char, bug...>) {
  Kernel kernel = nullptr;
  ((bug == wanted ? void(kernel = &toy::saxpy_and_sum_kernel<float, 4, Bug{bug}>) : void()), ...);
  return kernel;
}

bool run_once(Kernel kernel, int n) {
  const unsigned per_block = 4 * toy::kThreads, blocks = (n + per_block - 1) / per_block;
  std::vector<float> x(n), y(n), block_sums(blocks);
  for (int i = 0; i < n; ++i) x[i] = i % 7, y[i] = i % 5;
  float total = -1, expected = 0;
  for (int i = 0; i < n; ++i) expected += y[i] + 2 * x[i];
  unsigned ticket = 0;
  toy::SaxpyArgs args = {y.data(), x.data(), 2.0f, n,           block_sums.data(),
                         &total,   &ticket,  {},   toy::kCanary};
  shim::launch(kernel, blocks, toy::kThreads, 0, args);
  for (int i = 0; i < n; ++i) {
    if (y[i] != i % 5 + 2.0f * (i % 7)) return false;
  }
  return total == expected && ticket == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int bug = argc > 1 ? std::atoi(argv[1]) : 0, seeds = argc > 2 ? std::atoi(argv[2]) : 1;
  const int n = argc > 3 ? std::atoi(argv[3]) : 1003;
  const Kernel kernel = kernel_with(bug, std::make_integer_sequence<unsigned char, 13>());
  int wrong = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    shim::config.seed = seed;
    try {
      wrong += !run_once(kernel, n);
    } catch (const shim::KernelError& error) {
      std::printf("seed %d: %s\n", seed, error.what());
      return 2;
    }
  }
  std::printf("%d of %d seeds gave a wrong result\n", wrong, seeds);
  return wrong != 0;
}
