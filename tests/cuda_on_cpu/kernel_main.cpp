// Runs the kernels under the shim: kernel_main CASE RESULT. What the two files hold is written down
// in kernel_cases.py.
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>

#include "cuda_shim.h"
// After it: the headers need CUDA's words.
#if defined(KERNELS_HEADER)
// For changed copies of the kernels: whether the environment asks for this bug.
inline bool planted(const char* bug) {
  static const char* const wanted = std::getenv("PLANTED_BUG");
  return wanted != nullptr && std::strcmp(wanted, bug) == 0;
}
#include KERNELS_HEADER
#else
#include "cuda/fused_step.cuh"
#include "cuda/grad_norm.cuh"
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

// A parameter with its gradient and its state: memory of 0 bytes for what it does not have.
struct Tensor {
  uint32_t group, param_index, numel;
  enum Role { kParam, kGrad, kMomentumBuffer, kEma, kMaster, kRoles };
  ElementType types[kRoles];
  std::vector<DeviceMemory> memory;

  TensorEntry entry(const LaunchGroup& of_group) const {
    const auto at = [this](Role role, bool is_used) {
      return is_used && types[role] != ElementType::kNone ? memory[role].begin() : nullptr;
    };
    const bool has_master = types[kMaster] != ElementType::kNone;
    const Role trained = has_master ? kMaster : kParam;
    return {
        .param = memory[trained].begin(),
        .grad = memory[kGrad].begin(),
        .momentum_buffer = at(kMomentumBuffer, of_group.options.has_momentum()),
        .ema = at(kEma, of_group.options.averaging != Averaging::kNone),
        .low_precision_param = at(kParam, has_master),
        .numel = numel,
        .group = group,
        .param_index = of_group.first_param + param_index,
        .param_type = types[trained],
        .grad_type = types[kGrad],
        .momentum_type = of_group.options.has_momentum() ? types[kMomentumBuffer] : types[trained],
        .low_precision_type = has_master ? types[kParam] : ElementType::kNone};
  }
};

Tensor read_tensor(Reader& in) {
  Tensor tensor{};
  tensor.group = in.get<uint32_t>();
  tensor.param_index = in.get<uint32_t>();
  tensor.numel = in.get<uint32_t>();
  uint8_t offsets[Tensor::kRoles];
  in.bytes(tensor.types, sizeof tensor.types);
  in.bytes(offsets, sizeof offsets);
  for (int role = 0; role < Tensor::kRoles; ++role) {
    const size_t bytes = tensor.numel * element_size(tensor.types[role]);
    const DeviceMemory& memory = tensor.memory.emplace_back(bytes, offsets[role]);
    if (role != Tensor::kGrad && in.flag()) in.bytes(memory.begin(), bytes);
  }
  return tensor;
}

LaunchGroup read_group(Reader& in) {
  LaunchGroup group{};
  GroupOptions& options = group.options;
  in.bytes(&options.schedule, sizeof options.schedule);
  options.momentum = in.get<double>();
  options.dampening = in.get<double>();
  options.weight_decay = in.get<double>();
  options.ema_decay = in.get<double>();
  options.seed = in.get<uint64_t>();
  options.decay = in.get<WeightDecay>();
  options.direction = in.get<Direction>();
  group.lr_source = in.get<LrSource>();
  options.averaging = in.get<Averaging>();
  options.maximize = in.flag();
  options.reset_momentum = in.flag();
  options.rounds_param = in.flag();
  options.rounds_momentum = in.flag();
  return group;
}

