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

void drop_momentum(std::span<const ParamAndState> params) {
  for (const ParamAndState& param : params) {
    if (param.state == nullptr || find(param.state, names::momentum_buffer()) == nullptr) continue;
    if (PyDict_DelItem(param.state, names::momentum_buffer()) != 0) throw py::error_already_set();
  }
}

}  // namespace

Stepper::Stepper(std::shared_ptr<StepLock> lock, py::function check_groups, py::function sync_group,
                 py::function local_tensor, py::function shard_axes, py::function sum_over_shards)
    : python_{std::move(check_groups), std::move(sync_group), std::move(shard_axes),
              std::move(sum_over_shards)},
      local_tensor_([this, local_tensor = std::move(local_tensor)](
                        const at::Tensor& tensor, const at::Tensor& param) -> at::Tensor {
        own();
        const py::object local = local_tensor(to_python(tensor), to_python(param));
        return local.is_none() ? at::Tensor() : THPVariable_Unpack(local.ptr());
      }),
      lock_(std::move(lock)),
      host_{at::kCPU, Flattener(at::kCPU, plain_host_keys(), local_tensor_)} {}

void Stepper::set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite) {
  clipping_ = {max_grad_norm, skip_nonfinite};
  if (!clipping_.needs_norm()) grad_norm_ = py::none();
}

// Guards one step: keeps others out, and at its end clears what belongs to it. Unless it is kept,
// everything is put back as it was.
struct Stepper::RunningStep {
  explicit RunningStep(Stepper& stepper) : stepper(stepper) { stepper.lock_->begin_step(); }
  ~RunningStep() {
    stepper.host_.clear();
    for (DeviceStep& gpu : stepper.gpus_) gpu.clear();
    stepper.new_state_.clear();
    stepper.params_.end_step();
    stepper.owns_ = false;
    if (!is_kept) {
      stepper.groups_before_.restore();
      stepper.params_.invalidate();
      for (ParamGroup& group : stepper.groups_) group.forget();
    }
    stepper.groups_before_.forget();
    stepper.group_dicts_.clear();
    stepper.param_lists_.clear();
    stepper.lock_->end_step();
  }

  bool keep() { return is_kept = true; }

  Stepper& stepper;
  bool is_kept = false;
};

bool Stepper::step(const py::object& param_groups, const py::object& state,
                   const py::object& grad_scale, const py::object& found_inf) {
  RunningStep running(*this);
  const at::NoGradGuard no_grad;

  sync_groups(param_groups, state);
  // If all groups are on GPUs, the kernels read grad_scale and found_inf: the host must not wait.
  const bool is_host_in_charge = !is_all_on_gpus();
  if (is_host_in_charge && !found_inf.is_none() && to_double(found_inf) != 0) {
    count_skipped_step();
    return running.keep();
  }
  const double scale = is_host_in_charge && !grad_scale.is_none() ? to_double(grad_scale) : 1;
  if (!gather(state.ptr())) return false;
  for (DeviceStep& gpu : gpus_) {
    const c10::DeviceGuard guard(gpu.device);
    gpu.grad_scale = float_on(grad_scale, gpu.device);
  }
  const std::optional<double> clip_coefficient = norm(scale);
  if (!clip_coefficient.has_value()) {
    count_skipped_step();
    return running.keep();
  }
  // From the first write on, nothing runs Python code.
  new_state_.prepare(state);
  if (!new_state_.empty()) params_.invalidate();  // it has put new dicts into the state
  run(found_inf, scale, *clip_coefficient);
  store();
  advance(!found_inf.is_none() || clipping_.skip_nonfinite);
  return running.keep();
}

bool Stepper::step_param(const py::object& param_groups, const py::object& state, size_t index) {
  RunningStep running(*this);
  const at::NoGradGuard no_grad;

  sync_groups(param_groups, state);
  size_t group = 0;
  while (group < groups_.size() && groups_[group].first_param + groups_[group].size() <= index)
    ++group;
  if (group == groups_.size())
    throw py::index_error("the param groups hold no parameter of index " + std::to_string(index));
  const size_t in_group = index - groups_[group].first_param;
  const auto param = py::reinterpret_borrow<py::object>(groups_[group].param(in_group));
  if (!THPVariable_Check(param.ptr())) return false;
  ParamAndState found = find_state(param.ptr(), state.ptr());
  const auto state_of_param = py::reinterpret_borrow<py::object>(found.state);
  if (!gather_group(group, {&found, 1}, in_group, false)) return false;
  drop_unused_gpus();
  new_state_.prepare(state);
  run(py::none(), 1, 1);
  store();
  return running.keep();
}

// ------------------------------------------------------------------------------------------------
// sync

void Stepper::sync(const py::object& param_groups, const py::object& state) {
  RunningStep running(*this);
  const at::NoGradGuard no_grad;
  sync_groups(param_groups, state);
  for (const ParamGroup& group : groups_) {
    if (group.on_gpu != nullptr) group.on_gpu->sync_flags(group.params(), state.ptr());
  }
  running.keep();
}

void Stepper::sync_groups(const py::object& param_groups, const py::object& state) {
  if (!PyDict_Check(state.ptr())) {
    throw py::type_error(std::string("optimizer.state is of type ") +
                         Py_TYPE(state.ptr())->tp_name + ", but must be a dict");
  }
  const bool are_unchanged = are_current(param_groups);
  if (!are_unchanged) python_.check_groups(param_groups);
  for (const py::handle group : py::reinterpret_borrow<py::list>(param_groups))
    group_dicts_.push_back(py::reinterpret_borrow<py::object>(group));
  groups_.resize(group_dicts_.size());
  size_t first_param = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (!are_unchanged && !groups_[i].is_current(group_dicts_[i].ptr()))
      sync_group(groups_[i], group_dicts_[i], state);
    param_lists_.push_back(py::reinterpret_borrow<py::object>(groups_[i].params()));
    groups_[i].first_param = static_cast<uint32_t>(first_param);
    first_param += groups_[i].size();
  }
}

