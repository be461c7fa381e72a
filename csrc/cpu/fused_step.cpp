#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "../backend.h"
#include "find_loop.h"
#include "instruction_set.h"

namespace sgdr {
namespace cpu {
namespace {

constexpr int64_t kRangeNumel = 1 << 14;  // elements that a thread takes at a time
constexpr size_t kTensorsAhead = 3;
constexpr int64_t kBlockNumel = 1024;  // three blocks of doubles stay in the first-level cache
static_assert(kRangeNumel % kBlockNumel == 0 && kBlockNumel % kDrawsNumel == 0);

template <class T>
constexpr ElementType kElementType =
    std::is_same_v<T, double> ? ElementType::kDouble : ElementType::kFloat;

// What the tensors of one group have in common, for arithmetic in T.
template <class T>
struct GroupLoops {
  const GroupStep* group;
  UpdateScalars<T> scalars;
  UpdateScalars<T> first_scalars;  // see kEmptyMomentum
  UpdateLoop<T> update;
  UpdateRoundingLoop update_rounding;  // for a momentum buffer in bfloat16

  template <class InstructionSet>
  GroupLoops(const GroupStep& group, InstructionSet)
      : group(&group),
        scalars(group.scalars),
        first_scalars(group.scalars),
        update(find_update_loop<InstructionSet, T>(group)),
        update_rounding(find_update_rounding_loop<InstructionSet>(group)) {
    first_scalars.one_minus_dampening = 1;
  }
};

bool is_rounded(bool stochastically, ElementType type) {
  return stochastically && element_size(type) == 2;
}

RandomKey random_key(const GroupStep& group, const TensorEntry& entry) {
  return {group.options.seed, static_cast<uint32_t>(group.steps_applied), entry.param_index};
}

// A block of a tensor in the type of the arithmetic: the tensor's own memory if it has that type,
// else a copy.
template <class InstructionSet, class T>
class Operand {
 public:
  Operand(const void* memory, ElementType type)
      : memory_(static_cast<char*>(const_cast<void*>(memory))), type_(type) {}

  bool is_direct() const { return type_ == kElementType<T>; }

  // The block's memory, which holds the elements only if is_direct().
  T* block(int64_t begin) { return is_direct() ? reinterpret_cast<T*>(memory_) + begin : block_; }

  T* load(int64_t begin, int64_t numel) {
    if (memory_ == nullptr) return nullptr;
    const char* const next = at(begin + kBlockNumel);
    prefetch_elements(next, at(begin + 2 * kBlockNumel) - next);
    if (!is_direct()) find_load_loop<InstructionSet, T>(type_)(at(begin), block_, numel);
    return block(begin);
  }

  void store(int64_t begin, int64_t numel) {
    if (memory_ == nullptr || is_direct()) return;
    find_store_loop<InstructionSet, T>(type_)(block_, at(begin), numel);
  }

  void store_rounded(int64_t begin, int64_t numel, const RandomKey& key, Rounded rounded) {
    find_round_loop<InstructionSet, T>(type_)(block_, at(begin), numel, key, rounded, begin);
  }

  char* at(int64_t index) const {
    return memory_ + index * static_cast<int64_t>(element_size(type_));
  }

