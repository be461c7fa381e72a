#include "stepper.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/Dtype.h>

#include <algorithm>

#include "tensor_kinds.h"

namespace sgdr {
namespace {

// Of a number, or a tensor of one element, which a GPU has to be waited for.
double to_double(const py::object& value) { return py::float_(value).cast<double>(); }

at::Tensor own(at::TensorImpl* tensor) {
  using Owner = c10::intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;
  return at::Tensor(Owner::unsafe_reclaim_from_nonowning(tensor));
}

// A parameter's dict in state, borrowed; null where it has none.
PyObject* state_of(PyObject* param, PyObject* state) {
  PyObject* of_param = find(state, param);
  if (of_param != nullptr && !PyDict_Check(of_param)) {
    throw py::type_error(std::string("optimizer.state[param] is of type ") +
                         Py_TYPE(of_param)->tp_name +
                         ", but must be a dict; delete it to start anew");
  }
  return of_param;
}

}  // namespace

Stepper::Stepper(py::function sync_group, py::function local_tensor, py::function shard_axes,
                 py::function sum_over_shards)
    : host_keys_(plain_keys()),
      plain_keys_(host_keys_),
      sync_group_(std::move(sync_group)),
      local_tensor_(std::move(local_tensor)),
      shard_axes_(std::move(shard_axes)),
      sum_over_shards_(std::move(sum_over_shards)) {}

PyObject* Stepper::name_of(Role role) {
  switch (role) {
    case kMomentumBuffer:
      return names::momentum_buffer();
    case kEma:
      return names::ema();
    default:
      return names::master_param();
  }
}

void Stepper::set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite) {
  max_grad_norm_ = max_grad_norm;
  skip_nonfinite_ = skip_nonfinite;
  if (!needs_norm()) grad_norm_ = py::none();
}

struct Stepper::Stepping {
  explicit Stepping(Stepper& stepper) : stepper(stepper) {
    if (stepper.is_stepping_)
      throw std::runtime_error("step() was called on an optimizer whose step() is still running");
    stepper.is_stepping_ = true;
    stepper.numel_ = 0;
    stepper.entries_.clear();
    stepper.written_.clear();
  }
  ~Stepping() {
    stepper.is_stepping_ = false;
    stepper.new_state_.clear();
    stepper.averaged_.clear();
    stepper.sharded_parts_.clear();
    stepper.copy_back_.clear();
    stepper.kept_alive_.clear();
    stepper.gpu_steps_.clear();
    stepper.gathered_slots_ = {};
  }
  Stepper& stepper;
};

bool Stepper::step(const py::list& param_groups, const py::dict& state,
                   const py::object& grad_scale, const py::object& found_inf) {
  const Stepping stepping(*this);
  const at::NoGradGuard no_grad;

  sync_groups(param_groups, state);
  if (!is_all_on_gpus_ && !found_inf.is_none() && to_double(found_inf) != 0) {
    count_skipped_step(param_groups);
    return true;
  }
  const double host_scale = is_all_on_gpus_ || grad_scale.is_none() ? 1.0 : to_double(grad_scale);
  if (!gather(state.ptr())) return false;
  double coefficient = 1;
  if (needs_norm()) {
    check_devices_of_norm();
    if (gpu_steps_.empty()) {
      const double norm = sgdr::grad_norm(sum_of_squared_grads(), host_scale);
      grad_norm_ = py::float_(norm);
      if (skip_nonfinite_ && !is_finite(norm)) {
        count_skipped_step(param_groups);
        return true;
      }
      if (max_grad_norm_.has_value()) coefficient = clip_coefficient(norm, *max_grad_norm_);
    }
  }
  set_scalars(host_scale, coefficient);
  if (!gpu_steps_.empty()) run_on_gpus(grad_scale, found_inf, true);
  run();
  store_new_state(state);
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].on_gpu != nullptr) continue;
    advance_group(groups_[i], PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)),
                  state);
  }
  return true;
}

