// A list of tensors as flat memory, and its division into chunks. Plain host code, no CUDA types.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

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

// The type that the arithmetic on a parameter is in, and that an average of it is stored in.
constexpr ElementType arithmetic_type(ElementType param_type) {
  return param_type == ElementType::kDouble ? ElementType::kDouble : ElementType::kFloat;
}

// One parameter of this step. Its other tensors hold as many elements in the same order.
struct TensorEntry {
  void* param;  // the master copy, where there is one
  const void* grad;
  void* momentum_buffer;                // null without momentum
  void* ema = nullptr;                  // null where nothing is averaged in this step
  void* low_precision_param = nullptr;  // of which `param` is the master copy, or null
  int64_t numel;
  double ema_decay = 0;  // 0: the average holds nothing yet
  uint32_t group;
  uint32_t param_index = 0;  // among those of all groups
  ElementType param_type;
  ElementType grad_type;
  ElementType momentum_type;
  ElementType low_precision_type = ElementType::kNone;
  bool first_step;          // the momentum buffer holds nothing yet
  bool new_master = false;  // the master copy holds nothing yet
};

// Elements [begin, end) of one entry.
struct Chunk {
  size_t entry;
  int64_t begin;
  int64_t end;
};

// Chunks of at most `chunk_size` elements, in the order of the entries; entries without elements
// have none.
inline std::vector<Chunk> divide_into_chunks(std::span<const TensorEntry> entries,
                                             int64_t chunk_size) {
  std::vector<Chunk> chunks;
  for (size_t entry = 0; entry < entries.size(); ++entry) {
    for (int64_t begin = 0; begin < entries[entry].numel; begin += chunk_size) {
      const int64_t left = entries[entry].numel - begin;
      chunks.push_back({entry, begin, begin + (left < chunk_size ? left : chunk_size)});
    }
  }
  return chunks;
}

// The sum over all entries of the chunks that each makes.
inline int64_t count_chunks(std::span<const TensorEntry> entries, int64_t chunk_size) {
  int64_t count = 0;
  for (const TensorEntry& entry : entries) count += (entry.numel + chunk_size - 1) / chunk_size;
  return count;
}

}  // namespace sgdr
