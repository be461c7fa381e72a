// One optimizer's step: reads param_groups and state, runs a backend, writes the schedule back.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "gatherer.h"
#include "grad_norm.h"
#include "groups_before.h"
#include "new_state.h"
#include "param_group.h"
#include "state.h"
#include "step_lock.h"

namespace sgdr {

// The parts of a step that are written in Python.
struct PythonFunctions {
  // check_groups(param_groups) makes each group's params a list; raises for what is no param group.
  py::function check_groups;
  // sync_group(param_group, device_state, state) checks a group whose items changed and brings its
  // lr up to date. Returns the group's DeviceState, or None if its state is on the host.
  py::function sync_group;
  // shard_axes(param) tells over which ranks a parameter is cut into parts, or None.
  py::function shard_axes;
  // sum_over_shards(sum, axes) adds the other ranks' sums in place.
  py::function sum_over_shards;
};

class Stepper {
 public:
  // local_tensor(tensor, param) gives the plain tensor behind a tensor subclass, or None.
  Stepper(std::shared_ptr<StepLock> lock, py::function check_groups, py::function sync_group,
          py::function local_tensor, py::function shard_axes, py::function sum_over_shards);
  Stepper(const Stepper&) = delete;
  Stepper& operator=(const Stepper&) = delete;

  // Takes over what has changed in the groups and their state since the last step.
  void sync(const py::object& param_groups, const py::object& state);

  // No limit if max_grad_norm is None.
  void set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite);

  // The norm at the last step before clipping: a float, a tensor on a GPU, or None.
  py::object grad_norm() const { return grad_norm_; }

  // grad_scale and found_inf are numbers, tensors of one element, or None. Returns false, having
  // written nothing, if a tensor is of a kind that no native backend takes.
  bool step(const py::object& param_groups, const py::object& state, const py::object& grad_scale,
            const py::object& found_inf);

  // Updates one parameter, by its index among those of all groups, and leaves the schedule where it
  // is. Returns like step().
  bool step_param(const py::object& param_groups, const py::object& state, size_t index);

 private:
  struct RunningStep;

  void sync_groups(const py::object& param_groups, const py::object& state);
  bool are_current(const py::object& param_groups) const;
  void sync_group(ParamGroup& group, const py::object& dict, const py::object& state);
  bool is_all_on_gpus() const;
  bool gather(PyObject* state);
  bool gather_group(size_t group, std::span<ParamAndState> params, size_t first, bool advances);
  void own();
  DeviceStep& device_step_of(const at::Tensor& memory);
  void drop_unused_gpus();
  std::optional<double> norm(double grad_scale);
  void run(const py::object& found_inf, double grad_scale, double clip_coefficient);
  void run_on_host(double grad_scale, double clip_coefficient);
  void run_on_gpu(const DeviceStep& step, const py::object& found_inf);
  void store();
  void advance(bool may_be_skipped);
  void count_skipped_step();

  PythonFunctions python_;
  Flattener::LocalTensor local_tensor_;
  Clipping clipping_;
  py::object grad_norm_ = py::none();
  std::vector<ParamGroup> groups_;
  ParamsWithState params_;
  std::shared_ptr<StepLock> lock_;

  // The step under way.
  std::vector<py::object> group_dicts_;
  std::vector<py::object> param_lists_;
  GroupsBefore groups_before_;
  bool owns_ = false;
  DeviceStep host_;
  std::deque<DeviceStep> gpus_;
  NewState new_state_;
};

}  // namespace sgdr
