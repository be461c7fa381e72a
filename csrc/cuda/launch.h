// The arguments of the step's kernel, and how a step is divided among launches. Plain host code, no
// CUDA types.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <span>

#include "../backend.h"
#include "../random_rounding.h"

namespace sgdr {

// Four blocks fill the smallest multiprocessor (compute capability 7.5), and leave each thread 64
// registers on every larger one. With extras a thread needs more.
constexpr uint32_t kThreadsPerBlock = 256;
constexpr uint32_t blocks_per_multiprocessor(bool has_extras = false) { return has_extras ? 2 : 4; }
// A multiple of the widest vector, so that the chunks of an aligned tensor are aligned, and of a
// draw.
constexpr uint32_t kChunkNumel = 1 << 12;
constexpr uint32_t kMaxPieceNumel = 1u << 31;
static_assert(kChunkNumel % kDrawNumel == 0 && kMaxPieceNumel % kChunkNumel == 0);

// A kernel's arguments are in its constant bank, which an instruction addresses by a register plus
// a signed 16-bit immediate. For an argument at byte 0x8000 or beyond, ptxas subtracts 0x10000 from
// the immediate and adds it to the register. In places ptxas 13.0 forgets to add it, and the load
// reads zeros. So no argument of any kernel is there.
constexpr size_t kMaxArgsEnd = 0x8000;
// The byte at which arguments of more than a few KB begin: 0x1a80 on compute capability 7.5 to 8.9,
// 0x210 on 9.0, 0x380 on 10.0 and 12.0.
constexpr size_t kMaxArgsBegin = 0x1a80;
constexpr size_t kMaxArgsBytes = kMaxArgsEnd - kMaxArgsBegin;
static_assert(kMaxArgsBytes <= 32764);  // what CUDA allows, since 12.1

// A parameter, or a piece of one that has more than kMaxPieceNumel elements.
struct LaunchTensor {
  void* param;
  const void* grad;
  void* momentum_buffer;
  uint32_t numel;
  uint32_t first_chunk;  // index among the launch's chunks
  uint32_t param_index;  // index among its group's parameters
  uint8_t group;         // index among the launch's groups
  uint8_t piece;         // its elements begin at piece * kMaxPieceNumel of the parameter
  ElementType param_type : 3;
  ElementType grad_type : 3;
  ElementType momentum_type : 3;
  ElementType low_precision_type : 3;
  bool completes_param : 1;  // no piece of the parameter comes after it
};

// Follows each LaunchTensor in a step that needs_extras().
struct LaunchExtras {
  void* ema;                  // null if nothing is averaged
  void* low_precision_param;  // the parameter, if LaunchTensor::param is its master copy, or null
};
static_assert(sizeof(LaunchTensor) == 40 && sizeof(LaunchExtras) == 16 &&
              sizeof(LaunchGroup) == 152);

// The kernel's one argument, passed by value. The payload holds the tensors, each with its extras,
// from the front, and the groups from the back, as many of both as there is room for.
struct LaunchArgs {
  const float* grad_scale;       // device memory, or null
  const float* found_inf;        // device memory, or null; not 0: the step is skipped
  const double* sum_of_squares;  // device memory, or null: see cuda::Step; so the next three
  double* grad_norm;
  double max_grad_norm;
  bool skip_nonfinite;
  bool has_extras;
  uint32_t* ticket;  // device memory, 0 before and after each launch
  uint32_t tensor_count;
  uint32_t group_count;
  uint32_t chunk_count;
  alignas(8) unsigned char payload[25760];

  SGDR_HD size_t tensor_bytes() const {
    return sizeof(LaunchTensor) + (has_extras ? sizeof(LaunchExtras) : 0);
  }
  SGDR_HD const LaunchTensor& tensor(uint32_t i) const {
    return *reinterpret_cast<const LaunchTensor*>(payload + i * tensor_bytes());
  }
  SGDR_HD const LaunchExtras& extras(uint32_t i) const {
    return *reinterpret_cast<const LaunchExtras*>(payload + i * tensor_bytes() +
                                                  sizeof(LaunchTensor));
  }
  SGDR_HD const LaunchGroup& group(uint32_t i) const {
    return reinterpret_cast<const LaunchGroup*>(payload + sizeof(payload))[-1 - int64_t{i}];
  }
};
// One group is subtracted because group(i) counts down from the payload's end: the immediate can be
// that end plus the offset of a member.
static_assert(sizeof(LaunchArgs) + sizeof(LaunchGroup) <= kMaxArgsBytes);
static_assert(sizeof(LaunchArgs::payload) / sizeof(LaunchGroup) <= 1 << 8);

// Fills a LaunchArgs, whose pointers the caller has set.
class LaunchFiller {
 public:
  explicit LaunchFiller(LaunchArgs& args) : args_(args) { clear(); }