bool Stepper::step_param(const py::list& param_groups, const py::dict& state, uint32_t index) {
  const Stepping stepping(*this);
  const at::NoGradGuard no_grad;
  sync_groups(param_groups, state);
  set_scalars(1, 1);
  size_t i = 0;
  while (i + 1 < groups_.size() && groups_[i + 1].first_param <= index) ++i;
  Group& group = groups_[i];
  const size_t in_group = index - group.first_param;
  PyObject* param = PyList_GET_ITEM(group.params(), static_cast<Py_ssize_t>(in_group));
  if (!THPVariable_Check(param)) return false;
  Slot slot{param, state_of(param, state.ptr())};
  gathered_slots_ = {&slot, 1};
  if (group.on_gpu != nullptr) {
    if (!gather_on_gpu(group, &slot, in_group, in_group + 1, false)) return false;
    run_on_gpus(py::none(), py::none(), false);
  } else if (!gather_param(group, static_cast<uint32_t>(i), index, slot)) {
    return false;
  }
  run();
  store_new_state(state);
  return true;
}

void Stepper::set_scalars(double grad_scale, double coefficient) {
  group_steps_.clear();
  for (Group& group : groups_) {
    group.update.scalars.grad_divisor = grad_scale;
    group.update.scalars.grad_multiplier = group.maximize ? -coefficient : coefficient;
    group.update.step = group.position.step;
    group_steps_.push_back(group.update);
  }
}

void Stepper::count_skipped_step(const py::list& param_groups) {
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    if (group.on_gpu != nullptr) {
      const at::Tensor count =
          group.on_gpu->memory.select(0, offsetof(GroupState, skipped_steps) / sizeof(int64_t));
      count.fill_(count.item<int64_t>() + 1);
      continue;
    }
    group.items.store(PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)),
                      group.skipped_steps_index, py::int_(++group.skipped_steps));
  }
}

void Stepper::sync(const py::list& param_groups, const py::dict& state) {
  const at::NoGradGuard no_grad;
  sync_groups(param_groups, state);
  for (Group& group : groups_) {
    if (group.on_gpu == nullptr) continue;
    for (size_t i = 0; i < group.on_gpu->params.size(); ++i) {
      PyObject* of_param = find(state.ptr(), group.on_gpu->params[i].param.ptr());
      for (const Role role : {kMomentumBuffer, kEma, kMasterParam})
        track(*group.on_gpu, i, role, of_param);
    }
  }
}

void Stepper::sync_groups(const py::list& param_groups, const py::dict& state) {
  groups_.resize(param_groups.size());
  is_all_on_gpus_ = !groups_.empty();
  uint32_t first_param = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i));
    if (!groups_[i].items.matches(dict) || !groups_[i].is_where_its_params_are())
      sync_group(groups_[i], dict, state);
    is_all_on_gpus_ &= groups_[i].on_gpu != nullptr;
    groups_[i].first_param = first_param;
    first_param += static_cast<uint32_t>(PyList_GET_SIZE(groups_[i].params()));
  }
}

void Stepper::sync_group(Group& group, PyObject* dict, const py::dict& state) {
  const py::object lr_before = group.items.empty() ? py::none() : group.items.value(group.lr_index);
  const bool lr_is_by_hand = !get(dict, names::lr()).is(lr_before);
  const py::object state_before = group.on_gpu == nullptr ? py::none() : group.on_gpu->device_state;
  const py::object device_state = sync_group_(py::handle(dict), lr_before, state_before, state);
  Group synced = read_group(dict, device_state.is_none());
  if (!device_state.is_none() && device_state.is(state_before)) {
    synced.on_gpu = std::move(group.on_gpu);
    synced.on_gpu->lr_source = lr_is_by_hand ? LrSource::kState : LrSource::kSchedule;
  } else if (!device_state.is_none()) {
    synced.on_gpu = std::make_unique<OnGpu>();
    synced.on_gpu->device_state = device_state;
    synced.on_gpu->memory = THPVariable_Unpack(device_state.attr("memory").ptr());
    for (const py::handle param : py::list(device_state.attr("params"))) {
      synced.on_gpu->params.emplace_back(py::reinterpret_borrow<py::object>(param),
                                         find(state.ptr(), param.ptr()));
    }
  }
  group = std::move(synced);
}

