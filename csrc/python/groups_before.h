// Puts param groups back after an error.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace sgdr {

namespace py = pybind11;

// Copies of the groups that a step changes before its first write.
class GroupsBefore {
 public:
  void remember(const py::object& group) {
    copies_.emplace_back(group, py::reinterpret_steal<py::object>(PyDict_Copy(group.ptr())));
  }

  void restore() {
    const py::error_scope error;  // this is after an error
    for (const auto& [group, copy] : copies_) {
      PyDict_Clear(group.ptr());
      if (PyDict_Update(group.ptr(), copy.ptr()) != 0) PyErr_Clear();
    }
    forget();
  }

  void forget() { copies_.clear(); }

 private:
  std::vector<std::pair<py::object, py::object>> copies_;
};

}  // namespace sgdr
