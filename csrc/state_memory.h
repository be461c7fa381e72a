// Memory and version counters of the tensors that the optimizer keeps for its parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <cstring>

#include "tensor_kinds.h"

namespace sgdr {

// Note [State side by side]
// Where tensors are small, a step's time is that of the cache lines it touches. So the memory of
// small tensors of the state lies side by side, in blocks that live as long as any tensor in them.
// And the tensors of one parameter's state count their versions together, as views of one tensor
// do: a step writes them together.
class StateMemory {
 public:
  // Of the parameter's shape and order of elements, without content. Counts its versions with
  // another tensor of the parameter's state, where there is one.
  at::Tensor empty_like(const at::Tensor& param, at::ScalarType dtype, const at::Tensor* sibling) {
    const c10::InferenceMode off(false);
    at::Tensor tensor = at::empty_like(param, param.options().dtype(dtype));
    if (is_small(tensor)) tensor.storage().set_data_ptr_noswap(next_slice(tensor.nbytes()));
    count_versions_with(sibling, tensor);
    return tensor;
  }

  // A copy, as if it had been made here; the tensor itself where that would be the same.
  at::Tensor copy_of(const at::Tensor& tensor, const at::Tensor* sibling) {
    if (!is_small(tensor)) {
      count_versions_with(sibling, tensor);
      return tensor;
    }
    return empty_like(tensor, tensor.scalar_type(), sibling).copy_(tensor);
  }

  static bool count_versions_together(const at::TensorImpl& a, const at::TensorImpl& b) {
    // A handle of a counter is a pointer to it, and has no operator==.
    static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
    return std::memcmp(&a.version_counter(), &b.version_counter(), sizeof(void*)) == 0;
  }

 private:
  static constexpr size_t kBlock = 1 << 16;
  static constexpr size_t kSmall = 1 << 12;
  static constexpr size_t kAlignment = 64;
  static_assert(kBlock % kAlignment == 0);

  bool is_plain(const at::Tensor& tensor) const {
    return tensor.unsafeGetTensorImpl()->key_set() == plain_keys_;
  }

  bool is_small(const at::Tensor& tensor) const {
    return is_plain(tensor) && tensor.numel() > 0 && tensor.nbytes() <= kSmall;
  }

  void count_versions_with(const at::Tensor* sibling, const at::Tensor& tensor) const {
    if (sibling == nullptr || !is_plain(*sibling) || !is_plain(tensor)) return;
    tensor.unsafeGetTensorImpl()->set_version_counter(
        sibling->unsafeGetTensorImpl()->version_counter());
  }

  at::DataPtr next_slice(size_t size) {
    if (!block_.defined() || used_ + size > kBlock) {
      block_ = at::empty({kBlock}, at::kByte);
      used_ = 0;
    }
    char* const slice = static_cast<char*>(block_.mutable_data_ptr()) + used_;
    used_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return {slice, c10::Storage(block_.storage()).unsafeReleaseStorageImpl(), &release, at::kCPU};
  }

  static void release(void* block) {
    c10::intrusive_ptr<c10::StorageImpl>::reclaim(static_cast<c10::StorageImpl*>(block));
  }

  c10::DispatchKeySet plain_keys_ = plain_keys();
  at::Tensor block_;
  size_t used_ = 0;
};

}  // namespace sgdr
