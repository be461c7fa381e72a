// The part of a step that one device takes.
#pragma once

#include <span>
#include <vector>

#include "../backend.h"
#include "../torch/flattener.h"
#include "python_dict.h"

namespace sgdr {

// Entries whose sums of squares are added up over the same ranks.
struct ShardedPart {
  py::object axes;  // sgdr_fused's shard_axes(param)
  std::vector<size_t> entries;
};

// Calls f, without the GIL if there is work for several threads. The step has to own its tensors
// then.
template <class F>
auto without_gil(std::span<const TensorEntry> work, F f) {
  if (!cpu::is_worth_threads(work)) return f();
  const py::gil_scoped_release no_gil;
  return f();
}

struct DeviceStep {
  c10::Device device;
  Flattener flattener;
  std::vector<TensorEntry> entries{};
  std::vector<GroupStep> host_groups{};      // of the CPU
  std::vector<LaunchGroup> launch_groups{};  // of a GPU
  std::vector<ShardedPart> sharded_parts{};  // if a norm is needed
  at::Tensor grad_scale{};                   // of a GPU: a float, if there is one
  at::Tensor grad_norm{};                    // of a GPU: a cuda::GradNorm, if one is needed

  void clear() {
    flattener.clear();
    entries.clear();
    host_groups.clear();
    launch_groups.clear();
    sharded_parts.clear();
    grad_scale = grad_norm = at::Tensor();
  }
};

}  // namespace sgdr
