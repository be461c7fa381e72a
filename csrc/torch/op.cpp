// torch.ops.sgdr_fused.fused_step_: the step of one param group with nothing hidden, for graphs of
// torch.compile. What changes from step to step is in group_state, so that the graph stays the
// same.
#include <ATen/MemoryOverlap.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <vector>

#include "../backend.h"
#include "flattener.h"
#include "internals.h"

namespace sgdr {
namespace {

// A group_state: the group's GroupMemory, then a ParamState for each of its parameters.
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
      TORCH_CHECK_TYPE(element_type(tensor) != ElementType::kNone, name, "[", i, "] has dtype ",
                       tensor.scalar_type(),
                       "; fused_step_ takes float64, float32, float16 and bfloat16");
    };
    check_fits("params", param);
    check_fits("grads", grads[i]);
    if (momentum != 0) check_fits("momentum_buffers", momentum_buffers[i]);
  }
}

// A GradScaler's two tensors.
struct Amp {
  const std::optional<at::Tensor>& grad_scale;
  const std::optional<at::Tensor>& found_inf;
};

void step_on_cpu(std::vector<TensorEntry>& entries, const GroupView& group,
                 const GroupOptions& options, const Amp& amp) {
  GroupState& state = group.memory->state;
  if (amp.found_inf.has_value() && amp.found_inf->item<double>() != 0) {
    ++state.skipped_steps;
    return;
  }
  for (TensorEntry& entry : entries)
    entry.first_step =
        options.has_momentum() && group.params[entry.param_index].momentum_is_empty != 0;
  const double grad_scale = amp.grad_scale.has_value() ? amp.grad_scale->item<double>() : 1;
  const GroupStep step{.options = options,
                       .scalars = scalars_of(options, state.lr, grad_scale, 1),
                       .steps_applied = state.position.step};
  cpu::fused_step({.tensors = entries, .groups = {&step, 1}});

  if (options.has_momentum()) {
    for (const TensorEntry& entry : entries) group.params[entry.param_index].momentum_is_empty = 0;
  }
  advance(options.schedule, state);
  if (!options.reset_momentum || !at_restart(options.schedule, state.position)) return;
  for (int64_t i = 0; i < group.param_count; ++i) group.params[i].momentum_is_empty = 1;
}

void step_on_gpu(const std::vector<TensorEntry>& entries, const GroupView& view,
                 const GroupOptions& options, const Amp& amp, c10::Device device) {
  const LaunchGroup group{.options = options,
                          .memory = view.memory,
                          .params = view.params,
                          .param_count = static_cast<uint32_t>(view.param_count),
                          .first_param = 0,
                          .lr_source = LrSource::kState,
                          .advances = true};
  const auto to_float = [&](const std::optional<at::Tensor>& value) {
    return value.has_value() ? value->to(device, at::kFloat) : at::Tensor();
  };
  const at::Tensor scale = to_float(amp.grad_scale);
  const at::Tensor inf = to_float(amp.found_inf);
  cuda::fused_step(device.index(),
                   {.tensors = entries,
                    .groups = {&group, 1},
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
                             .decay = decay_of(weight_decay, decoupled_weight_decay),
                             .direction = direction_of(momentum, nesterov),
                             .maximize = maximize,
                             .reset_momentum = reset_momentum};

  const bool is_on_gpu = group_state.is_cuda();
  Flattener flattener(group_state.device(), is_on_gpu ? group_state.key_set() : plain_host_keys(),
                      {});
  std::vector<TensorEntry> entries(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    entries[i].param_index = static_cast<uint32_t>(param_indices[i]);
    const at::Tensor* const buffer = momentum_buffers.empty() ? nullptr : &momentum_buffers[i];
    TORCH_CHECK_TYPE(
        flattener.flatten({.param = &params[i], .grad = &grads[i], .momentum_buffer = buffer},
                          entries[i]),
        "params[", i,
        "], its grad or its momentum_buffer is not an ordinary dense tensor (is it a "
        "subclass, or was it made in inference mode?), or two of them share memory");
  }
  const GroupView group(group_state);
  const Amp amp{grad_scale, found_inf};
  if (is_on_gpu)
    step_on_gpu(entries, group, options, amp, group_state.device());
  else
    step_on_cpu(entries, group, options, amp);
  flattener.finish();
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
  if constexpr (sgdr::cuda::kIsBuilt) library.impl("fused_step_", &sgdr::fused_step_);
}