// Whether sync_group() would find the group's state where it should be.
bool Stepper::Group::is_where_its_params_are() const {
  PyObject* list = params();
  const Py_ssize_t size = PyList_GET_SIZE(list);
  const at::Tensor* first = nullptr;
  if (size > 0 && THPVariable_Check(PyList_GET_ITEM(list, 0)))
    first = &THPVariable_Unpack(PyList_GET_ITEM(list, 0));
  if (on_gpu == nullptr) return !kHasCuda || first == nullptr || !first->is_cuda();
  if (first == nullptr || first->device() != on_gpu->memory.device()) return false;
  if (static_cast<size_t>(size) != on_gpu->params.size()) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (on_gpu->params[static_cast<size_t>(i)].param.ptr() != PyList_GET_ITEM(list, i))
      return false;
  }
  return true;
}

Stepper::Group Stepper::read_group(PyObject* dict, bool is_on_host) {
  Group group;
  const bool by_epoch = get(dict, names::anneal()).cast<std::string>() == "epoch";
  const int64_t epoch = integer(dict, names::steps_per_epoch());
  const py::handle end = get(dict, names::n_cycles());
  group.schedule = {.eta_max = number(dict, names::initial_lr()),
                    .eta_min = number(dict, names::eta_min()),
                    .T_mult = number(dict, names::T_mult()),
                    .cycle_decay = number(dict, names::cycle_decay()),
                    .warmup_start_lr = number(dict, names::warmup_start_lr()),
                    .T_0 = integer(dict, names::T_0()) * epoch,
                    .anneal_every = by_epoch ? epoch : 1,
                    .warmup_steps = integer(dict, names::warmup_steps()),
                    .n_cycles = end.is_none() ? kEndless : end.cast<int64_t>()};
  if (is_on_host) {
    group.position = {.step = integer(dict, names::step()),
                      .cycle = integer(dict, names::cycle()),
                      .T_cur = integer(dict, names::T_cur()),
                      .T_i = integer(dict, names::T_i())};
    group.skipped_steps = integer(dict, names::skipped_steps());
  }
  const double decay = number(dict, names::weight_decay());
  const py::handle momentum_dtype = get(dict, names::momentum_dtype());
  if (!momentum_dtype.is_none())
    group.momentum_dtype = reinterpret_cast<THPDtype*>(momentum_dtype.ptr())->scalar_type;
  const bool rounds = truth(dict, names::stochastic_rounding());
  group.update = {
      .scalars = {.lr = is_on_host ? number(dict, names::lr()) : 0,
                  .momentum = number(dict, names::momentum()),
                  .dampening = number(dict, names::dampening()),
                  .weight_decay = decay},
      .weight_decay = kind_of_decay(decay, truth(dict, names::decoupled_weight_decay())),
      .direction = direction_of(number(dict, names::momentum()), truth(dict, names::nesterov())),
      .rounds_param = rounds,
      .rounds_momentum = rounds || group.momentum_dtype.has_value(),
      .seed = py::cast<uint64_t>(get(dict, names::seed()))};
  if (const py::handle average = get(dict, names::ema_decay()); py::isinstance<py::str>(average)) {
    group.averaging = Averaging::kEqual;
  } else if (!average.is_none()) {
    group.averaging = Averaging::kExponential;
    group.ema_decay = number(dict, names::ema_decay());
  }
  group.master_weights = truth(dict, names::master_weights());
  if (group.update.has_momentum()) group.roles |= bit_of(kMomentumBuffer);
  if (group.averaging != Averaging::kNone) group.roles |= bit_of(kEma);
  if (group.master_weights) group.roles |= bit_of(kMasterParam);
  group.maximize = truth(dict, names::maximize());
  group.reset_momentum = truth(dict, names::reset_momentum());

  group.items.take(dict);
  group.lr_index = group.items.index_of(names::lr());
  group.step_index = group.items.index_of(names::step());
  group.cycle_index = group.items.index_of(names::cycle());
  group.T_cur_index = group.items.index_of(names::T_cur());
  group.T_i_index = group.items.index_of(names::T_i());
  group.skipped_steps_index = group.items.index_of(names::skipped_steps());
  group.params_index = group.items.index_of(names::params());
  return group;
}

