// A CUDA runtime without a GPU, to be preloaded under a CUDA build of PyTorch:
// LD_PRELOAD=libfake_cudart.so.
//
// It answers the calls that torch and an extension make as a GPU's runtime would, and writes each
// one down. Device memory is host memory that starts as 0xFF (NaN) and that only kernels and copies
// may touch: anything else faults. A launch runs the host version of its kernel (fake_cudart.h). A
// graph capture records, a replay runs what was recorded. For the runtime of CUDA 13. fake_cuda.py
// builds it, and runtime_log.py reads what it wrote down.
//
// Environment:
//   FAKE_CUDA_KERNELS=a.so:b.so  libraries with host versions of kernels, loaded at the first
//   launch FAKE_CUDA_DEVICES=n    so many devices (default 1); a kernel can touch the memory of its
//   own device only FAKE_CUDA_GUARD=1      each allocation ends at a page that faults, so that an
//   overrun by one byte is seen (by less
//                          than 16 bytes: when it is freed). With PYTORCH_NO_CUDA_MEMORY_CACHING=1:
//                          each tensor
//   FAKE_CUDA_DEFERRED=1   nothing runs until something synchronises or asks, as if the GPU were
//   very slow
#include "fake_cudart.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kPoison = 0xFF;  // of fresh memory: NaN, -1, no valid bool
constexpr int kBorder =
    0xA5;  // of the rest of its pages; no NaN, which arithmetic would leave as it is
constexpr size_t kPage = 4096;
constexpr size_t kGuardedAlignment =
    16;  // of an allocation, where its end is to be at a guard page
constexpr int kAllDevices = -1;

bool environment_flag(const char* name) {
  const char* text = std::getenv(name);
  return text != nullptr && std::strcmp(text, "1") == 0;
}

int number_of_devices() {
  const char* text = std::getenv("FAKE_CUDA_DEVICES");
  return text != nullptr ? std::atoi(text) : 1;
}

// ------------------------------------------------------------------------------------------- state

struct Work {
  int device;
  std::function<void()> run;
  bool is_kernel;
};

struct Capture {
  std::vector<Work> nodes;
  unsigned long long id;
  cudaStreamCaptureMode mode;
  bool invalidated = false;
};

struct Stream {
  int id;  // 0: the default stream
  int device;
  bool blocking;
  std::shared_ptr<Capture> capture = nullptr;  // under way
};

struct Event {
  std::shared_ptr<Capture> capture;
  size_t recorded_after = 0;  // so many pieces of work were deferred up to its record
  std::chrono::steady_clock::time_point time;
};

struct Graph {
  std::vector<Work> nodes;
};

struct Allocation {
  char* begin;
  size_t bytes;
  char* mapping;  // guard page, pages, guard page
  size_t mapping_bytes;
  int device;

  char* pages() const { return mapping + kPage; }
  size_t pages_bytes() const { return mapping_bytes - 2 * kPage; }
};

struct HostKernel {
  std::string name;
  void (*run)(const FakeLaunch*);
  std::vector<size_t> arg_bytes;
};

struct Runtime {
  std::recursive_mutex mutex;
  const int devices = number_of_devices();
  const bool guard = environment_flag("FAKE_CUDA_GUARD");
  bool deferred = environment_flag("FAKE_CUDA_DEFERRED");

  std::string log;
  std::unordered_map<const void*, std::string> kernel_names;  // by the address of the host stub
  std::vector<HostKernel> host_kernels;
  std::map<const char*, Allocation> allocations;
  std::map<const char*, size_t> pinned;
  std::vector<std::unique_ptr<Stream>> default_streams;
  std::vector<std::unique_ptr<Stream>> streams;
  std::vector<std::shared_ptr<Capture>> captures;  // under way
  unsigned long long captures_begun = 0;
  std::deque<Work> pending;
  size_t deferred_so_far = 0;
  cudaError_t broken = cudaSuccess;  // a kernel failed: the context is lost

  Runtime() {
    for (int device = 0; device < devices; ++device)
      default_streams.push_back(std::make_unique<Stream>(Stream{0, device, true}));
  }
};

// Never destroyed: torch still calls while the process ends.
Runtime& runtime() {
  static Runtime* const the_runtime = new Runtime;
  return *the_runtime;
}

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_capture_mode = cudaStreamCaptureModeGlobal;

