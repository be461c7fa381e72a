// The sum of the squares of all gradients: see Note [Sum of squares] in sgdr_math.h.
#include <ATen/Parallel.h>

#include <vector>

#include "find_loop.h"
#include "instruction_set.h"

namespace sgdr {
namespace cpu {
namespace {

constexpr size_t kGradsAhead = 3;

// Adds up values that come one by one, in the lanes of one long chunk.
class LaneSum {
 public:
  void add(double value) {
    lanes_[count_ % kNormLanes] += value;
    ++count_;
  }
  double total() { return fold_lanes(lanes_, count_); }

 private:
  double lanes_[kNormLanes] = {};
  int64_t count_ = 0;
};

template <class InstructionSet>
double sum_up(std::span<const TensorEntry> tensors) {
  const auto sum_of_chunk = [](const TensorEntry& entry, int64_t begin, int64_t end) {
    const char* const grad = static_cast<const char*>(entry.grad);
    return find_sum_loop<InstructionSet>(entry.grad_type)(
        grad + begin * static_cast<int64_t>(element_size(entry.grad_type)), end - begin);
  };
  LaneSum sum;
  if (!is_worth_threads(tensors) || at::get_num_threads() == 1) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const TensorEntry& entry = tensors[i];
      if (i + kGradsAhead < tensors.size()) {
        const auto* const soon = static_cast<const char*>(tensors[i + kGradsAhead].grad);
        for (int64_t byte = 0; byte < 256; byte += 64) __builtin_prefetch(soon + byte);
      }
      for (int64_t begin = 0; begin < entry.numel; begin += kNormChunk)
        sum.add(sum_of_chunk(entry, begin, std::min(begin + kNormChunk, entry.numel)));
    }
    return sum.total();
  }
  const std::vector<EntryRange> chunks = divide_into_ranges(tensors, kNormChunk);
  std::vector<double> sums(chunks.size());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
      sums[i] = sum_of_chunk(tensors[chunks[i].entry], chunks[i].begin, chunks[i].end);
  });
  for (const double of_chunk : sums) sum.add(of_chunk);
  return sum.total();
}

}  // namespace

double sum_of_squared_grads(std::span<const TensorEntry> tensors) {
  static const auto sum_up_with_set = with_instruction_set(
      [](auto set) -> double (*)(std::span<const TensorEntry>) { return sum_up<decltype(set)>; });
  return sum_up_with_set(tensors);
}

}  // namespace cpu
}  // namespace sgdr
