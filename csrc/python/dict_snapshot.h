// Notices whether a Python dict still holds the same objects.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

namespace sgdr {

namespace py = pybind11;

// Note [No stale pointers]
// A step does no Python work per parameter, and yet trusts no pointer from the step before. It
// compares, by identity, what a param group and optimizer.state hold now with what they held then,
// looks up each tensor in the parameter's state, and reads all addresses anew. Only what differs
// (param_group["momentum"] = 0.8, a parameter added) takes the slow path through Python, once. A
// snapshot owns the objects in it, so that no other object can get the address of one of them.
class DictSnapshot {
 public:
  bool matches(PyObject* dict) const {
    if (PyDict_Size(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (const auto& [seen_key, seen_value] : items_) {
      if (!PyDict_Next(dict, &position, &key, &value)) return false;
      if (key != seen_key.ptr() || value != seen_value.ptr()) return false;
    }
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
  }

  bool empty() const { return items_.empty(); }

  size_t index_of(PyObject* name) const {
    for (size_t i = 0; i < items_.size(); ++i) {
      if (items_[i].first.equal(py::handle(name))) return i;
    }
    throw py::key_error(py::str(py::handle(name)).cast<std::string>());
  }

  const py::object& value(size_t index) const { return items_[index].second; }

  // Sets an item of the dict and of the snapshot, so that it does not count as a change.
  void store(PyObject* dict, size_t index, py::object value) {
    if (PyDict_SetItem(dict, items_[index].first.ptr(), value.ptr()) != 0)
      throw py::error_already_set();
    items_[index].second = std::move(value);
  }

 private:
  std::vector<std::pair<py::object, py::object>> items_;
};

}  // namespace sgdr
