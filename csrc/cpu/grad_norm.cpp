// The norm's one read of the gradients: see Note [Sum of squares] in sgdr_math.h.
#include <ATen/Parallel.h>

#include <vector>

#include "instruction_set.h"
#include "loops.h"

namespace sgdr {
namespace cpu {
namespace {

constexpr size_t kAhead = 3;

// Adds up what comes one by one as the lanes of one long chunk.
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
double sum_of_squared_grads(const FusedStep& step) {
  const auto sum_of_chunk = [](const TensorEntry& entry, int64_t begin, int64_t end) {
    const char* const grad = static_cast<const char*>(entry.grad);
    return find_sum_loop<InstructionSet>(entry.grad_type)(
        grad + begin * static_cast<int64_t>(element_size(entry.grad_type)), end - begin);
  };
  LaneSum sum;
  if (!is_worth_threads(step) || at::get_num_threads() == 1) {
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      const TensorEntry& entry = step.tensors[i];
      if (i + kAhead < step.tensors.size()) {
        const auto* const soon = static_cast<const char*>(step.tensors[i + kAhead].grad);
        for (int64_t byte = 0; byte < 256; byte += 64) __builtin_prefetch(soon + byte);
      }
      for (int64_t begin = 0; begin < entry.numel; begin += kNormChunk)
        sum.add(sum_of_chunk(entry, begin, std::min(begin + kNormChunk, entry.numel)));
    }
    return sum.total();
  }
  const std::vector<Chunk> chunks = divide_into_chunks(step.tensors, kNormChunk);
  std::vector<double> sums(chunks.size());
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 4, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
      sums[i] = sum_of_chunk(step.tensors[chunks[i].entry], chunks[i].begin, chunks[i].end);
  });
  for (const double of_chunk : sums) sum.add(of_chunk);
  return sum.total();
}

}  // namespace
}  // namespace cpu

double sum_of_squared_grads_cpu(const FusedStep& step) {
  static const auto sum_function =
      cpu::with_instruction_set([](auto set) -> double (*)(const FusedStep&) {
        return cpu::sum_of_squared_grads<decltype(set)>;
      });
  return sum_function(step);
}

}  // namespace sgdr