 private:
  char* memory_;
  ElementType type_;
  alignas(64) T block_[kBlockNumel];
};

template <class InstructionSet, class T>
void update_by_blocks(const TensorEntry& entry, int64_t begin, int64_t end,
                      const GroupLoops<T>& loops) {
  const GroupStep& group = *loops.group;
  const UpdateScalars<T>& scalars = entry.first_step ? loops.first_scalars : loops.scalars;
  const bool rounds_param = is_rounded(group.options.rounds_param, entry.param_type);
  const bool rounds_momentum = is_rounded(group.options.rounds_momentum, entry.momentum_type) &&
                               entry.momentum_buffer != nullptr;
  const RandomKey key = random_key(group, entry);
  Operand<InstructionSet, T> param(entry.param, entry.param_type);
  Operand<InstructionSet, T> grad(entry.grad, entry.grad_type);
  Operand<InstructionSet, T> momentum_buffer(entry.momentum_buffer, entry.momentum_type);
  T* const ema = static_cast<T*>(entry.ema);
  char* const low_precision_param = static_cast<char*>(entry.low_precision_param);
  const auto low_precision_size = static_cast<int64_t>(element_size(entry.low_precision_type));
  for (; begin < end; begin += kBlockNumel) {
    const int64_t numel = std::min(kBlockNumel, end - begin);
    char* const low_precision = low_precision_param + begin * low_precision_size;
    T* const p = entry.new_master ? param.block(begin) : param.load(begin, numel);
    if (entry.new_master)
      find_load_loop<InstructionSet, T>(entry.low_precision_type)(low_precision, p, numel);
    T* m = nullptr;
    if (entry.momentum_buffer != nullptr && entry.first_step) {
      m = momentum_buffer.block(begin);
      std::fill_n(m, numel, T{kEmptyMomentum});
    } else {
      m = momentum_buffer.load(begin, numel);
    }

    loops.update(p, grad.load(begin, numel), m, numel, scalars);

    if (ema != nullptr)
      InstructionSet::template update_ema<T>(ema + begin, p, numel, entry.ema_decay);
    if (rounds_param)
      param.store_rounded(begin, numel, key, Rounded::kParam);
    else
      param.store(begin, numel);
    if (rounds_momentum)
      momentum_buffer.store_rounded(begin, numel, key, Rounded::kMomentumBuffer);
    else
      momentum_buffer.store(begin, numel);
    if (low_precision_param != nullptr)
      find_store_loop<InstructionSet, T>(entry.low_precision_type)(p, low_precision, numel);
  }
}

template <class InstructionSet, class T>
void update_range(const TensorEntry& entry, int64_t begin, int64_t end,
                  const GroupLoops<T>& loops) {
  constexpr ElementType kDirect = kElementType<T>;
  const bool is_plain = entry.param_type == kDirect && entry.grad_type == kDirect &&
                        !entry.first_step && entry.low_precision_param == nullptr;
  if constexpr (std::is_same_v<T, float>) {
    if (is_plain && entry.ema == nullptr && entry.momentum_type == ElementType::kBFloat16 &&
        loops.group->options.rounds_momentum) {
      loops.update_rounding(static_cast<float*>(entry.param) + begin,
                            static_cast<const float*>(entry.grad) + begin,
                            static_cast<uint16_t*>(entry.momentum_buffer) + begin, end - begin,
                            loops.scalars, random_key(*loops.group, entry), begin);
      return;
    }
  }
  if (!is_plain || entry.momentum_type != kDirect) {
    update_by_blocks<InstructionSet>(entry, begin, end, loops);
    return;
  }
  T* const param = static_cast<T*>(entry.param);
  const T* const grad = static_cast<const T*>(entry.grad);
  T* const momentum_buffer = static_cast<T*>(entry.momentum_buffer);
  T* const ema = static_cast<T*>(entry.ema);
  // With an average, go block by block, so that it finds the parameter in the first-level cache.
  const int64_t stretch = ema == nullptr ? end - begin : kBlockNumel;
  for (; begin < end; begin += stretch) {
    const int64_t numel = std::min(stretch, end - begin);
    loops.update(param + begin, grad + begin,
                 momentum_buffer == nullptr ? nullptr : momentum_buffer + begin, numel,
                 loops.scalars);
    if (ema != nullptr)
      InstructionSet::template update_ema<T>(ema + begin, param + begin, numel, entry.ema_decay);
  }
}

// Prefetches the first cache lines of a tensor that comes soon. A small tensor is done before the
// processor's own prefetcher has seen a pattern.
SGDR_INLINE void prefetch(const TensorEntry& entry) {
  for (int64_t byte = 0; byte < 256; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(entry.param) + byte, 1);
    __builtin_prefetch(static_cast<const char*>(entry.grad) + byte);
    if (entry.momentum_buffer != nullptr)
      __builtin_prefetch(static_cast<const char*>(entry.momentum_buffer) + byte, 1);
    if (entry.ema != nullptr) __builtin_prefetch(static_cast<const char*>(entry.ema) + byte, 1);
  }
}

// Whether parameters share memory, as weights do that are tied by their .data. One thread then
// updates them in order, as torch.optim.SGD's for-loop does.
bool share_memory(std::span<const TensorEntry> tensors) {
  struct Range {
    uintptr_t begin, end;
    bool is_written;
  };
  std::vector<Range> ranges;
  for (const TensorEntry& entry : tensors) {
    const auto add = [&](const void* memory, ElementType type, bool is_written) {
      const auto begin = reinterpret_cast<uintptr_t>(memory);
      if (memory != nullptr)
        ranges.push_back(
            {begin, begin + static_cast<size_t>(entry.numel) * element_size(type), is_written});
    };
    add(entry.param, entry.param_type, true);
    add(entry.momentum_buffer, entry.momentum_type, true);
    add(entry.ema, arithmetic_type(entry.param_type), true);
    add(entry.low_precision_param, entry.low_precision_type, true);
    if (entry.grad != entry.param) add(entry.grad, entry.grad_type, false);
  }
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  uintptr_t end_of_read = 0, end_of_written = 0;
  for (const Range& range : ranges) {
    if (range.begin < (range.is_written ? std::max(end_of_read, end_of_written) : end_of_written))
      return true;
    uintptr_t& end = range.is_written ? end_of_written : end_of_read;
    end = std::max(end, range.end);
  }
  return false;
}

template <class InstructionSet>
void run(const Step& step) {
  struct Loops {
    GroupLoops<float> in_float;
    GroupLoops<double> in_double;
  };
  std::vector<Loops> loops;
  loops.reserve(step.groups.size());
  for (const GroupStep& group : step.groups)
    loops.push_back({{group, InstructionSet{}}, {group, InstructionSet{}}});

  const auto update = [&](const TensorEntry& entry, int64_t begin, int64_t end) {
    const Loops& of_group = loops[entry.group];
    if (entry.param_type == ElementType::kDouble)
      update_range<InstructionSet>(entry, begin, end, of_group.in_double);
    else
      update_range<InstructionSet>(entry, begin, end, of_group.in_float);
  };

  if (!is_worth_threads(step.tensors) || at::get_num_threads() == 1 || share_memory(step.tensors)) {
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      if (i + kTensorsAhead < step.tensors.size()) prefetch(step.tensors[i + kTensorsAhead]);
      update(step.tensors[i], 0, step.tensors[i].numel);
    }
    return;
  }
  const std::vector<EntryRange> ranges = divide_into_ranges(step.tensors, kRangeNumel);
  at::parallel_for(0, static_cast<int64_t>(ranges.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const EntryRange& range = ranges[static_cast<size_t>(i)];
      update(step.tensors[range.entry], range.begin, range.end);
    }
  });
}

}  // namespace

bool is_worth_threads(std::span<const TensorEntry> tensors) {
  int64_t numel = 0;
  for (const TensorEntry& entry : tensors) numel += entry.numel;
  const auto least = static_cast<int64_t>(tensors.size()) * kParallelNumelPerTensor;
  return numel >= std::max(kParallelNumel, least);
}

void fused_step(const Step& step) {
  static const auto run_with_set =
      with_instruction_set([](auto set) -> void (*)(const Step&) { return run<decltype(set)>; });
  run_with_set(step);
}

}  // namespace cpu
}  // namespace sgdr
