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

// One parameter of this step. Its grad and momentum buffer hold the same number of elements in the
// same order.
struct TensorEntry {
  void* param;
  const void* grad;
  void* momentum_buffer;  // null without momentum
  int64_t numel;
  uint32_t group;
  ElementType param_type;
  ElementType grad_type;
  ElementType momentum_type;
  bool first_step;  // the momentum buffer is to be initialised, and holds nothing yet
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

}  // namespace sgdr
