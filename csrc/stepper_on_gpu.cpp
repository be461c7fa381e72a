#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include "python_dict.h"
#include "stepper.h"

namespace sgdr {
namespace {

// The one number that a tensor holds, on a GPU as the kernel reads it; undefined for None.
at::Tensor float_on(const py::object& value, c10::Device device) {
  if (value.is_none()) return {};
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  if (!THPVariable_Check(value.ptr())) return at::full({}, value.cast<double>(), options);
  return THPVariable_Unpack(value.ptr()).to(options, /*non_blocking=*/true);
}

}  // namespace

// Note [State on the GPU]
// Where a group's schedule stands, its LR, and for each parameter whether its momentum buffer holds
// nothing yet, are in the GPU's memory, and the kernel brings them up to date: the host does not
// know whether a step was skipped, nor how often a graph was replayed. param_group["lr"], ["step"],
// ["cycle"], ["T_cur"] and ["T_i"] are tensors that show this memory. What else is put there, or
// into state as a momentum buffer, is written to the memory before the next launch; as a graph
// would repeat that at each replay, it is an error while one is captured.

Stepper::Tracked::Tracked(py::object param, const at::Tensor* buffer)
    : param(std::move(param)), momentum_buffer(at::Tensor().getIntrusivePtr()) {
  if (buffer != nullptr) set(*buffer);
}

void Stepper::Tracked::set(const at::Tensor& buffer) {
  momentum_buffer = decltype(momentum_buffer)(buffer.getIntrusivePtr());
}

bool Stepper::Tracked::is(const at::TensorImpl* buffer) const {
  return momentum_buffer._unsafe_get_target() == buffer;
}

// Brings a parameter's first-step flag in line with the buffer in its state, if somebody else has
// put it there or removed it.
void Stepper::track(OnGpu& on_gpu, size_t index, PyObject* state_of_param) {
  Tracked& tracked = on_gpu.params[index];
  const at::Tensor* buffer = buffer_in(state_of_param);
  const at::Tensor none;
  if (buffer == nullptr) buffer = &none;
  if (tracked.is(buffer->unsafeGetTensorImpl())) return;
  if (is_capturing()) {
    throw std::runtime_error(
        "a momentum_buffer in the optimizer's state was set or removed since the last step; take "
        "one step before the capture of a CUDA graph, which would repeat this at each replay");
  }
  on_gpu.memory.view(at::kByte)
      .narrow(0, static_cast<int64_t>(sizeof(GroupMemory) + index), 1)
      .fill_(buffer->defined() ? 0 : 1);
  tracked.set(*buffer);
}

bool Stepper::gather_on_gpu(Group& group, size_t slot, PyObject* state) {
  OnGpu& on_gpu = *group.on_gpu;
  const bool capturing = is_capturing();
  GpuStep& step = step_of_gpu(on_gpu.memory.device().index());
  const auto index = static_cast<uint32_t>(step.groups.size());
  auto* const memory = static_cast<char*>(on_gpu.memory.mutable_data_ptr());
  step.groups.push_back({.schedule = group.schedule,
                         .momentum = group.update.scalars.momentum,
                         .dampening = group.update.scalars.dampening,
                         .weight_decay = group.update.scalars.weight_decay,
                         .state = reinterpret_cast<GroupState*>(memory),
                         .first_step = reinterpret_cast<uint8_t*>(memory) + sizeof(GroupMemory),
                         .param_count = static_cast<uint32_t>(on_gpu.params.size()),
                         .decay = group.update.weight_decay,
                         .lr_source = on_gpu.lr_source,
                         .has_momentum = group.update.momentum,
                         .nesterov = group.update.nesterov,
                         .maximize = group.maximize,
                         .reset_momentum = group.reset_momentum,
                         .advances = false});

  const struct Guard {
    explicit Guard(Stepper& stepper) : stepper(stepper) {}
    ~Guard() {
      stepper.plain_keys_ = stepper.host_keys_;
      stepper.device_ = at::kCPU;
      stepper.gathered_ = &stepper.entries_;
    }
    Stepper& stepper;
  } guard(*this);
  plain_keys_ = on_gpu.memory.key_set();
  device_ = on_gpu.memory.device();
  gathered_ = &step.tensors;

  for (size_t i = 0; i < on_gpu.params.size(); ++i, ++slot) {
    PyObject* param = on_gpu.params[i].param.ptr();
    if (slot >= slots_.size() || slots_[slot].param != param) find_slots(state);
    if (group.update.momentum) track(on_gpu, i, slots_[slot].state);
    const size_t gathered = operands_.size();
    const size_t created = new_buffers_.size();
    if (!gather_param(group, index, slots_[slot])) return false;
    if (operands_.size() == gathered) continue;
    for (const at::TensorImpl* tensor :
         {operands_.back().param, operands_.back().grad, operands_.back().momentum_buffer}) {
      if (tensor != nullptr && tensor->device() != device_) return false;
    }
    step.param_indices.push_back(static_cast<uint32_t>(i));
    if (new_buffers_.size() == created) continue;
    new_buffers_.back().tracked = &on_gpu.params[i];
    // For whoever looks at it after a skipped step. The kernel goes by the flag, and a graph would
    // repeat this.
    if (!capturing) new_buffers_.back().momentum_buffer.zero_();
  }
  return true;
}

Stepper::GpuStep& Stepper::step_of_gpu(c10::DeviceIndex gpu) {
  for (GpuStep& step : gpu_steps_) {
    if (step.gpu == gpu) return step;
  }
  return gpu_steps_.emplace_back(GpuStep{gpu, {}, {}, {}});
}

void Stepper::run_on_gpus(const py::object& grad_scale, const py::object& found_inf) {
  const bool capturing = is_capturing();
  for (const GpuStep& step : gpu_steps_) {
    const c10::Device device(at::kCUDA, step.gpu);
    const c10::DeviceGuard guard(device);
    const at::Tensor scale = float_on(grad_scale, device);
    const at::Tensor inf = float_on(found_inf, device);
    fused_step_cuda(step.gpu,
                    {.groups = step.groups,
                     .tensors = step.tensors,
                     .param_indices = step.param_indices,
                     .grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                     .found_inf = inf.defined() ? inf.const_data_ptr<float>() : nullptr});
  }
  // The kernel has written the new LR, unless the step was skipped or is yet to be replayed.
  if (capturing || !found_inf.is_none()) return;
  for (Group& group : groups_) {
    if (group.on_gpu != nullptr) group.on_gpu->lr_source = LrSource::kState;
  }
}

}  // namespace sgdr
