"""What a user may get wrong before a step, each with the way back.

A fault is a function of a side and of one of its parameters. It returns the function that undoes
it, or None if it does not apply to that parameter.
"""

from collections import defaultdict

import torch

MUST_RAISE = set()
FAULTS = {}


def fault(function):
    FAULTS[function.__name__] = function
    return function


def refused(function):
    """A fault that is an error of the step, whatever the options are."""
    MUST_RAISE.add(function.__name__)
    return fault(function)


def is_plain(tensor):
    """Whether the native step works on its memory as it is."""
    is_dense = torch.empty_like(tensor).stride() == tensor.stride()
    return is_dense and not tensor.is_conj() and not tensor.is_neg()


def _set_grad(param, grad):
    """Sets a gradient, also one that does not fit, and returns the way back."""
    before, data = param.grad, param.data
    param.grad = None
    if param.requires_grad:
        param.grad_dtype = None
    elif grad.dtype != param.dtype:
        return None
    # torch checks the new gradient's shape by the parameter's.
    if grad.shape != param.shape:
        param.data = torch.zeros(grad.shape, dtype=param.dtype)
    param.grad = grad
    param.data = data

    def undo():
        param.grad = None
        param.grad = before

    return undo


def _set_data(param, data):
    before = param.data
    param.data = data

    def undo():
        param.data = before

    return undo


def _set_buffer(side, param, buffer, role="momentum_buffer"):
    """Sets a tensor in the state; None if the parameter has none there."""
    of_param = side.optimizer.state.get(param)
    if of_param is None or of_param.get(role) is None:
        return None
    before = of_param[role]
    of_param[role] = buffer

    def undo():
        of_param[role] = before

    return undo


# ------------------------------------------------------------------------------------------------
# gradients


@refused
def sparse_gradient(side, param):
    return None if param.ndim == 0 else _set_grad(param, torch.ones(param.shape).to_sparse())


@refused
def gradient_of_another_shape(side, param):
    return _set_grad(param, torch.ones(*param.shape, 2, dtype=param.dtype))


@refused
def gradient_of_as_many_elements(side, param):
    return _set_grad(param, torch.ones(1, *param.shape, dtype=param.dtype))


@fault
def integer_gradient(side, param):
    return None if param.is_complex() else _set_grad(param, torch.ones(param.shape).to(torch.int32))


@fault
def bool_gradient(side, param):
    return None if param.is_complex() else _set_grad(param, torch.ones(param.shape).bool())


@refused
def complex_gradient_of_a_real_parameter(side, param):
    if param.is_complex():
        return None
    return _set_grad(param, torch.ones(param.shape, dtype=torch.complex64))


@fault
def zero_tensor_as_gradient(side, param):
    return _set_grad(param, torch._efficientzerotensor(param.shape, dtype=param.dtype))


@fault
def inference_tensor_as_gradient(side, param):
    with torch.inference_mode():
        grad = torch.ones(param.shape, dtype=param.dtype)
    before = param.grad
    param.grad = grad

    def undo():
        param.grad = before

    return undo


@fault
def gradient_that_is_the_parameter(side, param):
    before = param.grad
    param.grad = param.detach()

    def undo():
        param.grad = before

    return undo


# ------------------------------------------------------------------------------------------------
# parameters


@fault
def expanded_parameter(side, param):
    if param.numel() < 2:
        return None
    return _set_data(param, torch.ones((), dtype=param.dtype).expand(param.shape))


@fault
def integer_parameter(side, param):
    if param.requires_grad:
        return None
    before = param.grad
    param.grad = None
    undo_data = _set_data(param, torch.ones(param.shape, dtype=torch.int64))
    param.grad = torch.ones(param.shape, dtype=torch.int64)

    def undo():
        param.grad = None
        undo_data()
        param.grad = before

    return undo


@fault
def parameter_of_another_shape(side, param):
    return _set_data(param, torch.ones(2, *param.shape, dtype=param.dtype))


@fault
def inference_tensor_as_parameter(side, param):
    with torch.inference_mode():
        data = torch.ones(param.shape, dtype=param.dtype)
    return _set_data(param, data)


