// The norm of all gradients, of plain tensors and of shards that lie on several ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "device_step.h"

namespace sgdr {

// The options that need the norm.
struct Clipping {
  std::optional<double> max_grad_norm;
  bool skip_nonfinite = false;

  bool needs_norm() const { return max_grad_norm.has_value() || skip_nonfinite; }
};

void add_to_part(std::vector<ShardedPart>& parts, py::object axes, size_t entry);

// The sum of the squares of all gradients. sum_over_shards(sum, axes) adds the other ranks' sums to
// a tensor in place.
double sum_of_squared_grads_on_host(DeviceStep& step, const py::function& sum_over_shards);

// The cuda::GradNorm of all gradients in memory of the GPU, without waiting for it.
at::Tensor grad_norm_on_gpu(const DeviceStep& step, const Clipping& clipping,
                            const py::function& sum_over_shards);

}  // namespace sgdr