  void clear() { args_.tensor_count = args_.group_count = args_.chunk_count = 0; }

  bool has_room(size_t tensors, size_t groups) const {
    return (args_.tensor_count + tensors) * args_.tensor_bytes() +
               (args_.group_count + groups) * sizeof(LaunchGroup) <=
           sizeof(args_.payload);
  }

  void add_group(const LaunchGroup& group) {
    unsigned char* const end = args_.payload + sizeof(args_.payload);
    last_group_ = new (end - (args_.group_count + 1) * sizeof(LaunchGroup)) LaunchGroup(group);
    last_group_->advances = false;
    ++args_.group_count;
  }

  // Called after the group's last tensor.
  void complete_group(bool advances) { last_group_->advances = advances; }

  // Adds elements [begin, begin + numel) of an entry of the group that was added last.
  void add_piece(const TensorEntry& entry, int64_t begin, int64_t numel) {
    const auto at = [begin](const void* memory, ElementType type) -> const void* {
      const int64_t bytes = begin * static_cast<int64_t>(element_size(type));
      return memory == nullptr ? nullptr : static_cast<const char*>(memory) + bytes;
    };
    unsigned char* const room = args_.payload + args_.tensor_count * args_.tensor_bytes();
    auto& tensor = *new (room) LaunchTensor;
    tensor.param = const_cast<void*>(at(entry.param, entry.param_type));
    tensor.grad = at(entry.grad, entry.grad_type);
    tensor.momentum_buffer = const_cast<void*>(at(entry.momentum_buffer, entry.momentum_type));
    tensor.numel = static_cast<uint32_t>(numel);
    tensor.first_chunk = args_.chunk_count;
    tensor.param_index = entry.param_index - last_group_->first_param;
    tensor.group = static_cast<uint8_t>(args_.group_count - 1);
    tensor.piece = static_cast<uint8_t>(begin / kMaxPieceNumel);
    tensor.param_type = entry.param_type;
    tensor.grad_type = entry.grad_type;
    tensor.momentum_type = entry.momentum_type;
    tensor.low_precision_type = entry.low_precision_type;
    tensor.completes_param = begin + numel == entry.numel;
    if (args_.has_extras) {
      auto& extras = *new (room + sizeof(LaunchTensor)) LaunchExtras;
      extras.ema = const_cast<void*>(at(entry.ema, arithmetic_type(entry.param_type)));
      extras.low_precision_param =
          const_cast<void*>(at(entry.low_precision_param, entry.low_precision_type));
    }
    ++args_.tensor_count;
    args_.chunk_count += static_cast<uint32_t>((numel + kChunkNumel - 1) / kChunkNumel);
  }

 private:
  LaunchArgs& args_;
  LaunchGroup* last_group_ = nullptr;
};

// Whether the step averages, rounds stochastically or has master copies.
inline bool needs_extras(std::span<const LaunchGroup> groups,
                         std::span<const TensorEntry> tensors) {
  const auto of_group = [](const LaunchGroup& group) {
    return group.options.averaging != Averaging::kNone || group.options.rounds_param ||
           group.options.rounds_momentum;
  };
  const auto of_tensor = [](const TensorEntry& entry) {
    return entry.low_precision_type != ElementType::kNone;
  };
  return std::any_of(groups.begin(), groups.end(), of_group) ||
         std::any_of(tensors.begin(), tensors.end(), of_tensor);
}

// Fills `args` and calls launch(args), once for each launch that the step needs. The tensors come
// in the order of their groups.
template <class Launch>
void for_each_launch(LaunchArgs& args, std::span<const LaunchGroup> groups,
                     std::span<const TensorEntry> tensors, Launch launch) {
  args.has_extras = needs_extras(groups, tensors);
  LaunchFiller filler(args);
  size_t next = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!filler.has_room(1, 1)) {
      launch(args);
      filler.clear();
    }
    filler.add_group(groups[i]);
    for (; next < tensors.size() && tensors[next].group == i; ++next) {
      const TensorEntry& entry = tensors[next];
      int64_t begin = 0;
      do {
        if (!filler.has_room(1, 0)) {
          launch(args);
          filler.clear();
          filler.add_group(groups[i]);
        }
        const int64_t numel = std::min<int64_t>(entry.numel - begin, kMaxPieceNumel);
        filler.add_piece(entry, begin, numel);
        begin += numel;
      } while (begin < entry.numel);
    }
    filler.complete_group(groups[i].advances);
  }
  if (args.group_count != 0) launch(args);
}

// At most as many blocks as run at once; they share the chunks. At least one, which advances the
// schedule.
inline uint32_t block_count(const LaunchArgs& args, uint32_t multiprocessors) {
  return std::clamp(args.chunk_count, 1u,
                    blocks_per_multiprocessor(args.has_extras) * multiprocessors);
}

}  // namespace sgdr
