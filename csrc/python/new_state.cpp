#include "new_state.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

namespace sgdr {

const at::Tensor& NewState::make(PyObject* param, Role role, at::ScalarType dtype,
                                 GroupOnGpu* on_gpu, size_t index) {
  const c10::InferenceMode off(false);
  const at::Tensor& like = THPVariable_Unpack(param);
  const at::Tensor tensor = at::empty_like(like, like.options().dtype(dtype));
  return tensors_.emplace_back(NewTensor{param, role, tensor, on_gpu, index}).tensor;
}

void NewState::store(const py::dict& state) const {
  for (const auto& [param, role, tensor, on_gpu, index] : tensors_) {
    const py::object of_param = state[py::handle(param)];
    of_param[py::handle(name_of(role))] = to_python(tensor);
    if (on_gpu != nullptr) on_gpu->expect(index, role, tensor);
  }
  for (const auto& [param, n_averaged] : averaged_) {
    const py::object of_param = state[py::handle(param)];
    of_param[py::handle(names::n_averaged())] = n_averaged;
  }
}

}  // namespace sgdr