// One call of the runtime: holds the lock and writes a line of the log.
class Call {
 public:
  explicit Call(const char* name) : lock_(runtime().mutex) {
    runtime().log += name;
    runtime().log += '\n';
  }

  __attribute__((format(printf, 3, 4))) Call(const char* name, const char* fields, ...)
      : Call(name) {
    va_list list;
    va_start(list, fields);
    char text[512];
    std::vsnprintf(text, sizeof text, fields, list);
    va_end(list);
    note(text);
  }

  // Adds to the line.
  void note(const std::string& text) const {
    runtime().log.back() = ' ';
    runtime().log += text + '\n';
  }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

cudaError_t result(cudaError_t error) {
  if (error == cudaSuccess) error = runtime().broken;
  if (error != cudaSuccess) last_error = error;
  return error;
}

Stream& stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread)
    return *runtime().default_streams[current_device];
  return *reinterpret_cast<Stream*>(handle);
}

Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

// ------------------------------------------------------------------------------------------ memory

void set_access(int device, int protection) {
  for (const auto& [begin, allocation] : runtime().allocations) {
    if (device == kAllDevices || allocation.device == device)
      mprotect(allocation.pages(), allocation.pages_bytes(), protection);
  }
}

// Device memory may be touched while one of these lives.
class DeviceAccess {
 public:
  explicit DeviceAccess(int device) : device_(device) {
    set_access(device_, PROT_READ | PROT_WRITE);
  }
  ~DeviceAccess() { set_access(device_, PROT_NONE); }

 private:
  const int device_;
};

// The allocation that `pointer` lies in, or null.
const Allocation* find_allocation(const void* pointer) {
  const auto& allocations = runtime().allocations;
  const char* const address = static_cast<const char*>(pointer);
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const Allocation& allocation = (--after)->second;
  return address < allocation.begin + std::max<size_t>(1, allocation.bytes) ? &allocation : nullptr;
}

bool is_pinned(const void* pointer) {
  const char* const address = static_cast<const char*>(pointer);
  auto after = runtime().pinned.upper_bound(address);
  if (after == runtime().pinned.begin()) return false;
  --after;
  return address < after->first + after->second;
}

