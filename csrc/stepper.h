// One optimizer's step: reads param_groups and state, runs a backend, writes the schedule back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "cuda/launcher.h"
#include "dict_snapshot.h"
#include "fused_step.h"
#include "python_dict.h"
#include "state_memory.h"
#include "version_counter.h"

namespace sgdr {

class Stepper {
 public:
  // sync_group(param_group, lr_before, device_state, state) checks a group whose items changed, and
  // brings its lr up to date; gives the group's DeviceState, or None where its state is on the
  // host. local_tensor(tensor, param) gives the plain tensor behind a tensor subclass, or None.
  // shard_axes(param) says over which ranks a parameter is cut into parts, or None;
  // sum_over_shards(sum, axes) adds up the sums of its parts.
  Stepper(py::function sync_group, py::function local_tensor, py::function shard_axes,
          py::function sum_over_shards);

  // Takes over what has changed in the groups and their state since they were last seen.
  void sync(const py::list& param_groups, const py::dict& state);

  // A fresh copy of a tensor for the state, beside another of the parameter's or None, as if the
  // step had made it: see Note [State side by side].
  at::Tensor keep(const at::Tensor& copy, const std::optional<at::Tensor>& sibling) {
    const at::NoGradGuard no_grad;
    return state_memory_.copy_of(copy,
                                 sibling.has_value() ? sibling->unsafeGetTensorImpl() : nullptr);
  }

  // None: no limit.
  void set_clipping(std::optional<double> max_grad_norm, bool skip_nonfinite);

  // Of the last step, before clipping: a float, a tensor on a GPU, or None.
  py::object grad_norm() const { return grad_norm_; }

  // The update of one parameter, by its place among those of all groups; the schedule stays.
  // Returns false like step().
  bool step_param(const py::list& param_groups, const py::dict& state, uint32_t index);

  // grad_scale and found_inf are numbers, tensors of one element, or None. Returns false, having
  // written nothing, where a tensor is of a kind that no native backend takes.
  bool step(const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
            const py::object& found_inf);

 private:
  // The tensors that a parameter has in state.
  enum Role : size_t { kMomentumBuffer, kEma, kMasterParam, kRoles };
  static PyObject* name_of(Role role);
  static constexpr uint32_t bit_of(Role role) { return 1u << role; }

  using WeakTensor = c10::weak_intrusive_ptr<at::TensorImpl, c10::UndefinedTensorImpl>;
  static WeakTensor no_tensor() { return WeakTensor(at::Tensor().getIntrusivePtr()); }

  // A parameter of a group on a GPU, and the tensors in its state that its flags are about: null
  // where there is none yet, and the flag is set. Weak pointers, so that the address cannot come to
  // stand for another tensor.
  struct Tracked {
    py::object param;
    std::vector<WeakTensor> tensors;

    Tracked(py::object param, PyObject* state_of_param);
    void set(Role role, const at::Tensor& tensor);
    bool is(Role role, const at::TensorImpl* tensor) const;
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
           skipped_steps_index = 0, params_index = 0;
    Schedule schedule{};
    Position position{};
    int64_t skipped_steps = 0;
    GroupStep update{};
    Averaging averaging = Averaging::kNone;
    double ema_decay = 0;
    std::optional<at::ScalarType> momentum_dtype;
    bool master_weights = false;
    uint32_t roles = 0;  // of the tensors that its parameters have in state, as a bit each
    bool maximize = false;
    bool reset_momentum = false;
    uint32_t first_param = 0;       // its first parameter's place among those of all groups
    std::unique_ptr<OnGpu> on_gpu;  // null for a group on the host

    PyObject* params() const { return items.value(params_index).ptr(); }
    bool is_where_its_params_are() const;
  };
  // A parameter, its gradient and its state, and what else its entry says.
  struct Operands {
    at::TensorImpl* param;  // the master copy, where there is one
    at::TensorImpl* grad;
    at::TensorImpl* momentum_buffer = nullptr;
    at::TensorImpl* ema = nullptr;
    at::TensorImpl* low_precision_param = nullptr;
    double ema_decay = 0;
    uint32_t group;
    uint32_t param_index;
    bool first_step = false;
    bool new_master = false;
  };
  // A parameter, which is a tensor, its dict in state, and the tensors in that, which are the same
  // as long as the dict has the same version. Fills one cache line.
  struct alignas(64) Slot {
    PyObject* param;             // slot_params_ owns it
    PyObject* state;             // state_ owns it; null: none
    uint64_t state_version = 0;  // when the tensors were looked up; 0: not known
    uint64_t looked_for = 0;     // then: a hash of the parameter's shape and the roles
    std::array<WeakTensor, kRoles> stored = {no_tensor(), no_tensor(), no_tensor()};
    const at::TensorImpl* last_grad = nullptr;  // a hint: prefetched, never followed

