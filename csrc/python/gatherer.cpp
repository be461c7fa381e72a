#include "gatherer.h"

#include "../torch/internals.h"

namespace sgdr {

Gatherer::Gatherer(DeviceStep& target, const ParamGroup& group, uint32_t group_index,
                   NewState& new_state, const py::function* shard_axes)
    : target_(target),
      group_(group),
      group_index_(group_index),
      new_state_(new_state),
      shard_axes_(shard_axes),
      // A reader of a new buffer sees zeros if the step is skipped; the kernel goes by its flag.
      // While a graph is captured that is left out: each replay would repeat it.
      zeroes_new_state_(group.on_gpu != nullptr && !cuda::is_capturing()),
      is_in_use_{group.options.has_momentum(), group.options.averaging != Averaging::kNone,
                 group.options.master_weights} {}

bool Gatherer::add(size_t index, ParamAndState& found) {
  const GroupOptions& options = group_.options;
  GroupOnGpu* const on_gpu = group_.on_gpu.get();
  const at::Tensor& param = THPVariable_Unpack(found.param);
  const at::Tensor& grad = grad_of(param);
  if (!grad.defined() && on_gpu == nullptr) return true;
  for (const Role role : {kMomentumBuffer, kEma, kMasterParam}) {
    if (!is_in_use_[role]) continue;
    stored_[role] = find_in_state(found.state, name_of(role));
    if (on_gpu != nullptr) on_gpu->sync_flag(index, role, as_tensor(stored_[role]));
  }
  if (!grad.defined()) return true;
  if (param.layout() != at::kStrided) return false;

  ParamTensors tensors = {.param = &param, .grad = &grad};
  TensorEntry& entry = target_.entries.emplace_back();
  entry.group = group_index_;
  entry.param_index = group_.first_param + static_cast<uint32_t>(index);
  const bool is_half = element_size(element_type(param)) == 2;
  const bool has_master = options.master_weights && is_half;
  if (options.has_momentum()) {
    if (options.momentum_type != ElementType::kNone && param.is_complex()) return false;
    const at::ScalarType dtype = options.momentum_type != ElementType::kNone
                                     ? scalar_type(options.momentum_type)
                                 : has_master ? at::kFloat
                                              : param.scalar_type();
    if (!find_or_make(found, index, kMomentumBuffer, dtype, tensors.momentum_buffer,
                      entry.first_step))
      return false;
  }
  if (has_master) {
    tensors.low_precision_param = &param;
    if (!find_or_make(found, index, kMasterParam, at::kFloat, tensors.param, entry.new_master))
      return false;
  }
  const at::ScalarType ema_dtype = is_half ? at::kFloat : param.scalar_type();
  if (averages_in_this_step()) {
    bool is_new = false;
    if (!find_or_make(found, index, kEma, ema_dtype, tensors.ema, is_new)) return false;
    if (options.averaging == Averaging::kExponential)
      entry.ema_decay = is_new ? 0 : options.ema_decay;
    else if (group_.on_gpu == nullptr)
      entry.ema_decay = decay_of_equal_average(count_averaged(found, is_new));
  } else if (options.averaging != Averaging::kNone && !is_average_valid(found, ema_dtype)) {
    return false;
  }

  if (!target_.flattener.flatten(tensors, entry)) return false;
  if (shard_axes_ != nullptr && is_subclass(param)) {
    py::object axes = (*shard_axes_)(py::handle(found.param));
    if (!axes.is_none())
      add_to_part(target_.sharded_parts, std::move(axes), target_.entries.size() - 1);
  }
  return true;
}

bool Gatherer::averages_in_this_step() const {
  switch (group_.options.averaging) {
    case Averaging::kNone:
      return false;
    case Averaging::kExponential:
      return true;
    default:
      // On a GPU only the kernel knows where the schedule stands.
      return group_.on_gpu != nullptr || ends_cycle(group_.options.schedule, group_.state.position);
  }
}

// The tensor of that role in a parameter's state, or else a new one. False if something else is
// there.
SGDR_INLINE bool Gatherer::find_or_make(ParamAndState& param, size_t index, Role role,
                                        at::ScalarType dtype, const at::Tensor*& tensor,
                                        bool& is_new) {
  if (stored_[role] != nullptr) {
    tensor = as_tensor(stored_[role]);
    return tensor != nullptr;
  }
  tensor = &new_state_.make(param, role, dtype, group_.on_gpu.get(), index);
  if (zeroes_new_state_) tensor->zero_();
  is_new = true;
  return true;
}

// Whether an average that this step leaves alone could be updated.
bool Gatherer::is_average_valid(const ParamAndState& param, at::ScalarType dtype) const {
  if (stored_[kEma] == nullptr) return true;
  const at::Tensor* const ema = as_tensor(stored_[kEma]);
  return ema != nullptr && ema->scalar_type() == dtype &&
         ema->sizes() == THPVariable_Unpack(param.param).sizes();
}

// How many weights an equal average holds before this step.
int64_t Gatherer::count_averaged(ParamAndState& param, bool is_new) {
  PyObject* const counted = is_new ? nullptr : find(param.state, names::n_averaged());
  const int64_t n_averaged = counted == nullptr ? 0 : py::handle(counted).cast<int64_t>();
  new_state_.set_n_averaged(param, n_averaged + 1);
  return n_averaged;
}

}  // namespace sgdr
