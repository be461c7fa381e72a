#include "stepper.h"

#include <ATen/Functions.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include "python_dict.h"
#include "tensor_kinds.h"

namespace sgdr {
namespace {

// Of a number, or a tensor of one element, which a GPU has to be waited for.
double to_double(const py::object& value) { return py::float_(value).cast<double>(); }

}  // namespace

Stepper::Stepper(py::function sync_group, py::function local_tensor)
    : host_keys_(plain_keys()),
      plain_keys_(host_keys_),
      sync_group_(std::move(sync_group)),
      local_tensor_(std::move(local_tensor)) {}

bool Stepper::step(const py::list& param_groups, const py::dict& state,
                   const py::object& grad_scale, const py::object& found_inf) {
  if (is_stepping_)
    throw std::runtime_error("step() was called on an optimizer whose step() is still running");
  const struct Guard {
    explicit Guard(Stepper& stepper) : stepper(stepper) { stepper.is_stepping_ = true; }
    ~Guard() {
      stepper.is_stepping_ = false;
      stepper.new_buffers_.clear();
      stepper.copy_back_.clear();
      stepper.kept_alive_.clear();
      stepper.gpu_steps_.clear();
    }
    Stepper& stepper;
  } guard(*this);
  const at::NoGradGuard no_grad;

  if (!is_all_on_gpus_ && !found_inf.is_none() && to_double(found_inf) != 0) return true;
  sync_groups(param_groups, state);
  const double host_scale = is_all_on_gpus_ || grad_scale.is_none() ? 1.0 : to_double(grad_scale);
  group_steps_.clear();
  for (Group& group : groups_) {
    group.update.scalars.grad_divisor = group.maximize ? -host_scale : host_scale;
    group_steps_.push_back(group.update);
  }
  if (!gather(state.ptr())) return false;
  if (!gpu_steps_.empty()) run_on_gpus(grad_scale, found_inf);
  run();
  store_momentum_buffers(state);
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (groups_[i].on_gpu != nullptr) continue;
    advance_group(groups_[i], PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)),
                  state);
  }
  return true;
}

void Stepper::sync(const py::list& param_groups, const py::dict& state) {
  const at::NoGradGuard no_grad;
  sync_groups(param_groups, state);
  for (Group& group : groups_) {
    if (group.on_gpu == nullptr) continue;
    for (size_t i = 0; i < group.on_gpu->params.size(); ++i)
      track(*group.on_gpu, i, find(state.ptr(), group.on_gpu->params[i].param.ptr()));
  }
}

void Stepper::sync_groups(const py::list& param_groups, const py::dict& state) {
  groups_.resize(param_groups.size());
  is_all_on_gpus_ = !groups_.empty();
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* dict = PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i));
    if (!groups_[i].items.matches(dict) || !groups_[i].is_where_its_params_are())
      sync_group(groups_[i], dict, state);
    is_all_on_gpus_ &= groups_[i].on_gpu != nullptr;
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
      const at::Tensor* buffer = buffer_in(find(state.ptr(), param.ptr()));
      synced.on_gpu->params.emplace_back(py::reinterpret_borrow<py::object>(param), buffer);
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
  }
  const double decay = number(dict, names::weight_decay());
  group.update = {.scalars = {.lr = is_on_host ? number(dict, names::lr()) : 0,
                              .momentum = number(dict, names::momentum()),
                              .dampening = number(dict, names::dampening()),
                              .weight_decay = decay,
                              .grad_divisor = 1},
                  .weight_decay = decay == 0 ? WeightDecay::kNone
                                  : truth(dict, names::decoupled_weight_decay())
                                      ? WeightDecay::kDecoupled
                                      : WeightDecay::kL2,
                  .momentum = number(dict, names::momentum()) != 0,
                  .nesterov = truth(dict, names::nesterov())};
  group.maximize = truth(dict, names::maximize());
  group.reset_momentum = truth(dict, names::reset_momentum());

  group.items.take(dict);
  group.lr_index = group.items.index_of(names::lr());
  group.step_index = group.items.index_of(names::step());
  group.cycle_index = group.items.index_of(names::cycle());
  group.T_cur_index = group.items.index_of(names::T_cur());
  group.T_i_index = group.items.index_of(names::T_i());
  group.params_index = group.items.index_of(names::params());
  return group;
}

