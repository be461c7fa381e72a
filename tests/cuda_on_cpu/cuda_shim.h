// Lets g++ (C++20) compile and run a header that needs only the CUDA language, on a machine without
// a GPU.
//
// Include it before the kernel's header, then launch: shim::launch(&kernel<float>, blocks, threads,
// 0, args...). How threads and blocks are run, and what the sanitizers see of it: shim_scheduler.h.
// Which order, and how many blocks at once: shim::config, or the environment variables SHIM_SEED
// and SHIM_RESIDENT_BLOCKS.
//
// What a kernel must heed, beyond CUDA's own rules:
// - `alignas` stands before `__shared__`, not after it; `__align__(n)` may stand on either side;
// - `extern __shared__` arrays are defined once, by SHIM_DYNAMIC_SHARED_MEMORY below;
// - a loop that waits for another thread needs an atomic, a fence or __nanosleep() in it, which are
//   where others get to run.
#pragma once

#if defined(__CUDACC__)
#error "cuda_shim.h is for host compilers"
#endif

#include <bit>
#include <cmath>
#include <type_traits>

#include "cuda_vector_types.h"
#include "shim_scheduler.h"

// --------------------------------------------------------------------------- qualifiers, built-ins

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// See shim_scheduler.h. constinit: as in CUDA, no constructor runs.
#define __shared__ constinit thread_local

#define threadIdx (::shim::this_thread().index)
#define blockIdx (::shim::this_thread().block->index)
#define blockDim (::shim::this_thread().block->grid.threads)
#define gridDim (::shim::this_thread().block->grid.blocks)
constexpr int warpSize = shim::kWarpSize;

// Defines the memory behind `extern __shared__ type name[]`, before the function that declares it
// and in the same namespace. A launch may ask for at most `max_bytes`; AddressSanitizer guards what
// it did not ask for. Needs g++ -fno-extern-tls-init.
#define SHIM_DYNAMIC_SHARED_MEMORY(type, name, max_bytes)                          \
  alignas(16) __shared__ type name[(max_bytes) / sizeof(type)];                    \
  [[maybe_unused]] static const bool shim_has_##name = [] {                        \
    ::shim::dynamic_shared_memory = {[]() -> void* { return name; }, sizeof name}; \
    return true;                                                                   \
  }()

// ----------------------------------------------------------------------------- barriers and fences