// Whether the tensors of those roles are what the state holds now, looked up for that shape.
[[gnu::always_inline]] inline bool Stepper::Slot::is_current(uint32_t roles) const {
  if (state == nullptr) return true;  // the snapshot of all state notices when there is one
  const uint64_t version = version_of(state);
  return version != 0 && version == state_version &&
         fingerprint(*param_tensor(), roles) == looked_for;
}

// False where something else than a tensor of the parameter's shape is in the place of one.
[[gnu::noinline]] bool Stepper::Slot::find_stored(uint32_t roles) {
  state_version = 0;
  FirstItems items(state);
  for (const Role role : {kMomentumBuffer, kEma, kMasterParam}) {
    PyObject* found = (roles & bit_of(role)) != 0 ? items.find(name_of(role)) : nullptr;
    if (found == nullptr || found == Py_None) {
      stored[role] = no_tensor();
      continue;
    }
    if (!THPVariable_Check(found)) return false;
    const at::Tensor& tensor = THPVariable_Unpack(found);
    if (!is_equal(tensor.sizes(), param_tensor()->sizes())) return false;
    if (tensor.unsafeGetTensorImpl() != stored[role]._unsafe_get_target())
      stored[role] = WeakTensor(tensor.getIntrusivePtr());
  }
  state_version = version_of(state);
  looked_for = fingerprint(*param_tensor(), roles);
  return true;
}

namespace {

[[gnu::always_inline]] inline void prefetch(const void* object, size_t offset) {
  __builtin_prefetch(static_cast<const char*>(object) + offset);
}

// What is read of a tensor lies on two to four cache lines.
[[gnu::always_inline]] inline void prefetch_tensor(const at::TensorImpl* tensor, bool with_sizes) {
  prefetch(tensor, 16);
  if (with_sizes) prefetch(tensor, 72);
  prefetch(tensor, 144);
  prefetch(tensor, sizeof(at::TensorImpl) - 1);
}

[[gnu::always_inline]] inline void prefetch_storage(const at::TensorImpl* tensor) {
  prefetch(tensor->unsafe_storage().unsafeGetStorageImpl(), 16);
}

}  // namespace

// Four functions that are called one after the other, each some parameters later, as each reads
// what the one before has fetched. Inlined by force: a function that only prefetches has no effect
// in gcc's eyes, and a call of it is dropped.
[[gnu::always_inline]] inline void Stepper::Slot::prefetch_objects() const {
  prefetch(param, 0);
  if (state != nullptr) prefetch(state, sizeof(PyVarObject));  // its version
  for (const Role role : {kMomentumBuffer, kEma, kMasterParam}) {
    if (tensor(role) != nullptr) prefetch_tensor(tensor(role), false);
  }
  if (last_grad != nullptr) prefetch_tensor(last_grad, true);
}

[[gnu::always_inline]] inline void Stepper::Slot::prefetch_tensors() const {
  prefetch_tensor(param_tensor(), true);
  for (const Role role : {kMomentumBuffer, kEma, kMasterParam}) {
    if (tensor(role) != nullptr) prefetch_storage(tensor(role));
  }
}

[[gnu::always_inline]] inline void Stepper::Slot::prefetch_behind_param() const {
  prefetch_storage(param_tensor());
  prefetch(param_tensor()->autograd_meta(), 32);
}

