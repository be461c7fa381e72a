// What a step is: tensors as flat memory, and the options of a param group. Plain C++, without
// torch, Python or CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sgdr_math.h"

namespace sgdr {

enum class ElementType : uint8_t { kFloat, kDouble, kHalf, kBFloat16, kNone };

constexpr size_t element_size(ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return 4;
    case ElementType::kDouble:
      return 8;
    case ElementType::kHalf:
    case ElementType::kBFloat16:
      return 2;
    case ElementType::kNone:
      break;
  }
  return 0;
}

// The type in which a parameter's arithmetic is done, and its average stored.
constexpr ElementType arithmetic_type(ElementType param_type) {
  return param_type == ElementType::kDouble ? ElementType::kDouble : ElementType::kFloat;
}

// ------------------------------------------------------------------------------------------------
// options

// kEqual ("swa") averages the weights at the ends of cycles.
enum class Averaging : uint8_t { kNone, kExponential, kEqual };

// The options of a param group. Options that only act together are one member: nesterov and
// momentum become `direction`. csrc/python/param_group.cpp fills it from the group,
// csrc/torch/op.cpp from the op's arguments.
struct GroupOptions {
  Schedule schedule{};
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  double ema_decay = 0;
  uint64_t seed = 0;
  WeightDecay decay = WeightDecay::kDecoupled;
  Direction direction = Direction::kGrad;
  Averaging averaging = Averaging::kNone;
  ElementType momentum_type = ElementType::kNone;  // momentum_dtype; kNone: the parameter's dtype
  bool maximize : 1 = false;
  bool reset_momentum : 1 = false;
  bool master_weights : 1 = false;
  bool rounds_param : 1 = false;     // stochastically, if stored narrower than the arithmetic
  bool rounds_momentum : 1 = false;  // likewise

  SGDR_HD bool has_momentum() const { return direction != Direction::kGrad; }
};

constexpr Direction direction_of(double momentum, bool nesterov) {
  if (momentum == 0) return Direction::kGrad;
  return nesterov ? Direction::kNesterov : Direction::kMomentumBuffer;
}

// No weight decay is decoupled weight decay by 0, since p * 1 is p. So no loop without weight decay
// is compiled.
constexpr WeightDecay decay_of(double weight_decay, bool decoupled) {
  return weight_decay != 0 && !decoupled ? WeightDecay::kL2 : WeightDecay::kDecoupled;
}

// The numbers of one step of a group.
SGDR_HD GroupScalars scalars_of(const GroupOptions& options, double lr, double grad_scale,
                                double clip_coefficient) {
  return {.lr = lr,
          .momentum = options.momentum,
          .dampening = options.dampening,
          .weight_decay = options.weight_decay,
          .grad_divisor = grad_scale,
          .grad_multiplier = options.maximize ? -clip_coefficient : clip_coefficient};
}

// ------------------------------------------------------------------------------------------------
// tensors

// One parameter of a step. Its other tensors hold as many elements in the same order.
struct TensorEntry {
  void* param = nullptr;  // the master copy, if there is one
  const void* grad = nullptr;
  void* momentum_buffer = nullptr;      // null without momentum
  void* ema = nullptr;                  // null if nothing is averaged in this step
  void* low_precision_param = nullptr;  // the parameter that `param` is the master copy of, or null
  int64_t numel = 0;
  double ema_decay = 0;      // 0: the average holds nothing yet
  uint32_t group = 0;        // index among the step's groups
  uint32_t param_index = 0;  // index among the parameters of all groups
  ElementType param_type = ElementType::kNone;
  ElementType grad_type = ElementType::kNone;
  ElementType momentum_type = ElementType::kNone;  // the parameter's without a momentum buffer
  ElementType low_precision_type = ElementType::kNone;
  bool first_step = false;  // the momentum buffer holds nothing yet
  bool new_master = false;  // the master copy holds nothing yet
};

// Elements [begin, end) of one entry.
struct EntryRange {
  size_t entry;
  int64_t begin;
  int64_t end;
};

// Ranges of at most `max_numel` elements, in the order of the entries; an entry without elements
// has none.
inline std::vector<EntryRange> divide_into_ranges(std::span<const TensorEntry> entries,
                                                  int64_t max_numel) {
  std::vector<EntryRange> ranges;
  for (size_t entry = 0; entry < entries.size(); ++entry) {
    for (int64_t begin = 0; begin < entries[entry].numel; begin += max_numel) {
      const int64_t left = entries[entry].numel - begin;
      ranges.push_back({entry, begin, begin + (left < max_numel ? left : max_numel)});
    }
  }
  return ranges;
}

// The number of ranges that divide_into_ranges() returns.
inline int64_t count_ranges(std::span<const TensorEntry> entries, int64_t max_numel) {
  int64_t count = 0;
  for (const TensorEntry& entry : entries) count += (entry.numel + max_numel - 1) / max_numel;
  return count;
}

// ------------------------------------------------------------------------------------------------
// a group's state in a tensor

// Where a group's schedule stands. On a GPU, param_group["step"], ["cycle"], ["T_cur"], ["T_i"],
// ["lr"], ["scheduled_lr"] and ["skipped_steps"] are views of this memory.
struct GroupState {
  Position position{};
  double lr = 0;            // of the next step
  double scheduled_lr = 0;  // the schedule's LR for it
  int64_t skipped_steps = 0;
};

// The LR of the next step, if an option of the schedule may have changed since it was computed. An
// LR that differs from the schedule's was set by hand, and stays.
SGDR_HD double refreshed_lr(const Schedule& schedule, const GroupState& state) {
  return state.lr == state.scheduled_lr ? learning_rate(schedule, state.position) : state.lr;
}

// Goes on to the next step. An LR that was set by hand holds until the schedule's next change: for
// one step, or with anneal="epoch" until the next epoch.
SGDR_HD void advance(const Schedule& schedule, GroupState& state) {
  advance(schedule, state.position);
  const bool was_set_by_hand = state.lr != state.scheduled_lr;
  state.scheduled_lr = learning_rate(schedule, state.position);
  if (!was_set_by_hand || changes_lr(schedule, state.position)) state.lr = state.scheduled_lr;
}

// Which tensors in a parameter's state hold nothing yet.
struct ParamState {
  uint8_t momentum_is_empty;
  uint8_t ema_is_empty;
  uint8_t master_is_empty;
  uint8_t unused;
  uint32_t n_averaged;  // number of weights in an equal average
};

// The int64 tensor that sgdr_fused/device_state.py makes, which knows this layout too: the
// DeviceState of Python, the memory of a GroupOnGpu, and the group_state of the registered op. A
// ParamState for each of the group's parameters follows.
struct GroupMemory {
  GroupState state;
  uint32_t ticket;  // counts the finished blocks of a launch whose first group this is, else 0
  uint32_t unused;
  GroupState next;  // the state after the step that is running
};
static_assert(sizeof(GroupState) == 56 && sizeof(ParamState) == 8 && sizeof(GroupMemory) == 120);

}  // namespace sgdr
