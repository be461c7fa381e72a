#include "group_on_gpu.h"

#include <ATen/Functions.h>

#include "python_dict.h"

namespace sgdr {

GroupOnGpu::GroupOnGpu(py::object device_state, PyObject* params, PyObject* state)
    : device_state_(std::move(device_state)),
      memory_(THPVariable_Unpack(device_state_.attr("memory").ptr())) {
  for (const py::handle param : py::reinterpret_borrow<py::list>(params)) {
    PyObject* const of_param = find(state, param.ptr());
    const auto stored = [&](Role role) {
      return WeakTensor(as_tensor(find_in_state(of_param, name_of(role))));
    };
    params_.push_back({param.ptr(), {stored(kMomentumBuffer), stored(kEma), stored(kMasterParam)}});
  }
}

bool GroupOnGpu::belongs_to(PyObject* params) const {
  if (params_.empty() || static_cast<size_t>(PyList_GET_SIZE(params)) != params_.size())
    return false;
  for (size_t i = 0; i < params_.size(); ++i) {
    PyObject* const param = PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i));
    if (param != params_[i].param || !THPVariable_Check(param)) return false;
  }
  return THPVariable_Unpack(PyList_GET_ITEM(params, 0)).device() == memory_.device();
}

LaunchGroup GroupOnGpu::launch_group(const GroupOptions& options, uint32_t first_param,
                                     bool advances) const {
  auto* const memory = static_cast<GroupMemory*>(memory_.mutable_data_ptr());
  return {.options = options,
          .memory = memory,
          .params = reinterpret_cast<ParamState*>(memory + 1),
          .param_count = static_cast<uint32_t>(params_.size()),
          .first_param = first_param,
          .lr_source = lr_source,
          .advances = advances};
}

void GroupOnGpu::write_flag(size_t index, Role role, const at::Tensor* stored) {
  if (cuda::is_capturing()) {
    throw std::runtime_error(
        std::string("a tensor in the optimizer's state was set or removed since the last step (") +
        PyUnicode_AsUTF8(name_of(role)) +
        "); take one step before the capture of a CUDA graph, which would repeat this at each "
        "replay");
  }
  static_assert(offsetof(ParamState, momentum_is_empty) == kMomentumBuffer &&
                offsetof(ParamState, ema_is_empty) == kEma &&
                offsetof(ParamState, master_is_empty) == kMasterParam);
  const size_t flag = sizeof(GroupMemory) + index * sizeof(ParamState) + role;
  memory_.view(at::kByte).narrow(0, static_cast<int64_t>(flag), 1).fill_(stored == nullptr ? 1 : 0);
  params_[index].tensors[role] = WeakTensor(stored);
}

void GroupOnGpu::sync_flags(PyObject* params, PyObject* state) {
  for (size_t i = 0; i < params_.size(); ++i) {
    PyObject* const of_param = find(state, PyList_GET_ITEM(params, static_cast<Py_ssize_t>(i)));
    for (const Role role : {kMomentumBuffer, kEma, kMasterParam})
      sync_flag(i, role, as_tensor(find_in_state(of_param, name_of(role))));
  }
}

void GroupOnGpu::expect(size_t index, Role role, const at::Tensor& tensor) {
  params_[index].tensors[role] = WeakTensor(&tensor);
}

void GroupOnGpu::count_skipped_step() const {
  const at::Tensor count = memory_.select(0, offsetof(GroupState, skipped_steps) / sizeof(int64_t));
  count.fill_(count.item<int64_t>() + 1);
}

}  // namespace sgdr