void run(Reader& in, std::ostream& out) {
  const auto write = [&out](const void* from, size_t count) {
    out.write(static_cast<const char*>(from), static_cast<std::streamsize>(count));
  };
  shim::config.seed = in.get<uint32_t>();
  const auto threads = in.get<uint32_t>();
  std::vector<GroupMemory> memories(in.get<uint32_t>());
  std::vector<std::vector<ParamState>> params(memories.size());
  for (size_t i = 0; i < memories.size(); ++i) {
    in.bytes(&memories[i].state, sizeof(GroupState));
    params[i].resize(in.get<uint32_t>());
    in.bytes(params[i].data(), params[i].size() * sizeof(ParamState));
  }
  std::vector<Tensor> tensors;
  const auto tensor_count = in.get<uint32_t>();
  for (uint32_t i = 0; i < tensor_count; ++i) tensors.push_back(read_tensor(in));

  uint32_t ticket = 0;
  const auto step_count = in.get<uint32_t>();
  for (uint32_t step = 0; step < step_count; ++step) {
    const bool has_grad_scale = in.flag();
    const auto grad_scale = in.get<float>();
    const bool has_found_inf = in.flag();
    const auto found_inf = in.get<float>();
    const bool needs_norm = in.flag();
    const auto max_grad_norm = in.get<double>();
    const bool skip_nonfinite = in.flag();
    std::vector<LaunchGroup> groups;
    uint32_t first_param = 0;
    for (size_t i = 0; i < memories.size(); ++i) {
      groups.push_back(read_group(in));
      groups[i].memory = &memories[i];
      groups[i].params = params[i].data();
      groups[i].param_count = static_cast<uint32_t>(params[i].size());
      groups[i].first_param = first_param;
      groups[i].advances = true;
      first_param += groups[i].param_count;
      if (const bool is_set = in.flag(); is_set) memories[i].state.lr = in.get<double>();
    }
    std::vector<TensorEntry> entries;
    for (const Tensor& tensor : tensors) {
      if (!in.flag()) continue;
      const DeviceMemory& grad = tensor.memory[Tensor::kGrad];
      in.bytes(grad.begin(), grad.bytes());
      LaunchGroup& group = groups[tensor.group];
      group.options.master_weights |= tensor.types[Tensor::kMaster] != ElementType::kNone;
      entries.push_back(tensor.entry(group));
    }

    uint32_t norm_launches = 0, launches = 0;
    const DeviceMemory grad_norm(sizeof(cuda::GradNorm), 0);
    auto* const norm = reinterpret_cast<cuda::GradNorm*>(grad_norm.begin());
    if (needs_norm) {
      const auto chunks = static_cast<size_t>(count_ranges(entries, kNormChunk));
      const DeviceMemory chunk_sums(chunks * sizeof(double), 8);
      FilledNormLaunch args;
      const cuda::NormStep of_step = {.tensors = entries,
                                      .chunk_sums = reinterpret_cast<double*>(chunk_sums.begin()),
                                      .result = norm,
                                      .ticket = &ticket,
                                      .grad_scale = has_grad_scale ? &grad_scale : nullptr,
                                      .max_grad_norm = max_grad_norm};
      for_each_norm_launch(args, of_step, [&](const FilledNormLaunch& filled) {
        ++norm_launches;
        with_norm_args_type(filled, [&]<class Args>(std::type_identity<Args>) {
          shim::launch(&grad_norm_kernel<Args>, block_count(filled, threads), threads, 0,
                       reinterpret_cast<const Args&>(filled));
        });
      });
    }
    FilledLaunch args;
    args.grad_scale = has_grad_scale ? &grad_scale : nullptr;
    args.found_inf = has_found_inf ? &found_inf : nullptr;
    args.grad_norm = needs_norm ? norm : nullptr;
    args.skip_nonfinite = skip_nonfinite;
    args.ticket = &ticket;
    for_each_launch(args, groups, entries, [&](const FilledLaunch& filled) {
      ++launches;
      with_args_type(filled, [&]<class Args>(std::type_identity<Args>) {
        shim::launch(&fused_step_kernel<Args>, filled.block_count(), threads, 0,
                     reinterpret_cast<const Args&>(filled));
      });
    });

    write(&norm_launches, sizeof norm_launches);
    write(&launches, sizeof launches);
    write(&ticket, sizeof ticket);
    if (needs_norm) {
      double value = norm->norm;
      if (value != value) value = std::numeric_limits<double>::quiet_NaN();  // there are others
      write(&value, sizeof value);
    }
    for (size_t i = 0; i < memories.size(); ++i) {
      write(&memories[i].state, sizeof(GroupState));
      write(params[i].data(), params[i].size() * sizeof(ParamState));
    }
    for (const Tensor& tensor : tensors) {
      for (int role = 0; role < Tensor::kRoles; ++role) {
        if (role != Tensor::kGrad) write(tensor.memory[role].begin(), tensor.memory[role].bytes());
      }
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
