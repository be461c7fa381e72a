// Lets one thread at a time into an optimizer.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <stdexcept>
#include <thread>

namespace sgdr {

namespace py = pybind11;

// A lock that the same thread may enter again, but for a step, within which nothing else may begin:
// a step may release the GIL, or call Python code that calls the optimizer. Its members are guarded
// by the GIL, so that it costs a step next to nothing.
class StepLock {
 public:
  void enter() {
    const unsigned long me = PyThread_get_thread_ident();
    while (depth_ > 0 && owner_ != me) wait();
    refuse_within_step();
    owner_ = me;
    ++depth_;
  }

  void leave() { --depth_; }

  void begin_step() {
    enter();
    is_stepping_ = true;
  }

  void end_step() {
    is_stepping_ = false;
    leave();
  }

 private:
  void refuse_within_step() const {
    if (is_stepping_)
      throw std::runtime_error(
          "the optimizer was changed, or its step() called, while its step() is still running");
  }

  static void wait() {
    {
      const py::gil_scoped_release no_gil;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

  unsigned long owner_ = 0;
  int depth_ = 0;
  bool is_stepping_ = false;
};

}  // namespace sgdr
