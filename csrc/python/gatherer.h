// From a parameter, its gradient and its state to the entry that a backend takes.
#pragma once

#include <array>

#include "device_step.h"
#include "grad_norm.h"
#include "new_state.h"
#include "param_group.h"
#include "state.h"

namespace sgdr {

// Adds the entries of one param group to a device's step.
class Gatherer {
 public:
  // `group_index` is the group's index among those of the device's step. `shard_axes` is
  // sgdr_fused's, or null if no norm is needed.
  Gatherer(DeviceStep& target, const ParamGroup& group, uint32_t group_index, NewState& new_state,
           const py::function* shard_axes);

  // Adds the group's parameter of that index, if it has a gradient. False if a tensor is of a kind
  // that no backend takes.
  bool add(size_t index, ParamAndState& param);

 private:
  bool averages_in_this_step() const;
  bool find_or_make(ParamAndState& param, size_t index, Role role, at::ScalarType dtype,
                    const at::Tensor*& tensor, bool& is_new);
  bool is_average_valid(const ParamAndState& param, at::ScalarType dtype) const;
  int64_t count_averaged(ParamAndState& param, bool is_new);

  DeviceStep& target_;
  const ParamGroup& group_;
  uint32_t group_index_;
  NewState& new_state_;
  const py::function* shard_axes_;
  bool zeroes_new_state_;
  std::array<bool, kRoles> is_in_use_;
  std::array<PyObject*, kRoles> stored_{};  // in the state of the parameter that is being added
};

}  // namespace sgdr
