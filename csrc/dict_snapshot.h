// Notices whether a Python dict holds the same objects as before, by its version or in one walk,
// and without hashing a key.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "python_dict.h"

namespace sgdr {

namespace py = pybind11;

// Note [No stale pointers]
// In the steady state a step does no Python work per parameter, and yet it never trusts a pointer
// from the step before. It compares, by identity, what param_groups and state hold now with what
// they held then, and reads the memory addresses anew from the tensors. Whatever differs (a new
// buffer after load_state_dict, a parameter unfrozen, param_group["momentum"] = 0.8) takes the slow
// path once. The snapshot owns the objects it has seen, so an address cannot come to stand for
// another object. The tensors in a parameter's dict are known by weak pointers: as long as the dict
// has the same version they are in it, and torch swaps no tensor that somebody points to so. Their
// sizes are compared with the parameter's when they are looked up, not at each step.
class DictSnapshot {
 public:
  bool matches(PyObject* dict) {
    const uint64_t version = version_of(dict);
    if (version != 0 && version == version_) return true;
    if (PyDict_Size(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (const auto& [seen_key, seen_value] : items_) {
      if (!PyDict_Next(dict, &position, &key, &value)) return false;
      if (key != seen_key.ptr() || value != seen_value.ptr()) return false;
    }
    version_ = version;
    return true;
  }

  void take(PyObject* dict) {
    items_.clear();
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict, &position, &key, &value)) {
      items_.emplace_back(py::reinterpret_borrow<py::object>(key),
                          py::reinterpret_borrow<py::object>(value));
    }
    version_ = version_of(dict);
  }

  bool empty() const { return items_.empty(); }

  size_t index_of(PyObject* name) const {
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].first.equal(py::handle(name))) return i;
    }
    throw py::key_error(py::str(py::handle(name)).cast<std::string>());
  }

  const py::object& value(size_t index) const { return items_[index].second; }

  // Sets dict[key] to a value of ours, which is then no change.
  void store(PyObject* dict, size_t index, py::object value) {
    const bool is_known = version_of(dict) == version_;
    if (PyDict_SetItem(dict, items_[index].first.ptr(), value.ptr()) != 0)
      throw py::error_already_set();
    items_[index].second = std::move(value);
    version_ = is_known ? version_of(dict) : 0;
  }

 private:
  uint64_t version_ = 0;  // of the dict that holds the items
  std::vector<std::pair<py::object, py::object>> items_;
};

}  // namespace sgdr
