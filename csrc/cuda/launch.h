// The arguments of the step's kernel, and how a step is divided among launches. Plain host code, no
// CUDA types.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <type_traits>

#include "../backend.h"
#include "../random_rounding.h"
#include "../static_switch.h"

namespace sgdr {

constexpr uint32_t kThreadsPerBlock = 256;
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

// Follows each LaunchTensor if has_addresses().
struct LaunchExtras {
  void* ema;                  // null if nothing is averaged
  void* low_precision_param;  // the parameter, if LaunchTensor::param is its master copy, or null
};

// A param group as the kernel reads it.
struct KernelGroup : LaunchGroup {
  FixedScalars<float> in_float;

  explicit KernelGroup(const LaunchGroup& group)
      : LaunchGroup(group), in_float(scalars_of(options, 0, 1, 1)) {
    advances = false;
  }

  template <class T>
  SGDR_HD FixedScalars<T> fixed_scalars() const {
    if constexpr (std::is_same_v<T, float>)
      return in_float;
    else
      return FixedScalars<T>(scalars_of(options, 0, 1, 1));
  }
};
static_assert(sizeof(LaunchTensor) == 40 && sizeof(LaunchExtras) == 16 &&
              sizeof(KernelGroup) == 160);

// What a step does besides the update. The kernel is compiled for each of these; a step that does
// two of them takes kAll.
enum class Extras : uint8_t { kNone, kAverages, kRounding, kMasters, kAll };
constexpr bool has_averages(Extras e) { return e == Extras::kAverages || e == Extras::kAll; }
constexpr bool has_rounding(Extras e) { return e == Extras::kRounding || e == Extras::kAll; }
constexpr bool has_masters(Extras e) { return e == Extras::kMasters || e == Extras::kAll; }
constexpr bool has_addresses(Extras e) { return has_averages(e) || has_masters(e); }
constexpr size_t tensor_bytes(Extras e) {
  return sizeof(LaunchTensor) + (has_addresses(e) ? sizeof(LaunchExtras) : 0);
}

// Four blocks fill the smallest multiprocessor (compute capability 7.5), and leave each thread 64
// registers on every larger one. With extras a thread needs more.
constexpr uint32_t blocks_per_multiprocessor(Extras e) {
  return e == Extras::kNone ? 4 : has_averages(e) ? 2 : 3;
}

// What does not depend on the number of tensors.
struct LaunchHeader {
  const float* grad_scale;          // device memory, or null
  const float* found_inf;           // device memory, or null; not 0: the step is skipped
  const cuda::GradNorm* grad_norm;  // device memory, or null: nothing is clipped
  uint32_t* ticket;                 // device memory, 0 before and after each launch
  uint32_t tensor_count;
  uint32_t group_count;
  uint32_t chunk_count;
  bool skip_nonfinite;
  Extras extras;
};

// The kernel's one argument, passed by value. The payload holds the groups, and then the tensors,
// each with its LaunchExtras.
template <Extras kind, size_t kBytes>
struct LaunchArgs : LaunchHeader {
  static constexpr Extras kExtras = kind;

  alignas(8) unsigned char payload[kBytes];

  SGDR_HD const KernelGroup& group(uint32_t i) const {
    return reinterpret_cast<const KernelGroup*>(payload)[i];
  }
  SGDR_HD const LaunchTensor& tensor(uint32_t i) const {
    return *reinterpret_cast<const LaunchTensor*>(tensor_address(i));
  }
  SGDR_HD const LaunchExtras& extras_of(uint32_t i) const {
    return *reinterpret_cast<const LaunchExtras*>(tensor_address(i) + sizeof(LaunchTensor));
  }

 private:
  SGDR_HD const unsigned char* tensor_address(uint32_t i) const {
    return payload + group_count * sizeof(KernelGroup) + i * tensor_bytes(kind);
  }
};

// A launch without extras takes the smallest payload that suffices: the host hands all of it over,
// which takes 5 us for 1 KB and 10 us for 25 KB. With extras there is only the large one, as each
// kernel takes long to compile.
constexpr size_t kSmallPayload = 976;
constexpr size_t kMediumPayload = 10192;
constexpr size_t kLargePayload = 25760;
static_assert(sizeof(LaunchHeader) + kLargePayload <= kMaxArgsBytes);
static_assert(kLargePayload / sizeof(KernelGroup) <= 1 << 8);

// Any LaunchArgs, as the host fills it.
struct FilledLaunch : LaunchHeader {
  alignas(8) unsigned char payload[kLargePayload];

