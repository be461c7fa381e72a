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
// Where a group's schedule stands, its LR, the count of its skipped steps, and for each parameter
// which tensors of its state hold nothing yet, are in the GPU's memory, and the kernel brings them
// up to date: the host does not know whether a step was skipped, nor how often a graph was
// replayed. param_group["lr"], ["step"], ["cycle"], ["T_cur"], ["T_i"] and ["skipped_steps"] are
// tensors that show this memory. What else is put there, or into state, is written to the memory
// before the next launch; as a graph would repeat that at each replay, it is an error while one is
// captured.

Stepper::Tracked::Tracked(py::object param, PyObject* state_of_param) : param(std::move(param)) {
  for (size_t role = 0; role < kRoles; ++role) {
    tensors.push_back(no_tensor());
    const at::Tensor* stored = tensor_in(state_of_param, name_of(static_cast<Role>(role)));
    if (stored != nullptr) set(static_cast<Role>(role), *stored);
  }
}

void Stepper::Tracked::set(Role role, const at::Tensor& tensor) {
  tensors[role] = WeakTensor(tensor.getIntrusivePtr());
}

bool Stepper::Tracked::is(Role role, const at::TensorImpl* tensor) const {
  return tensors[role]._unsafe_get_target() == tensor;
}

// Brings a parameter's flag in line with the tensor in its state, if somebody else has put it there
// or removed it.
void Stepper::track(OnGpu& on_gpu, size_t index, Role role, PyObject* state_of_param) {
  Tracked& tracked = on_gpu.params[index];
  const at::Tensor* stored = tensor_in(state_of_param, name_of(role));
  const at::Tensor none;
  if (stored == nullptr) stored = &none;
  if (tracked.is(role, stored->unsafeGetTensorImpl())) return;
  if (is_capturing()) {
    throw std::runtime_error(
        std::string("a tensor in the optimizer's state was set or removed since the last step (") +
        PyUnicode_AsUTF8(name_of(role)) +
        "); take one step before the capture of a CUDA graph, which would repeat this at each "
        "replay");
  }
  // The flags stand in the order of the roles.
  static_assert(offsetof(ParamState, momentum_is_empty) == kMomentumBuffer &&
                offsetof(ParamState, ema_is_empty) == kEma &&
                offsetof(ParamState, master_is_empty) == kMasterParam);
  const size_t flag = sizeof(GroupMemory) + index * sizeof(ParamState) + role;
  on_gpu.memory.view(at::kByte)
      .narrow(0, static_cast<int64_t>(flag), 1)
      .fill_(stored->defined() ? 0 : 1);
  tracked.set(role, *stored);
}

bool Stepper::gather_on_gpu(Group& group, Slot* slots, size_t first, size_t last, bool advances) {
  OnGpu& on_gpu = *group.on_gpu;
  const bool capturing = is_capturing();
  GpuStep& step = step_of_gpu(on_gpu.memory.device().index());
  const auto index = static_cast<uint32_t>(step.groups.size());
  auto* const memory = static_cast<char*>(on_gpu.memory.mutable_data_ptr());
  step.groups.push_back({.schedule = group.schedule,
                         .momentum = group.update.scalars.momentum,
                         .dampening = group.update.scalars.dampening,
                         .weight_decay = group.update.scalars.weight_decay,
                         .ema_decay = group.ema_decay,
                         .seed = group.update.seed,
                         .state = reinterpret_cast<GroupState*>(memory),
                         .params = reinterpret_cast<ParamState*>(memory + sizeof(GroupMemory)),
                         .param_count = static_cast<uint32_t>(on_gpu.params.size()),
                         .first_param = group.first_param,
                         .decay = group.update.weight_decay,
                         .direction = group.update.direction,
                         .lr_source = on_gpu.lr_source,
                         .averaging = group.averaging,
                         .maximize = group.maximize,
                         .reset_momentum = group.reset_momentum,
                         .rounds_param = group.update.rounds_param,
                         .rounds_momentum = group.update.rounds_momentum,
                         .advances = advances});

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

  for (size_t i = first; i < last; ++i) {
    Slot& slot = slots[i - first];
    if (group.update.has_momentum()) track(on_gpu, i, kMomentumBuffer, slot.state);
    if (group.averaging != Averaging::kNone) track(on_gpu, i, kEma, slot.state);
    if (group.master_weights) track(on_gpu, i, kMasterParam, slot.state);
    const size_t gathered = gathered_->size();
    const size_t created = new_state_.size();
    const auto param_index = group.first_param + static_cast<uint32_t>(i);
    if (!gather_param(group, index, param_index, slot)) return false;
    if (gathered_->size() == gathered) continue;
    step.param_indices.push_back(static_cast<uint32_t>(i));
    for (size_t j = created; j < new_state_.size(); ++j) {
      new_state_[j].tracked = &on_gpu.params[i];
      // For whoever looks at it after a skipped step. The kernel goes by the flag, and a graph
      // would repeat this.
      if (!capturing) new_state_[j].tensor.zero_();
    }
  }
  return true;
}

Stepper::GpuStep& Stepper::step_of_gpu(c10::DeviceIndex gpu) {
  for (GpuStep& step : gpu_steps_) {
    if (step.gpu == gpu) return step;
  }
  return gpu_steps_.emplace_back(GpuStep{gpu, {}, {}, {}});
}

void Stepper::run_on_gpus(const py::object& grad_scale, const py::object& found_inf,
                          bool advances) {
  const bool capturing = is_capturing();
  for (const GpuStep& step : gpu_steps_) {
    const c10::Device device(at::kCUDA, step.gpu);
    const c10::DeviceGuard guard(device);
    const at::Tensor scale = float_on(grad_scale, device);
    const at::Tensor inf = float_on(found_inf, device);
    at::Tensor sum_of_squares, norm;
    if (advances && needs_norm()) {
      sum_of_squares = sum_of_squared_grads_on(step);
      norm = at::empty({}, sum_of_squares.options());
      grad_norm_ = py::reinterpret_steal<py::object>(THPVariable_Wrap(norm));
    }
    fused_step_cuda(
        step.gpu,
        {.groups = step.groups,
         .tensors = step.tensors,
         .param_indices = step.param_indices,
         .grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr,
         .found_inf = inf.defined() ? inf.const_data_ptr<float>() : nullptr,
         .sum_of_squares =
             sum_of_squares.defined() ? sum_of_squares.const_data_ptr<double>() : nullptr,
         .grad_norm = norm.defined() ? norm.mutable_data_ptr<double>() : nullptr,
         .max_grad_norm = max_grad_norm_.value_or(std::numeric_limits<double>::infinity()),
         .skip_nonfinite = skip_nonfinite_});
  }
  // The kernel has written the new LR, unless the step was skipped or is yet to be replayed.
  if (capturing || !advances || !found_inf.is_none() || skip_nonfinite_) return;
  for (Group& group : groups_) {
    if (group.on_gpu != nullptr) group.on_gpu->lr_source = LrSource::kState;
  }
}

}  // namespace sgdr
