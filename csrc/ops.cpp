// torch.ops.sgdr_fused.fused_step_: the step of one param group with nothing hidden, for graphs of
// torch.compile. What moves from step to step is in group_state, so that the graph stays the same.
#include <ATen/MemoryOverlap.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <vector>

#include "cuda/launcher.h"
#include "fused_step.h"
#include "tensor_kinds.h"

namespace sgdr {
namespace {

struct GroupOptions {
  Schedule schedule;
  double momentum, dampening, weight_decay;
  bool nesterov, maximize, decoupled_weight_decay, reset_momentum;
};

// The memory of a GroupState, its ticket, and a ParamState for each parameter of the group.
struct GroupView {
  GroupMemory* memory;
  ParamState* params;
  int64_t param_count;

  explicit GroupView(const at::Tensor& group_state)
      : memory(reinterpret_cast<GroupMemory*>(group_state.mutable_data_ptr<int64_t>())),
        params(reinterpret_cast<ParamState*>(memory + 1)),
        param_count(group_state.numel() - static_cast<int64_t>(sizeof(GroupMemory) / 8)) {}
};

void check(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
           const at::Tensor& group_state, at::IntArrayRef param_indices, double momentum) {
  TORCH_CHECK_VALUE(grads.size() == params.size() && param_indices.size() == params.size(),
                    "fused_step_ takes as many grads and param_indices as params: got ",
                    params.size(), " params, ", grads.size(), " grads and ", param_indices.size(),
                    " param_indices");
  TORCH_CHECK_VALUE(momentum_buffers.size() == (momentum == 0 ? 0 : params.size()),
                    "fused_step_ takes a momentum_buffer for each param, and none where "
                    "momentum=0: got ",
                    momentum_buffers.size(), " with momentum=", momentum);
  const auto words = static_cast<int64_t>(sizeof(GroupMemory) / 8);
  TORCH_CHECK_VALUE(group_state.scalar_type() == at::kLong && group_state.dim() == 1 &&
                        group_state.is_contiguous() && group_state.numel() >= words,
                    "group_state must be a contiguous int64 vector of ", words,
                    " words and one for each parameter of the group, but is ",
                    group_state.toString(), " of shape ", group_state.sizes());
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor& param = params[i];
    TORCH_CHECK_VALUE(param_indices[i] >= 0 && param_indices[i] < group_state.numel() - words,
                      "param_indices[", i, "]=", param_indices[i],
                      " is no parameter of a group of ", group_state.numel() - words);
    TORCH_CHECK_VALUE(param.device() == group_state.device(), "params[", i, "] is on ",
                      param.device(), ", but group_state on ", group_state.device());
    TORCH_CHECK_VALUE(at::has_internal_overlap(param) != at::MemOverlap::Yes, "params[", i,
                      "] has several elements at one memory address; pass a clone()");
    const auto check_fits = [&](const char* name, const at::Tensor& tensor) {
      TORCH_CHECK_VALUE(tensor.sizes() == param.sizes() && tensor.device() == param.device(), name,
                        "[", i, "] is of shape ", tensor.sizes(), " on ", tensor.device(),
                        ", but params[", i, "] of shape ", param.sizes(), " on ", param.device());
      TORCH_CHECK_TYPE(element_type(*tensor.unsafeGetTensorImpl()) != ElementType::kNone, name, "[",
                       i, "] has dtype ", tensor.scalar_type(),
                       "; fused_step_ takes float64, float32, float16 and bfloat16");
    };
    check_fits("params", param);
    check_fits("grads", grads[i]);
    if (momentum != 0) check_fits("momentum_buffers", momentum_buffers[i]);
  }
}

// The tensors in the order of the parameter's memory; those that lie otherwise as copies.
class Entries {
 public:
  std::vector<TensorEntry> entries;
  int64_t numel = 0;

  void add(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& momentum_buffer) {
    const at::Tensor flat_param = laid_out(param, param, true);
    const at::Tensor flat_grad = laid_out(grad, flat_param, false);
    const at::Tensor flat_buffer =
        momentum_buffer.defined() ? laid_out(momentum_buffer, flat_param, true) : at::Tensor();
    const auto type = [](const at::Tensor& t) { return element_type(*t.unsafeGetTensorImpl()); };
    entries.push_back(
        {.param = flat_param.mutable_data_ptr(),
         .grad = flat_grad.const_data_ptr(),
         .momentum_buffer = flat_buffer.defined() ? flat_buffer.mutable_data_ptr() : nullptr,
         .numel = flat_param.numel(),
         .group = 0,
         .param_type = type(flat_param),
         .grad_type = type(flat_grad),
         .momentum_type = flat_buffer.defined() ? type(flat_buffer) : type(flat_param),
         .first_step = false});
    numel += flat_param.numel();
  }

  void copy_back() const {
    for (const auto& [tensor, copy] : copies_) tensor.copy_(copy);
  }

