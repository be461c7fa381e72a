#include "param_group.h"

#include <torch/csrc/utils/pybind.h>

#include "../torch/internals.h"
#include "python_dict.h"

namespace sgdr {
namespace {

Schedule read_schedule(PyObject* dict) {
  const int64_t steps_per_epoch = integer(dict, names::steps_per_epoch());
  const bool by_epoch = get(dict, names::anneal()).cast<std::string>() == "epoch";
  const py::handle n_cycles = get(dict, names::n_cycles());
  return {.eta_max = number(dict, names::initial_lr()),
          .eta_min = number(dict, names::eta_min()),
          .T_mult = number(dict, names::T_mult()),
          .cycle_decay = number(dict, names::cycle_decay()),
          .warmup_start_lr = number(dict, names::warmup_start_lr()),
          .T_0 = integer(dict, names::T_0()) * steps_per_epoch,
          .anneal_every = by_epoch ? steps_per_epoch : 1,
          .warmup_steps = integer(dict, names::warmup_steps()),
          .n_cycles = n_cycles.is_none() ? kEndless : n_cycles.cast<int64_t>()};
}

GroupOptions read_options(PyObject* dict) {
  const double momentum = number(dict, names::momentum());
  const double weight_decay = number(dict, names::weight_decay());
  const py::handle ema_decay = get(dict, names::ema_decay());
  const bool is_swa = py::isinstance<py::str>(ema_decay);
  const bool is_averaged = !ema_decay.is_none();
  const py::handle momentum_dtype = get(dict, names::momentum_dtype());
  const bool rounds = truth(dict, names::stochastic_rounding());
  return {.schedule = read_schedule(dict),
          .momentum = momentum,
          .dampening = number(dict, names::dampening()),
          .weight_decay = weight_decay,
          .ema_decay = is_averaged && !is_swa ? number(dict, names::ema_decay()) : 0,
          .seed = get(dict, names::seed()).cast<uint64_t>(),
          .decay = decay_of(weight_decay, truth(dict, names::decoupled_weight_decay())),
          .direction = direction_of(momentum, truth(dict, names::nesterov())),
          .averaging = is_swa        ? Averaging::kEqual
                       : is_averaged ? Averaging::kExponential
                                     : Averaging::kNone,
          .momentum_type = momentum_dtype.is_none()
                               ? ElementType::kNone
                               : element_type(momentum_dtype.cast<at::ScalarType>()),
          .maximize = truth(dict, names::maximize()),
          .reset_momentum = truth(dict, names::reset_momentum()),
          .master_weights = truth(dict, names::master_weights()),
          .rounds_param = rounds,
          .rounds_momentum = rounds || !momentum_dtype.is_none()};
}

}  // namespace

bool ParamGroup::is_current(PyObject* dict) const {
  if (items_.empty() || !PyDict_Check(dict) || !items_.matches(dict)) return false;
  if (!PyList_CheckExact(params())) return false;
  if (needs_new_ema_decay()) return false;
  if constexpr (!cuda::kIsBuilt) return true;
  if (on_gpu != nullptr) return on_gpu->belongs_to(params());
  return size() == 0 || !THPVariable_Check(param(0)) || !THPVariable_Unpack(param(0)).is_cuda();
}

void ParamGroup::read(PyObject* dict, bool is_on_host) {
  options = read_options(dict);
  const bool is_function = PyCallable_Check(get(dict, names::ema_decay()).ptr()) != 0;
  if (is_on_host) {
    state = {.position = {.step = integer(dict, names::step()),
                          .cycle = integer(dict, names::cycle()),
                          .T_cur = integer(dict, names::T_cur()),
                          .T_i = integer(dict, names::T_i())},
             .lr = number(dict, names::lr()),
             .scheduled_lr = number(dict, names::scheduled_lr()),
             .skipped_steps = integer(dict, names::skipped_steps())};
  }
  ema_decay_step_ = is_function ? state.position.step : kNoFunction;
  items_.take(dict);
  indices_[kParams] = items_.index_of(names::params());
  indices_[kLr] = items_.index_of(names::lr());
  indices_[kScheduledLr] = items_.index_of(names::scheduled_lr());
  indices_[kStep] = items_.index_of(names::step());
  indices_[kCycle] = items_.index_of(names::cycle());
  indices_[kTCur] = items_.index_of(names::T_cur());
  indices_[kTI] = items_.index_of(names::T_i());
  indices_[kSkippedSteps] = items_.index_of(names::skipped_steps());
}

bool ParamGroup::advance_schedule(PyObject* dict) {
  advance(options.schedule, state);
  const Position& position = state.position;
  const py::float_ scheduled_lr(state.scheduled_lr);
  items_.store(dict, indices_[kScheduledLr], scheduled_lr);
  items_.store(dict, indices_[kLr],
               state.lr == state.scheduled_lr ? scheduled_lr : py::float_(state.lr));
  items_.store(dict, indices_[kStep], py::int_(position.step));
  items_.store(dict, indices_[kTCur], py::int_(position.T_cur));
  if (position.T_cur != 0) return false;
  items_.store(dict, indices_[kCycle], py::int_(position.cycle));
  items_.store(dict, indices_[kTI], py::int_(position.T_i));
  return options.reset_momentum && at_restart(options.schedule, position);
}

void ParamGroup::count_skipped_step(PyObject* dict) {
  if (on_gpu != nullptr)
    on_gpu->count_skipped_step();
  else
    items_.store(dict, indices_[kSkippedSteps], py::int_(++state.skipped_steps));
}

}  // namespace sgdr
