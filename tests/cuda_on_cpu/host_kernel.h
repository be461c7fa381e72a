// Gives the fake CUDA runtime the host version of a kernel: the same source, compiled under
// cuda_shim.h.
//
//   #include "cuda_shim.h"
//   #include "fused_step.cuh"
//   #include "host_kernel.h"
//   HOST_KERNEL((sgdr::fused_step_kernel<float, float, 4>));
//
// The name under which nvcc registers a kernel is its mangled name, and g++ gives the same function
// the same name: it is looked up here from the function's address. So a kernel must have external
// linkage: no anonymous namespace, no static. Compile with fake_cuda.host_kernels(), which has the
// flags that this needs.
#pragma once

#include <dlfcn.h>

#include <array>
#include <tuple>

#include "cuda_shim.h"
#include "fake_cudart.h"

#define HOST_KERNEL(kernel) SHIM_HOST_KERNEL(kernel, __COUNTER__)
#define SHIM_HOST_KERNEL(kernel, number) SHIM_HOST_KERNEL_NUMBERED(kernel, number)
#define SHIM_HOST_KERNEL_NUMBERED(kernel, number) \
  [[maybe_unused]] static const bool shim_host_kernel_##number = ::shim::register_kernel<kernel>()

#pragma GCC visibility push(hidden)
namespace shim {

template <auto kernel>
struct HostVersion;

template <class... Params, void (*kernel)(Params...)>
struct HostVersion<kernel> {
  static constexpr int kParams = sizeof...(Params);
  static constexpr std::array<size_t, kParams> kBytes = {sizeof(Params)...};

  static void run(const FakeLaunch* launched) {
    run(launched, std::index_sequence_for<Params...>());
  }

  template <size_t... i>
  static void run(const FakeLaunch* launched, std::index_sequence<i...>) {
    const auto& [gx, gy, gz] = launched->grid;
    const auto& [bx, by, bz] = launched->block;
    launch(kernel, dim3(gx, gy, gz), dim3(bx, by, bz), launched->shared_bytes,
           *static_cast<const Params*>(launched->args[i])...);
  }
};

// True, so that it can initialise a variable.
template <auto kernel>
bool register_kernel() {
  Dl_info symbol;
  const auto address = reinterpret_cast<void*>(kernel);
  if (dladdr(address, &symbol) == 0 || symbol.dli_saddr != address || symbol.dli_sname == nullptr) {
    std::fprintf(stderr,
                 "host_kernel.h: a kernel has no name to find it by; see the head of the file\n");
    std::abort();
  }
  using Version = HostVersion<kernel>;
  fake_register_kernel(symbol.dli_sname, &Version::run, Version::kParams, Version::kBytes.data());
  return true;
}

}  // namespace shim
#pragma GCC visibility pop