cudaError_t allocate(void** pointer, size_t bytes) {
  Allocation allocation;
  const size_t pages_bytes = std::max(kPage, (bytes + kPage - 1) / kPage * kPage);
  allocation.bytes = bytes;
  allocation.device = current_device;
  allocation.mapping_bytes = pages_bytes + 2 * kPage;
  allocation.mapping = static_cast<char*>(mmap(nullptr, allocation.mapping_bytes, PROT_NONE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (allocation.mapping == MAP_FAILED) return cudaErrorMemoryAllocation;
  const size_t rounded = (bytes + kGuardedAlignment - 1) / kGuardedAlignment * kGuardedAlignment;
  allocation.begin = allocation.pages() + (runtime().guard ? pages_bytes - rounded : 0);
  mprotect(allocation.pages(), pages_bytes, PROT_READ | PROT_WRITE);
  std::memset(allocation.pages(), kBorder, pages_bytes);
  std::memset(allocation.begin, kPoison, bytes);
  mprotect(allocation.pages(), pages_bytes, PROT_NONE);
  runtime().allocations[allocation.begin] = allocation;
  *pointer = allocation.begin;
  return cudaSuccess;
}

// Ends the process if somebody wrote beside the allocation, on its own pages.
void check_borders(const Allocation& allocation) {
  const auto untouched = [](const char* begin, const char* end) {
    return std::all_of(begin, end, [](char byte) { return byte == static_cast<char>(kBorder); });
  };
  if (untouched(allocation.pages(), allocation.begin) &&
      untouched(allocation.begin + allocation.bytes, allocation.pages() + allocation.pages_bytes()))
    return;
  std::fprintf(stderr, "fake_cudart: a write beside the %zu bytes at %p\n", allocation.bytes,
               static_cast<void*>(allocation.begin));
  std::abort();
}

cudaError_t release(void* pointer) {
  const auto found = runtime().allocations.find(static_cast<const char*>(pointer));
  if (found == runtime().allocations.end()) return cudaErrorInvalidValue;
  const Allocation allocation = found->second;
  mprotect(allocation.pages(), allocation.pages_bytes(), PROT_READ | PROT_WRITE);
  check_borders(allocation);
  munmap(allocation.mapping, allocation.mapping_bytes);
  runtime().allocations.erase(found);
  return cudaSuccess;
}

// -------------------------------------------------------------------------------------------- work

void execute(const Work& work) {
  if (runtime().broken != cudaSuccess) return;
  const DeviceAccess access(work.device);
  try {
    work.run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fake_cudart: a kernel failed: %s\n", error.what());
    runtime().broken = cudaErrorLaunchFailure;
  }
}

// In the order of the calls, which every order that streams and events allow includes. Leaves
// `left` pieces of work pending.
void drain(size_t left = 0) {
  while (runtime().pending.size() > left) {
    const Work work = std::move(runtime().pending.front());
    runtime().pending.pop_front();
    execute(work);
  }
}

// True if a stream that takes part in the default stream's implicit order is being captured.
bool blocking_stream_captures() {
  const auto& streams = runtime().streams;
  return std::any_of(streams.begin(), streams.end(),
                     [](const auto& stream) { return stream->blocking && stream->capture; });
}

cudaError_t enqueue(Stream& stream, Work work) {
  if (stream.capture) {
    if (stream.capture->invalidated) return cudaErrorStreamCaptureInvalidated;
    stream.capture->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  if (stream.id == 0 && blocking_stream_captures()) return cudaErrorStreamCaptureImplicit;
  if (runtime().deferred) {
    runtime().pending.push_back(std::move(work));
    ++runtime().deferred_so_far;
  } else {
    execute(work);
  }
  return runtime().broken;
}

// What may not be called while a stream is captured: such a call fails, and with it the capture.
cudaError_t forbidden_in_capture() {
  if (runtime().captures.empty() || thread_capture_mode == cudaStreamCaptureModeRelaxed)
    return cudaSuccess;
  bool forbidden = false;
  for (const auto& capture : runtime().captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    capture->invalidated = forbidden = true;
  }
  return forbidden ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

// Waits for all the work so far, as most calls that synchronise do, but for the last `left` pieces.
cudaError_t synchronize(size_t left = 0) {
  if (const cudaError_t error = forbidden_in_capture()) return result(error);
  drain(left);
  return result(cudaSuccess);
}

// ------------------------------------------------------------------------------------------ copies

const char* copy_kind(const void* to, const void* from) {
  const bool to_device = find_allocation(to) != nullptr,
             from_device = find_allocation(from) != nullptr;
  return to_device ? (from_device ? "D2D" : "H2D") : (from_device ? "D2H" : "H2H");
}

const char* host_memory(const void* to, const void* from) {
  const void* const host = find_allocation(to) == nullptr ? to : from;
  return find_allocation(host) != nullptr ? "none" : is_pinned(host) ? "pinned" : "pageable";
}

// A copy from pageable memory reads it before the call returns, and one into pageable memory is
// finished by then.
cudaError_t copy(void* to, const void* from, size_t bytes, Stream& stream) {
  const bool from_device = find_allocation(from) != nullptr,
             to_device = find_allocation(to) != nullptr;
  if (!stream.capture && !from_device && !is_pinned(from)) {
    const auto* begin = static_cast<const char*>(from);
    std::vector<char> staged(begin, begin + bytes);
    return enqueue(
        stream,
        {kAllDevices, [=, staged = std::move(staged)] { std::memcpy(to, staged.data(), bytes); },
         false});
  }
  const cudaError_t error =
      enqueue(stream, {kAllDevices, [=] { std::memmove(to, from, bytes); }, false});
  if (!stream.capture && !to_device && !is_pinned(to)) drain();
  return error;
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                      size_t height, Stream& stream) {
  cudaError_t error = cudaSuccess;
  for (size_t row = 0; row < height && error == cudaSuccess; ++row)
    error = copy(static_cast<char*>(to) + row * to_pitch,
                 static_cast<const char*>(from) + row * from_pitch, width, stream);
  return error;
}

cudaError_t fill(void* to, int value, size_t bytes, Stream& stream) {
  return enqueue(stream, {kAllDevices, [=] { std::memset(to, value, bytes); }, false});
}

// ---------------------------------------------------------------------------------------- launches

// RTLD_LOCAL: the host version of a kernel has the name of nvcc's host stub, and must not take its
// place.
void load_host_kernels() {
  const char* const list = std::getenv("FAKE_CUDA_KERNELS");
  if (list == nullptr) return;
  std::istringstream paths(list);
  for (std::string path; std::getline(paths, path, ':');) {
    if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) != nullptr) continue;
    std::fprintf(stderr, "fake_cudart: %s\n", dlerror());
    std::abort();
  }
}

const HostKernel* find_host_kernel(const std::string& name) {
  static std::once_flag once;
  std::call_once(once, load_host_kernels);
  const HostKernel* best = nullptr;
  for (const HostKernel& kernel : runtime().host_kernels) {
    if (kernel.name == name) return &kernel;
    if (name.find(kernel.name) == std::string::npos) continue;
    if (best == nullptr || kernel.name.size() > best->name.size()) best = &kernel;
  }
  return best;
}

cudaError_t launch(const char* call_name, const void* stub, dim3 grid, dim3 block, void** args,
                   size_t shared_bytes, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const auto known = runtime().kernel_names.find(stub);
  const std::string name = known != runtime().kernel_names.end() ? known->second : "unknown";
  const Call call(call_name,
                  "grid=%u,%u,%u block=%u,%u,%u shared=%zu stream=%d device=%d captured=%d", grid.x,
                  grid.y, grid.z, block.x, block.y, block.z, shared_bytes, stream.id, stream.device,
                  stream.capture ? 1 : 0);
  call.note("kernel=" + name);

  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return result(cudaErrorInvalidConfiguration);
  if (stream.device != current_device) return result(cudaErrorInvalidResourceHandle);
  const HostKernel* const kernel = find_host_kernel(name);
  if (kernel == nullptr) {
    std::fprintf(stderr,
                 "fake_cudart: no host version of kernel %s, grid %u,%u,%u block %u,%u,%u\n",
                 name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z);
    return result(cudaErrorInvalidDeviceFunction);
  }

  size_t argument_bytes = 0;
  for (const size_t bytes : kernel->arg_bytes) argument_bytes += bytes;
  call.note("argument_bytes=" + std::to_string(argument_bytes));
  std::vector<std::vector<char>> copies;
  for (size_t i = 0; i < kernel->arg_bytes.size(); ++i) {
    const char* const arg = static_cast<const char*>(args[i]);
    copies.emplace_back(arg, arg + kernel->arg_bytes[i]);
  }
  const auto run = [name, grid, block, shared_bytes, function = kernel->run,
                    copies = std::move(copies)] {
    std::vector<std::vector<char>> mine =
        copies;  // of this run: a replay must find the arguments unchanged
    std::vector<void*> pointers;
    for (auto& arg : mine) pointers.push_back(arg.data());
    const FakeLaunch launched = {name.c_str(),
                                 {grid.x, grid.y, grid.z},
                                 {block.x, block.y, block.z},
                                 shared_bytes,
                                 pointers.data()};
    function(&launched);
  };
  return result(enqueue(stream, {stream.device, run, true}));
}

}  // namespace

// --------------------------------------------------------------------------------------- for tests

API void fake_register_kernel(const char* name, void (*run)(const FakeLaunch*), int n_args,
                              const size_t* arg_bytes) {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().host_kernels.push_back({name, run, {arg_bytes, arg_bytes + n_args}});
}

API void fake_log_clear() {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().log.clear();
}

// Valid until the next call of the runtime.
API const char* fake_log_text() { return runtime().log.c_str(); }

API void fake_set_deferred(int deferred) {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  drain();
  runtime().deferred = deferred != 0;
}

// How many launches, copies and fills have been called for and not yet run.
API size_t fake_pending() { return runtime().pending.size(); }

// A copy that no program can make: from or to a device's memory, and not written down.
API void fake_move(void* to, const void* from, size_t bytes) {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  drain();
  const DeviceAccess access(kAllDevices);
  std::memcpy(to, from, bytes);
}

// ----------------------------------------------------------------------------------------- devices

API cudaError_t cudaGetDeviceCount(int* count) {
  const Call call("cudaGetDeviceCount");
  *count = runtime().devices;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* device) {
  const Call call("cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int device) {
  const Call call("cudaSetDevice", "device=%d", device);
  if (device < 0 || device >= runtime().devices) return result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  const Call call("cudaDriverGetVersion");
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int* version) {
  const Call call("cudaRuntimeGetVersion");
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const Call call("cudaGetDeviceProperties");
  std::memset(properties, 0, sizeof *properties);
  std::strcpy(properties->name, "a GPU that is not there");
  properties->major = 9;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = size_t{8} << 30;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxGridSize[0] = 0x7fffffff;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->regsPerBlock = 65536;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Call call("cudaDeviceGetAttribute", "attribute=%d", attribute);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 << 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      *value = 1;
  }
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  const Call call("cudaDeviceGetPCIBusId");
  std::snprintf(text, length, "0000:%02x:00.0", device);
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  const Call call("cudaDeviceGetStreamPriorityRange");
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  const Call call("cudaDeviceCanAccessPeer");
  *can = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  const Call call("cudaDeviceSynchronize");
  return synchronize();
}

API cudaError_t cudaGetLastError() {
  const Call call("cudaGetLastError");
  const cudaError_t error = runtime().broken != cudaSuccess ? runtime().broken : last_error;
  last_error = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError() {
  const Call call("cudaPeekAtLastError");
  return runtime().broken != cudaSuccess ? runtime().broken : last_error;
}

// The driver's functions, which torch asks for here, are all missing.
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                 unsigned long long,
                                                 cudaDriverEntryPointQueryResult* found) {
  const Call call("cudaGetDriverEntryPointByVersion", "name=%s", name);
  *function = nullptr;
  if (found != nullptr) *found = cudaDriverEntryPointSymbolNotFound;
  return cudaErrorUnknown;
}

// ----------------------------------------------------------------------------------- memory, again

API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Call call("cudaMalloc", "bytes=%zu", bytes);
  if (const cudaError_t error = forbidden_in_capture()) return result(error);
  return result(allocate(pointer, bytes));
}