void Stepper::Slot::remember(const at::TensorImpl* of_param, const at::TensorImpl* grad,
                             const at::TensorImpl* buffer) {
  const auto storage = [](const at::TensorImpl* tensor) -> const void* {
    return tensor == nullptr ? nullptr : tensor->unsafe_storage().unsafeGetStorageImpl();
  };
  tensors = {of_param, grad, buffer};
  others = {of_param->autograd_meta(), storage(of_param), storage(grad), storage(buffer)};
}

// Inlined by force: a function that only prefetches has no effect in gcc's eyes, and a call of it
// is dropped.
[[gnu::always_inline]] inline void Stepper::Slot::prefetch() const {
  __builtin_prefetch(param);
  __builtin_prefetch(state);
  // What is read of a tensor lies on three cache lines, four at times, of anything else on two at
  // most.
  for (const at::TensorImpl* tensor : tensors) {
    for (int offset = 16; offset < 192; offset += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tensor) + offset);
  }
  for (const void* object : others) {
    for (int offset = 16; offset < 64; offset += 44)
      __builtin_prefetch(static_cast<const char*>(object) + offset);
  }
}

// Looks every parameter's state up, which hashes it: the slow path.
void Stepper::find_slots(PyObject* state) {
  state_.take(state);
  slots_.clear();
  for (const Group& group : groups_) {
    PyObject* list = group.params();
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      PyObject* param = PyList_GET_ITEM(list, i);
      slots_.push_back({param, find(state, param), {}, {}});
    }
  }
}

bool Stepper::gather(PyObject* state) {
  if (!state_.matches(state)) find_slots(state);
  numel_ = 0;
  entries_.clear();
  operands_.clear();
  size_t slot = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    PyObject* list = groups_[i].params();
    if (groups_[i].on_gpu != nullptr) {
      if (!gather_on_gpu(groups_[i], slot, state)) return false;
      slot += static_cast<size_t>(PyList_GET_SIZE(list));
      continue;
    }
    for (Py_ssize_t j = 0; j < PyList_GET_SIZE(list); ++j, ++slot) {
      if (slot >= slots_.size() || slots_[slot].param != PyList_GET_ITEM(list, j))
        find_slots(state);
      if (slot + kAhead < slots_.size()) slots_[slot + kAhead].prefetch();
      if (!gather_param(groups_[i], static_cast<uint32_t>(i), slots_[slot])) return false;
    }
  }
  return true;
}

[[gnu::flatten]] bool Stepper::gather_param(const Group& group, uint32_t index, Slot& slot) {
  if (!THPVariable_Check(slot.param)) return false;
  const at::Tensor& param = THPVariable_Unpack(slot.param);
  const at::Tensor& grad = grad_of(*param.unsafeGetTensorImpl());
  if (!grad.defined()) return true;

  at::Tensor new_buffer;
  const at::Tensor* buffer = &new_buffer;
  if (group.update.momentum) {
    PyObject* stored =
        slot.state == nullptr ? nullptr : find_first(slot.state, names::momentum_buffer());
    if (stored != nullptr && stored != Py_None) {
      if (!THPVariable_Check(stored)) return false;
      buffer = &THPVariable_Unpack(stored);
    } else {
      const c10::InferenceMode off(false);
      new_buffer = at::empty_like(param);
      new_buffers_.push_back({slot.param, new_buffer, nullptr});
    }
  }

  slot.remember(param.unsafeGetTensorImpl(), grad.unsafeGetTensorImpl(),
                buffer->defined() ? buffer->unsafeGetTensorImpl() : nullptr);
  const bool first_step = new_buffer.defined();
  return add_entry(index, first_step, param, grad, *buffer) ||
         add_unusual(index, first_step, param, grad, *buffer);
}