@fault
def two_parameters_in_the_same_memory(side, param):
    others = [p for p in side.params_in_groups() if p is not param and p.shape == param.shape]
    others = [p for p in others if p.dtype == param.dtype and is_plain(p)]
    return _set_data(param, others[0].data) if others else None


@fault
def two_parameters_that_overlap(side, param):
    others = [p for p in side.params_in_groups() if p is not param and p.numel() > param.numel()]
    others = [p for p in others if p.dtype == param.dtype and p.is_contiguous() and is_plain(p)]
    if not others:
        return None
    return _set_data(param, others[0].data.view(-1)[1 : 1 + param.numel()].view(param.shape))


# ------------------------------------------------------------------------------------------------
# state


@refused
def buffer_of_another_shape(side, param):
    return _set_buffer(side, param, torch.ones(*param.shape, 2, dtype=param.dtype))


@refused
def buffer_of_as_many_elements(side, param):
    return _set_buffer(side, param, torch.ones(1, *param.shape, dtype=param.dtype))


@refused
def buffer_on_another_device(side, param):
    return _set_buffer(side, param, torch.ones(param.shape, dtype=param.dtype, device="meta"))


@refused
def expanded_buffer(side, param):
    if param.numel() < 2:
        return None
    return _set_buffer(side, param, torch.ones((), dtype=param.dtype).expand(param.shape))


@refused
def integer_buffer(side, param):
    return _set_buffer(side, param, torch.ones(param.shape, dtype=torch.int32))


@refused
def bool_buffer(side, param):
    return _set_buffer(side, param, torch.ones(param.shape, dtype=torch.bool))


@refused
def sparse_buffer(side, param):
    if param.ndim == 0:
        return None
    return _set_buffer(side, param, torch.ones(param.shape, dtype=param.dtype).to_sparse())


@fault
def zero_tensor_as_buffer(side, param):
    zeros = torch._efficientzerotensor(param.shape, dtype=param.dtype)
    return _set_buffer(side, param, zeros)


@fault
def inference_tensor_as_buffer(side, param):
    with torch.inference_mode():
        buffer = torch.ones(param.shape, dtype=param.dtype)
    return _set_buffer(side, param, buffer)


@fault
def conjugate_or_negative_buffer(side, param):
    return _set_buffer(side, param, torch._neg_view(torch.ones(param.shape, dtype=param.dtype)))


@fault
def buffer_that_requires_grad(side, param):
    buffer = torch.ones(param.shape, dtype=param.dtype, requires_grad=True)
    return _set_buffer(side, param, buffer)


@fault
def buffer_of_another_layout(side, param):
    transposed = torch.ones(param.shape[::-1], dtype=param.dtype)
    return _set_buffer(side, param, transposed.permute(list(range(param.ndim))[::-1]))


@fault
def buffer_that_is_the_parameter(side, param):
    return _set_buffer(side, param, param)


@fault
def buffer_that_overlaps_the_parameter(side, param):
    if not param.is_contiguous():
        return None
    memory = torch.ones(param.numel() + 1, dtype=param.dtype)
    undo_buffer = _set_buffer(side, param, memory[1:].view(param.shape))
    if undo_buffer is None:
        return None
    undo_data = _set_data(param, memory[:-1].view(param.shape))

    def undo():
        undo_data()
        undo_buffer()

    return undo


@fault
def buffer_that_is_the_gradient(side, param):
    return None if param.grad is None else _set_buffer(side, param, param.grad)


@fault
def buffer_that_overlaps_the_gradient(side, param):
    memory = torch.ones(param.numel() + 1, dtype=param.dtype)
    undo_buffer = _set_buffer(side, param, memory[1:].view(param.shape))
    if undo_buffer is None:
        return None
    undo_grad = _set_grad(param, memory[:-1].view(param.shape))

    def undo():
        undo_grad()
        undo_buffer()

    return undo


@fault
def two_parameters_with_one_buffer(side, param):
    buffers = [
        of_param.get("momentum_buffer")
        for other, of_param in side.optimizer.state.items()
        if other is not param and other.shape == param.shape
    ]
    return _set_buffer(side, param, buffers[0]) if buffers and buffers[0] is not None else None


