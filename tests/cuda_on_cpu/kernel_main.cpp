// Runs the kernel under the shim: kernel_main CASE RESULT. What the two files hold is written down
// in kernel_cases.py.
#include <fstream>
#include <iostream>

#include "cuda_shim.h"
// After it: the header needs CUDA's words.
#if defined(KERNEL_HEADER)
// For a changed copy of the kernel: whether the environment asks for this bug.
inline bool planted(const char* bug) {
  static const char* const wanted = std::getenv("PLANTED_BUG");
  return wanted != nullptr && std::strcmp(wanted, bug) == 0;
}
#include KERNEL_HEADER
#else
#include "cuda/fused_step.cuh"
#endif

namespace {

using namespace sgdr;

class Reader {
 public:
  explicit Reader(const char* path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit | std::ios::eofbit);
  }
  void bytes(void* to, size_t count) {
    if (count != 0) file_.read(static_cast<char*>(to), static_cast<std::streamsize>(count));
  }
  template <class T>
  T get() {
    T value;
    bytes(&value, sizeof value);
    return value;
  }
  bool flag() { return get<uint8_t>() != 0; }

 private:
  std::ifstream file_;
};

// Device memory to the byte, so that AddressSanitizer sees the first one too many; `offset` bytes
// off a multiple of 256.
class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, size_t offset)
      : room_(static_cast<char*>(std::aligned_alloc(256, (offset + bytes + 255) / 256 * 256))),
        begin_(static_cast<char*>(room_.get()) + offset),
        bytes_(bytes) {
    std::memset(begin_, 0xFF, bytes);
#if defined(__SANITIZE_ADDRESS__)
    const size_t whole = (offset + bytes + 255) / 256 * 256;
    __asan_poison_memory_region(room_.get(), offset / 8 * 8);
    __asan_poison_memory_region(begin_ + bytes, whole - offset - bytes);
#endif
  }
  char* begin() const { return begin_; }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> room_;
  char* begin_;
  size_t bytes_;
};

struct Tensor {
  uint32_t group, param_index, numel;
  ElementType types[3];
  DeviceMemory param, grad, momentum_buffer;
};

Tensor read_tensor(Reader& in) {
  const auto group = in.get<uint32_t>(), param_index = in.get<uint32_t>(),
             numel = in.get<uint32_t>();
  ElementType types[3];
  uint8_t offsets[3];
  in.bytes(types, 3);
  in.bytes(offsets, 3);
  const auto memory = [&](int i) {
    return DeviceMemory(numel * element_size(types[i]), offsets[i]);
  };
  Tensor tensor{group,     param_index, numel,    {types[0], types[1], types[2]},
                memory(0), memory(1),   memory(2)};
  in.bytes(tensor.param.begin(), tensor.param.bytes());
  if (in.flag()) in.bytes(tensor.momentum_buffer.begin(), tensor.momentum_buffer.bytes());
  return tensor;
}

LaunchGroup read_group(Reader& in) {
  LaunchGroup group{};
  in.bytes(&group.schedule, sizeof group.schedule);
  group.momentum = in.get<double>();
  group.dampening = in.get<double>();
  group.weight_decay = in.get<double>();
  group.decay = in.get<WeightDecay>();
  group.lr_source = in.get<LrSource>();
  group.has_momentum = group.momentum != 0;
  group.nesterov = in.flag();
  group.maximize = in.flag();
  group.reset_momentum = in.flag();
  return group;
}

void run(Reader& in, std::ostream& out) {
  const auto write = [&out](const void* from, size_t count) {
    out.write(static_cast<const char*>(from), static_cast<std::streamsize>(count));
  };
  shim::config.seed = in.get<uint32_t>();
  const auto multiprocessors = in.get<uint32_t>(), threads = in.get<uint32_t>();
  std::vector<GroupState> states(in.get<uint32_t>());
  std::vector<std::vector<uint8_t>> flags(states.size());
  for (size_t i = 0; i < states.size(); ++i) {
    in.bytes(&states[i], sizeof states[i]);
    flags[i].resize(in.get<uint32_t>());
    in.bytes(flags[i].data(), flags[i].size());
  }
  std::vector<Tensor> tensors;
  const auto tensor_count = in.get<uint32_t>();
  for (uint32_t i = 0; i < tensor_count; ++i) tensors.push_back(read_tensor(in));

  uint32_t ticket = 0;
  LaunchArgs args;
  const auto step_count = in.get<uint32_t>();
  for (uint32_t step = 0; step < step_count; ++step) {
    const bool has_grad_scale = in.flag();
    const auto grad_scale = in.get<float>();
    const bool has_found_inf = in.flag();
    const auto found_inf = in.get<float>();
    std::vector<LaunchGroup> groups;
    for (size_t i = 0; i < states.size(); ++i) {
      groups.push_back(read_group(in));
      groups[i].state = &states[i];
      groups[i].first_step = flags[i].data();
      groups[i].param_count = static_cast<uint32_t>(flags[i].size());
      if (const bool is_set = in.flag(); is_set) states[i].lr = in.get<double>();
    }
    std::vector<TensorEntry> entries;
    std::vector<uint32_t> param_indices;
    for (Tensor& tensor : tensors) {
      if (!in.flag()) continue;
      in.bytes(tensor.grad.begin(), tensor.grad.bytes());
      const bool momentum = groups[tensor.group].has_momentum;
      entries.push_back({.param = tensor.param.begin(),
                         .grad = tensor.grad.begin(),
                         .momentum_buffer = momentum ? tensor.momentum_buffer.begin() : nullptr,
                         .numel = tensor.numel,
                         .group = tensor.group,
                         .param_type = tensor.types[0],
                         .grad_type = tensor.types[1],
                         .momentum_type = tensor.types[2],
                         .first_step = false});
      param_indices.push_back(tensor.param_index);
    }

    uint32_t launches = 0;
    args.grad_scale = has_grad_scale ? &grad_scale : nullptr;
    args.found_inf = has_found_inf ? &found_inf : nullptr;
    args.ticket = &ticket;
    for_each_launch(args, groups, entries, param_indices, [&](const LaunchArgs& filled) {
      ++launches;
      shim::launch(&fused_step_kernel, block_count(filled, multiprocessors), threads, 0, filled);
    });

    write(&launches, sizeof launches);
    write(&ticket, sizeof ticket);
    for (size_t i = 0; i < states.size(); ++i) {
      write(&states[i], sizeof states[i]);
      write(flags[i].data(), flags[i].size());
    }
    for (const Tensor& tensor : tensors) {
      write(tensor.param.begin(), tensor.param.bytes());
      write(tensor.momentum_buffer.begin(), tensor.momentum_buffer.bytes());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  Reader in(argv[1]);
  std::ofstream out(argv[2], std::ios::binary);
  try {
    run(in, out);
  } catch (const std::exception& error) {
    std::cout << error.what() << '\n';
    return 1;
  }
  return out.flush() ? 0 : 2;
}
