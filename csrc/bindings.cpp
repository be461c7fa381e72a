#include <ATen/record_function.h>
#include <torch/extension.h>

#include "stepper.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  py::class_<sgdr::Stepper>(module, "Stepper", py::module_local())
      .def(py::init<py::function, py::function, py::function, py::function>(),
           py::arg("sync_group"), py::arg("local_tensor"), py::arg("shard_axes"),
           py::arg("sum_over_shards"))
      .def("set_clipping", &sgdr::Stepper::set_clipping, py::arg("max_grad_norm"),
           py::arg("skip_nonfinite"))
      .def("keep", &sgdr::Stepper::keep, py::arg("copy"), py::arg("sibling"))
      .def("step_param", &sgdr::Stepper::step_param, py::arg("param_groups"), py::arg("state"),
           py::arg("index"))
      .def_property_readonly("grad_norm", &sgdr::Stepper::grad_norm)
      .def("sync", &sgdr::Stepper::sync, py::arg("param_groups"), py::arg("state"))
      .def("step", &sgdr::Stepper::step, py::arg("param_groups"), py::arg("state"),
           py::arg("grad_scale"), py::arg("found_inf"));
  module.attr("has_cuda") = sgdr::kHasCuda;
  module.def("is_profiling", [] {
    return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value();
  });
}
