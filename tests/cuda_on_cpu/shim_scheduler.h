// Runs the threads of a CUDA grid on the CPU, one at a time, in an order drawn from a seed. Part of
// cuda_shim.h.
//
// A CUDA thread is a fiber (ucontext), a resident block is an operating system thread that owns the
// fibers of its CUDA threads, and a baton lets one of them all run at any moment. So a run is
// repeatable from its seed, and yet
//
// - blocks interleave: at barriers, fences and atomics the baton may go to another resident block;
// - each block has its own shared memory: `__shared__` is `thread_local`, hence one per operating
// system thread;
// - a block's shared memory starts as 0xFF (NaN, -1, no valid bool or pointer), not as zeros;
// - AddressSanitizer follows the stacks, and ThreadSanitizer takes every fiber for a thread of its
// own.
//
// Why no real thread for each CUDA thread: thread_local could not be a block's shared memory then,
// and what ThreadSanitizer found would depend on timing. It is not needed either: a race is two
// accesses that no barrier or fence orders, whether or not they ever coincide, and the order is
// known here exactly:
//
//   __syncthreads, __syncwarp   order the accesses of the threads that take part
//   __threadfence               orders like a sequentially consistent fence: what came before a
//   fence is seen
//                               after every later fence, of whatever block
//   atomics, shuffles, votes    order nothing by themselves, as in CUDA
//
// So a "last block" pattern needs a fence before the ticket is drawn and one after, as the PTX
// memory model has it.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <semaphore>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cuda_vector_types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Two libraries in one process that both include this file must not share its state.
#pragma GCC visibility push(hidden)
namespace shim {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr size_t kStackBytes = 512 << 10;  // of a CUDA thread; committed as it is touched
constexpr int kPoison = 0xFF;

inline uint64_t environment_number(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

struct Config {
  // 0: blocks and threads in their natural order, one block after another.
  uint64_t seed = environment_number("SHIM_SEED", 1);
  // How many blocks may be under way at once; the others wait for one to finish.
  unsigned resident_blocks = environment_number("SHIM_RESIDENT_BLOCKS", 4);
};
inline Config config;

// A kernel did what hangs, or is undefined, on a GPU.
struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// --------------------------------------------------------------------------- sanitizers and stacks

// One flow of control: a fiber, or the operating system thread that schedules a block's fibers.
struct Flow {
  ucontext_t context = {};
  void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
};

// Without synchronisation: that the scheduler runs two threads one after the other orders nothing
// on a GPU.
inline void tsan_continue_as([[maybe_unused]] Flow& flow) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(flow.tsan, __tsan_switch_to_fiber_no_sync);
#endif
}

inline void tsan_release([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
}

inline void tsan_acquire([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
}

#if defined(__SANITIZE_THREAD__)
constexpr bool kUnderTsan = true;
#else
constexpr bool kUnderTsan = false;
#endif

inline void switch_stack(Flow& from, [[maybe_unused]] Flow& to, [[maybe_unused]] bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  swapcontext(&from.context, &to.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline std::vector<void*> spare_stacks;  // touched only by who holds the baton

inline void* take_stack() {
  if (!spare_stacks.empty()) {
    void* stack = spare_stacks.back();
    spare_stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack, 4096, PROT_NONE);  // an overflow faults
  return stack;
}

inline void give_back_stack(void* stack, bool unwound) {
  if (kUnderTsan || !unwound) {
    // ThreadSanitizer would compare accesses of the next thread on this stack with those of the
    // last one.
    munmap(stack, kStackBytes);
    return;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  spare_stacks.push_back(stack);
}

// ------------------------------------------------------------------------------ threads and blocks

class Block;

// What a thread waits for. kNothing: it may run.
enum class Wait : uint8_t { kNothing, kBlockBarrier, kWarp, kExited };

// What the lanes of a warp do together; all lanes in the mask must do the same.
enum class WarpOperation : uint8_t { kSync, kShuffle, kVote, kMatch };

// One meeting of the threads of a block or warp, as one thread sees it.
struct Meeting {
  const char* file = nullptr;
  int line = 0;
  WarpOperation operation = WarpOperation::kSync;
  unsigned mask = 0;
  uint64_t brought = 0;
};

struct Thread {
  Flow flow;
  Block* block = nullptr;
  uint3 index = {};
  unsigned rank = 0;  // in the block
  Wait wait = Wait::kNothing;
  Meeting meeting;
  uint64_t gathered[kWarpSize] = {};  // what each lane brought to the last meeting of the warp
  unsigned gathered_from = 0;         // the lanes that took part
  unsigned votes = 0;  // how many threads brought a non-zero to the last block barrier

  unsigned lane() const { return rank % kWarpSize; }
  unsigned warp() const { return rank / kWarpSize; }
};

inline thread_local Thread* current_thread = nullptr;

// Not instrumented: the scheduler's own data is handed from fiber to fiber without any order that
// ThreadSanitizer sees.
#define SHIM_UNSEEN_BY_TSAN __attribute__((no_sanitize("thread"), noinline))

SHIM_UNSEEN_BY_TSAN inline Thread& this_thread() { return *current_thread; }
SHIM_UNSEEN_BY_TSAN inline uint64_t gathered_from_lane(unsigned lane) {
  return current_thread->gathered[lane];
}
SHIM_UNSEEN_BY_TSAN inline unsigned lanes_gathered() { return current_thread->gathered_from; }
SHIM_UNSEEN_BY_TSAN inline unsigned votes_counted() { return current_thread->votes; }

// `extern __shared__` memory of the file, see SHIM_DYNAMIC_SHARED_MEMORY in cuda_shim.h.
struct DynamicSharedMemory {
  void* (*address)() = nullptr;
  size_t capacity = 0;
};
inline DynamicSharedMemory dynamic_shared_memory;

struct Grid {
  dim3 blocks;
  dim3 threads;
  size_t dynamic_shared_bytes;
  std::function<void()> kernel;
  char finished_tag = 0;  // ThreadSanitizer: all that the kernel did comes before all that the
                          // host does after the launch
};

struct MemoryRange {
  char* begin = nullptr;
  size_t bytes = 0;
};

// This module's thread_local variables in the calling thread: the shared memory of its block, and
// current_thread.
inline MemoryRange shared_memory() {
  MemoryRange range;
  const auto find = [](dl_phdr_info* module, size_t, void* found) {
    const auto* mine = reinterpret_cast<const char*>(&current_thread);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      if (module->dlpi_phdr[i].p_type != PT_TLS || module->dlpi_tls_data == nullptr) continue;
      auto* begin = static_cast<char*>(module->dlpi_tls_data);
      const size_t bytes = module->dlpi_phdr[i].p_memsz;
      if (begin <= mine && mine < begin + bytes) *static_cast<MemoryRange*>(found) = {begin, bytes};
    }
    return 0;
  };
  dl_iterate_phdr(find, &range);
  if (range.begin == nullptr)
    throw std::logic_error("shim: cannot find this module's shared memory");
  return range;
}

// Before a block starts: its shared memory holds poison, and AddressSanitizer lets it touch what
// the launch asked for.
inline void prepare_shared_memory([[maybe_unused]] size_t dynamic_bytes) {
  const MemoryRange range = shared_memory();
  Thread* const keep = current_thread;
  std::memset(range.begin, kPoison, range.bytes);
  current_thread = keep;
#if defined(__SANITIZE_ADDRESS__)
  if (const DynamicSharedMemory& dynamic = dynamic_shared_memory; dynamic.address != nullptr) {
    __asan_poison_memory_region(static_cast<char*>(dynamic.address()) + dynamic_bytes,
                                dynamic.capacity - dynamic_bytes);
  }
#endif
}

// After it: the operating system gives the memory to other threads.
inline void give_back_shared_memory() {
#if defined(__SANITIZE_ADDRESS__)
  const MemoryRange range = shared_memory();
  __asan_unpoison_memory_region(range.begin, range.bytes);
#endif
}

// A block under way: its threads, and the operating system thread on which their fibers take
// turns.
class Block {
 public:
  Block(Grid& grid, uint3 index, uint64_t seed, bool shuffled, bool interleaved,
        std::binary_semaphore& baton_home)
      : index(index),
        grid(grid),
        random_(seed),
        shuffled_(shuffled),
        interleaved_(interleaved),
        baton_home_(baton_home) {
    host_ = std::thread([this] { run(); });
  }

  ~Block() {
    host_.join();
#if defined(__SANITIZE_THREAD__)
    Flow me;
    me.tsan = __tsan_get_current_fiber();
    for (Thread& thread : threads_) {
      tsan_continue_as(thread.flow);
      tsan_release(&grid.finished_tag);
      tsan_continue_as(me);
      __tsan_destroy_fiber(thread.flow.tsan);
    }
    tsan_acquire(&grid.finished_tag);
#endif
    for (Thread& thread : threads_) {
      if (thread.flow.stack != nullptr)
        give_back_stack(thread.flow.stack, thread.wait == Wait::kExited);
    }
  }

  // Gives the block the baton and returns when it comes back.
  void take_turn() {
    my_turn_.release();
    baton_home_.acquire();
  }

  // As take_turn(), but what is left of the block is dropped.
  void abandon() {
    abandoned_ = true;
    take_turn();
  }

  bool finished() const { return finished_; }
  std::exception_ptr error() const { return error_; }

  // Called on a fiber: leaves it until `wait` is over.
  void suspend(Thread& self, Wait wait, const Meeting& meeting) {
    // From here on the scheduler's data is touched, in the scheduler's name.
    tsan_continue_as(scheduler_);
    self.wait = wait;
    self.meeting = meeting;
    switch_stack(self.flow, scheduler_, false);
  }

  void* barrier_tag() { return &barrier_tags_[barriers_passed() % 2]; }
  void* warp_tag(unsigned warp) { return &warp_tags_[warp][warp_meetings(warp) % 2]; }

  const uint3 index;
  Grid& grid;

 private:
  // Two tags in turn: a thread that is already at the next barrier must not be taken for one
  // still at this one.
  SHIM_UNSEEN_BY_TSAN unsigned barriers_passed() const { return barriers_; }
  SHIM_UNSEEN_BY_TSAN unsigned warp_meetings(unsigned warp) const { return warp_meetings_[warp]; }

  void run() {
    my_turn_.acquire();
    try {
      if (!abandoned_) {
        start();
        schedule();
      }
    } catch (...) {
      error_ = std::current_exception();
    }
    give_back_shared_memory();
    finished_ = true;
    baton_home_.release();
  }

  void start() {
#if defined(__SANITIZE_THREAD__)
    scheduler_.tsan = __tsan_get_current_fiber();
#endif
    prepare_shared_memory(grid.dynamic_shared_bytes);
    const dim3 size = grid.threads;
    threads_.resize(size_t{size.x} * size.y * size.z);
    for (unsigned rank = 0; rank < threads_.size(); ++rank) {
      Thread& thread = threads_[rank];
      thread.block = this;
      thread.rank = rank;
      thread.index = {rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
      Flow& flow = thread.flow;
      flow.stack = take_stack();
      flow.stack_bytes = kStackBytes;
      getcontext(&flow.context);
      flow.context.uc_stack = {flow.stack, 0, flow.stack_bytes};
      flow.context.uc_link = nullptr;
      makecontext(&flow.context, &Block::thread_main, 0);
#if defined(__SANITIZE_THREAD__)
      flow.tsan = __tsan_create_fiber(0);
      const std::string name =
          "block " + std::to_string(index.x) + " thread " + std::to_string(rank);
      __tsan_set_fiber_name(flow.tsan, name.c_str());
#endif
    }
  }

  static void thread_main() {
    Thread& self = this_thread();
    Block& block = *self.block;
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &block.scheduler_.stack_bytes);
    block.scheduler_.stack = const_cast<void*>(bottom);
#endif
    try {
      block.grid.kernel();
      tsan_continue_as(block.scheduler_);
    } catch (...) {
      tsan_continue_as(block.scheduler_);
      if (!block.error_) block.error_ = std::current_exception();
    }
    self.wait = Wait::kExited;
    switch_stack(self.flow, block.scheduler_, true);
  }

  void resume(Thread& thread) {
    current_thread = &thread;
    tsan_continue_as(thread.flow);
    switch_stack(scheduler_, thread.flow, false);
    current_thread = nullptr;
  }

  void schedule() {
    std::vector<unsigned> order(threads_.size());
    std::iota(order.begin(), order.end(), 0u);
    for (;;) {
      if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
      bool any_ran = false;
      for (const unsigned rank : order) {
        if (threads_[rank].wait != Wait::kNothing) continue;
        any_ran = true;
        resume(threads_[rank]);
        if (error_) return;
        const bool yielded = threads_[rank].wait == Wait::kNothing;
        if (yielded) lend_baton();
        if (abandoned_) return;
      }
      if (any_ran) continue;
      if (all_threads(Wait::kExited)) return;
      if (!release_warps()) release_barrier();
      lend_baton();
      if (abandoned_) return;
    }
  }

  void lend_baton() {
    if (!interleaved_ || random_() % 2 == 0) return;
    baton_home_.release();
    my_turn_.acquire();
  }

  bool all_threads(Wait wait) const {
    return std::all_of(threads_.begin(), threads_.end(),
                       [wait](const Thread& t) { return t.wait == wait; });
  }

  // Lets go on the threads whose whole mask has arrived; true if there were any.
  bool release_warps() {
    bool any_released = false;
    for (unsigned first = 0; first < threads_.size(); first += kWarpSize) {
      const unsigned lanes = std::min<unsigned>(kWarpSize, threads_.size() - first);
      Thread* const warp = &threads_[first];
      for (unsigned leader = 0; leader < lanes; ++leader) {
        if (warp[leader].wait != Wait::kWarp) continue;
        const Meeting meeting = warp[leader].meeting;
        if (!(meeting.mask >> leader & 1))
          fail(warp[leader], "a lane is not in the mask that it names");
        unsigned present = 0;
        bool complete = true;
        for (unsigned lane = 0; lane < lanes; ++lane) {
          if (!(meeting.mask >> lane & 1) || warp[lane].wait == Wait::kExited) continue;
          complete = complete && warp[lane].wait == Wait::kWarp;
          present |= 1u << lane;
        }
        if (!complete) continue;
        uint64_t brought[kWarpSize];
        std::memset(brought, kPoison, sizeof brought);
        for (unsigned lane = 0; lane < lanes; ++lane) {
          if (!(present >> lane & 1)) continue;
          if (warp[lane].meeting.mask != meeting.mask ||
              warp[lane].meeting.operation != meeting.operation)
            fail(warp[lane],
                 "lanes of one warp meet in different operations or with different masks");
          brought[lane] = warp[lane].meeting.brought;
        }
        for (unsigned lane = 0; lane < lanes; ++lane) {
          if (!(present >> lane & 1)) continue;
          std::memcpy(warp[lane].gathered, brought, sizeof brought);
          warp[lane].gathered_from = present;
          warp[lane].wait = Wait::kNothing;
        }
        ++warp_meetings_[first / kWarpSize];
        any_released = true;
      }
    }
    return any_released;
  }

  void release_barrier() {
    const Thread* at_barrier = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.wait == Wait::kBlockBarrier) at_barrier = &thread;
    }
    unsigned votes = 0;
    for (const Thread& thread : threads_) {
      if (thread.wait == Wait::kWarp)
        fail(thread, "not all lanes in the mask reach a warp's meeting");
      if (thread.wait == Wait::kExited)
        fail(*at_barrier, "__syncthreads() that some threads never reach");
      if (thread.meeting.line != at_barrier->meeting.line ||
          std::strcmp(thread.meeting.file, at_barrier->meeting.file) != 0)
        fail(thread, "threads of one block wait at different __syncthreads()");
      votes += thread.meeting.brought != 0;
    }
    for (Thread& thread : threads_) {
      thread.votes = votes;
      thread.wait = Wait::kNothing;
    }
    ++barriers_;
  }

  [[noreturn]] void fail(const Thread& thread, const char* what) const {
    const std::string where = thread.meeting.file + (":" + std::to_string(thread.meeting.line));
    throw KernelError(where + ": " + what + " (block " + std::to_string(index.x) + ", thread " +
                      std::to_string(thread.rank) + ")");
  }

  std::vector<Thread> threads_;
  Flow scheduler_;
  std::mt19937_64 random_;
  const bool shuffled_, interleaved_;
  std::binary_semaphore& baton_home_;
  std::binary_semaphore my_turn_{0};
  bool abandoned_ = false;
  bool finished_ = false;
  std::exception_ptr error_;
  unsigned barriers_ = 0;
  unsigned warp_meetings_[kMaxThreadsPerBlock / kWarpSize] = {};
  char barrier_tags_[2] = {};  // of ThreadSanitizer; only their addresses matter
  char warp_tags_[kMaxThreadsPerBlock / kWarpSize][2] = {};
  std::thread host_;  // last: it uses all the above
};

// ----------------------------------------------------------------------- what a CUDA thread can do

inline void yield() {
  Thread& self = this_thread();
  self.block->suspend(self, Wait::kNothing, {});
}

// Returns for how many threads `predicate` held.
inline unsigned meet_block(bool predicate, const char* file, int line) {
  Thread& self = this_thread();
  void* const tag = self.block->barrier_tag();
  tsan_release(tag);
  self.block->suspend(self, Wait::kBlockBarrier, {file, line, WarpOperation::kSync, 0, predicate});
  tsan_acquire(tag);
  return votes_counted();
}

// Afterwards gathered_from_lane() has what each lane brought.
inline void meet_warp(WarpOperation operation, unsigned mask, uint64_t brought, const char* file,
                      int line) {
  Thread& self = this_thread();
  void* const tag = self.block->warp_tag(self.warp());
  const bool orders_memory = operation == WarpOperation::kSync;
  if (orders_memory) tsan_release(tag);
  self.block->suspend(self, Wait::kWarp, {file, line, operation, mask, brought});
  if (orders_memory) tsan_acquire(tag);
}

inline char fence_tag;

inline void fence() {
  yield();
  tsan_acquire(&fence_tag);
  tsan_release(&fence_tag);
  yield();
}

// --------------------------------------------------------------------------------------- launching

inline void run_grid(Grid& grid) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);

  const size_t threads = size_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  const size_t blocks = size_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  if (threads == 0 || threads > kMaxThreadsPerBlock || blocks == 0)
    throw KernelError("launch of " + std::to_string(blocks) + " blocks of " +
                      std::to_string(threads) + " threads");
  if (grid.dynamic_shared_bytes > dynamic_shared_memory.capacity)
    throw KernelError("more dynamic shared memory than SHIM_DYNAMIC_SHARED_MEMORY has");

  const bool shuffled = config.seed != 0;
  const size_t resident_limit = shuffled ? std::max(1u, config.resident_blocks) : 1;
  std::mt19937_64 random(config.seed);
  std::vector<size_t> waiting(blocks);
  std::iota(waiting.rbegin(), waiting.rend(), size_t{0});  // taken from the back
  if (shuffled) std::shuffle(waiting.begin(), waiting.end(), random);

  std::binary_semaphore baton_home(0);
  std::vector<std::unique_ptr<Block>> resident, finished;
  std::exception_ptr error;
  while (!error && !(waiting.empty() && resident.empty())) {
    while (resident.size() < resident_limit && !waiting.empty()) {
      const size_t b = waiting.back();
      waiting.pop_back();
      const uint3 index = {unsigned(b % grid.blocks.x), unsigned(b / grid.blocks.x % grid.blocks.y),
                           unsigned(b / grid.blocks.x / grid.blocks.y)};
      resident.push_back(
          std::make_unique<Block>(grid, index, random(), shuffled, resident_limit > 1, baton_home));
    }
    auto& block = resident[random() % resident.size()];
    block->take_turn();
    if (!block->finished()) continue;
    error = block->error();
    // Under ThreadSanitizer they stay until the end: to tear one down here would order it before
    // the next one.
    if (kUnderTsan) finished.push_back(std::move(block));
    std::swap(block, resident.back());
    resident.pop_back();
  }
  for (auto& block : resident) block->abandon();
  resident.clear();
  finished.clear();
  if (error) std::rethrow_exception(error);
}

// kernel<<<blocks, threads, dynamic_shared_bytes>>>(args...). Arguments are copied now, as by a
// launch.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 blocks, dim3 threads, size_t dynamic_shared_bytes,
            const Args&... args) {
  const std::tuple<std::remove_const_t<Params>...> copies(args...);
  Grid grid{blocks, threads, dynamic_shared_bytes, [&] { std::apply(kernel, copies); }};
  run_grid(grid);
}

}  // namespace shim

#pragma GCC visibility pop