// The default arguments are the place of the call: threads that wait at different places diverge.
#define SHIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_PLACE) { shim::meet_block(false, file, line); }
inline int __syncthreads_count(int predicate, SHIM_PLACE) {
  return int(shim::meet_block(predicate != 0, file, line));
}
inline int __syncthreads_or(int predicate, SHIM_PLACE) {
  return shim::meet_block(predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, SHIM_PLACE) {
  return shim::meet_block(predicate == 0, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, SHIM_PLACE) {
  shim::meet_warp(shim::WarpOperation::kSync, mask, 0, file, line);
}

inline void __threadfence() { shim::fence(); }
inline void __threadfence_system() { shim::fence(); }
inline void __threadfence_block() {
  shim::fence();
}  // stronger than CUDA's: a too narrow fence is not found
inline void __nanosleep(unsigned) { shim::yield(); }
[[noreturn]] inline void __trap() { throw shim::KernelError("__trap()"); }

// ------------------------------------------------------------------------------ shuffles and votes

namespace shim {

// A lane outside the mask, or one that has exited, gives a poison value: on a GPU the result is
// undefined.
template <class T>
T shuffle(unsigned mask, T value, unsigned source_lane, SHIM_PLACE) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  meet_warp(WarpOperation::kShuffle, mask, bits, file, line);
  bits = gathered_from_lane(source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned vote(unsigned mask, bool predicate, SHIM_PLACE) {
  meet_warp(WarpOperation::kVote, mask, predicate, file, line);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((lanes_gathered() >> lane & 1) && gathered_from_lane(lane) != 0) ballot |= 1u << lane;
  }
  return ballot;
}

}  // namespace shim

// Byte i of the result is the byte of y:x that digit i of the selector names.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i)
    result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

// As in CUDA, a lane whose source lies outside its group of `width` lanes keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_PLACE) {
  const unsigned lane = shim::this_thread().lane();
  return shim::shuffle(mask, value, (lane & -width) + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_PLACE) {
  const unsigned lane = shim::this_thread().lane();
  const bool inside = (lane & (width - 1)) >= delta;
  return shim::shuffle(mask, value, inside ? lane - delta : lane, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_PLACE) {
  const unsigned lane = shim::this_thread().lane();
  const bool inside = (lane & (width - 1)) + delta < unsigned(width);
  return shim::shuffle(mask, value, inside ? lane + delta : lane, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SHIM_PLACE) {
  const unsigned lane = shim::this_thread().lane();
  const unsigned source = lane ^ lane_mask;
  const bool inside = source < (lane & -width) + width;
  return shim::shuffle(mask, value, inside ? source : lane, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_PLACE) {
  return shim::vote(mask, predicate != 0, file, line);
}
inline int __any_sync(unsigned mask, int predicate, SHIM_PLACE) {
  return shim::vote(mask, predicate != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_PLACE) {
  return shim::vote(mask, predicate == 0, file, line) == 0;
}

// ----------------------------------------------------------------------------------------- atomics

namespace shim {

// `next` maps the old value to the new one. Relaxed, as CUDA's; other threads may run before and
// after.
template <class T, class Next>
T atomic_update(T* address, const Next& next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  auto* const word = reinterpret_cast<Bits*>(address);
  yield();
  Bits old_bits = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(word, &old_bits,
                                      std::bit_cast<Bits>(next(std::bit_cast<T>(old_bits))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  yield();
  return std::bit_cast<T>(old_bits);
}

// So that atomicAdd(&unsigned, 1) converts the 1, as CUDA's overloads do.
template <class T>
using same = std::type_identity_t<T>;

}  // namespace shim

template <class T>
T atomicAdd(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return T(old + value); });
}
template <class T>
T atomicSub(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return T(old - value); });
}
template <class T>
T atomicExch(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, shim::same<T> compare, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return old == compare ? value : old; });
}
template <class T>
T atomicMax(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicAnd(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return T(old & value); });
}
template <class T>
T atomicOr(T* address, shim::same<T> value) {
  return shim::atomic_update(address, [&](T old) { return T(old | value); });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return shim::atomic_update(address, [&](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return shim::atomic_update(
      address, [&](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// ----------------------------------------------------------------------- loads, stores, arithmetic

// The cache hints change no value. volatile T is not for them, as in CUDA.
#define SHIM_LOAD(name)      \
  template <class T>         \
  T name(const T* address) { \
    return *address;         \
  }
#define SHIM_STORE(name)                       \
  template <class T>                           \
  void name(T* address, shim::same<T> value) { \
    *address = value;                          \
  }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldcs)
SHIM_LOAD(__ldcv)
SHIM_LOAD(__ldlu)
SHIM_STORE(__stwb)
SHIM_STORE(__stcg)
SHIM_STORE(__stcs)
SHIM_STORE(__stwt)
#undef SHIM_LOAD
#undef SHIM_STORE

// cos(pi * x), exact in the reduction; CUDA's may differ in the last bit.
inline double cospi(double x) { return std::cos(3.14159265358979323846 * std::remainder(x, 2.0)); }
inline double sinpi(double x) { return std::sin(3.14159265358979323846 * std::remainder(x, 2.0)); }
inline float cospif(float x) { return float(cospi(double{x})); }
inline float sinpif(float x) { return float(sinpi(double{x})); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

// CUDA has them without std::.
using std::max;
using std::min;

#undef SHIM_PLACE
