// Memory and version counter of the tensors that the optimizer keeps for its parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <cstring>

#include "tensor_kinds.h"

namespace sgdr {

// Note [State side by side]
// Where tensors are small, a step's time is that of the cache lines it touches. So small tensors of
// the state lie side by side in blocks of memory, with one storage a block, and all tensors of the
// state that the optimizer makes count their versions together, as views of one tensor do. A block
// lives as long as any tensor in it.
class StateMemory {
 public:
  // Of the parameter's shape and order of elements, without content.
  at::Tensor empty_like(const at::Tensor& param, at::ScalarType dtype) {
    const c10::InferenceMode off(false);
    at::Tensor tensor = at::empty_like(param, param.options().dtype(dtype));
    if (tensor.unsafeGetTensorImpl()->key_set() == plain_keys_ && is_small(tensor)) {
      const auto size = static_cast<int64_t>(tensor.nbytes());
      if (!block_.defined() || used_ + size > kBlock) {
        block_ = at::empty({kBlock}, at::kByte);
        used_ = 0;
      }
      tensor.set_(block_.storage(), used_ / static_cast<int64_t>(tensor.itemsize()), tensor.sizes(),
                  tensor.strides());
      used_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    }
    tensor.unsafeGetTensorImpl()->set_version_counter(version_);
    return tensor;
  }

  // The tensor, or a copy of it, as if it had been made here; of a subclass, a shard for one, and
  // on a GPU it is left as it is.
  at::Tensor keep(const at::Tensor& tensor) {
    if (tensor.unsafeGetTensorImpl()->key_set() != plain_keys_) return tensor;
    if (!is_small(tensor)) {
      tensor.unsafeGetTensorImpl()->set_version_counter(version_);
      return tensor;
    }
    return empty_like(tensor, tensor.scalar_type()).copy_(tensor);
  }

  // Whether bump_version() counts for the tensor.
  bool counts_for(const at::TensorImpl& tensor) const {
    // A handle of a counter is a pointer to it, and has no operator==.
    static_assert(sizeof(version_) == sizeof(void*));
    return std::memcmp(&tensor.version_counter(), &version_, sizeof(version_)) == 0;
  }

  void bump_version() { version_.bump(); }

 private:
  static constexpr int64_t kBlock = 1 << 16;
  static constexpr int64_t kSmall = 1 << 12;
  static constexpr int64_t kAlignment = 64;
  static_assert(kBlock % kAlignment == 0);

  static bool is_small(const at::Tensor& tensor) {
    return tensor.numel() > 0 && static_cast<int64_t>(tensor.nbytes()) <= kSmall;
  }

  c10::DispatchKeySet plain_keys_ = plain_keys();
  at::Tensor block_;
  int64_t used_ = 0;
  c10::VariableVersion version_{0};
};

}  // namespace sgdr
