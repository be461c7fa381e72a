// What a step adds to optimizer.state.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <vector>

#include "group_on_gpu.h"
#include "state.h"

namespace sgdr {

// What a step puts into optimizer.state once it has been taken. What can fail, or run Python code,
// is done before the step's first write.
class NewState {
 public:
  // Makes a tensor of the parameter's shape and strides, without content. `on_gpu` is null for a
  // group on the host; `index` is the parameter's index in its group. The reference stays valid,
  // and `param` has to.
  const at::Tensor& make(ParamAndState& param, Role role, at::ScalarType dtype, GroupOnGpu* on_gpu,
                         size_t index);

  void set_n_averaged(ParamAndState& param, int64_t n_averaged);

  bool empty() const { return entries_.empty(); }

  // Gives each parameter a dict in optimizer.state. clear() takes an unused one away again.
  void prepare(const py::dict& state);

  // Runs no Python code.
  void store();

  void clear();

 private:
  struct Entry {
    ParamAndState* param = nullptr;
    PyObject* name = nullptr;
    at::Tensor tensor{};           // undefined for a number
    py::object value{};            // the tensor or number, once prepared
    py::object of_param{};         // the dict that gets it, once prepared
    GroupOnGpu* on_gpu = nullptr;  // null for a group on the host
    Role role = kRoles;
    size_t index = 0;
  };

  py::object dict_of(ParamAndState& param, const py::dict& state);

  std::deque<Entry> entries_;  // its elements do not move
  py::object state_;           // while it holds unused dicts
  std::vector<py::object> params_with_unused_dict_;
};

}  // namespace sgdr
