#include "stepper.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>

#include "../torch/internals.h"

namespace sgdr {
namespace {

// A number or a tensor of one element; synchronizes for a CUDA tensor.
double to_double(const py::object& value) { return py::float_(value).cast<double>(); }

// A number or a tensor of one element as the kernel reads it; undefined for None.
at::Tensor float_on(const py::object& value, c10::Device device) {
  if (value.is_none()) return {};
  const auto options = at::TensorOptions().dtype(at::kFloat).device(device);
  if (!THPVariable_Check(value.ptr())) return at::full({}, value.cast<double>(), options);
  return THPVariable_Unpack(value.ptr()).to(options, /*non_blocking=*/true);
}

template <class T>
const T* address_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

PyObject* group_dict(const py::list& param_groups, size_t i) {
  return PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i));
}

void drop_momentum(const ParamGroup& group, const py::dict& state) {
  for (size_t i = 0; i < group.size(); ++i) {
    PyObject* const of_param = find(state.ptr(), group.param(i));
    if (of_param != nullptr && find(of_param, names::momentum_buffer()) != nullptr)
      py::reinterpret_borrow<py::dict>(of_param).attr("pop")(py::handle(names::momentum_buffer()));
  }
}

Flattener::LocalTensor as_cpp_function(py::function local_tensor) {
  return [local_tensor = std::move(local_tensor)](const at::Tensor& tensor,
                                                  const at::Tensor& param) -> at::Tensor {
    const py::object local = local_tensor(to_python(tensor), to_python(param));
    return local.is_none() ? at::Tensor() : THPVariable_Unpack(local.ptr());
  };
}

}  // namespace

Stepper::Stepper(py::function sync_group, py::function local_tensor, py::function shard_axes,
                 py::function sum_over_shards)
    : python_{std::move(sync_group), std::move(shard_axes), std::move(sum_over_shards)},
      local_tensor_(as_cpp_function(std::move(local_tensor))),
      host_{at::kCPU, Flattener(at::kCPU, plain_host_keys(), local_tensor_)} {}

void Stepper::set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite) {
  clipping_ = {max_grad_norm, skip_nonfinite};
  if (!clipping_.needs_norm()) grad_norm_ = py::none();
}

// A callback or another thread may come while a step runs without the GIL.
void Stepper::refuse_while_running() const {
  if (is_running_)
    throw std::runtime_error(
        "the optimizer was changed, or its step() called, while its step() is still running");
}

// Guards one step: refuses re-entry, and clears what belongs to the step at its end.
struct Stepper::RunningStep {
  explicit RunningStep(Stepper& stepper) : stepper(stepper) {
    stepper.refuse_while_running();
    stepper.is_running_ = true;
  }
  ~RunningStep() {
    stepper.is_running_ = false;
    stepper.host_.clear();
    stepper.gpus_.clear();
    stepper.new_state_.clear();
  }
  Stepper& stepper;
};

bool Stepper::step(const py::list& param_groups, const py::dict& state,
                   const py::object& grad_scale, const py::object& found_inf) {
  const RunningStep running(*this);
  const at::NoGradGuard no_grad;

  sync_groups(param_groups, state);
  // If all groups are on GPUs, the kernels read grad_scale and found_inf: the host must not wait.
  const bool is_host_in_charge = !is_all_on_gpus();
  if (is_host_in_charge && !found_inf.is_none() && to_double(found_inf) != 0) {
    count_skipped_step(param_groups);
    return true;
  }
  const double scale = is_host_in_charge && !grad_scale.is_none() ? to_double(grad_scale) : 1;
  if (!gather(state.ptr())) return false;
  const std::optional<double> clip_coefficient = norm(scale);
  if (!clip_coefficient.has_value()) {
    count_skipped_step(param_groups);
    return true;
  }
  run({grad_scale, found_inf}, scale, *clip_coefficient);
  store(state);
  advance(param_groups, state, !found_inf.is_none() || clipping_.skip_nonfinite);
  return true;
}