  size_t payload_bytes() const {
    return group_count * sizeof(KernelGroup) + tensor_count * tensor_bytes(extras);
  }
  // One block for each chunk, and one for the schedule.
  uint32_t block_count() const { return chunk_count + 1; }
};

// Calls f(std::type_identity<Args>) with the type of LaunchArgs that the kernel takes.
template <class F>
void with_args_type(const FilledLaunch& args, F f) {
  using enum Extras;
  const size_t needed = args.payload_bytes();
  static_switch<kNone, kAverages, kRounding, kMasters, kAll>(args.extras, [&](auto extras) {
    if constexpr (extras == kNone) {
      if (needed <= kSmallPayload) return f(std::type_identity<LaunchArgs<kNone, kSmallPayload>>{});
      if (needed <= kMediumPayload)
        return f(std::type_identity<LaunchArgs<kNone, kMediumPayload>>{});
    }
    f(std::type_identity<LaunchArgs<extras, kLargePayload>>{});
  });
}

// Fills a FilledLaunch, whose pointers the caller has set.
class LaunchFiller {
 public:
  explicit LaunchFiller(FilledLaunch& args) : args_(args) { clear(); }

  void clear() { args_.tensor_count = args_.group_count = args_.chunk_count = 0; }

  bool has_room(size_t tensors, size_t groups) const {
    return args_.payload_bytes() + tensors * tensor_bytes(args_.extras) +
               groups * sizeof(KernelGroup) <=
           sizeof(args_.payload);
  }

  void add_group(const LaunchGroup& group) {
    unsigned char* const room = args_.payload + args_.group_count * sizeof(KernelGroup);
    last_group_ = new (room) KernelGroup(group);
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
    unsigned char* const room = tensors_ + args_.tensor_count * tensor_bytes(args_.extras);
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
    if (has_addresses(args_.extras)) {
      auto& extras = *new (room + sizeof(LaunchTensor)) LaunchExtras;
      extras.ema = const_cast<void*>(at(entry.ema, arithmetic_type(entry.param_type)));
      extras.low_precision_param =
          const_cast<void*>(at(entry.low_precision_param, entry.low_precision_type));
    }
    ++args_.tensor_count;
    args_.chunk_count += static_cast<uint32_t>((numel + kChunkNumel - 1) / kChunkNumel);
  }

  // Puts the tensors behind the groups, whose number is known only now.
  void finish() {
    const size_t groups = args_.group_count * sizeof(KernelGroup);
    std::memcpy(args_.payload + groups, tensors_, args_.payload_bytes() - groups);
  }

 private:
  FilledLaunch& args_;
  KernelGroup* last_group_ = nullptr;
  alignas(8) unsigned char tensors_[kLargePayload];
};

// Whether a value is rounded stochastically: to float32 and float64 there is nothing to round.
SGDR_HD bool rounds(bool option, ElementType type) { return option && element_size(type) == 2; }

inline Extras extras_of(std::span<const LaunchGroup> groups, std::span<const TensorEntry> tensors) {
  bool averages = false, narrows = false, rounding = false, masters = false;
  for (const LaunchGroup& group : groups) {
    const GroupOptions& options = group.options;
    averages |= options.averaging != Averaging::kNone;
    narrows |= options.rounds_param || options.rounds_momentum || options.master_weights;
  }
  if (!narrows) return averages ? Extras::kAverages : Extras::kNone;
  for (const TensorEntry& entry : tensors) {
    const GroupOptions& options = groups[entry.group].options;
    rounding |= rounds(options.rounds_param, entry.param_type) ||
                rounds(options.rounds_momentum, entry.momentum_type);
    masters |= entry.low_precision_type != ElementType::kNone;
  }
  if (averages + rounding + masters > 1) return Extras::kAll;
  return averages   ? Extras::kAverages
         : rounding ? Extras::kRounding
         : masters  ? Extras::kMasters
                    : Extras::kNone;
}

// Fills `args` and calls launch(args), once for each launch that the step needs. The tensors come
// in the order of their groups.
template <class Launch>
void for_each_launch(FilledLaunch& args, std::span<const LaunchGroup> groups,
                     std::span<const TensorEntry> tensors, Launch launch) {
  args.extras = extras_of(groups, tensors);
  LaunchFiller filler(args);
  const auto launch_filled = [&] {
    filler.finish();
    launch(args);
    filler.clear();
  };
  size_t next = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!filler.has_room(1, 1)) launch_filled();
    filler.add_group(groups[i]);
    for (; next < tensors.size() && tensors[next].group == i; ++next) {
      const TensorEntry& entry = tensors[next];
      int64_t begin = 0;
      do {
        if (!filler.has_room(1, 0)) {
          launch_filled();
          filler.add_group(groups[i]);
        }
        const int64_t numel = std::min<int64_t>(entry.numel - begin, kMaxPieceNumel);
        filler.add_piece(entry, begin, numel);
        begin += numel;
      } while (begin < entry.numel);
    }
    filler.complete_group(groups[i].advances);
  }
  if (args.group_count != 0) launch_filled();
}

}  // namespace sgdr
