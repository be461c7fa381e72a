// One optimizer's step: reads param_groups and state, runs a backend, writes the schedule back.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <vector>

#include "cuda/launcher.h"
#include "dict_snapshot.h"
#include "fused_step.h"

namespace sgdr {

class Stepper {
 public:
  // sync_group(param_group, lr_before, device_state, state) checks a group whose items changed, and
  // brings its lr up to date; gives the group's DeviceState, or None where its state is on the
  // host. local_tensor(tensor, param) gives the plain tensor behind a tensor subclass, or None.
  Stepper(py::function sync_group, py::function local_tensor);

  // Takes over what has changed in the groups and their momentum buffers since they were last seen.
  void sync(const py::list& param_groups, const py::dict& state);

  // grad_scale and found_inf are numbers, tensors of one element, or None. Returns false, having
  // written nothing, where a tensor is of a kind that no native backend takes.
  bool step(const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
            const py::object& found_inf);

 private:
  // A parameter of a group on a GPU, and the momentum buffer that its first-step flag is about:
  // null where there is none yet, and the flag is set. A weak pointer, so that the address cannot
  // come to stand for another buffer.
  struct Tracked {
    py::object param;
    c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl> momentum_buffer;

    Tracked(py::object param, const at::Tensor* buffer);
    void set(const at::Tensor& buffer);
    bool is(const at::TensorImpl* buffer) const;
  };
  // What a group on a GPU has besides: see Note [State on the GPU].
  struct OnGpu {
    py::object device_state;
    at::Tensor memory;  // the group's GroupMemory
    std::vector<Tracked> params;
    LrSource lr_source = LrSource::kState;
  };
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
    std::unique_ptr<OnGpu> on_gpu;  // null for a group on the host

    PyObject* params() const { return items.value(params_index).ptr(); }
    bool is_where_its_params_are() const;
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
    Tracked* tracked;  // null on the host
  };
  // The part of the step under way that one GPU has.
  struct GpuStep {
    c10::DeviceIndex gpu;
    std::vector<LaunchGroup> groups;
    std::vector<TensorEntry> tensors;
    std::vector<uint32_t> param_indices;
  };
  struct CopyBack {
    at::Tensor tensor;
    at::Tensor copy;
  };

  void sync_groups(const py::list& param_groups, const py::dict& state);
  void sync_group(Group& group, PyObject* dict, const py::dict& state);
  static void track(OnGpu& on_gpu, size_t index, PyObject* state_of_param);
  static Group read_group(PyObject* dict, bool is_on_host);
  void find_slots(PyObject* state);
  bool gather(PyObject* state);
  bool gather_on_gpu(Group& group, size_t slot, PyObject* state);
  GpuStep& step_of_gpu(c10::DeviceIndex gpu);
  bool gather_param(const Group& group, uint32_t index, Slot& slot);
  bool add_entry(uint32_t group, bool first_step, const at::Tensor& param, const at::Tensor& grad,
                 const at::Tensor& buffer);
  bool add_unusual(uint32_t group, bool first_step, const at::Tensor& param, const at::Tensor& grad,
                   const at::Tensor& buffer);
  at::Tensor to_plain(const at::Tensor& tensor, const at::Tensor& param);
  at::Tensor to_layout_of(const at::Tensor& tensor, const at::Tensor& other, bool is_written);
  void run();
  void run_on_gpus(const py::object& grad_scale, const py::object& found_inf);
  void store_momentum_buffers(const py::dict& state);
  void advance_group(Group& group, PyObject* dict, const py::dict& state);

  bool is_plain(const at::TensorImpl& tensor) const { return tensor.key_set() == plain_keys_; }

  c10::DispatchKeySet host_keys_;
  // Of the group whose tensors are being gathered.
  c10::DispatchKeySet plain_keys_;
  c10::Device device_ = at::kCPU;
  std::vector<TensorEntry>* gathered_ = &entries_;
  py::function sync_group_;
  py::function local_tensor_;
  std::vector<Group> groups_;
  DictSnapshot state_;
  std::vector<Slot> slots_;
  bool is_stepping_ = false;
  bool is_all_on_gpus_ = false;

  // Of the step under way; members so that their memory is kept.
  int64_t numel_ = 0;
  std::vector<TensorEntry> entries_;
  std::vector<Operands> operands_;
  std::vector<GroupStep> group_steps_;
  std::vector<GpuStep> gpu_steps_;
  std::vector<NewBuffer> new_buffers_;
  std::vector<CopyBack> copy_back_;
  std::vector<at::Tensor> kept_alive_;
};

}  // namespace sgdr
