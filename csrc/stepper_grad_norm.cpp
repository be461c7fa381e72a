// The norm of all gradients: of plain tensors, and of shards that lie on several ranks.
#include <ATen/Functions.h>

#include "stepper.h"

namespace sgdr {

void Stepper::check_devices_of_norm() const {
  const size_t devices = gpu_steps_.size() + (entries_.empty() ? 0 : 1);
  if (devices <= 1) return;
  throw py::value_error(
      "max_grad_norm and skip_nonfinite take one norm over all gradients, but the parameters are "
      "on several devices; set max_grad_norm=None and skip_nonfinite=False, and call "
      "torch.nn.utils.clip_grad_norm_()");
}

// Notes the entry that was added last where the parameter is a shard.
void Stepper::note_shards(const at::Tensor& param) {
  if (!param.unsafeGetTensorImpl()->is_python_dispatch()) return;
  py::object axes = shard_axes_(py::reinterpret_steal<py::object>(THPVariable_Wrap(param)));
  if (axes.is_none()) return;
  const size_t entry = gathered_->size() - 1;
  for (ShardedPart& part : sharded_parts_) {
    if (!part.axes.equal(axes)) continue;
    part.entries.push_back(entry);
    return;
  }
  sharded_parts_.push_back({std::move(axes), {entry}});
}

// Calls sum_of(entries, axes) for those that are whole, with axes None, and for each sharded part.
template <class Sum>
void Stepper::for_each_part(const std::vector<TensorEntry>& entries, Sum sum_of) const {
  if (sharded_parts_.empty()) {
    sum_of(entries, py::none());
    return;
  }
  std::vector<bool> is_sharded(entries.size());
  std::vector<std::vector<TensorEntry>> parts;
  for (const ShardedPart& part : sharded_parts_) {
    std::vector<TensorEntry>& of_part = parts.emplace_back();
    for (const size_t i : part.entries) {
      of_part.push_back(entries[i]);
      is_sharded[i] = true;
    }
  }
  std::vector<TensorEntry> whole;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (!is_sharded[i]) whole.push_back(entries[i]);
  }
  sum_of(whole, py::none());
  for (size_t i = 0; i < parts.size(); ++i) sum_of(parts[i], sharded_parts_[i].axes);
}

double Stepper::sum_of_squared_grads() {
  double total = 0;
  for_each_part(entries_, [&](const std::vector<TensorEntry>& entries, const py::object& axes) {
    double sum = 0;
    const FusedStep part{.tensors = entries, .groups = {}, .numel = numel_};
    if (is_worth_threads(part)) {
      keep_tensors_alive();
      const py::gil_scoped_release no_gil;
      sum = sum_of_squared_grads_cpu(part);
    } else {
      sum = sum_of_squared_grads_cpu(part);
    }
    if (!axes.is_none()) {
      const at::Tensor over_shards = at::full({}, sum, at::kDouble);
      sum_over_shards_(py::reinterpret_steal<py::object>(THPVariable_Wrap(over_shards)), axes);
      sum = over_shards.item<double>();
    }
    total += sum;
  });
  return total;
}

// On that GPU, without waiting for it.
at::Tensor Stepper::sum_of_squared_grads_on(const GpuStep& step) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(at::kCUDA, step.gpu);
  at::Tensor total;
  for_each_part(step.tensors, [&](const std::vector<TensorEntry>& entries, const py::object& axes) {
    at::Tensor sum;
    if (entries.empty()) {
      if (!axes.is_none() || total.defined()) return;
      sum = at::zeros({}, options);
    } else {
      // The sum, then those of the chunks.
      const at::Tensor sums = at::empty({1 + count_chunks(entries, kNormChunk)}, options);
      auto* const memory = sums.mutable_data_ptr<double>();
      auto* const group = reinterpret_cast<GroupMemory*>(step.groups[0].state);
      sum_of_squared_grads_cuda(step.gpu, {.tensors = entries,
                                           .chunk_sums = memory + 1,
                                           .sum_of_squares = memory,
                                           .ticket = &group->ticket});
      sum = sums.select(0, 0);
    }
    if (!axes.is_none())
      sum_over_shards_(py::reinterpret_steal<py::object>(THPVariable_Wrap(sum)), axes);
    total = total.defined() ? total.add(sum) : sum;
  });
  return total;
}

}  // namespace sgdr
