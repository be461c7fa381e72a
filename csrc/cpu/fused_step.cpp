#include "../fused_step.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <string>
#include <vector>

#include "loops.h"

namespace sgdr {
namespace cpu {
namespace {

constexpr int64_t kChunkNumel = 1 << 14;
constexpr size_t kAhead = 3;
constexpr int64_t kBlockNumel = 256;  // three blocks of doubles stay in the first-level cache

template <class T>
constexpr ElementType kElementType =
    std::is_same_v<T, double> ? ElementType::kDouble : ElementType::kFloat;

// What the tensors of one group have in common, for arithmetic in T.
template <class T>
struct GroupLoops {
  UpdateScalars<T> scalars;
  UpdateLoop<T> update;
  UpdateLoop<T> first_update;

  template <class InstructionSet>
  GroupLoops(const GroupStep& group, InstructionSet)
      : scalars(group.scalars),
        update(find_update_loop<InstructionSet, T>(
            group, group.momentum ? Momentum::kRunning : Momentum::kNone)),
        first_update(find_update_loop<InstructionSet, T>(
            group, group.momentum ? Momentum::kFirst : Momentum::kNone)) {}
};

// A stretch of a tensor in the type of the arithmetic: the tensor's own memory where it has that
// type, else a copy.
template <class InstructionSet, class T>
class Operand {
 public:
  Operand(const void* memory, ElementType type)
      : memory_(static_cast<char*>(const_cast<void*>(memory))), type_(type) {}

  bool is_direct() const { return type_ == kElementType<T>; }

  T* load(int64_t begin, int64_t numel, bool has_content = true) {
    if (memory_ == nullptr) return nullptr;
    if (is_direct()) return reinterpret_cast<T*>(memory_) + begin;
    if (has_content) find_load_loop<InstructionSet, T>(type_)(at(begin), block_, numel);
    return block_;
  }

  void store(int64_t begin, int64_t numel) {
    if (memory_ == nullptr || is_direct()) return;
    find_store_loop<InstructionSet, T>(type_)(block_, at(begin), numel);
  }

 private:
  char* at(int64_t index) const {
    return memory_ + index * static_cast<int64_t>(element_size(type_));
  }

  char* memory_;
  ElementType type_;
  alignas(64) T block_[kBlockNumel];
};

template <class InstructionSet, class T>
void update_by_blocks(const TensorEntry& entry, int64_t begin, int64_t end, UpdateLoop<T> update,
                      const UpdateScalars<T>& scalars) {
  Operand<InstructionSet, T> param(entry.param, entry.param_type);
  Operand<InstructionSet, T> grad(entry.grad, entry.grad_type);
  Operand<InstructionSet, T> momentum_buffer(entry.momentum_buffer, entry.momentum_type);
  for (; begin < end; begin += kBlockNumel) {
    const int64_t numel = std::min(kBlockNumel, end - begin);
    update(param.load(begin, numel), grad.load(begin, numel),
           momentum_buffer.load(begin, numel, !entry.first_step), numel, scalars);
    param.store(begin, numel);
    momentum_buffer.store(begin, numel);
  }
}

template <class InstructionSet, class T>
void update_range(const TensorEntry& entry, int64_t begin, int64_t end,
                  const GroupLoops<T>& loops) {
  const UpdateLoop<T> update = entry.first_step ? loops.first_update : loops.update;
  constexpr ElementType kDirect = kElementType<T>;
  if (entry.param_type != kDirect || entry.grad_type != kDirect || entry.momentum_type != kDirect) {
    update_by_blocks<InstructionSet>(entry, begin, end, update, loops.scalars);
    return;
  }
  T* momentum_buffer = static_cast<T*>(entry.momentum_buffer);
  update(static_cast<T*>(entry.param) + begin, static_cast<const T*>(entry.grad) + begin,
         momentum_buffer == nullptr ? nullptr : momentum_buffer + begin, end - begin,
         loops.scalars);
}

// The first lines of a tensor that is due soon: small ones are over before the processor sees a
// pattern.
SGDR_HD void prefetch(const TensorEntry& entry) {
  for (int64_t byte = 0; byte < 256; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(entry.param) + byte, 1);
    __builtin_prefetch(static_cast<const char*>(entry.grad) + byte);
    __builtin_prefetch(static_cast<const char*>(entry.momentum_buffer) + byte, 1);
  }
}

template <class InstructionSet>
void fused_step(const FusedStep& step) {
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

  if (!is_worth_threads(step) || at::get_num_threads() == 1) {
    for (size_t i = 0; i < step.tensors.size(); ++i) {
      if (i + kAhead < step.tensors.size()) prefetch(step.tensors[i + kAhead]);
      update(step.tensors[i], 0, step.tensors[i].numel);
    }
    return;
  }
  const std::vector<Chunk> chunks = divide_into_chunks(step.tensors, kChunkNumel);
  at::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk& chunk = chunks[static_cast<size_t>(i)];
      update(step.tensors[chunk.entry], chunk.begin, chunk.end);
    }
  });
}

using StepFunction = void (*)(const FusedStep&);

// torch's own choice, so that ATEN_CPU_CAPABILITY rules both.
StepFunction choose_step_function() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  const bool avx2 = __builtin_cpu_supports("x86-64-v3");
  if (capability == "AVX512" && __builtin_cpu_supports("x86-64-v4")) return fused_step<Avx512>;
  if ((capability == "AVX512" || capability == "AVX2") && avx2) return fused_step<Avx2>;
#endif
  return fused_step<Baseline>;
}

}  // namespace
}  // namespace cpu

void fused_step_cpu(const FusedStep& step) {
  static const cpu::StepFunction step_function = cpu::choose_step_function();
  step_function(step);
}

}  // namespace sgdr
