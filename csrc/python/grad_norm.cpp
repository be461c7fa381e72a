#include "grad_norm.h"

#include <ATen/Functions.h>

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

at::Tensor sum_of_squared_grads_on_gpu(const DeviceStep& step,
                                       const py::function& sum_over_shards) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(step.device);
  at::Tensor total;
  for_each_part(step, [&](const std::vector<TensorEntry>& entries, const py::object& axes) {
    at::Tensor sum;
    if (entries.empty()) {
      if (!axes.is_none() || total.defined()) return;
      sum = at::zeros({}, options);
    } else {
      const at::Tensor sums = at::empty({1 + count_ranges(entries, kNormChunk)}, options);
      auto* const memory = sums.mutable_data_ptr<double>();
      auto* const group = reinterpret_cast<GroupMemory*>(step.launch_groups[0].state);
      cuda::sum_of_squared_grads(
          step.device.index(), entries,
          {.sum_of_squares = memory, .chunk_sums = memory + 1, .ticket = &group->ticket});
      sum = sums.select(0, 0);
    }
    if (!axes.is_none()) sum_over_shards(to_python(sum), axes);
    total = total.defined() ? total.add(sum) : sum;
  });
  return total;
}

}  // namespace sgdr