API cudaError_t cudaFree(void* pointer) {
  const Call call("cudaFree");
  if (pointer == nullptr) return cudaSuccess;
  if (const cudaError_t error = synchronize()) return error;
  return result(release(pointer));
}

API cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  const Call call("cudaMallocAsync", "bytes=%zu stream=%d", bytes, stream_of(stream).id);
  return result(allocate(pointer, bytes));
}

API cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const Call call("cudaFreeAsync", "stream=%d", stream_of(stream).id);
  drain();
  return result(release(pointer));
}

API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Call call("cudaMemGetInfo");
  *free = *total = size_t{8} << 30;
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  const Call call("cudaHostAlloc", "bytes=%zu", bytes);
  if (const cudaError_t error = forbidden_in_capture()) return result(error);
  *pointer = std::aligned_alloc(kPage, std::max(kPage, (bytes + kPage - 1) / kPage * kPage));
  std::memset(*pointer, kPoison, bytes);
  runtime().pinned[static_cast<char*>(*pointer)] = bytes;
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void* pointer) {
  const Call call("cudaFreeHost");
  drain();
  runtime().pinned.erase(static_cast<char*>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

API cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  const Call call("cudaHostRegister", "bytes=%zu", bytes);
  runtime().pinned[static_cast<char*>(pointer)] = bytes;
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void* pointer) {
  const Call call("cudaHostUnregister");
  drain();
  runtime().pinned.erase(static_cast<char*>(pointer));
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Call call("cudaPointerGetAttributes");
  std::memset(attributes, 0, sizeof *attributes);
  if (const Allocation* allocation = find_allocation(pointer)) {
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = allocation->device;
    attributes->devicePointer = const_cast<void*>(pointer);
  } else {
    attributes->type = is_pinned(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    attributes->device = is_pinned(pointer) ? current_device : -1;
    attributes->hostPointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Call call("cudaMemcpy", "kind=%s bytes=%zu", copy_kind(to, from), bytes);
  if (const cudaError_t error = synchronize()) return error;
  const cudaError_t error = copy(to, from, bytes, stream_of(nullptr));
  drain();
  return result(error);
}

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const Call call("cudaMemcpyAsync", "kind=%s bytes=%zu host=%s stream=%d captured=%d",
                  copy_kind(to, from), bytes, host_memory(to, from), stream.id,
                  stream.capture ? 1 : 0);
  return result(copy(to, from, bytes, stream));
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                    cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const Call call("cudaMemcpyPeerAsync", "kind=D2D bytes=%zu stream=%d", bytes, stream.id);
  return result(copy(to, from, bytes, stream));
}

API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                  size_t width, size_t height, cudaMemcpyKind,
                                  cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const Call call("cudaMemcpy2DAsync", "kind=%s bytes=%zu host=%s stream=%d captured=%d",
                  copy_kind(to, from), width * height, host_memory(to, from), stream.id,
                  stream.capture ? 1 : 0);
  return result(copy_rows(to, to_pitch, from, from_pitch, width, height, stream));
}

API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const Call call("cudaMemset", "bytes=%zu stream=0", bytes);
  return result(fill(to, value, bytes, stream_of(nullptr)));
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t handle) {
  Stream& stream = stream_of(handle);
  const Call call("cudaMemsetAsync", "bytes=%zu stream=%d captured=%d", bytes, stream.id,
                  stream.capture ? 1 : 0);
  return result(fill(to, value, bytes, stream));
}