bool Stepper::step_param(const py::list& param_groups, const py::dict& state, uint32_t index) {
  const RunningStep running(*this);
  const at::NoGradGuard no_grad;

  sync_groups(param_groups, state);
  size_t group = 0;
  while (group + 1 < groups_.size() && groups_[group + 1].first_param <= index) ++group;
  const size_t in_group = index - groups_[group].first_param;
  PyObject* const param = groups_[group].param(in_group);
  if (!THPVariable_Check(param)) return false;
  const ParamAndState found = find_state(param, state.ptr());
  if (!gather_group(group, {&found, 1}, in_group, false)) return false;
  run({py::none(), py::none()}, 1, 1);
  store(state);
  return true;
}

// ------------------------------------------------------------------------------------------------
// sync

void Stepper::sync(const py::list& param_groups, const py::dict& state) {
  refuse_while_running();
  const at::NoGradGuard no_grad;
  sync_groups(param_groups, state);
  for (const ParamGroup& group : groups_) {
    if (group.on_gpu != nullptr) group.on_gpu->sync_flags(state.ptr());
  }
}

void Stepper::sync_groups(const py::list& param_groups, const py::dict& state) {
  groups_.resize(param_groups.size());
  uint32_t first_param = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* const dict = group_dict(param_groups, i);
    if (!groups_[i].is_current(dict)) sync_group(groups_[i], dict, state);
    groups_[i].first_param = first_param;
    first_param += static_cast<uint32_t>(groups_[i].size());
  }
}

void Stepper::sync_group(ParamGroup& group, PyObject* dict, const py::dict& state) {
  const py::object lr_before = group.lr_object();
  const bool lr_is_by_hand = !get(dict, names::lr()).is(lr_before);
  const py::object state_before =
      group.on_gpu == nullptr ? py::none() : group.on_gpu->device_state();
  const py::object device_state =
      python_.sync_group(py::handle(dict), lr_before, state_before, state);
  ParamGroup synced;
  synced.read(dict, device_state.is_none());
  if (!device_state.is_none() && device_state.is(state_before)) {
    synced.on_gpu = std::move(group.on_gpu);
    synced.on_gpu->lr_source = lr_is_by_hand ? LrSource::kState : LrSource::kSchedule;
  } else if (!device_state.is_none()) {
    synced.on_gpu = std::make_unique<GroupOnGpu>(device_state, state.ptr());
  }
  group = std::move(synced);
}

bool Stepper::is_all_on_gpus() const {
  for (const ParamGroup& group : groups_) {
    if (group.on_gpu == nullptr) return false;
  }
  return !groups_.empty();
}

// ------------------------------------------------------------------------------------------------
// gather

bool Stepper::gather(PyObject* state) {
  if (!params_.update(groups_, state)) return false;
  std::span<const ParamAndState> rest = params_.all();
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (!gather_group(i, rest.first(groups_[i].size()), 0, true)) return false;
    rest = rest.subspan(groups_[i].size());
  }
  return true;
}

// Gathers parameters of one group; `first` is the index in the group of params[0].
bool Stepper::gather_group(size_t group, std::span<const ParamAndState> params, size_t first,
                           bool advances) {
  const ParamGroup& of_params = groups_[group];
  DeviceStep* target = &host_;
  if (const auto& on_gpu = of_params.on_gpu; on_gpu != nullptr) {
    target = &device_step_of(on_gpu->memory());
    group = target->launch_groups.size();
    target->launch_groups.push_back(
        on_gpu->launch_group(of_params.options, of_params.first_param, advances));
  }
  Gatherer gatherer(*target, of_params, static_cast<uint32_t>(group), new_state_,
                    clipping_.needs_norm() ? &python_.shard_axes : nullptr);
  for (const ParamAndState& param : params) {
    if (!gatherer.add(first++, param)) return false;
  }
  return true;
}

DeviceStep& Stepper::device_step_of(const at::Tensor& memory) {
  for (DeviceStep& step : gpus_) {
    if (step.device == memory.device()) return step;
  }
  Flattener flattener(memory.device(), memory.key_set(), local_tensor_);
  return gpus_.emplace_back(DeviceStep{memory.device(), std::move(flattener)});
}

// ------------------------------------------------------------------------------------------------
// norm

