// The arguments of the norm's kernel, and how the gradients are divided among launches. Plain host
// code, no CUDA types; launch.h does the same for the step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "launch.h"

namespace sgdr {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kMaxNormPieceNumel = 1u << 28;
static_assert(kMaxNormPieceNumel % kNormChunk == 0);

// A gradient, or a piece of one that has more than kMaxNormPieceNumel elements.
struct NormTensor {
  const void* grad;
  uint32_t first_chunk;  // index among the launch's chunks
  uint32_t numel : 29;
  ElementType type : 3;
};
static_assert(sizeof(NormTensor) == 16);

// The kernel's one argument, passed by value.
struct NormArgs {
  double* chunk_sums;      // device memory, for all launches together
  double* sum_of_squares;  // device memory
  uint32_t* ticket;        // device memory, 0 before and after each launch
  int64_t first_chunk;     // index of the launch's first chunk among those of all launches
  uint32_t chunk_count;
  uint32_t tensor_count;
  bool is_last;  // whether this is the last launch
  NormTensor tensors[1621];

  SGDR_HD const NormTensor& tensor(uint32_t i) const { return tensors[i]; }
};
static_assert(sizeof(NormArgs) <= kMaxArgsBytes);

// Fills `args` and calls launch(args), once for each launch that the list needs, at least once. The
// caller has set its pointers.
template <class Launch>
void for_each_norm_launch(NormArgs& args, std::span<const TensorEntry> entries, Launch launch) {
  args.first_chunk = args.chunk_count = args.tensor_count = 0;
  args.is_last = false;
  for (const TensorEntry& entry : entries) {
    const auto* const grad = static_cast<const char*>(entry.grad);
    for (int64_t begin = 0; begin < entry.numel; begin += kMaxNormPieceNumel) {
      if (args.tensor_count == std::size(args.tensors)) {
        launch(args);
        args.first_chunk += args.chunk_count;
        args.chunk_count = args.tensor_count = 0;
      }
      const int64_t numel = std::min<int64_t>(entry.numel - begin, kMaxNormPieceNumel);
      NormTensor& tensor = args.tensors[args.tensor_count++];
      tensor.grad = grad + begin * static_cast<int64_t>(element_size(entry.grad_type));
      tensor.first_chunk = args.chunk_count;
      tensor.numel = static_cast<uint32_t>(numel);
      tensor.type = entry.grad_type;
      args.chunk_count += static_cast<uint32_t>((numel + kNormChunk - 1) / kNormChunk);
    }
  }
  args.is_last = true;
  launch(args);
}

// At most as many blocks as run at once; their warps share the chunks.
inline uint32_t block_count(const NormArgs& args, uint32_t multiprocessors) {
  constexpr uint32_t kWarps = kThreadsPerBlock / kWarpSize;
  return std::clamp((args.chunk_count + kWarps - 1) / kWarps, 1u,
                    blocks_per_multiprocessor() * multiprocessors);
}

}  // namespace sgdr