// ----------------------------------------------------------------------------------------- streams

namespace {

cudaError_t create_stream(cudaStream_t* handle, unsigned flags) {
  auto& streams = runtime().streams;
  const int id = static_cast<int>(streams.size()) + 1;
  streams.push_back(
      std::make_unique<Stream>(Stream{id, current_device, flags != cudaStreamNonBlocking}));
  *handle = reinterpret_cast<cudaStream_t>(streams.back().get());
  return cudaSuccess;
}

}  // namespace

API cudaError_t cudaStreamCreate(cudaStream_t* handle) {
  const Call call("cudaStreamCreate");
  return create_stream(handle, cudaStreamDefault);
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  const Call call("cudaStreamCreateWithFlags");
  return create_stream(handle, flags);
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
  const Call call("cudaStreamCreateWithPriority");
  return create_stream(handle, flags);
}

API cudaError_t cudaStreamDestroy(cudaStream_t) {
  const Call call("cudaStreamDestroy");
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  const Call call("cudaStreamGetPriority");
  *priority = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Call call("cudaStreamSynchronize", "stream=%d", stream_of(stream).id);
  return synchronize();
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Call call("cudaStreamQuery", "stream=%d", stream_of(stream).id);
  return synchronize();
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream& stream = stream_of(handle);
  const Call call("cudaStreamWaitEvent", "stream=%d", stream.id);
  // A stream that waits for a captured one takes part in the capture.
  if (!stream.capture) stream.capture = event_of(event).capture;
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* user) {
  Stream& stream = stream_of(handle);
  const Call call("cudaLaunchHostFunc", "stream=%d", stream.id);
  return result(enqueue(stream, {kAllDevices, [=] { function(user); }, false}));
}