@refused
def buffer_that_is_no_tensor(side, param):
    return _set_buffer(side, param, 3.0)


@refused
def average_of_another_dtype(side, param):
    return _set_buffer(side, param, torch.ones(param.shape, dtype=torch.float16), role="ema")


@refused
def master_copy_of_another_dtype(side, param):
    buffer = torch.ones(param.shape, dtype=torch.float64)
    return _set_buffer(side, param, buffer, role="master_param")


def _bad_count(value):
    def spoil(side, param):
        return _set_buffer(side, param, value, role="n_averaged")

    return spoil


for _value in (-1, 2**70, "1", 1.5, True):
    FAULTS[f"n_averaged={_value!r}"] = _bad_count(_value)


@fault
def state_that_is_no_dict(side, param):
    state = side.optimizer.state
    before = state.get(param)
    state[param] = [1, 2]

    def undo():
        del state[param]
        if before is not None:
            state[param] = before

    return undo


@fault
def state_in_a_plain_dict(side, param):
    optimizer = side.optimizer
    optimizer.state = dict(optimizer.state)

    def undo():
        optimizer.state = defaultdict(dict, optimizer.state)

    return undo


@fault
def empty_plain_dict_as_state(side, param):
    optimizer = side.optimizer
    optimizer.state = {}

    def undo():
        optimizer.state = defaultdict(dict, optimizer.state)

    return undo


# ------------------------------------------------------------------------------------------------
# groups


def _set_entry(side, key, value):
    group = side.optimizer.param_groups[-1]
    before = group[key]
    group[key] = value

    def undo():
        group[key] = before

    return undo


@fault
def parameter_that_is_no_tensor(side, param):
    params = side.optimizer.param_groups[-1]["params"]
    if not isinstance(params, list):
        return None
    params.append("weight")
    return params.pop


@fault
def parameter_listed_twice(side, param):
    params = side.optimizer.param_groups[-1]["params"]
    if not isinstance(params, list) or not params or not is_plain(params[0]):
        return None
    params.append(params[0])
    return params.pop


def _params_as(make):
    def spoil(side, param):
        return _set_entry(side, "params", make(side.optimizer.param_groups[-1]["params"]))

    return spoil


FAULTS["params as a tuple"] = _params_as(tuple)
for _name, _make in {
    "no list": lambda params: None,
    "a number": lambda params: 7,
    "a str": lambda params: "weights",
    "a set": lambda params: {1, 2},
    "a dict": dict.fromkeys,
    "dict values": lambda params: dict(enumerate(params)).values(),
    "one tensor": lambda params: torch.ones(3),
    "a generator": lambda params: (param for param in params),
    "a filter": lambda params: filter(None.__ne__, params),
    "an empty list": lambda params: [],
}.items():
    FAULTS[f"params as {_name}"] = _params_as(_make)


@refused
def empty_dict_as_group(side, param):
    side.optimizer.param_groups.append({})
    return side.optimizer.param_groups.pop


@refused
def group_that_is_no_dict(side, param):
    side.optimizer.param_groups.append("group")
    return side.optimizer.param_groups.pop


@refused
def group_without_an_option(side, param):
    group = side.optimizer.param_groups[-1]
    before = dict(group)
    del group["momentum"]

    def undo():
        group.clear()
        group.update(before)

    return undo


@fault
def group_with_an_unknown_entry(side, param):
    group = side.optimizer.param_groups[-1]
    group["layer"] = "head"

    def undo():
        del group["layer"]

    return undo


@fault
def groups_in_a_tuple(side, param):
    optimizer = side.optimizer
    before = optimizer.param_groups
    optimizer.param_groups = tuple(before)

    def undo():
        optimizer.param_groups = before

    return undo


def _bad_position(key, value):
    def spoil(side, param):
        return _set_entry(side, key, value)

    return spoil


for _key in ("step", "cycle", "T_cur", "T_i", "skipped_steps"):
    for _value in (-(2**63), 2**63, 2**70, 1.5, "1", None):
        FAULTS[f"{_key}={_value!r}"] = _bad_position(_key, _value)
        MUST_RAISE.add(f"{_key}={_value!r}")
