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
    if (state_.matches(state) && holds_params_of(groups)) return true;
    clear();
    for (const auto& group : groups) {
      for (size_t i = 0; i < group.size(); ++i) {
        if (!THPVariable_Check(group.param(i))) {
          clear();
          return false;
        }
        found_.push_back(find_state(group.param(i), state));
        params_.push_back(py::reinterpret_borrow<py::object>(group.param(i)));
      }
    }
    state_.take(state);
    return true;
  }

  std::span<const ParamAndState> all() const { return found_; }

 private:
  void clear() {
    state_ = {};
    params_.clear();
    found_.clear();
  }

  template <class Groups>
  bool holds_params_of(const Groups& groups) const {
    size_t next = 0;
    for (const auto& group : groups) {
      if (params_.size() - next < group.size()) return false;
      for (size_t i = 0; i < group.size(); ++i, ++next) {
        if (params_[next].ptr() != group.param(i)) return false;
      }
    }
    return next == params_.size();
  }

  DictSnapshot state_;
  std::vector<py::object> params_;
  std::vector<ParamAndState> found_;
};

}  // namespace sgdr