// The clip coefficient, or nothing if the step is to be skipped. A GPU keeps the norm, and decides
// for itself.
std::optional<double> Stepper::norm(double grad_scale) {
  if (!clipping_.needs_norm()) return 1;
  if (gpus_.size() + (host_.entries.empty() ? 0 : 1) > 1) {
    throw py::value_error(
        "max_grad_norm and skip_nonfinite take one norm over all gradients, but the parameters are "
        "on several devices; set max_grad_norm=None and skip_nonfinite=False, and call "
        "torch.nn.utils.clip_grad_norm_()");
  }
  if (!gpus_.empty()) {
    DeviceStep& gpu = gpus_.front();
    const c10::DeviceGuard guard(gpu.device);
    gpu.sum_of_squares = sum_of_squared_grads_on_gpu(gpu, python_.sum_over_shards);
    return 1;
  }
  const double sum_of_squares = sum_of_squared_grads_on_host(host_, python_.sum_over_shards);
  const double norm = sgdr::grad_norm(sum_of_squares, grad_scale);
  grad_norm_ = py::float_(norm);
  if (clipping_.skip_nonfinite && !is_finite(norm)) return std::nullopt;
  return clipping_.max_grad_norm.has_value() ? clip_coefficient(norm, *clipping_.max_grad_norm) : 1;
}

// ------------------------------------------------------------------------------------------------
// run

void Stepper::run(const Amp& amp, double grad_scale, double clip_coefficient) {
  for (const DeviceStep& gpu : gpus_) run_on_gpu(gpu, amp);
  run_on_host(grad_scale, clip_coefficient);
}

void Stepper::run_on_host(double grad_scale, double clip_coefficient) {
  if (host_.entries.empty()) return;
  for (const ParamGroup& group : groups_)
    host_.host_groups.push_back(
        {.options = group.options,
         .scalars = scalars_of(group.options, group.lr, grad_scale, clip_coefficient),
         .steps_applied = group.position.step});
  host_.without_gil(host_.entries, [&] {
    cpu::fused_step({.tensors = host_.entries, .groups = host_.host_groups});
  });
}

void Stepper::run_on_gpu(const DeviceStep& step, const Amp& amp) {
  const c10::DeviceGuard guard(step.device);
  const at::Tensor scale = float_on(amp.grad_scale, step.device);
  const at::Tensor inf = float_on(amp.found_inf, step.device);
  at::Tensor norm;
  if (step.sum_of_squares.defined()) {
    norm = at::empty({}, step.sum_of_squares.options());
    grad_norm_ = to_python(norm);
  }
  constexpr double kNoLimit = std::numeric_limits<double>::infinity();
  cuda::fused_step(step.device.index(),
                   {.tensors = step.entries,
                    .groups = step.launch_groups,
                    .grad_scale = address_or_null<float>(scale),
                    .found_inf = address_or_null<float>(inf),
                    .sum_of_squares = address_or_null<double>(step.sum_of_squares),
                    .grad_norm = norm.defined() ? norm.mutable_data_ptr<double>() : nullptr,
                    .max_grad_norm = clipping_.max_grad_norm.value_or(kNoLimit),
                    .skip_nonfinite = clipping_.skip_nonfinite});
}

// ------------------------------------------------------------------------------------------------
// store and advance

void Stepper::store(const py::dict& state) {
  for (DeviceStep& gpu : gpus_) gpu.flattener.finish();
  host_.flattener.finish();
  new_state_.store(state);
}

// The kernel has advanced the groups on GPUs. It has also written their new LR, unless the step may
// have been skipped or is yet to be replayed.
void Stepper::advance(const py::list& param_groups, const py::dict& state, bool may_be_skipped) {
  const bool lr_is_written = !gpus_.empty() && !may_be_skipped && !cuda::is_capturing();
  for (size_t i = 0; i < groups_.size(); ++i) {
    ParamGroup& group = groups_[i];
    if (group.on_gpu == nullptr) {
      if (group.advance_schedule(group_dict(param_groups, i))) drop_momentum(group, state);
    } else if (lr_is_written) {
      group.on_gpu->lr_source = LrSource::kState;
    }
  }
}

void Stepper::count_skipped_step(const py::list& param_groups) {
  for (size_t i = 0; i < groups_.size(); ++i)
    groups_[i].count_skipped_step(group_dict(param_groups, i));
}

}  // namespace sgdr
