// The norm of all gradients, from the sum of their squares: see Note [Sum of squares] in
// sgdr_math.h. Needs only the CUDA language; counterpart of csrc/cpu/grad_norm.cpp.
#pragma once

#include "../sgdr_math.h"
#include "blocks.cuh"
#include "grad_norm_launch.h"
#include "memory.cuh"

namespace sgdr {
namespace cuda {

// A warp sums up a chunk; its thread t holds lanes 4 t to 4 t + 3.
constexpr uint32_t kLanesPerThread = static_cast<uint32_t>(kNormLanes) / kWarpSize;

__device__ __forceinline__ uint32_t thread_of_warp() { return threadIdx.x % kWarpSize; }

// Returns the sum in the warp's first thread.
__device__ __forceinline__ double fold_lanes(double (&lanes)[kLanesPerThread]) {
  constexpr unsigned kWholeWarp = 0xFFFFFFFF;
  for (uint32_t half = kWarpSize / 2; half > 0; half /= 2) {
    for (double& lane : lanes) lane += __shfl_down_sync(kWholeWarp, lane, half);
  }
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// The square of a float is exact in double, so an fma gives the same bits; that of a double is not.
template <ElementType kType>
__device__ __forceinline__ double add_square(double sum, double x) {
  return kType == ElementType::kDouble ? sum + square(x) : fused_multiply_add(x, x, sum);
}

template <ElementType kType>
__device__ __forceinline__ void add_squares(double (&lanes)[kLanesPerThread],
                                            const Memory<kType>& grad, uint32_t numel) {
  constexpr uint32_t kLanes = static_cast<uint32_t>(kNormLanes);
  using Lanes = Pack<typename Stored<kType>::type, kLanesPerThread>;
  const uint32_t rows = grad.bits_of_address() % alignof(Lanes) == 0 ? numel / kLanes : 0;
#pragma unroll 4
  for (uint32_t row = 0; row < rows; ++row) {
    const auto loaded =
        grad.template load<double, kLanesPerThread>(row * kWarpSize + thread_of_warp());
    for (uint32_t i = 0; i < kLanesPerThread; ++i)
      lanes[i] = add_square<kType>(lanes[i], loaded.value(i));
  }
  for (uint32_t row = rows * kLanes; row < numel; row += kLanes) {
    for (uint32_t i = 0; i < kLanesPerThread; ++i) {
      const uint32_t index = row + thread_of_warp() * kLanesPerThread + i;
      if (index >= numel) continue;
      lanes[i] = add_square<kType>(lanes[i], grad.template load<double, 1>(index).element);
    }
  }
}

__device__ __forceinline__ double sum_of_chunk(const NormTensor& tensor, uint32_t chunk) {
  constexpr uint32_t kChunk = static_cast<uint32_t>(kNormChunk);
  const uint32_t begin = (chunk - tensor.first_chunk) * kChunk;
  const ElementType type = tensor.type;
  char* const grad =
      static_cast<char*>(const_cast<void*>(tensor.grad)) + size_t{begin} * element_size(type);
  double lanes[kLanesPerThread] = {};
  using enum ElementType;
  static_switch<kFloat, kDouble, kHalf, kBFloat16>(type, [&](auto known_type) {
    add_squares(lanes, Memory<known_type.value>{grad}, min(tensor.numel - begin, kChunk));
  });
  return fold_lanes(lanes);
}

template <class Args>
__device__ __forceinline__ void sum_up_chunks(const Args& args) {
  const uint32_t warps = blockDim.x / kWarpSize;
  const uint32_t chunk = blockIdx.x * warps + threadIdx.x / kWarpSize;
  if (chunk >= args.chunk_count) return;
  const double sum = sum_of_chunk(args.tensor(tensor_of_chunk(args, chunk)), chunk);
  if (thread_of_warp() == 0) args.chunk_sums[args.first_chunk + chunk] = sum;
}

__device__ __forceinline__ GradNorm norm_of(const NormHeader& args, double sum_of_squares) {
  const double norm =
      sgdr::grad_norm(sum_of_squares, args.grad_scale == nullptr ? 1 : *args.grad_scale);
  return {sum_of_squares, norm, sgdr::clip_coefficient(norm, args.max_grad_norm)};
}

// One block adds up the sums of all chunks; a thread takes one lane after another.
__device__ __forceinline__ void sum_up_all(const NormHeader& args) {
  alignas(kBytesPerAccess) __shared__ double lanes[kNormLanes];
  const int64_t chunks = args.first_chunk + args.chunk_count;
  for (uint32_t lane = threadIdx.x; lane < kNormLanes; lane += blockDim.x) {
    double sum = 0;
#pragma unroll 16
    for (int64_t chunk = lane; chunk < chunks; chunk += kNormLanes) sum += args.chunk_sums[chunk];
    lanes[lane] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  double of_thread[kLanesPerThread];
  for (uint32_t i = 0; i < kLanesPerThread; ++i)
    of_thread[i] = lanes[threadIdx.x * kLanesPerThread + i];
  const double sum = fold_lanes(of_thread);
  if (threadIdx.x == 0) *args.result = norm_of(args, sum);
}

}  // namespace cuda

template <class Args>
__global__ void __launch_bounds__(kThreadsPerBlock, 4)
    grad_norm_kernel(const __grid_constant__ Args args) {
  cuda::sum_up_chunks(args);
  if (args.is_last && cuda::is_last_block(args.ticket)) cuda::sum_up_all(args);
}

}  // namespace sgdr