API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function,
                                      void* user, unsigned) {
  Stream& stream = stream_of(handle);
  const Call call("cudaStreamAddCallback", "stream=%d", stream.id);
  return result(
      enqueue(stream, {kAllDevices, [=] { function(handle, cudaSuccess, user); }, false}));
}

// ------------------------------------------------------------------------------------------ events

API cudaError_t cudaEventCreate(cudaEvent_t* handle) {
  const Call call("cudaEventCreate");
  *handle = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  const Call call("cudaEventCreateWithFlags");
  *handle = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

// Not freed: work that is pending may still record it.
API cudaError_t cudaEventDestroy(cudaEvent_t) {
  const Call call("cudaEventDestroy");
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  Stream& stream = stream_of(stream_handle);
  const Call call("cudaEventRecord", "stream=%d", stream.id);
  Event& event = event_of(handle);
  event.capture = stream.capture;
  if (stream.capture) return cudaSuccess;
  const cudaError_t error = enqueue(
      stream, {kAllDevices, [&event] { event.time = std::chrono::steady_clock::now(); }, false});
  event.recorded_after = runtime().deferred_so_far;
  return result(error);
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

API cudaError_t cudaEventQuery(cudaEvent_t) {
  const Call call("cudaEventQuery");
  return synchronize();
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Call call("cudaEventSynchronize");
  return synchronize(runtime().deferred_so_far - event_of(handle).recorded_after);
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  const Call call("cudaEventElapsedTime");
  drain();
  *milliseconds =
      std::chrono::duration<float, std::milli>(event_of(to).time - event_of(from).time).count();
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------ graphs

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const Call call("cudaThreadExchangeStreamCaptureMode");
  std::swap(*mode, thread_capture_mode);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream& stream = stream_of(handle);
  const Call call("cudaStreamBeginCapture", "stream=%d", stream.id);
  if (stream.id == 0) return result(cudaErrorStreamCaptureUnsupported);
  if (stream.capture) return result(cudaErrorIllegalState);
  stream.capture = std::make_shared<Capture>();
  stream.capture->id = ++runtime().captures_begun;
  stream.capture->mode = mode;
  runtime().captures.push_back(stream.capture);
  return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream& stream = stream_of(handle);
  const Call call("cudaStreamEndCapture", "stream=%d", stream.id);
  const std::shared_ptr<Capture> capture = stream.capture;
  *graph = nullptr;
  if (!capture) return result(cudaErrorIllegalState);
  std::erase(runtime().captures, capture);
  for (const auto& member : runtime().streams) {
    if (member->capture == capture) member->capture = nullptr;
  }
  if (capture->invalidated) return result(cudaErrorStreamCaptureInvalidated);
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{capture->nodes});
  call.note("nodes=" + std::to_string(capture->nodes.size()));
  return cudaSuccess;
}

namespace {

cudaStreamCaptureStatus capture_status(const Stream& stream) {
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->invalidated ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
}

}  // namespace

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Call call("cudaStreamIsCapturing");
  *status = capture_status(stream_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t**, const cudaGraphEdgeData**,
                                         size_t* n_dependencies) {
  const Call call("cudaStreamGetCaptureInfo");
  const Stream& stream = stream_of(handle);
  *status = capture_status(stream);
  if (id != nullptr) *id = stream.capture ? stream.capture->id : 0;
  if (graph != nullptr) *graph = nullptr;
  if (n_dependencies != nullptr) *n_dependencies = 0;
  return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  const Call call("cudaGraphGetNodes");
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                              unsigned long long) {
  const Call call("cudaGraphInstantiate");
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                     unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const Graph& graph = *reinterpret_cast<Graph*>(executable);
  Stream& stream = stream_of(handle);
  const auto kernels = std::count_if(graph.nodes.begin(), graph.nodes.end(),
                                     [](const Work& node) { return node.is_kernel; });
  const Call call("cudaGraphLaunch", "nodes=%zu kernels=%d stream=%d", graph.nodes.size(),
                  static_cast<int>(kernels), stream.id);
  for (const Work& node : graph.nodes) {
    if (const cudaError_t error = enqueue(stream, node)) return result(error);
  }
  return result(cudaSuccess);
}

API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Call call("cudaGraphDestroy");
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  const Call call("cudaGraphExecDestroy");
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

// torch ties the lifetime of random number generators to graphs; here they just live on.
API cudaError_t cudaUserObjectCreate(cudaUserObject_t*, void*, cudaHostFn_t, unsigned, unsigned) {
  const Call call("cudaUserObjectCreate");
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) {
  const Call call("cudaUserObjectRelease");
  return cudaSuccess;
}
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  const Call call("cudaGraphRetainUserObject");
  return cudaSuccess;
}

