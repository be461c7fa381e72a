// Memory and version counters of the tensors that the optimizer keeps for its parameters.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

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
  at::Tensor empty_like(const at::Tensor& param, at::ScalarType dtype,
                        const at::TensorImpl* sibling) {
    const c10::InferenceMode off(false);
    at::Tensor tensor = is_small(param, dtype)
                            ? in_block(param, dtype)
                            : at::empty_like(param, param.options().dtype(dtype));
    count_versions_with(sibling, tensor);
    return tensor;
  }

  // A copy, as if it had been made here; the tensor itself where that would be the same.
  at::Tensor copy_of(const at::Tensor& tensor, const at::TensorImpl* sibling) {
    if (!is_small(tensor, tensor.scalar_type())) {
      count_versions_with(sibling, tensor);
      return tensor;
    }
    return empty_like(tensor, tensor.scalar_type(), sibling).copy_(tensor);
  }

 private:
  static constexpr size_t kBlock = 1 << 16;
  static constexpr size_t kSmall = 1 << 12;
  static constexpr size_t kAlignment = 64;
  static_assert(kBlock % kAlignment == 0);

  bool is_plain(const at::TensorImpl& tensor) const { return tensor.key_set() == plain_keys_; }

  bool is_small(const at::Tensor& tensor, at::ScalarType dtype) const {
    const size_t size = tensor.numel() * c10::elementSize(dtype);
    return is_plain(*tensor.unsafeGetTensorImpl()) && size > 0 && size <= kSmall;
  }

  // As at::empty_like(), which would leave a hole on the heap where memory of its own had been.
  at::Tensor in_block(const at::Tensor& param, at::ScalarType dtype) {
    const size_t size = param.numel() * c10::elementSize(dtype);
    at::Tensor tensor = plain_empty(0, dtype);
    at::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(next_slice(size));
    storage->set_nbytes(size);
    at::TensorImpl* const impl = tensor.unsafeGetTensorImpl();
    if (param.is_non_overlapping_and_dense())
      impl->set_sizes_and_strides(param.sizes(), param.strides());
    else
      impl->set_sizes_and_strides(param.sizes(),
                                  at::infer_dense_strides(param.sizes(), param.strides()));
    return tensor;
  }

  // Where a mode of torch's would make a tensor of another kind, too.
  static at::Tensor plain_empty(int64_t numel, at::ScalarType dtype) {
    return at::detail::empty_cpu({numel}, dtype);
  }

  void count_versions_with(const at::TensorImpl* sibling, const at::Tensor& tensor) const {
    if (sibling == nullptr || !is_plain(*sibling) || !is_plain(*tensor.unsafeGetTensorImpl()))
      return;
    tensor.unsafeGetTensorImpl()->set_version_counter(sibling->version_counter());
  }

  at::DataPtr next_slice(size_t size) {
    if (!block_.defined() || used_ + size > kBlock) {
      block_ = plain_empty(kBlock, at::kByte);
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