[[gnu::always_inline]] inline void Stepper::Slot::prefetch_behind_grad() const {
  const at::TensorImpl* const grad = grad_of(*param_tensor());
  if (grad != nullptr) prefetch_storage(grad);
}

// Looks every parameter's state up, which hashes it: the slow path. False where one is no tensor.
bool Stepper::find_slots(PyObject* state) {
  state_.take(state);
  slots_.clear();
  slot_params_.clear();
  for (const Group& group : groups_) {
    PyObject* list = group.params();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      PyObject* param = PyList_GET_ITEM(list, i);
      if (!THPVariable_Check(param)) {
        slot_params_.clear();
        return false;
      }
      slots_.push_back({param, state_of(param, state)});
      slot_params_.push_back(py::reinterpret_borrow<py::object>(param));
    }
  }
  return true;
}

bool Stepper::has_slots_of_params() const {
  auto next = slot_params_.begin();
  for (const Group& group : groups_) {
    PyObject* const list = group.params();
    PyObject** const params = PySequence_Fast_ITEMS(list);
    const Py_ssize_t size = PyList_GET_SIZE(list);
    const auto is_same = [](PyObject* a, const py::object& b) { return a == b.ptr(); };
    if (slot_params_.end() - next < size || !std::equal(params, params + size, next, is_same))
      return false;
    next += size;
  }
  return next == slot_params_.end();
}

bool Stepper::gather(PyObject* state) {
  if ((!state_.matches(state) || !has_slots_of_params()) && !find_slots(state)) return false;
  gathered_slots_ = slots_;
  Slot* slot = slots_.data();
  Slot* const end = slot + slots_.size();
  for (size_t i = 0; i < groups_.size(); ++i) {
    const auto size = static_cast<size_t>(PyList_GET_SIZE(groups_[i].params()));
    if (groups_[i].on_gpu != nullptr) {
      if (!gather_on_gpu(groups_[i], slot, 0, size, true)) return false;
      slot += size;
      continue;
    }
    for (size_t j = 0; j < size; ++j, ++slot) {
      if (slot + 4 * kAhead < end) slot[4 * kAhead].prefetch_objects();
      if (slot + 3 * kAhead < end) slot[3 * kAhead].prefetch_tensors();
      if (slot + 2 * kAhead < end) slot[2 * kAhead].prefetch_behind_param();
      if (slot + kAhead < end) slot[kAhead].prefetch_behind_grad();
      const auto index = static_cast<uint32_t>(slot - slots_.data());
      if (!gather_param(groups_[i], static_cast<uint32_t>(i), index, *slot)) return false;
    }
  }
  return true;
}

