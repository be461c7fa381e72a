#include "new_state.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

namespace sgdr {

const at::Tensor& NewState::make(ParamAndState& param, Role role, at::ScalarType dtype,
                                 GroupOnGpu* on_gpu, size_t index) {
  const c10::InferenceMode off(false);
  const at::Tensor& like = THPVariable_Unpack(param.param);
  return entries_
      .emplace_back(Entry{.param = &param,
                          .name = name_of(role),
                          .tensor = at::empty_like(like, like.options().dtype(dtype)),
                          .on_gpu = on_gpu,
                          .role = role,
                          .index = index})
      .tensor;
}

void NewState::set_n_averaged(ParamAndState& param, int64_t n_averaged) {
  entries_.push_back({.param = &param, .name = names::n_averaged(), .value = py::int_(n_averaged)});
}

void NewState::prepare(const py::dict& state) {
  for (Entry& entry : entries_) {
    if (entry.tensor.defined()) entry.value = to_python(entry.tensor);
    entry.of_param = dict_of(*entry.param, state);
  }
}

py::object NewState::dict_of(ParamAndState& param, const py::dict& state) {
  if (param.state == nullptr) {
    const py::handle key = param.param;
    py::object found =
        py::reinterpret_borrow<py::object>(find_state(param.param, state.ptr()).state);
    if (!found) {
      found = py::dict();
      state_ = state;
      params_with_unused_dict_.push_back(py::reinterpret_borrow<py::object>(key));
      if (PyDict_SetItem(state.ptr(), key.ptr(), found.ptr()) != 0) throw py::error_already_set();
    }
    param.state = found.ptr();
    return found;
  }
  return py::reinterpret_borrow<py::object>(param.state);
}

void NewState::store() {
  for (const Entry& entry : entries_) {
    if (PyDict_SetItem(entry.of_param.ptr(), entry.name, entry.value.ptr()) != 0)
      throw py::error_already_set();
    if (entry.on_gpu != nullptr) entry.on_gpu->expect(entry.index, entry.role, entry.tensor);
  }
  params_with_unused_dict_.clear();
}

void NewState::clear() {
  if (!params_with_unused_dict_.empty()) {
    const py::error_scope error;  // this is after an error
    for (const py::object& param : params_with_unused_dict_) {
      if (PyDict_DelItem(state_.ptr(), param.ptr()) != 0) PyErr_Clear();
    }
    params_with_unused_dict_.clear();
  }
  state_ = {};
  entries_.clear();
}

}  // namespace sgdr
