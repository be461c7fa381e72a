// From a parameter, its gradient and its state to the entry that a backend takes.
#pragma once

#include <vector>

#include "../backend.h"
#include "../torch/flattener.h"
#include "grad_norm.h"
#include "param_group.h"
#include "state.h"

namespace sgdr {

// The part of a step that one device takes.
struct DeviceStep {
  c10::Device device;
  Flattener flattener;
  std::vector<TensorEntry> entries{};
  std::vector<GroupStep> host_groups{};      // of the CPU
  std::vector<LaunchGroup> launch_groups{};  // of a GPU
  std::vector<ShardedPart> sharded_parts{};  // if a norm is needed
  at::Tensor sum_of_squares{};               // on a GPU, if a norm is needed

  // Calls f, without the GIL if there is work for several threads.
  template <class F>
  auto without_gil(std::span<const TensorEntry> work, F f) {
    if (!cpu::is_worth_threads(work)) return f();
    flattener.keep_alive();
    const py::gil_scoped_release no_gil;
    return f();
  }

  void clear() {
    flattener.clear();
    entries.clear();
    host_groups.clear();
    launch_groups.clear();
    sharded_parts.clear();
  }
};

// Adds the entries of one param group to a device's step.
class Gatherer {
 public:
  // `group_index` is the group's index among those of the device's step. `shard_axes` is
  // sgdr_fused's, or null if no norm is needed.
  Gatherer(DeviceStep& target, const ParamGroup& group, uint32_t group_index, NewState& new_state,
           const py::function* shard_axes);

  // Adds the group's parameter of that index, if it has a gradient. False if a tensor is of a kind
  // that no backend takes.
  bool add(size_t index, const ParamAndState& param);

 private:
  bool is_in_use(Role role) const;
  bool averages_in_this_step() const;
  bool find_or_make(const ParamAndState& param, size_t index, Role role, at::ScalarType dtype,
                    const at::Tensor*& tensor, bool& is_new);
  int64_t count_averaged(const ParamAndState& param, bool is_new);

  DeviceStep& target_;
  const ParamGroup& group_;
  uint32_t group_index_;
  NewState& new_state_;
  const py::function* shard_axes_;
  bool zeroes_new_state_;
};

}  // namespace sgdr
