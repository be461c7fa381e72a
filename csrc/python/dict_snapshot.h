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
// (param_group["momentum"] = 0.8, a parameter added) takes the slow path through Python, once.
// A pointer is used only where the live dict or list holds the same pointer now. So nothing is kept
// alive that the user may want to be freed, such as parameters and state, nor anything that could
// refer to the optimizer. Only numbers and strings are: another number must not get the address of
// one of them.
class DictSnapshot {
 public:
  bool matches(PyObject* dict) const {
    if (PyDict_Size(dict) != static_cast<Py_ssize_t>(items_.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (const Item& seen : items_) {
      if (!PyDict_Next(dict, &position, &key, &value)) return false;
      if (key != seen.key || value != seen.value) return false;
    }
    return true;
  }

  void take(PyObject* dict) {
    clear();
    Py_ssize_t position = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict, &position, &key, &value)) items_.emplace_back(key, value);
  }

  void clear() { items_.clear(); }
  bool empty() const { return items_.empty(); }

  size_t index_of(PyObject* name) const {
    for (size_t i = 0; i < items_.size(); ++i) {
      if (py::handle(items_[i].key).equal(py::handle(name))) return i;
    }
    throw py::key_error(py::str(py::handle(name)).cast<std::string>());
  }

  PyObject* value(size_t index) const { return items_[index].value; }

  // Sets an item of the dict and of the snapshot, so that it does not count as a change.
  void store(PyObject* dict, size_t index, py::object value) {
    Item& item = items_[index];
    if (PyDict_SetItem(dict, item.key, value.ptr()) != 0) throw py::error_already_set();
    item.value = value.ptr();
    item.owned_value = std::move(value);
  }

 private:
  static py::object owned(PyObject* object) {
    return PyObject_IS_GC(object) ? py::object() : py::reinterpret_borrow<py::object>(object);
  }

  struct Item {
    Item(PyObject* key, PyObject* value)
        : key(key), value(value), owned_key(owned(key)), owned_value(owned(value)) {}

    PyObject* key;
    PyObject* value;
    // Null for an object that may refer to others.
    py::object owned_key;
    py::object owned_value;
  };

  std::vector<Item> items_;
};

}  // namespace sgdr