 private:
  at::Tensor laid_out(const at::Tensor& tensor, const at::Tensor& other, bool is_written) {
    if (Layout(*other.unsafeGetTensorImpl()).is_of(*tensor.unsafeGetTensorImpl())) {
      kept_alive_.push_back(tensor);
      return tensor;
    }
    const at::Tensor copy = copy_in_layout_of(tensor, other);
    if (is_written) copies_.emplace_back(tensor, copy);
    kept_alive_.push_back(copy);
    return copy;
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> copies_;
  std::vector<at::Tensor> kept_alive_;
};

Entries entries_of(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers) {
  Entries entries;
  for (size_t i = 0; i < params.size(); ++i)
    entries.add(params[i], grads[i], momentum_buffers.empty() ? at::Tensor() : momentum_buffers[i]);
  return entries;
}

void step_on_cpu(Entries& entries, const at::Tensor& group_state, at::IntArrayRef param_indices,
                 const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf, const GroupOptions& options) {
  const GroupView group(group_state);
  GroupState& state = group.memory->state;
  if (found_inf.has_value() && found_inf->item<double>() != 0) {
    ++state.skipped_steps;
    return;
  }
  const bool has_momentum = options.momentum != 0;
  for (size_t i = 0; i < entries.entries.size(); ++i)
    entries.entries[i].first_step =
        has_momentum && group.params[param_indices[i]].momentum_is_empty != 0;
  const GroupStep step{
      .scalars = {.lr = state.lr,
                  .momentum = options.momentum,
                  .dampening = options.dampening,
                  .weight_decay = options.weight_decay,
                  .grad_divisor = grad_scale.has_value() ? grad_scale->item<double>() : 1,
                  .grad_multiplier = options.maximize ? -1.0 : 1.0},
      .weight_decay = kind_of_decay(options.weight_decay, options.decoupled_weight_decay),
      .direction = direction_of(options.momentum, options.nesterov)};
  fused_step_cpu({.tensors = entries.entries, .groups = {&step, 1}, .numel = entries.numel});
  if (has_momentum) {
    for (const int64_t index : param_indices) group.params[index].momentum_is_empty = 0;
  }
  advance(options.schedule, state.position);
  state.lr = learning_rate(options.schedule, state.position);
  if (!options.reset_momentum || !at_restart(options.schedule, state.position)) return;
  for (int64_t i = 0; i < group.param_count; ++i) group.params[i].momentum_is_empty = 1;
}

void step_on_gpu(Entries& entries, const at::Tensor& group_state, at::IntArrayRef param_indices,
                 const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf, const GroupOptions& options) {
  const GroupView view(group_state);
  const LaunchGroup group{
      .schedule = options.schedule,
      .momentum = options.momentum,
      .dampening = options.dampening,
      .weight_decay = options.weight_decay,
      .ema_decay = 0,
      .seed = 0,
      .state = &view.memory->state,
      .params = view.params,
      .param_count = static_cast<uint32_t>(view.param_count),
      .first_param = 0,
      .decay = kind_of_decay(options.weight_decay, options.decoupled_weight_decay),
      .direction = direction_of(options.momentum, options.nesterov),
      .lr_source = LrSource::kState,
      .averaging = Averaging::kNone,
      .maximize = options.maximize,
      .reset_momentum = options.reset_momentum,
      .rounds_param = false,
      .rounds_momentum = false,
      .advances = true};
  const std::vector<uint32_t> indices(param_indices.begin(), param_indices.end());
  const auto to_float = [&](const std::optional<at::Tensor>& value) {
    return value.has_value() ? value->to(group_state.options().dtype(at::kFloat)) : at::Tensor();
  };
  const at::Tensor scale = to_float(grad_scale);
  const at::Tensor inf = to_float(found_inf);
  fused_step_cuda(group_state.device().index(),
                  {.groups = {&group, 1},
                   .tensors = entries.entries,
                   .param_indices = indices,
                   .grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr,
                   .found_inf = inf.defined() ? inf.const_data_ptr<float>() : nullptr});
}

void fused_step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 const at::Tensor& group_state, at::IntArrayRef param_indices,
                 const std::optional<at::Tensor>& grad_scale,
                 const std::optional<at::Tensor>& found_inf, double momentum, double dampening,
                 double weight_decay, bool nesterov, bool maximize, bool decoupled_weight_decay,
                 bool reset_momentum, double eta_max, double eta_min, double T_mult,
                 double cycle_decay, double warmup_start_lr, int64_t T_0, int64_t anneal_every,
                 int64_t warmup_steps, std::optional<int64_t> n_cycles) {
  check(params, grads, momentum_buffers, group_state, param_indices, momentum);
  const c10::DeviceGuard guard(group_state.device());
  const GroupOptions options{.schedule = {.eta_max = eta_max,
                                          .eta_min = eta_min,
                                          .T_mult = T_mult,
                                          .cycle_decay = cycle_decay,
                                          .warmup_start_lr = warmup_start_lr,
                                          .T_0 = T_0,
                                          .anneal_every = anneal_every,
                                          .warmup_steps = warmup_steps,
                                          .n_cycles = n_cycles.value_or(kEndless)},
                             .momentum = momentum,
                             .dampening = dampening,
                             .weight_decay = weight_decay,
                             .nesterov = nesterov,
                             .maximize = maximize,
                             .decoupled_weight_decay = decoupled_weight_decay,
                             .reset_momentum = reset_momentum};
  Entries entries = entries_of(params, grads, momentum_buffers);
  const auto step = group_state.is_cuda() ? step_on_gpu : step_on_cpu;
  step(entries, group_state, param_indices, grad_scale, found_inf, options);
  entries.copy_back();
}

}  // namespace
}  // namespace sgdr

TORCH_LIBRARY(sgdr_fused, library) {
  library.def(
      "fused_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!) group_state, int[] param_indices, *, Tensor? grad_scale=None, "
      "Tensor? found_inf=None, float momentum=0, float dampening=0, float weight_decay=0, "
      "bool nesterov=False, bool maximize=False, bool decoupled_weight_decay=False, "
      "bool reset_momentum=False, float eta_max, float eta_min=0, float T_mult=1, "
      "float cycle_decay=1, float warmup_start_lr=0, int T_0, int anneal_every=1, "
      "int warmup_steps=0, int? n_cycles=None) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sgdr_fused, CPU, library) { library.impl("fused_step_", &sgdr::fused_step_); }

TORCH_LIBRARY_IMPL(sgdr_fused, CUDA, library) {
  if constexpr (sgdr::kHasCuda) library.impl("fused_step_", &sgdr::fused_step_);
}
