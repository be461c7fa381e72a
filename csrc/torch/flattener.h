// Brings tensors to the form that the backends take, and back: for the optimizer's step and for the
// registered op.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <array>
#include <deque>
#include <functional>
#include <vector>

#include "../step_types.h"
#include "internals.h"

namespace sgdr {

// The tensors of one parameter in a step; null for one that it does not have. They belong to Python
// objects, to a parameter's .grad or to NewState, and stay valid as long as the GIL is held and no
// Python code runs; Flattener::own() makes them its own.
struct ParamTensors {
  const at::Tensor* param;  // the master copy, if there is one
  const at::Tensor* grad;
  const at::Tensor* momentum_buffer = nullptr;
  const at::Tensor* ema = nullptr;
  const at::Tensor* low_precision_param = nullptr;  // the parameter, if `param` is its master copy
};

// Flattens the tensors of one step on one device. Shards, complex numbers and unlike strides become
// flat memory: by a view, or else by a copy that finish() writes back.
class Flattener {
 public:
  // The plain tensor behind a subclass, or an undefined one if the subclass is not known.
  using LocalTensor = std::function<at::Tensor(const at::Tensor& tensor, const at::Tensor& param)>;

  // `plain_keys` are the dispatch keys of an ordinary dense tensor on the device.
  Flattener(c10::Device device, c10::DispatchKeySet plain_keys, LocalTensor local_tensor)
      : device_(device), plain_keys_(plain_keys), local_tensor_(std::move(local_tensor)) {}

  // Fills in the entry's addresses, types and numel. False if one of the tensors is of a kind that
  // no backend takes.
  bool flatten(const ParamTensors& tensors, TensorEntry& entry);

  // Keeps the step's tensors and their memory alive until clear(): from here on their other owners
  // may drop them, because the GIL is released or Python code runs.
  void own();

  // Whether a copy that finish() would write back is of memory that another parameter's tensor has,
  // too: one of the two updates would be lost.
  bool copies_shared_memory() const;

  // After the backend has run: writes copies back, and bumps the versions of what was written.
  void finish();

  // Forgets the step's tensors.
  void clear();

 private:
  void prefetch_ahead() const;
  bool flatten_plain(const ParamTensors& tensors, TensorEntry& entry);
  bool flatten_unusual(ParamTensors tensors, TensorEntry& entry);
  bool is_plain(const at::Tensor& tensor) const;
  const at::Tensor* own(const at::Tensor* tensor);
  void own(ParamTensors& tensors);
  const at::Tensor* to_plain(const at::Tensor& tensor, const at::Tensor& param, bool is_written);
  const at::Tensor* to_layout_of(const at::Tensor& tensor, const at::Tensor& other,
                                 bool is_written);

  struct Copy {
    const at::Tensor* copy;
    const at::Tensor* original;
  };

  c10::Device device_;
  c10::DispatchKeySet plain_keys_;
  LocalTensor local_tensor_;
  std::vector<ParamTensors> flattened_;
  std::vector<std::array<MetadataHint, 3>> hints_;  // by position in the step
  std::vector<at::Tensor> written_subclasses_;
  std::vector<Copy> copies_;
  std::deque<at::Tensor> kept_alive_;  // its elements do not move
  std::vector<c10::Storage> kept_storages_;
  bool owns_ = false;
};

}  // namespace sgdr
