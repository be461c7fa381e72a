// The tensors that a parameter has in optimizer.state.
#pragma once

#include <span>
#include <vector>

#include "dict_snapshot.h"
#include "python_dict.h"

namespace sgdr {

enum Role : size_t { kMomentumBuffer, kEma, kMasterParam, kRoles };

inline PyObject* name_of(Role role) {
  switch (role) {
    case kMomentumBuffer:
      return names::momentum_buffer();
    case kEma:
      return names::ema();
    default:
      return names::master_param();
  }
}

// A parameter with its dict in optimizer.state, which is null before its first step. Both borrowed.
struct ParamAndState {
  PyObject* param;
  PyObject* state;
};

// Throws if optimizer.state[param] is no dict.
inline ParamAndState find_state(PyObject* param, PyObject* state) {
  PyObject* const of_param = find(state, param);
  if (of_param != nullptr && !PyDict_Check(of_param)) {
    throw py::type_error(std::string("optimizer.state[param] is of type ") +
                         Py_TYPE(of_param)->tp_name +
                         ", but must be a dict; delete it to start anew");
  }
  return {param, of_param};
}

// The parameters of all groups with their dicts. A lookup calls Tensor.__hash__, which is Python
// code; so they are looked up again only after a parameter or a dict has changed.
class ParamsWithState {
 public:
  // False if a parameter is no tensor.
  template <class Groups>
  bool update(const Groups& groups, PyObject* state) {
    if (is_valid_ && state_.matches(state) && holds_params_of(groups)) return true;
    clear();
    // Python code may change lists and dicts while they are read.
    std::vector<py::object> lists;
    for (const auto& group : groups)
      lists.push_back(py::list(py::handle(group.params()).attr("copy")()));
    for (const py::object& params : lists) {
      for (const py::handle param : params) {
        if (!THPVariable_Check(param.ptr())) return false;
        found_.push_back(find_state(param.ptr(), state));
        own(found_.back());
      }
      group_ends_.push_back(found_.size());
    }
    state_.take(state);
    is_valid_ = true;
    return true;
  }

  std::span<ParamAndState> of_group(size_t i) {
    const size_t begin = i == 0 ? 0 : group_ends_[i - 1];
    return std::span(found_).subspan(begin, group_ends_[i] - begin);
  }

  // Keeps all of them alive until the step's end: Python code will run, or the GIL be released.
  void own() {
    if (!owned_.empty()) return;
    for (const ParamAndState& param : found_) own(param);
  }

  void end_step() { owned_.clear(); }

  // The next step looks everything up again.
  void invalidate() { is_valid_ = false; }

 private:
  void clear() {
    is_valid_ = false;
    found_.clear();
    group_ends_.clear();
  }

  void own(const ParamAndState& param) {
    owned_.push_back(py::reinterpret_borrow<py::object>(param.param));
    if (param.state != nullptr) owned_.push_back(py::reinterpret_borrow<py::object>(param.state));
  }

  template <class Groups>
  bool holds_params_of(const Groups& groups) const {
    if (groups.size() != group_ends_.size()) return false;
    size_t next = 0, group_index = 0;
    for (const auto& group : groups) {
      const size_t size = group.size();
      if (group_ends_[group_index++] - next != size) return false;
      for (size_t i = 0; i < size; ++i, ++next) {
        PyObject* const param = group.param(i);
        if (found_[next].param != param || !THPVariable_Check(param)) return false;
      }
    }
    return true;
  }

  bool is_valid_ = false;
  DictSnapshot state_;
  std::vector<ParamAndState> found_;
  std::vector<size_t> group_ends_;  // in found_
  std::vector<py::object> owned_;
};

}  // namespace sgdr
