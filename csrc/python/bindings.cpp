#include <ATen/record_function.h>
#include <torch/csrc/utils/pybind.h>

#include "stepper.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  namespace py = pybind11;
  using sgdr::StepLock;
  using sgdr::Stepper;
  py::class_<StepLock, std::shared_ptr<StepLock>>(module, "StepLock", py::module_local())
      .def(py::init<>())
      .def("__enter__", &StepLock::enter)
      .def("__exit__", [](StepLock& lock, const py::args&) { lock.leave(); });
  py::class_<Stepper>(module, "Stepper", py::module_local())
      .def(py::init<std::shared_ptr<StepLock>, py::function, py::function, py::function,
                    py::function, py::function>(),
           py::arg("lock"), py::arg("check_groups"), py::arg("sync_group"), py::arg("local_tensor"),
           py::arg("shard_axes"), py::arg("sum_over_shards"))
      .def("set_clipping", &Stepper::set_clipping, py::arg("max_grad_norm"),
           py::arg("skip_nonfinite"))
      .def("sync", &Stepper::sync, py::arg("param_groups"), py::arg("state"))
      .def("step", &Stepper::step, py::arg("param_groups"), py::arg("state"), py::arg("grad_scale"),
           py::arg("found_inf"))
      .def("step_param", &Stepper::step_param, py::arg("param_groups"), py::arg("state"),
           py::arg("index"))
      .def_property_readonly("grad_norm", &Stepper::grad_norm);
  module.attr("has_cuda") = sgdr::cuda::kIsBuilt;
  module.def("is_profiling", [] {
    return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value();
  });
}
