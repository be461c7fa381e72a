// What a tensor is to a kernel: an element type, a layout, an address.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/COWDeleter.h>
#include <torch/csrc/autograd/variable.h>

#include <array>

#include "tensor_list.h"

namespace sgdr {

[[gnu::always_inline]] inline ElementType element_type(const at::TensorImpl& tensor) {
  static constexpr auto kTypes = [] {
    std::array<ElementType, static_cast<size_t>(at::ScalarType::NumOptions)> types{};
    types.fill(ElementType::kNone);
    types[static_cast<size_t>(at::kFloat)] = ElementType::kFloat;
    types[static_cast<size_t>(at::kDouble)] = ElementType::kDouble;
    types[static_cast<size_t>(at::kHalf)] = ElementType::kHalf;
    types[static_cast<size_t>(at::kBFloat16)] = ElementType::kBFloat16;
    return types;
  }();
  return kTypes[static_cast<size_t>(c10::typeMetaToScalarType(tensor.dtype()))];
}

// What an ordinary dense CPU tensor has for keys: no subclass, no lazy conjugation or negation.
inline c10::DispatchKeySet plain_keys() {
  const c10::InferenceMode off(false);
  return at::empty({0}).unsafeGetTensorImpl()->key_set();
}

[[gnu::always_inline]] inline bool is_equal(at::IntArrayRef a, at::IntArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

// A hash of a tensor's sizes and a number.
[[gnu::always_inline]] inline uint64_t fingerprint(const at::TensorImpl& tensor, uint32_t number) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  uint64_t print = (number + 1) * kOdd;
  for (const int64_t size : tensor.sizes())
    print = (print + static_cast<uint64_t>(size) + 1) * kOdd;
  return print;
}

// How a tensor's elements lie in memory.
class Layout {
 public:
  explicit Layout(const at::TensorImpl& tensor)
      : tensor_(tensor), sizes_(tensor.sizes()), is_contiguous_(tensor.is_contiguous()) {}

  // Whether the other tensor has the same elements in the same order of memory, without gaps.
  [[gnu::always_inline]] bool is_of(const at::TensorImpl& other) const {
    if (!is_equal(sizes_, other.sizes())) return false;
    return is_contiguous_ ? other.is_contiguous() : has_strides_of(other);
  }

  // The same of one that had the same sizes when it was looked up: most often without the cache
  // line that they lie on.
  [[gnu::always_inline]] bool is_still_of(const at::TensorImpl& other) const {
    if (is_contiguous_) return other.is_contiguous() && other.numel() == tensor_.numel();
    return is_equal(sizes_, other.sizes()) && has_strides_of(other);
  }

 private:
  bool has_strides_of(const at::TensorImpl& other) const {
    return tensor_.is_non_overlapping_and_dense() && is_equal(tensor_.strides(), other.strides());
  }

  const at::TensorImpl& tensor_;
  at::IntArrayRef sizes_;
  bool is_contiguous_;
};

// The same elements in the order in which another tensor of that shape has them.
inline at::Tensor copy_in_layout_of(const at::Tensor& tensor, const at::Tensor& other) {
  at::Tensor copy = at::empty_like(other, other.options().dtype(tensor.scalar_type()));
  copy.copy_(tensor);
  return copy;
}

// Null: none.
[[gnu::always_inline]] inline at::TensorImpl* grad_of(const at::TensorImpl& param) {
  // Not Tensor::grad(), which spends longer on a warning than we on the tensor.
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(param.autograd_meta());
  if (meta == nullptr || !meta->grad_.defined()) return nullptr;
  return meta->grad_.unsafeGetTensorImpl();
}

// Of a plain tensor, that is: it has a storage, and its type is known.
[[gnu::always_inline]] inline char* data_of(const at::TensorImpl& tensor, bool is_written,
                                            size_t element_size) {
  at::StorageImpl* storage = tensor.unsafe_storage().unsafeGetStorageImpl();
  const at::DataPtr& pointer = storage->_mutable_data_ptr_no_checks();
  const void* data = pointer.get();
  // On the CPU what mutable_data() does, without the flags of the storage, which lie on another
  // cache line. On a GPU they say, too, whether a graph has taken the memory back.
  const bool is_lazy_copy = pointer.get_deleter() == &c10::impl::cow::cow_deleter;
  if (is_lazy_copy || !pointer.device().is_cpu())
    data = is_written ? storage->mutable_data() : storage->data();
  return static_cast<char*>(const_cast<void*>(data)) +
         tensor.storage_offset() * static_cast<int64_t>(element_size);
}

}  // namespace sgdr
