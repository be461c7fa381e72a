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

// What does not depend on the number of tensors.
struct NormHeader {
  double* chunk_sums;       // device memory, for all launches together
  cuda::GradNorm* result;   // device memory
  uint32_t* ticket;         // device memory, 0 before and after each launch
  const float* grad_scale;  // device memory, or null
  double max_grad_norm;
  int64_t first_chunk;  // index of the launch's first chunk among those of all launches
  uint32_t chunk_count;
  uint32_t tensor_count;
  bool is_last;  // whether this is the last launch
};

// The kernel's one argument, passed by value.
template <uint32_t kTensors>
struct NormArgs : NormHeader {
  NormTensor tensors[kTensors];

  SGDR_HD const NormTensor& tensor(uint32_t i) const { return tensors[i]; }
};

// A launch takes the smallest of these that suffices, as in launch.h.
constexpr uint32_t kFewNormTensors = 60;
constexpr uint32_t kMoreNormTensors = 636;
constexpr uint32_t kMostNormTensors = 1620;
using FilledNormLaunch = NormArgs<kMostNormTensors>;
static_assert(sizeof(FilledNormLaunch) <= kMaxArgsBytes);

// Calls f(std::type_identity<Args>) with the type of NormArgs that the kernel takes.
template <class F>
void with_norm_args_type(const FilledNormLaunch& args, F f) {
  const uint32_t tensors = args.tensor_count <= kFewNormTensors    ? kFewNormTensors
                           : args.tensor_count <= kMoreNormTensors ? kMoreNormTensors
                                                                   : kMostNormTensors;
  static_switch<kFewNormTensors, kMoreNormTensors, kMostNormTensors>(
      tensors, [&](auto known) { f(std::type_identity<NormArgs<known>>{}); });
}

// Fills `args` and calls launch(args), once for each launch that the list needs, at least once.
template <class Launch>
void for_each_norm_launch(FilledNormLaunch& args, const cuda::NormStep& step, Launch launch) {
  static_cast<NormHeader&>(args) = {.chunk_sums = step.chunk_sums,
                                    .result = step.result,
                                    .ticket = step.ticket,
                                    .grad_scale = step.grad_scale,
                                    .max_grad_norm = step.max_grad_norm,
                                    .first_chunk = step.sum_count,
                                    .chunk_count = 0,
                                    .tensor_count = 0,
                                    .is_last = false};
  for (const TensorEntry& entry : step.tensors) {
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

// A warp takes a chunk. At least one block, which adds up the sums.
inline uint32_t block_count(const NormHeader& args, uint32_t threads = kThreadsPerBlock) {
  const uint32_t warps = threads / kWarpSize;
  return std::max((args.chunk_count + warps - 1) / warps, 1u);
}

}  // namespace sgdr
