// What a step adds to optimizer.state.
#pragma once

#include <ATen/core/Tensor.h>

#include <deque>
#include <vector>

#include "group_on_gpu.h"
#include "state.h"

namespace sgdr {

// What a step puts into optimizer.state once it has been taken.
class NewState {
 public:
  // Makes a tensor of the parameter's shape and strides, without content. `on_gpu` is null for a
  // group on the host; `index` is the parameter's index in its group. The reference stays valid.
  const at::Tensor& make(PyObject* param, Role role, at::ScalarType dtype, GroupOnGpu* on_gpu,
                         size_t index);

  void set_n_averaged(PyObject* param, int64_t n_averaged) {
    averaged_.push_back({param, n_averaged});
  }

  void store(const py::dict& state) const;

  void clear() {
    tensors_.clear();
    averaged_.clear();
  }

 private:
  struct NewTensor {
    PyObject* param;
    Role role;
    at::Tensor tensor;
    GroupOnGpu* on_gpu;  // null for a group on the host
    size_t index;
  };
  struct Averaged {
    PyObject* param;
    int64_t n_averaged;
  };

  std::deque<NewTensor> tensors_;  // its elements do not move
  std::vector<Averaged> averaged_;
};

}  // namespace sgdr
