#include "grad_norm.h"

#include <ATen/Functions.h>

#include <limits>

namespace sgdr {
namespace {

// Calls sum_of(entries, axes) for the entries that are whole, with axes None, and for each sharded
// part.
template <class Sum>
void for_each_part(const DeviceStep& step, Sum sum_of) {
  if (step.sharded_parts.empty()) {
    sum_of(step.entries, py::none());
    return;
  }
  std::vector<bool> is_sharded(step.entries.size());
  std::vector<std::vector<TensorEntry>> parts;
  for (const ShardedPart& part : step.sharded_parts) {
    std::vector<TensorEntry>& of_part = parts.emplace_back();
    for (const size_t i : part.entries) {
      of_part.push_back(step.entries[i]);
      is_sharded[i] = true;
    }
  }
  std::vector<TensorEntry> whole;
  for (size_t i = 0; i < step.entries.size(); ++i) {
    if (!is_sharded[i]) whole.push_back(step.entries[i]);
  }
  sum_of(whole, py::none());
  for (size_t i = 0; i < parts.size(); ++i) sum_of(parts[i], step.sharded_parts[i].axes);
}

}  // namespace

void add_to_part(std::vector<ShardedPart>& parts, py::object axes, size_t entry) {
  for (ShardedPart& part : parts) {
    if (!part.axes.equal(axes)) continue;
    part.entries.push_back(entry);
    return;
  }
  parts.push_back({std::move(axes), {entry}});
}

double sum_of_squared_grads_on_host(DeviceStep& step, const py::function& sum_over_shards) {
  double total = 0;
  for_each_part(step, [&](const std::vector<TensorEntry>& entries, const py::object& axes) {
    double sum = without_gil(entries, [&] { return cpu::sum_of_squared_grads(entries); });
    if (!axes.is_none()) {
      const at::Tensor over_shards = at::full({}, sum, at::kDouble);
      sum_over_shards(to_python(over_shards), axes);
      sum = over_shards.item<double>();
    }
    total += sum;
  });
  return total;
}

at::Tensor grad_norm_on_gpu(const DeviceStep& step, const Clipping& clipping,
                            const py::function& sum_over_shards) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(step.device);
  const auto norm_of = [&](std::span<const TensorEntry> entries, const at::Tensor& sums,
                           int64_t sum_count) {
    const at::Tensor result = at::empty({sizeof(cuda::GradNorm) / sizeof(double)}, options);
    constexpr double kNoLimit = std::numeric_limits<double>::infinity();
    cuda::grad_norm(
        step.device.index(),
        {.tensors = entries,
         .chunk_sums = sums.mutable_data_ptr<double>(),
         .result = static_cast<cuda::GradNorm*>(result.mutable_data_ptr()),
         .ticket = &step.launch_groups[0].memory->ticket,
         .grad_scale =
             step.grad_scale.defined() ? step.grad_scale.const_data_ptr<float>() : nullptr,
         .max_grad_norm = clipping.max_grad_norm.value_or(kNoLimit),
         .sum_count = sum_count});
    return result;
  };
  std::vector<at::Tensor> sums;  // of squares, over all ranks
  at::Tensor result;
  for_each_part(step, [&](const std::vector<TensorEntry>& entries, const py::object& axes) {
    if (entries.empty() && !step.sharded_parts.empty()) return;
    result = norm_of(entries, at::empty({count_ranges(entries, kNormChunk)}, options), 0);
    sums.push_back(result.narrow(0, 0, 1));
    if (!axes.is_none()) sum_over_shards(to_python(sums.back()), axes);
  });
  if (step.sharded_parts.empty()) return result;
  at::Tensor total = sums[0];
  for (size_t i = 1; i < sums.size(); ++i) total = total.add(sums[i]);
  return norm_of({}, total, 1);
}

}  // namespace sgdr
