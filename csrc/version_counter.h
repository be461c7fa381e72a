// What autograd goes by to notice that a tensor was written after it was saved.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <new>

namespace sgdr {

// A tensor's count of its versions, borrowed. Tensors that count together, as views do, have the
// same one.
class VersionCounter {
 public:
  explicit VersionCounter(const at::TensorImpl& tensor) {
    std::memcpy(&counter_, &tensor.version_counter(), sizeof(counter_));
  }

  bool operator==(const VersionCounter&) const = default;

  void prefetch() const { __builtin_prefetch(counter_, 1); }

  void bump() const {
    // torch has no name for the counter itself, and a copy of its handle would count its owners. So
    // this relies on the handle being a pointer and nothing else.
    static_assert(sizeof(c10::VariableVersion) == sizeof(counter_));
    alignas(c10::VariableVersion) unsigned char handle[sizeof(counter_)];
    std::memcpy(handle, &counter_, sizeof(counter_));
    std::launder(reinterpret_cast<c10::VariableVersion*>(handle))->bump();
  }

 private:
  void* counter_;
};

}  // namespace sgdr