    at::TensorImpl* param_tensor() const { return THPVariable_Unpack(param).unsafeGetTensorImpl(); }
    bool is_current(uint32_t roles) const;
    bool find_stored(uint32_t roles);
    // Null: none.
    at::TensorImpl* tensor(Role role) const {
      at::TensorImpl* const tensor = stored[role]._unsafe_get_target();
      return tensor == c10::UndefinedTensorImpl::singleton() ? nullptr : tensor;
    }
    void prefetch_objects() const;
    void prefetch_tensors() const;
    void prefetch_behind_param() const;
    void prefetch_behind_grad() const;
  };
  static_assert(sizeof(Slot) == 64);
  static constexpr size_t kAhead = 2;  // parameters from one prefetch to what it is for
  static constexpr size_t kCountersAhead = 8;
  struct NewState {
    PyObject* param;
    Role role;
    at::Tensor tensor;
    Tracked* tracked;  // null on the host
  };
  struct Averaged {
    PyObject* param;
    int64_t n_averaged;
  };
  // The part of the step under way that one GPU has.
  struct GpuStep {
    c10::DeviceIndex gpu;
    std::vector<LaunchGroup> groups;
    std::vector<TensorEntry> tensors;
    std::vector<uint32_t> param_indices;
  };
  // Entries whose sum of squares is to be added up over some ranks.
  struct ShardedPart {
    py::object axes;
    std::vector<size_t> entries;
  };
  struct CopyBack {
    at::Tensor tensor;
    at::Tensor copy;
  };

  void sync_groups(const py::list& param_groups, const py::dict& state);
  void sync_group(Group& group, PyObject* dict, const py::dict& state);
  static void track(OnGpu& on_gpu, size_t index, Role role, PyObject* state_of_param);
  static Group read_group(PyObject* dict, bool is_on_host);
  bool find_slots(PyObject* state);
  bool has_slots_of_params() const;
  bool gather(PyObject* state);
  // Of the parameters [first, last) of a group, whose slots begin with the one given.
  bool gather_on_gpu(Group& group, Slot* slots, size_t first, size_t last, bool advances);
  GpuStep& step_of_gpu(c10::DeviceIndex gpu);
  // Of the parameter at that place among those of all groups.
  bool gather_param(const Group& group, uint32_t group_index, uint32_t param_index, Slot& slot);
  void gather_more(const Group& group, const Slot& slot, bool is_half, Operands& operands);
  int64_t count_average(const Slot& slot, bool is_new);
  at::TensorImpl* new_tensor(const Slot& slot, Role role, at::ScalarType dtype,
                             at::TensorImpl* sibling = nullptr);
  bool add_entry(const Operands& operands);
  bool add_unusual(const Operands& operands);
  at::Tensor to_plain(const at::Tensor& tensor, const at::Tensor& param);
  at::Tensor to_layout_of(const at::Tensor& tensor, const at::Tensor& other, bool is_written);
  void note_shards(const at::Tensor& param);
  FusedStep host_step() const;
  void keep_tensors_alive();
  void run();
  void run_on_gpus(const py::object& grad_scale, const py::object& found_inf, bool advances);
  bool needs_norm() const { return max_grad_norm_.has_value() || skip_nonfinite_; }
  void set_scalars(double grad_scale, double coefficient);
  void check_devices_of_norm() const;
  double sum_of_squared_grads();
  at::Tensor sum_of_squared_grads_on(const GpuStep& step);
  template <class Sum>
  void for_each_part(const std::vector<TensorEntry>& entries, Sum sum_of) const;
  void count_skipped_step(const py::list& param_groups);
  void store_new_state(const py::dict& state);
  void advance_group(Group& group, PyObject* dict, const py::dict& state);

  [[gnu::always_inline]] bool is_plain(const at::TensorImpl& tensor) const {
    return tensor.key_set() == plain_keys_ && (device_.is_cpu() || tensor.device() == device_);
  }

  c10::DispatchKeySet host_keys_;
  // Of the group whose tensors are being gathered.
  c10::DispatchKeySet plain_keys_;
  c10::Device device_ = at::kCPU;
  std::vector<TensorEntry>* gathered_ = &entries_;
  py::function sync_group_;
  py::function local_tensor_;
  py::function shard_axes_;
  py::function sum_over_shards_;
  std::optional<double> max_grad_norm_;
  bool skip_nonfinite_ = false;
  py::object grad_norm_ = py::none();
  std::vector<Group> groups_;
  DictSnapshot state_;
  StateMemory state_memory_;
  std::vector<Slot> slots_;
  std::vector<py::object> slot_params_;  // side by side, to be compared at once
  bool is_stepping_ = false;
  // Clears what is of the step under way only, whose beginning it marks.
  struct Stepping;
  bool is_all_on_gpus_ = false;

  // Of the step under way; members so that their memory is kept.
  int64_t numel_ = 0;
  std::vector<TensorEntry> entries_;
  std::span<const Slot> gathered_slots_;
  std::vector<VersionCounter> written_;  // of the tensors that are
  std::vector<GroupStep> group_steps_;
  std::vector<GpuStep> gpu_steps_;
  std::deque<NewState> new_state_;  // whose elements do not move
  std::vector<Averaged> averaged_;
  std::vector<ShardedPart> sharded_parts_;
  std::vector<CopyBack> copy_back_;
  std::vector<at::Tensor> kept_alive_;
};

}  // namespace sgdr
