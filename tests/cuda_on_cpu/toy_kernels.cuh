// A kernel with all that needs proof: vector loads, shared memory, shuffles, barriers, a last block
// found by a ticket. Each bug that the tools must catch can be planted in it. Needs only the CUDA
// language.
#pragma once

namespace toy {

enum class Bug : unsigned char {
  kNone,
  kOutOfBounds,          // of global memory
  kSharedOutOfBounds,    // of shared memory
  kMisaligned,           // a float4 at an address that is no multiple of 16
  kUninitialisedShared,  // shared memory taken for zeros
  kMissingBarrier,       // between a write and a read of shared memory
  kMissingWarpSync,      // the same, within a warp
  kMissingReleaseFence,  // before the ticket
  kMissingAcquireFence,  // after the ticket
  kMissingTicket,        // block 0 takes itself for the last one
  kDivergentBarrier,     // in one branch only
  kBarriersInBothBranches,
  kBarrierAfterReturn,
};

constexpr int kThreads = 64;
constexpr int kWarps = kThreads / 32;

// y += a * x, and total = the sum of the new y. About as large as arguments may be from CUDA 12.1
// on.
struct SaxpyArgs {
  float* y;
  const float* x;
  float a;
  int n;
  float* block_sums;
  float* total;
  unsigned* ticket;  // 0 before and after a launch
  unsigned char reserved[32000];
  unsigned canary;
};

constexpr unsigned kCanary = 0xC0FFEE;

// The sum over the block, in thread 0.
template <Bug bug>
__device__ float sum_over_block(float value) {
  __shared__ float warp_sums[kWarps];
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(0xffffffff, value, delta);
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32;
    if constexpr (bug == Bug::kUninitialisedShared)
      warp_sums[warp] += value;
    else
      warp_sums[bug == Bug::kSharedOutOfBounds ? warp + 1 : warp] = value;
  }
  if constexpr (bug != Bug::kMissingBarrier) __syncthreads();
  float sum = 0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

template <class scalar_t, int kVector, Bug bug = Bug::kNone>
__global__ void __launch_bounds__(kThreads)
    saxpy_and_sum_kernel(const __grid_constant__ SaxpyArgs args) {
  __shared__ bool is_last_block;
  if (args.canary != kCanary) return;

  scalar_t sum = 0;
  const int first = (blockIdx.x * blockDim.x + threadIdx.x) * kVector;
  if (first + kVector <= args.n && kVector == 4) {
    const int shift = bug == Bug::kMisaligned ? 1 : 0;
    const float4 x = __ldg(reinterpret_cast<const float4*>(args.x + first - shift));
    float4 y = *reinterpret_cast<float4*>(args.y + first);
    y = make_float4(fmaf(args.a, x.x, y.x), fmaf(args.a, x.y, y.y), fmaf(args.a, x.z, y.z),
                    fmaf(args.a, x.w, y.w));
    *reinterpret_cast<float4*>(args.y + first) = y;
    sum = y.x + y.y + y.z + y.w;
  } else {
    const int end = bug == Bug::kOutOfBounds ? args.n + 1 : args.n;
    for (int i = first; i < first + kVector && i < end; ++i)
      sum += args.y[i] = fmaf(args.a, args.x[i], args.y[i]);
  }

  if constexpr (bug == Bug::kMissingWarpSync) {
    __shared__ float exchange[kThreads];
    exchange[threadIdx.x] = sum;
    if (exchange[threadIdx.x ^ 1] == -1.0f) sum = 0;
  }
  if constexpr (bug == Bug::kDivergentBarrier) {
    if (threadIdx.x < 32) __syncthreads();
  }
  if constexpr (bug == Bug::kBarriersInBothBranches) {
    if (threadIdx.x < 32)
      __syncthreads();
    else
      __syncthreads();
  }
  if constexpr (bug == Bug::kBarrierAfterReturn) {
    if (threadIdx.x == 7) return;
    __syncthreads();
  }

  const float block_sum = sum_over_block<bug>(sum);
  if (threadIdx.x == 0) {
    args.block_sums[blockIdx.x] = block_sum;
    if constexpr (bug != Bug::kMissingReleaseFence) __threadfence();
    const unsigned drawn = atomicInc(args.ticket, gridDim.x - 1);
    is_last_block = bug == Bug::kMissingTicket ? blockIdx.x == 0 : drawn == gridDim.x - 1;
    if constexpr (bug != Bug::kMissingAcquireFence) __threadfence();
  }
  __syncthreads();
  if (is_last_block && threadIdx.x == 0) {
    float total = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) total += args.block_sums[block];
    *args.total = total;
  }
}

}  // namespace toy