// Adds an entry if all its tensors are plain, of a type we know and alike in layout.
[[gnu::always_inline]] inline bool Stepper::add_entry(const Operands& operands) {
  at::TensorImpl* const param = operands.param;
  at::TensorImpl* const grad = operands.grad;
  at::TensorImpl* const buffer = operands.momentum_buffer;
  at::TensorImpl* const ema = operands.ema;
  at::TensorImpl* const low_precision = operands.low_precision_param;
  const ElementType param_type = element_type(*param);
  const auto type_of = [](const at::TensorImpl* tensor, ElementType otherwise)
                           __attribute__((always_inline)) {
                             return tensor == nullptr ? otherwise : element_type(*tensor);
                           };
  const ElementType grad_type = element_type(*grad);
  const ElementType momentum_type = type_of(buffer, param_type);
  const ElementType ema_type = type_of(ema, arithmetic_type(param_type));
  const ElementType low_precision_type = type_of(low_precision, ElementType::kNone);
  if (param_type == ElementType::kNone || grad_type == ElementType::kNone ||
      momentum_type == ElementType::kNone || ema_type != arithmetic_type(param_type) ||
      (low_precision != nullptr && param_type != ElementType::kFloat))
    return false;

  const Layout layout(*param);
  const auto fits = [&](const at::TensorImpl* tensor) __attribute__((always_inline)) {
    return tensor == nullptr || (is_plain(*tensor) && layout.is_still_of(*tensor));
  };
  if (!is_plain(*param) || !is_plain(*grad) || !layout.is_of(*grad) || !fits(buffer) ||
      !fits(ema) || !fits(low_precision))
    return false;

  const auto data = [](const at::TensorImpl* tensor, bool is_written, ElementType type)
                        __attribute__((always_inline)) -> char* {
    return tensor == nullptr ? nullptr : data_of(*tensor, is_written, element_size(type));
  };
  gathered_->push_back({.param = data(param, true, param_type),
                        .grad = data(grad, false, grad_type),
                        .momentum_buffer = data(buffer, true, momentum_type),
                        .ema = data(ema, true, ema_type),
                        .low_precision_param = data(low_precision, true, low_precision_type),
                        .numel = param->numel(),
                        .ema_decay = operands.ema_decay,
                        .group = operands.group,
                        .param_index = operands.param_index,
                        .param_type = param_type,
                        .grad_type = grad_type,
                        .momentum_type = momentum_type,
                        .low_precision_type = low_precision_type,
                        .first_step = operands.first_step,
                        .new_master = operands.new_master});
  numel_ += param->numel();
  const size_t first_written = written_.size();
  for (const at::TensorImpl* tensor : {param, buffer, ema, low_precision}) {
    if (tensor == nullptr) continue;
    const VersionCounter counter(*tensor);
    const auto begin = written_.begin() + static_cast<ptrdiff_t>(first_written);
    if (std::find(begin, written_.end(), counter) == written_.end()) written_.push_back(counter);
  }
  return true;
}

// Of the parameter's shape, without content; goes into state when the step has been taken.
[[gnu::noinline]] at::TensorImpl* Stepper::new_tensor(const Slot& slot, Role role,
                                                      at::ScalarType dtype,
                                                      at::TensorImpl* sibling) {
  const at::Tensor& param = THPVariable_Unpack(slot.param);
  new_state_.push_back(
      {slot.param, role, state_memory_.empty_like(param, dtype, sibling), nullptr});
  return new_state_.back().tensor.unsafeGetTensorImpl();
}

// The average and the master copy.
inline void Stepper::gather_more(const Group& group, const Slot& slot, bool is_half,
                                 Operands& operands) {
  at::TensorImpl* const param = operands.param;
  if (group.master_weights && is_half) {
    operands.low_precision_param = param;
    operands.param = slot.tensor(kMasterParam);
    if (operands.param == nullptr) {
      operands.new_master = true;
      operands.param = new_tensor(slot, kMasterParam, at::kFloat, operands.momentum_buffer);
    }
  }
  if (group.averaging == Averaging::kNone) return;
  const bool is_equal = group.averaging == Averaging::kEqual;
  // On a GPU the kernel knows where the schedule stands.
  if (is_equal && group.on_gpu == nullptr && !ends_cycle(group.schedule, group.position)) return;
  operands.ema = slot.tensor(kEma);
  const bool is_new = operands.ema == nullptr;
  if (is_new) {
    const at::ScalarType dtype = is_half ? at::kFloat : c10::typeMetaToScalarType(param->dtype());
    at::TensorImpl* sibling = operands.momentum_buffer;
    if (sibling == nullptr && operands.low_precision_param != nullptr) sibling = operands.param;
    operands.ema = new_tensor(slot, kEma, dtype, sibling);
  }
  if (!is_equal) {
    operands.ema_decay = is_new ? 0 : group.ema_decay;
  } else if (group.on_gpu == nullptr) {
    operands.ema_decay = decay_of_equal_average(count_average(slot, is_new));
  }
}

