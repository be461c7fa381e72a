// The only door to torch's internals: what has no name in torch's public C++ API. Each use has a
// test that fails if torch changes what it relies on.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/Tensor.h>
#include <c10/core/InferenceMode.h>

#include <array>

#include "../step_types.h"

namespace sgdr {

// The .grad of a tensor, which may be undefined. Tensor::grad() also checks whether to warn, which
// takes longer than all other reads.
// tests/test_params_come_and_go.py
SGDR_INLINE const at::Tensor& grad_of(const at::Tensor& param) {
  return param.unsafeGetTensorImpl()->grad();
}

// Tells autograd that a tensor was written through its address. Tensors made in inference mode have
// no version.
// tests/test_state_tensors.py, test_hooks_and_closure.py
SGDR_INLINE void bump_version(const at::Tensor& tensor) {
  if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
}

SGDR_INLINE at::StorageImpl& storage_of(const at::Tensor& tensor) {
  return *tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
}

// The address of a plain tensor's elements, as Tensor::mutable_data_ptr() and const_data_ptr() give
// it. They also check what a plain tensor has. tests/test_layouts.py
SGDR_INLINE void* address_of(const at::Tensor& tensor) {
  const auto offset = static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize();
  auto* const memory = static_cast<char*>(storage_of(tensor).mutable_data());
  return tensor.numel() == 0 ? nullptr : memory + offset;
}

SGDR_INLINE const void* const_address_of(const at::Tensor& tensor) {
  const auto offset = static_cast<size_t>(tensor.storage_offset()) * tensor.itemsize();
  const auto* const memory = static_cast<const char*>(storage_of(tensor).data());
  return tensor.numel() == 0 ? nullptr : memory + offset;
}

// Addresses of a tensor's metadata that an earlier step has read. They are only prefetched, never
// dereferenced, so a stale one is harmless.
class MetadataHint {
 public:
  MetadataHint() = default;
  explicit MetadataHint(const at::Tensor& tensor)
      : tensor_(tensor.unsafeGetTensorImpl()), storage_(&storage_of(tensor)) {}

  SGDR_INLINE void prefetch() const {
    constexpr size_t kCacheLine = 64;
    for (size_t byte = 0; byte < sizeof(at::TensorImpl); byte += kCacheLine)
      __builtin_prefetch(static_cast<const char*>(tensor_) + byte);
    __builtin_prefetch(storage_);
  }

 private:
  const void* tensor_ = nullptr;
  const void* storage_ = nullptr;
};

// A tensor that may be gone. An address alone could be that of a later tensor, too.
// tests/cuda_on_cpu/test_path.py
class WeakTensor {
 public:
  // Null: no tensor.
  explicit WeakTensor(const at::Tensor* tensor)
      : tensor_(tensor == nullptr ? at::Tensor().getIntrusivePtr() : tensor->getIntrusivePtr()) {}

  bool is(const at::Tensor* tensor) const {
    const at::Tensor none;
    return tensor_._unsafe_get_target() ==
           (tensor == nullptr ? none : *tensor).unsafeGetTensorImpl();
  }

 private:
  c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> tensor_;
};

// Whether Python code decides what operations on the tensor mean, as for DTensor.
// tests/distributed/test_fsdp2.py
SGDR_INLINE bool is_subclass(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->is_python_dispatch();
}

// The dispatch keys of an ordinary dense CPU tensor: no subclass, no lazy conjugation or negation,
// not made in inference mode.
// tests/test_layouts.py with backend="native"
inline c10::DispatchKeySet plain_host_keys() {
  const c10::InferenceMode off(false);
  return at::empty({0}).key_set();
}

SGDR_INLINE ElementType element_type(at::ScalarType dtype) {
  static constexpr auto kTypes = [] {
    std::array<ElementType, static_cast<size_t>(at::ScalarType::NumOptions)> types{};
    types.fill(ElementType::kNone);
    types[static_cast<size_t>(at::kFloat)] = ElementType::kFloat;
    types[static_cast<size_t>(at::kDouble)] = ElementType::kDouble;
    types[static_cast<size_t>(at::kHalf)] = ElementType::kHalf;
    types[static_cast<size_t>(at::kBFloat16)] = ElementType::kBFloat16;
    return types;
  }();
  return kTypes[static_cast<size_t>(dtype)];
}

SGDR_INLINE ElementType element_type(const at::Tensor& tensor) {
  return element_type(tensor.scalar_type());
}

inline at::ScalarType scalar_type(ElementType type) {
  switch (type) {
    case ElementType::kFloat:
      return at::kFloat;
    case ElementType::kDouble:
      return at::kDouble;
    case ElementType::kHalf:
      return at::kHalf;
    case ElementType::kBFloat16:
      return at::kBFloat16;
    case ElementType::kNone:
      break;
  }
  return at::ScalarType::Undefined;
}

}  // namespace sgdr
