// Reads the Python dicts of param groups and of the optimizer's state.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <string>

namespace sgdr {

namespace py = pybind11;

namespace names {
#define SGDR_INTERNED(name)                                            \
  inline PyObject* name() {                                            \
    static PyObject* const string = PyUnicode_InternFromString(#name); \
    return string;                                                     \
  }
SGDR_INTERNED(params)
SGDR_INTERNED(lr)
SGDR_INTERNED(scheduled_lr)
SGDR_INTERNED(initial_lr)
SGDR_INTERNED(momentum)
SGDR_INTERNED(dampening)
SGDR_INTERNED(weight_decay)
SGDR_INTERNED(decoupled_weight_decay)
SGDR_INTERNED(nesterov)
SGDR_INTERNED(maximize)
SGDR_INTERNED(T_0)
SGDR_INTERNED(T_mult)
SGDR_INTERNED(eta_min)
SGDR_INTERNED(steps_per_epoch)
SGDR_INTERNED(anneal)
SGDR_INTERNED(warmup_steps)
SGDR_INTERNED(warmup_start_lr)
SGDR_INTERNED(cycle_decay)
SGDR_INTERNED(n_cycles)
SGDR_INTERNED(reset_momentum)
SGDR_INTERNED(step)
SGDR_INTERNED(cycle)
SGDR_INTERNED(T_cur)
SGDR_INTERNED(T_i)
SGDR_INTERNED(skipped_steps)
SGDR_INTERNED(ema_decay)
SGDR_INTERNED(momentum_dtype)
SGDR_INTERNED(stochastic_rounding)
SGDR_INTERNED(master_weights)
SGDR_INTERNED(seed)
SGDR_INTERNED(momentum_buffer)
SGDR_INTERNED(ema)
SGDR_INTERNED(master_param)
SGDR_INTERNED(n_averaged)
#undef SGDR_INTERNED
}  // namespace names

// Borrowed, or null if the dict has no such key.
inline PyObject* find(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline py::handle get(PyObject* dict, PyObject* key) {
  PyObject* value = find(dict, key);
  if (value == nullptr) throw py::key_error(py::str(py::handle(key)).cast<std::string>());
  return value;
}

inline double number(PyObject* dict, PyObject* key) {
  const double value = PyFloat_AsDouble(get(dict, key).ptr());
  if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline int64_t integer(PyObject* dict, PyObject* key) {
  const int64_t value = PyLong_AsLongLong(get(dict, key).ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline bool truth(PyObject* dict, PyObject* key) {
  const int value = PyObject_IsTrue(get(dict, key).ptr());
  if (value == -1) throw py::error_already_set();
  return value != 0;
}

// What a parameter's state holds under a name; null if nothing, or None. Mostly that is the first
// item, and to read it takes half as long as a lookup.
inline PyObject* find_in_state(PyObject* state_of_param, PyObject* name) {
  if (state_of_param == nullptr) return nullptr;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  if (!PyDict_Next(state_of_param, &position, &key, &value) || key != name)
    value = find(state_of_param, name);
  return value == Py_None ? nullptr : value;
}

// The tensor that a Python object is, or null.
inline const at::Tensor* as_tensor(PyObject* object) {
  return object != nullptr && THPVariable_Check(object) ? &THPVariable_Unpack(object) : nullptr;
}

inline py::object to_python(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

}  // namespace sgdr