// How many weights the average holds before this step.
[[gnu::noinline]] int64_t Stepper::count_average(const Slot& slot, bool is_new) {
  PyObject* counted = is_new ? nullptr : find(slot.state, names::n_averaged());
  const int64_t n_averaged = counted == nullptr ? 0 : py::cast<int64_t>(py::handle(counted));
  averaged_.push_back({slot.param, n_averaged + 1});
  return n_averaged;
}

// Flat, as torch's accessors are called through a table where they are not inlined.
[[gnu::flatten]] bool Stepper::gather_param(const Group& group, uint32_t group_index,
                                            uint32_t param_index, Slot& slot) {
  at::TensorImpl* const param = slot.param_tensor();
  at::TensorImpl* const grad = grad_of(*param);
  if (grad == nullptr) return true;

  Operands operands{.param = param, .grad = grad, .group = group_index, .param_index = param_index};
  slot.last_grad = grad;
  const bool is_half = element_size(element_type(*param)) == 2;
  const uint32_t roles = is_half ? group.roles : group.roles & ~bit_of(kMasterParam);
  if (!slot.is_current(roles) && !slot.find_stored(roles)) return false;
  if (group.update.has_momentum()) {
    operands.momentum_buffer = slot.tensor(kMomentumBuffer);
    if (operands.momentum_buffer == nullptr) {
      operands.first_step = true;
      const at::ScalarType dtype =
          group.master_weights && is_half ? at::kFloat : c10::typeMetaToScalarType(param->dtype());
      operands.momentum_buffer =
          new_tensor(slot, kMomentumBuffer, group.momentum_dtype.value_or(dtype));
    }
  }
  if (group.averaging != Averaging::kNone || group.master_weights)
    gather_more(group, slot, is_half, operands);
  return add_entry(operands) || add_unusual(operands);
}

// Shards, complex numbers and layouts that differ: brought to the plain form, by a copy where
// nothing less will do.
[[gnu::noinline]] bool Stepper::add_unusual(const Operands& operands) {
  const at::Tensor param =
      own(operands.low_precision_param == nullptr ? operands.param : operands.low_precision_param);
  const at::Tensor plain_param = to_plain(own(operands.param), param);
  if (!plain_param.defined()) return false;
  if (at::has_internal_overlap(plain_param) == at::MemOverlap::Yes) return false;
  const at::Tensor flat_param = to_layout_of(plain_param, plain_param, true);
  bool is_known = true;
  const auto flatten = [&](at::TensorImpl* tensor, bool is_written) -> at::TensorImpl* {
    if (tensor == nullptr) return nullptr;
    const at::Tensor plain = to_plain(own(tensor), param);
    const at::Tensor flat =
        plain.defined() ? to_layout_of(plain, flat_param, is_written) : at::Tensor();
    is_known &= flat.defined();
    return flat.unsafeGetTensorImpl();
  };
  Operands flat = operands;
  flat.param = flat_param.unsafeGetTensorImpl();
  flat.grad = flatten(operands.grad, false);
  flat.momentum_buffer = flatten(operands.momentum_buffer, true);
  flat.ema = flatten(operands.ema, true);
  flat.low_precision_param = flatten(operands.low_precision_param, true);
  if (!is_known) return false;
  if (flat.low_precision_param != nullptr &&
      at::has_internal_overlap(flat.low_precision_param) == at::MemOverlap::Yes)
    return false;
  if (!add_entry(flat)) return false;
  if (needs_norm()) note_shards(param);
  // What it wraps counts for itself.
  if (param.unsafeGetTensorImpl()->is_python_dispatch() && !param.is_inference())
    param.unsafeGetTensorImpl()->bump_version();
  return true;
}