// Adds an entry if all its tensors are plain, of a type we know and alike in layout.
bool Stepper::add_entry(uint32_t group, bool first_step, const at::Tensor& param,
                        const at::Tensor& grad, const at::Tensor& buffer) {
  at::TensorImpl* const param_impl = param.unsafeGetTensorImpl();
  at::TensorImpl* const grad_impl = grad.unsafeGetTensorImpl();
  at::TensorImpl* const buffer_impl = buffer.defined() ? buffer.unsafeGetTensorImpl() : nullptr;
  const ElementType param_type = element_type(*param_impl);
  const ElementType grad_type = element_type(*grad_impl);
  const ElementType momentum_type =
      buffer_impl != nullptr ? element_type(*buffer_impl) : param_type;
  if (param_type == ElementType::kNone || grad_type == ElementType::kNone ||
      momentum_type == ElementType::kNone)
    return false;
  if (!is_plain(*param_impl) || !is_plain(*grad_impl) || !is_alike(*param_impl, *grad_impl))
    return false;
  if (buffer_impl != nullptr && (!is_plain(*buffer_impl) || !is_alike(*param_impl, *buffer_impl)))
    return false;

  gathered_->push_back(
      {.param = data_of(*param_impl, true, element_size(param_type)),
       .grad = data_of(*grad_impl, false, element_size(grad_type)),
       .momentum_buffer = buffer_impl == nullptr
                              ? nullptr
                              : data_of(*buffer_impl, true, element_size(momentum_type)),
       .numel = param_impl->numel(),
       .group = group,
       .param_type = param_type,
       .grad_type = grad_type,
       .momentum_type = momentum_type,
       .first_step = first_step});
  numel_ += param_impl->numel();
  operands_.push_back({param_impl, grad_impl, buffer_impl});
  return true;
}

// Shards, complex numbers and layouts that differ: brought to the plain form, by a copy where
// nothing less will do.
[[gnu::noinline]] bool Stepper::add_unusual(uint32_t group, bool first_step,
                                            const at::Tensor& param, const at::Tensor& grad,
                                            const at::Tensor& buffer) {
  const at::Tensor plain_param = to_plain(param, param);
  const at::Tensor plain_grad = to_plain(grad, param);
  if (!plain_param.defined() || !plain_grad.defined()) return false;
  if (at::has_internal_overlap(plain_param) == at::MemOverlap::Yes) return false;
  const at::Tensor flat_param = to_layout_of(plain_param, plain_param, true);
  const at::Tensor flat_grad = to_layout_of(plain_grad, flat_param, false);
  at::Tensor flat_buffer;
  if (buffer.defined()) {
    const at::Tensor plain_buffer = to_plain(buffer, param);
    if (!plain_buffer.defined()) return false;
    flat_buffer = to_layout_of(plain_buffer, flat_param, true);
    if (!flat_buffer.defined()) return false;
  }
  if (!flat_grad.defined() || !add_entry(group, first_step, flat_param, flat_grad, flat_buffer))
    return false;
  if (!param.is_inference()) param.unsafeGetTensorImpl()->bump_version();
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
  if (is_alike(*other.unsafeGetTensorImpl(), *tensor.unsafeGetTensorImpl())) return tensor;
  at::Tensor copy = at::empty_like(other, other.options().dtype(tensor.scalar_type()));
  copy.copy_(tensor);
  if (is_written) copy_back_.push_back({tensor, copy});
  kept_alive_.push_back(copy);
  return copy;
}

void Stepper::run() {
  const FusedStep fused_step{.tensors = entries_, .groups = group_steps_, .numel = numel_};
  if (entries_.empty()) {
    // They are all on GPUs.
  } else if (!is_worth_threads(fused_step)) {
    fused_step_cpu(fused_step);
  } else {
    for (const Operands& operands : operands_) {
      for (at::TensorImpl* tensor : {operands.param, operands.grad, operands.momentum_buffer}) {
        if (tensor == nullptr) continue;
        kept_alive_.emplace_back(
            c10::intrusive_ptr<at::TensorImpl,
                               c10::UndefinedTensorImpl>::unsafe_reclaim_from_nonowning(tensor));
      }
    }
    const py::gil_scoped_release no_gil;
    fused_step_cpu(fused_step);
  }
  for (const CopyBack& staged : copy_back_) staged.tensor.copy_(staged.copy);
  for (size_t i = 0; i < operands_.size(); ++i) {
    if (i + kAhead < operands_.size()) {
      __builtin_prefetch(operands_[i + kAhead].param);
      __builtin_prefetch(operands_[i + kAhead].momentum_buffer);
    }
    operands_[i].param->bump_version();
    if (operands_[i].momentum_buffer != nullptr) operands_[i].momentum_buffer->bump_version();
  }
}

void Stepper::store_momentum_buffers(const py::dict& state) {
  for (const NewBuffer& created : new_buffers_) {
    const py::object buffer =
        py::reinterpret_steal<py::object>(THPVariable_Wrap(created.momentum_buffer));
    const py::object of_param = state[py::handle(created.param)];
    of_param[py::handle(names::momentum_buffer())] = buffer;
    if (created.tracked != nullptr) created.tracked->set(created.momentum_buffer);
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
