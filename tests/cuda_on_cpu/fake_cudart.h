// How a library gives the fake CUDA runtime (fake_cudart.cpp) host versions of kernels.
#pragma once

#include <cstddef>

extern "C" {

// A launch as the host version of a kernel sees it. args[i] points to a copy of the i-th argument,
// made at the launch.
struct FakeLaunch {
  const char* kernel;  // the mangled name
  unsigned grid[3], block[3];
  size_t shared_bytes;
  void** args;
};

// `name` is the kernel's mangled name, or a part of it: the whole name goes before a part, a longer
// part before a shorter. What `run` throws becomes cudaErrorLaunchFailure, which sticks, as on a
// GPU.
void fake_register_kernel(const char* name, void (*run)(const FakeLaunch*), int n_args,
                          const size_t* arg_bytes);
}