// The tensor as plain memory of real numbers that share its storage (but for a conjugate), or
// undefined.
at::Tensor Stepper::to_plain(const at::Tensor& tensor, const at::Tensor& param) {
  at::Tensor plain = tensor;
  if (tensor.unsafeGetTensorImpl()->is_python_dispatch()) {
    const py::object local =
        local_tensor_(py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)),
                      py::reinterpret_steal<py::object>(THPVariable_Wrap(param)));
    if (local.is_none()) return {};
    plain = THPVariable_Unpack(local.ptr());
  }
  if (plain.device() != device_ || plain.layout() != at::kStrided) return {};
  plain = plain.resolve_conj().resolve_neg();
  if (plain.is_complex()) plain = at::view_as_real(plain);
  kept_alive_.push_back(plain);
  return plain;
}

// The tensor itself, or a copy whose elements lie in the order of another's; undefined if the
// shapes differ.
at::Tensor Stepper::to_layout_of(const at::Tensor& tensor, const at::Tensor& other,
                                 bool is_written) {
  if (!tensor.sizes().equals(other.sizes())) return {};
  if (Layout(*other.unsafeGetTensorImpl()).is_of(*tensor.unsafeGetTensorImpl())) return tensor;
  const at::Tensor copy = copy_in_layout_of(tensor, other);
  if (is_written) copy_back_.push_back({tensor, copy});
  kept_alive_.push_back(copy);
  return copy;
}

FusedStep Stepper::host_step() const {
  return {.tensors = entries_, .groups = group_steps_, .numel = numel_};
}

// Others may drop tensors while the GIL is released.
void Stepper::keep_tensors_alive() {
  for (const Slot& slot : gathered_slots_) {
    kept_alive_.push_back(own(slot.param_tensor()));
    if (at::TensorImpl* grad = grad_of(*slot.param_tensor())) kept_alive_.push_back(own(grad));
    for (const WeakTensor& tensor : slot.stored) kept_alive_.emplace_back(tensor.lock());
  }
}

void Stepper::run() {
  if (entries_.empty()) {
    // They are all on GPUs.
  } else if (!is_worth_threads(host_step())) {
    fused_step_cpu(host_step());
  } else {
    keep_tensors_alive();
    const py::gil_scoped_release no_gil;
    fused_step_cpu(host_step());
  }
  for (const CopyBack& staged : copy_back_) staged.tensor.copy_(staged.copy);
  for (size_t i = 0; i < written_.size(); ++i) {
    if (i + kCountersAhead < written_.size()) written_[i + kCountersAhead].prefetch();
    written_[i].bump();
  }
}

void Stepper::store_new_state(const py::dict& state) {
  for (const NewState& created : new_state_) {
    const py::object tensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(created.tensor));
    const py::object of_param = state[py::handle(created.param)];
    of_param[py::handle(name_of(created.role))] = tensor;
    if (created.tracked != nullptr) created.tracked->set(created.role, created.tensor);
  }
  for (const Averaged& averaged : averaged_) {
    const py::object of_param = state[py::handle(averaged.param)];
    of_param[py::handle(names::n_averaged())] = averaged.n_averaged;
  }
}

void Stepper::advance_group(Group& group, PyObject* dict, const py::dict& state) {
  advance(group.schedule, group.position);
  group.update.scalars.lr = learning_rate(group.schedule, group.position);
  group.items.store(dict, group.lr_index, py::float_(group.update.scalars.lr));
  group.items.store(dict, group.step_index, py::int_(group.position.step));
  group.items.store(dict, group.T_cur_index, py::int_(group.position.T_cur));
  if (group.position.T_cur != 0) return;
  group.items.store(dict, group.cycle_index, py::int_(group.position.cycle));
  group.items.store(dict, group.T_i_index, py::int_(group.position.T_i));
  if (!group.reset_momentum || !at_restart(group.schedule, group.position)) return;
  for (const py::handle param : py::reinterpret_borrow<py::list>(group.params())) {
    if (PyObject* of_param = find(state.ptr(), param.ptr());
        of_param != nullptr && find(of_param, names::momentum_buffer()))
      py::reinterpret_borrow<py::dict>(of_param).attr("pop")(py::handle(names::momentum_buffer()));
  }
}

}  // namespace sgdr
