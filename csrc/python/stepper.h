// One optimizer's step: reads param_groups and state, runs a backend, writes the schedule back.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "gatherer.h"
#include "grad_norm.h"
#include "new_state.h"
#include "param_group.h"
#include "state.h"

namespace sgdr {

// The parts of a step that are written in Python.
struct PythonFunctions {
  // sync_group(param_group, lr_before, device_state, state) checks a group whose items changed and
  // brings its lr up to date. Returns the group's DeviceState, or None if its state is on the host.
  py::function sync_group;
  // shard_axes(param) tells over which ranks a parameter is cut into parts, or None.
  py::function shard_axes;
  // sum_over_shards(sum, axes) adds the other ranks' sums in place.
  py::function sum_over_shards;
};

class Stepper {
 public:
  // local_tensor(tensor, param) gives the plain tensor behind a tensor subclass, or None.
  Stepper(py::function sync_group, py::function local_tensor, py::function shard_axes,
          py::function sum_over_shards);

  // Takes over what has changed in the groups and their state since the last step.
  void sync(const py::list& param_groups, const py::dict& state);

  // No limit if max_grad_norm is None.
  void set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite);

  // The norm at the last step before clipping: a float, a tensor on a GPU, or None.
  py::object grad_norm() const { return grad_norm_; }

  // grad_scale and found_inf are numbers, tensors of one element, or None. Returns false, having
  // written nothing, if a tensor is of a kind that no native backend takes.
  bool step(const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
            const py::object& found_inf);

  // Updates one parameter, by its index among those of all groups, and leaves the schedule where it
  // is. Returns like step().
  bool step_param(const py::list& param_groups, const py::dict& state, uint32_t index);

 private:
  // What a GradScaler leaves for the step.
  struct Amp {
    py::object grad_scale;
    py::object found_inf;
  };
  struct RunningStep;

  void refuse_while_running() const;
  void sync_groups(const py::list& param_groups, const py::dict& state);
  void sync_group(ParamGroup& group, PyObject* dict, const py::dict& state);
  bool is_all_on_gpus() const;
  bool gather(PyObject* state);
  bool gather_group(size_t group, std::span<const ParamAndState> params, size_t first,
                    bool advances);
  DeviceStep& device_step_of(const at::Tensor& memory);
  std::optional<double> norm(double grad_scale);
  void run(const Amp& amp, double grad_scale, double clip_coefficient);
  void run_on_host(double grad_scale, double clip_coefficient);
  void run_on_gpu(const DeviceStep& step, const Amp& amp);
  void store(const py::dict& state);
  void advance(const py::list& param_groups, const py::dict& state, bool may_be_skipped);
  void count_skipped_step(const py::list& param_groups);

  PythonFunctions python_;
  Flattener::LocalTensor local_tensor_;
  Clipping clipping_;
  py::object grad_norm_ = py::none();
  std::vector<ParamGroup> groups_;
  ParamsWithState params_;

  // The step under way.
  bool is_running_ = false;
  DeviceStep host_;
  std::deque<DeviceStep> gpus_;
  NewState new_state_;
};

}  // namespace sgdr
