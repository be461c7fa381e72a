// What a param group keeps on its GPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "../backend.h"
#include "../torch/internals.h"
#include "state.h"

namespace sgdr {

// Note [State on the GPU]
// A group on a GPU keeps in the GPU's memory where its schedule stands, its LR, its skipped steps,
// and for each parameter which tensors of its state hold nothing yet. The kernel updates them: the
// host does not know whether a step was skipped, nor how often a graph was replayed.
// param_group["lr"], ["step"], ["cycle"], ["T_cur"], ["T_i"] and ["skipped_steps"] are views of
// this memory. A value that somebody puts there, or into optimizer.state, is written to the memory
// before the next launch. While a graph is captured that is an error: each replay would repeat it.
class GroupOnGpu {
 public:
  // kSchedule: the kernel computes the LR anew, because an option of the schedule has changed.
  LrSource lr_source = LrSource::kState;

  // A sgdr_fused.device_state.DeviceState, the list of the group's parameters, optimizer.state.
  GroupOnGpu(py::object device_state, PyObject* params, PyObject* state);

  const py::object& device_state() const { return device_state_; }
  const at::Tensor& memory() const { return memory_; }

  // Whether these are the parameters that it was made for, on the same GPU.
  bool belongs_to(PyObject* params) const;

  LaunchGroup launch_group(const GroupOptions& options, uint32_t first_param, bool advances) const;

  // Brings the flag of a parameter's tensor up to date if somebody else has put `stored` into
  // state, or removed it (null).
  void sync_flag(size_t index, Role role, const at::Tensor* stored) {
    if (!params_[index].tensors[role].is(stored)) write_flag(index, role, stored);
  }

  // Brings all flags up to date. `params` is the list of the group's parameters.
  void sync_flags(PyObject* params, PyObject* state);

  // Records a tensor that the step itself adds to the state, so that sync_flag() sees no change:
  // the kernel clears its flag.
  void expect(size_t index, Role role, const at::Tensor& tensor);

  // Synchronizes.
  void count_skipped_step() const;

 private:
  struct Param {
    PyObject* param;                         // for comparison only
    std::array<WeakTensor, kRoles> tensors;  // the state tensors that the flags describe
  };

  void write_flag(size_t index, Role role, const at::Tensor* stored);

  py::object device_state_;
  at::Tensor memory_;
  std::vector<Param> params_;
};

}  // namespace sgdr