bool Stepper::are_current(const py::object& param_groups) const {
  PyObject* const list = param_groups.ptr();
  if (!PyList_Check(list) || static_cast<size_t>(PyList_GET_SIZE(list)) != groups_.size())
    return false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (!groups_[i].is_current(PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i)))) return false;
  }
  return true;
}

void Stepper::sync_group(ParamGroup& group, const py::object& dict, const py::object& state) {
  groups_before_.remember(dict);
  const py::object state_before =
      group.on_gpu == nullptr ? py::none() : group.on_gpu->device_state();
  const py::object device_state = python_.sync_group(dict, state_before, state);
  ParamGroup synced;
  synced.read(dict.ptr(), device_state.is_none());
  if (!device_state.is_none() && device_state.is(state_before)) {
    synced.on_gpu = std::move(group.on_gpu);
    synced.on_gpu->lr_source = LrSource::kSchedule;
  } else if (!device_state.is_none()) {
    synced.on_gpu = std::make_unique<GroupOnGpu>(device_state, synced.params(), state.ptr());
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
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (!gather_group(i, params_.of_group(i), 0, true)) return false;
  }
  drop_unused_gpus();
  if (host_.flattener.copies_shared_memory()) return false;
  // To release the GIL lets other threads in; to prepare new state runs Python code.
  if (cpu::is_worth_threads(host_.entries) || !new_state_.empty()) own();
  return true;
}

// A DeviceStep is kept for the next step, as its vectors have grown to what they have to hold.
void Stepper::drop_unused_gpus() {
  std::erase_if(gpus_, [](const DeviceStep& gpu) { return gpu.launch_groups.empty(); });
}

// From here on the step does not rely on others to keep alive what it has gathered and will gather.
void Stepper::own() {
  owns_ = true;
  params_.own();
  host_.flattener.own();
  for (DeviceStep& gpu : gpus_) gpu.flattener.own();
}

// Gathers parameters of one group; `first` is the index in the group of params[0].
bool Stepper::gather_group(size_t group, std::span<ParamAndState> params, size_t first,
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
  for (ParamAndState& param : params) {
    if (!gatherer.add(first++, param)) return false;
  }
  return true;
}

DeviceStep& Stepper::device_step_of(const at::Tensor& memory) {
  for (DeviceStep& step : gpus_) {
    if (step.device == memory.device()) return step;
  }
  Flattener flattener(memory.device(), memory.key_set(), local_tensor_);
  if (owns_) flattener.own();
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
    gpu.grad_norm = grad_norm_on_gpu(gpu, clipping_, python_.sum_over_shards);
    grad_norm_ =
        to_python(gpu.grad_norm.select(0, offsetof(cuda::GradNorm, norm) / sizeof(double)));
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

void Stepper::run(const py::object& found_inf, double grad_scale, double clip_coefficient) {
  for (const DeviceStep& gpu : gpus_) run_on_gpu(gpu, found_inf);
  run_on_host(grad_scale, clip_coefficient);
}

void Stepper::run_on_host(double grad_scale, double clip_coefficient) {
  if (host_.entries.empty()) return;
  for (const ParamGroup& group : groups_)
    host_.host_groups.push_back(
        {.options = group.options,
         .scalars = scalars_of(group.options, group.state.lr, grad_scale, clip_coefficient),
         .steps_applied = group.state.position.step});
  without_gil(host_.entries,
              [&] { cpu::fused_step({.tensors = host_.entries, .groups = host_.host_groups}); });
}

void Stepper::run_on_gpu(const DeviceStep& step, const py::object& found_inf) {
  const c10::DeviceGuard guard(step.device);
  const at::Tensor inf = float_on(found_inf, step.device);
  const void* const norm = step.grad_norm.defined() ? step.grad_norm.const_data_ptr() : nullptr;
  cuda::fused_step(step.device.index(),
                   {.tensors = step.entries,
                    .groups = step.launch_groups,
                    .grad_scale = address_or_null<float>(step.grad_scale),
                    .found_inf = address_or_null<float>(inf),
                    .grad_norm = static_cast<const cuda::GradNorm*>(norm),
                    .skip_nonfinite = norm != nullptr && clipping_.skip_nonfinite});
}

// ------------------------------------------------------------------------------------------------
// store and advance

void Stepper::store() {
  for (DeviceStep& gpu : gpus_) gpu.flattener.finish();
  host_.flattener.finish();
  new_state_.store();
}

// The kernel has advanced the groups on GPUs. It has also written their new LR, unless the step may
// have been skipped or is yet to be replayed.
void Stepper::advance(bool may_be_skipped) {
  const bool lr_is_written = !gpus_.empty() && !may_be_skipped && !cuda::is_capturing();
  for (size_t i = 0; i < groups_.size(); ++i) {
    ParamGroup& group = groups_[i];
    if (group.on_gpu == nullptr) {
      if (group.advance_schedule(group_dicts_[i].ptr())) drop_momentum(params_.of_group(i));
    } else if (lr_is_written) {
      group.on_gpu->lr_source = LrSource::kState;
    }
  }
}

void Stepper::count_skipped_step() {
  for (size_t i = 0; i < groups_.size(); ++i) groups_[i].count_skipped_step(group_dicts_[i].ptr());
}

}  // namespace sgdr
