// One optimizer's step: reads param_groups and state, runs a backend, writes the schedule back.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "dict_snapshot.h"
#include "fused_step.h"

namespace sgdr {

class Stepper {
 public:
  // sync_group(param_group, lr_before) checks a group whose items changed, and brings its lr up to
  // date. local_tensor(tensor, param) gives the plain tensor behind a tensor subclass, or None.
  Stepper(py::function sync_group, py::function local_tensor);

  // Takes over what has changed in the groups since they were last seen.
  void sync(const py::list& param_groups);

  // Returns false, having written nothing, where a tensor is of a kind that no native backend
  // takes.
  bool step(const py::list& param_groups, const py::dict& state, double grad_scale);

 private:
  // A param group as of its last step.
  struct Group {
    DictSnapshot items;
    size_t lr_index = 0, step_index = 0, cycle_index = 0, T_cur_index = 0, T_i_index = 0,
           params_index = 0;
    Schedule schedule{};
    Position position{};
    GroupStep update{};
    bool maximize = false;
    bool reset_momentum = false;

    PyObject* params() const { return items.value(params_index).ptr(); }
  };
  // A parameter and its dict in state, borrowed: the snapshots own them.
  struct Slot {
    PyObject* param;
    PyObject* state;
    // What the last step read for it. A hint: prefetched, never followed.
    std::array<const at::TensorImpl*, 3> tensors;
    std::array<const void*, 4> others;

    void remember(const at::TensorImpl* of_param, const at::TensorImpl* grad,
                  const at::TensorImpl* buffer);
    void prefetch() const;
  };
  static constexpr size_t kAhead = 3;
  // The tensors of one entry.
  struct Operands {
    at::TensorImpl* param;
    at::TensorImpl* grad;
    at::TensorImpl* momentum_buffer;
  };
  struct NewBuffer {
    PyObject* param;
    at::Tensor momentum_buffer;
  };
  struct CopyBack {
    at::Tensor tensor;
    at::Tensor copy;
  };

  static Group read_group(PyObject* dict);
  void find_slots(PyObject* state);
  bool gather(PyObject* state);
  bool gather_param(const Group& group, uint32_t index, Slot& slot);
  bool add_entry(uint32_t group, bool first_step, const at::Tensor& param, const at::Tensor& grad,
                 const at::Tensor& buffer);
  bool add_unusual(uint32_t group, bool first_step, const at::Tensor& param, const at::Tensor& grad,
                   const at::Tensor& buffer);
  at::Tensor to_plain(const at::Tensor& tensor, const at::Tensor& param);
  at::Tensor to_layout_of(const at::Tensor& tensor, const at::Tensor& other, bool is_written);
  void run();
  void store_momentum_buffers(const py::dict& state);
  void advance_group(Group& group, PyObject* dict, const py::dict& state);

  bool is_plain(const at::TensorImpl& tensor) const { return tensor.key_set() == plain_keys_; }

  c10::DispatchKeySet plain_keys_;
  py::function sync_group_;
  py::function local_tensor_;
  std::vector<Group> groups_;
  DictSnapshot state_;
  std::vector<Slot> slots_;
  bool is_stepping_ = false;

  // Of the step under way; members so that their memory is kept.
  int64_t numel_ = 0;
  std::vector<TensorEntry> entries_;
  std::vector<Operands> operands_;
  std::vector<GroupStep> group_steps_;
  std::vector<NewBuffer> new_buffers_;
  std::vector<CopyBack> copy_back_;
  std::vector<at::Tensor> kept_alive_;
};

}  // namespace sgdr
