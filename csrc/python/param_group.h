// A param group as the last step left it: its options, and where its schedule stands.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "../step_types.h"
#include "dict_snapshot.h"
#include "group_on_gpu.h"

namespace sgdr {

class ParamGroup {
 public:
  GroupOptions options;
  GroupState state;  // on a GPU it is in its memory instead

  uint32_t first_param = 0;            // index of its first parameter among those of all groups
  std::unique_ptr<GroupOnGpu> on_gpu;  // null for a group on the host

  // Whether it is a dict of the same objects as after the last step, on the same device.
  bool is_current(PyObject* dict) const;

  // The next step reads the dict anew.
  void forget() { items_.clear(); }

  // Reads options and position from the dict, whose values have been checked.
  void read(PyObject* dict, bool is_on_host);

  // A list, borrowed.
  PyObject* params() const { return items_.value(indices_[kParams]); }
  size_t size() const { return static_cast<size_t>(PyList_GET_SIZE(params())); }
  PyObject* param(size_t i) const { return PyList_GET_ITEM(params(), static_cast<Py_ssize_t>(i)); }

  // Advances the schedule of a group on the host. True at a restart that drops the momentum.
  bool advance_schedule(PyObject* dict);

  // Counts a skipped step.
  void count_skipped_step(PyObject* dict);

 private:
  enum Item : size_t {
    kParams,
    kLr,
    kScheduledLr,
    kStep,
    kCycle,
    kTCur,
    kTI,
    kSkippedSteps,
    kItems
  };

  // A function as ema_decay is evaluated for each step; see ScheduledDecay in ema_schedule.py. On a
  // GPU the position is not kept.
  bool needs_new_ema_decay() const {
    return ema_decay_step_ != kNoFunction &&
           (on_gpu != nullptr || ema_decay_step_ != state.position.step);
  }
  static constexpr int64_t kNoFunction = -1;
  int64_t ema_decay_step_ = kNoFunction;

  DictSnapshot items_;
  std::array<size_t, kItems> indices_{};  // their places in the snapshot
};

}  // namespace sgdr