// ----------------------------------------------------------------------------------------- kernels

API cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** args,
                                 size_t shared_bytes, cudaStream_t stream) {
  return launch("cudaLaunchKernel", stub, grid, block, args, shared_bytes, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                    void** args) {
  return launch("cudaLaunchKernelExC", stub, config->gridDim, config->blockDim, args,
                config->dynamicSmemBytes, config->stream);
}

API cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void** args,
                                            size_t shared_bytes, cudaStream_t stream) {
  return launch("cudaLaunchCooperativeKernel", stub, grid, block, args, shared_bytes, stream);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  const Call call("cudaFuncGetAttributes");
  std::memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  const Call call("cudaFuncSetAttribute");
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                       int, size_t, unsigned) {
  const Call call("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  *blocks = 2;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                              int threads, size_t bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, bytes, 0);
}

// What nvcc writes into every program: kernels are registered at start-up, and kernel<<<...>>>
// becomes a pushed configuration and a call of the host stub, which pops it and launches.

API void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 0; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*,
                                uint3*, dim3*, dim3*, int*) {
  const std::lock_guard<std::recursive_mutex> lock(runtime().mutex);
  runtime().kernel_names[stub] = name;
}

namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local CallConfiguration pushed;

}  // namespace

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                         cudaStream_t stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                           void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                                   size_t shared_bytes, cudaStream_t stream) {
  return launch("cudaLaunchKernel", reinterpret_cast<const void*>(kernel), grid, block, args,
                shared_bytes, stream);
}
