"""Tensors that are not what they seem: lazy views, shared memory, subclasses."""

import warnings

import pytest
import torch
from pair import assert_unchanged, draw, give_gradients, make_params, snapshot
from torch.utils._pytree import tree_map

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "T_0": 4}


def numbers(size, dtype=torch.float32, seed=0):
    return draw(size, dtype, torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------- lazy views


def conjugate(size, seed):
    return numbers(size, torch.complex64, seed).conj()


def negative(size, seed):
    return numbers(size, torch.complex64, seed).conj().imag


def negative_conjugate(size, seed):
    return torch._neg_view(conjugate(size, seed))


def conjugate_of_a_transpose(size, seed):
    return numbers((2, size), torch.complex64, seed).t().conj()


LAZY = [conjugate, negative, negative_conjugate, conjugate_of_a_transpose]


@pytest.mark.parametrize("lazy_grad", [False, True], ids=["grad", "lazy_grad"])
@pytest.mark.parametrize("make", LAZY)
def test_lazy_conjugate_or_negative_parameter_is_updated(backend, make, lazy_grad):
    """It was not updated at all, without a word; torch.optim.SGD updates it."""
    options = OPTIONS | {"ema_decay": 0.5}
    lazy = torch.nn.Parameter(make(33, 1))
    plain, theirs = (
        torch.nn.Parameter(lazy.detach().resolve_conj().resolve_neg().clone()) for _ in range(2)
    )
    assert lazy.is_conj() or lazy.is_neg()
    ours = FusedSGDR([lazy], backend=backend, **options)
    same = FusedSGDR([plain], backend=backend, **options)
    sgd = torch.optim.SGD(
        [theirs], **{k: v for k, v in options.items() if k not in ("T_0", "ema_decay")}
    )
    for step in range(6):
        grad = make(33, step + 2) if lazy_grad else torch.zeros_like(plain) + make(33, step + 2)
        for param in (lazy, plain, theirs):
            param.grad = grad
        sgd.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
        for optimizer in (ours, same, sgd):
            optimizer.step()
    assert torch.equal(lazy, plain)
    assert torch.equal(ours.state[lazy]["ema"], same.state[plain]["ema"])
    torch.testing.assert_close(lazy, theirs)


@pytest.mark.parametrize("make", LAZY)
def test_lazy_conjugate_or_negative_momentum_buffer_is_updated(backend, make):
    results = []
    for resolved in (True, False):
        buffer = make(33, 1)
        param = torch.nn.Parameter(
            torch.ones_like(buffer.resolve_conj().resolve_neg(), dtype=buffer.dtype)
        )
        optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
        if resolved:
            buffer = buffer.resolve_conj().resolve_neg()
        optimizer.state[param]["momentum_buffer"] = buffer
        for step in range(3):
            param.grad = numbers(param.shape, param.dtype, step)
            optimizer.step()
        assert optimizer.state[param]["momentum_buffer"] is buffer
        results.append((param, buffer))
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
def test_gradient_of_integers_is_read(backend, dtype):
    """param.grad_dtype = None allows one."""
    param, expected = make_params([33], seed=3)[0], make_params([33], seed=3)[0]
    optimizers = [FusedSGDR([p], backend=backend, **OPTIONS) for p in (param, expected)]
    param.grad_dtype = None
    param.grad = torch.arange(33).to(dtype)
    expected.grad = param.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize("kind", ["zero", "inference"])
def test_gradient_without_memory_or_from_inference_mode_is_read(backend, kind):
    param, expected = make_params([33], seed=3)[0], make_params([33], seed=3)[0]
    optimizers = [FusedSGDR([p], backend=backend, **OPTIONS) for p in (param, expected)]
    for step in range(3):
        value = torch.zeros(33) if kind == "zero" else numbers(33, seed=step)
        expected.grad = value.clone()
        if kind == "zero":
            param.grad = torch._efficientzerotensor([33])
        else:
            with torch.inference_mode():
                param.grad = value.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize("shape", [(9,), (5, 7), (7, 5)], ids=str)
@pytest.mark.parametrize("options", [{"momentum": 0}, {}, {"nesterov": False, "dampening": 0.3}])
def test_expanded_gradient_counts_as_a_copy_of_its_values(backend, shape, options):
    """torch rounds twice where an operand is expanded, and so did the reference."""
    options = OPTIONS | {"weight_decay": 0} | options
    if not options["momentum"]:
        options["nesterov"] = False
    for dim in range(len(shape)):
        expanded, copied = (make_params([shape])[0] for _ in range(2))
        optimizers = [FusedSGDR([p], backend=backend, **options) for p in (expanded, copied)]
        for step in range(3):
            narrow = tuple(1 if i == dim else n for i, n in enumerate(shape))
            expanded.grad = numbers(narrow, seed=step).expand(shape)
            copied.grad = expanded.grad.clone(memory_format=torch.contiguous_format)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(expanded, copied)


# ----------------------------------------------------------------------------------- shared memory


def tied(size):
    """Two parameters tied by .data, and two that torch.optim.SGD updates."""
    both = []
    for _ in range(2):
        first = torch.nn.Parameter(numbers(size))
        second = torch.nn.Parameter(torch.zeros(size))
        second.data = first.data
        both.append([first, second])
    return both


@pytest.mark.parametrize("size", [33, 200_000], ids=["small", "large"])
def test_parameters_tied_by_data_are_updated_in_order(backend, size):
    """As by torch.optim.SGD's for-loop; threads must not update them at the same time."""
    ours, theirs = tied(size)
    optimizer = FusedSGDR(ours, lr=0.1, momentum=0.9, T_0=4, backend=backend)
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False, fused=False)
    for step in range(5):
        give_gradients(step, ours)
        give_gradients(step, theirs)
        sgd.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        sgd.step()
        assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("begin", [0, 5], ids=["whole", "in_part"])
@pytest.mark.parametrize("kind", ["gaps", "negative"])
def test_copied_parameters_tied_by_data_are_updated_in_order(kind, begin):
    """The native step wrote back a copy over the other's update."""
    both = []
    for _ in range(2):
        base = numbers(34)[::2]
        both.append([torch.nn.Parameter(base.clone()) for _ in range(2)])
        both[-1][0].data = base = base.contiguous() if kind == "negative" else base
        tied = torch._neg_view(base) if kind == "negative" else base
        both[-1][1] = torch.nn.Parameter(tied[begin:])
    ours, theirs = both
    optimizer = FusedSGDR(ours, lr=0.1, momentum=0.9, T_0=9)
    reference = FusedSGDR(theirs, lr=0.1, momentum=0.9, T_0=9, backend="reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference takes over
        for step in range(3):
            give_gradients(step, ours)
            give_gradients(step, theirs)
            optimizer.step()
            reference.step()
    assert torch.equal(ours[0], theirs[0])


def test_zero_tensor_as_buffer_of_a_copied_parameter_is_refused_before_anything_is_written(backend):
    """torch refused to write the copy back, after the other parameters' updates."""
    params = [torch.nn.Parameter(numbers(5)), torch.nn.Parameter(torch._neg_view(numbers(5)))]
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=4, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    optimizer.state[params[1]]["momentum_buffer"] = torch._efficientzerotensor([5])
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="momentum_buffer is a ZeroTensor"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_parameters_that_overlap_in_part_are_updated_in_order(backend):
    results = []
    for chosen in (backend, "reference"):
        memory = numbers(300_000)
        params = [torch.nn.Parameter(memory[i * 1000 : i * 1000 + 200_000]) for i in range(3)]
        optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=4, backend=chosen)
        for step in range(3):
            give_gradients(step, params)
            optimizer.step()
        results.append(memory)
    assert torch.equal(*results)


def test_empty_swap_ema_changes_no_tied_weights(backend):
    """The second one's saved weights were the first one's average."""
    params, _ = tied(5)
    optimizer = FusedSGDR(params, lr=0.1, T_0=9, ema_decay=0.9, backend=backend)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    before = snapshot(optimizer, params)
    with optimizer.swap_ema():
        assert not torch.equal(params[0], before["params"][0])
    assert_unchanged(before, optimizer, params)


SHARING = {
    "the_parameter": lambda param: param.detach(),
    "the_gradient": lambda param: param.grad,
    "a_shift_of_the_parameter": lambda param: memory_of(param)[3:20],
    "a_shift_of_the_gradient": lambda param: memory_of(param.grad)[3:20],
}


def memory_of(tensor):
    return torch.empty(0).set_(tensor.untyped_storage())


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize("role", ["momentum_buffer", "ema"])
def test_state_that_shares_memory_with_its_parameter_is_refused(backend, role, share):
    """Each element would be read after it was written, in an order that depends on the backend."""
    params = make_params([9, 17])
    params[1].data = torch.ones(40)[2:19]
    optimizer = FusedSGDR(params, ema_decay=0.5, backend=backend, **OPTIONS)
    give_gradients(0, params)
    optimizer.step()
    give_gradients(1, params)
    params[1].grad.data = torch.ones(40)[2:19]
    optimizer.state[params[1]][role] = share(params[1])
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=rf'\["params"\]\[1\]\'s {role} shares memory with its'):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


def test_state_that_is_its_parameter_with_gaps_is_refused(backend):
    param = torch.nn.Parameter(torch.ones(34)[::2])
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
    optimizer.state[param]["momentum_buffer"] = param.detach()
    give_gradients(0, [param])
    with pytest.raises(ValueError, match="momentum_buffer shares memory with its parameter"):
        optimizer.step()
    assert torch.equal(param, torch.ones(17))


def test_state_tensors_that_share_memory_are_refused(backend):
    (param,) = make_params([17])
    optimizer = FusedSGDR([param], ema_decay=0.5, backend=backend, **OPTIONS)
    give_gradients(0, [param])
    optimizer.step()
    of_param = optimizer.state[param]
    of_param["ema"] = of_param["momentum_buffer"]
    with pytest.raises(ValueError, match="ema shares memory with its momentum_buffer"):
        optimizer.step()


def test_gradient_may_be_the_parameter_but_not_a_shift_of_it(backend):
    param = torch.nn.Parameter(torch.ones(40)[2:19])
    optimizer = FusedSGDR([param], lr=0.5, T_0=9, backend=backend)
    param.grad = param.detach()
    optimizer.step()
    assert param.tolist() == [0.5] * 17
    param.grad = memory_of(param)[3:20]
    with pytest.raises(ValueError, match="gradient shares memory with its parameter"):
        optimizer.step()
    assert param.tolist() == [0.5] * 17


def test_gradient_may_be_the_parameter_that_has_a_master_copy(backend):
    param = torch.nn.Parameter(torch.full([3], 1.5, dtype=torch.float16))
    optimizer = FusedSGDR([param], lr=0.125, T_0=3, master_weights=True, backend=backend)
    param.grad = param.detach()
    optimizer.step()
    assert torch.equal(optimizer.state[param]["master_param"], torch.full([3], 1.5 - 1.5 * 0.125))
    assert torch.equal(param, torch.full([3], 1.5 - 1.5 * 0.125, dtype=torch.float16))


# --------------------------------------------------------------------------------------- subclasses


class Wrapper(torch.Tensor):
    """A tensor subclass like DTensor, whose ``to_local()`` does what a test asks for."""

    action = staticmethod(lambda: None)

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, requires_grad=requires_grad
        )

    def __init__(self, inner, requires_grad=False):
        self.inner = inner

    def to_local(self):
        Wrapper.action()
        return self.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x, (args, kwargs or {}))
        result = func(*inner[0], **inner[1])
        makes_state = func in (torch.ops.aten.empty_like.default, torch.ops.aten.zeros_like.default)
        return Wrapper(result) if makes_state else result


@pytest.mark.parametrize("size", [3, 200_000], ids=["small", "large"])
@pytest.mark.parametrize("what", ["grad", "data", "state"])
def test_subclass_that_drops_tensors_while_they_are_gathered(monkeypatch, size, what):
    """What the step had gathered was freed while it was in use."""
    params = [torch.nn.Parameter(torch.ones(size)) for _ in range(3)]
    last = Wrapper(torch.ones(size), requires_grad=True)
    optimizer = FusedSGDR([*params, last], lr=0.5, momentum=0.9, T_0=99, backend="native")
    values = [param.detach() for param in params]

    def give_ones():
        for param in params:
            param.grad = torch.ones(size)
        last.grad = Wrapper(torch.ones(size))

    give_ones()
    optimizer.step()
    give_ones()

    def drop():
        for param in params:
            if what == "grad":
                param.grad = None
            elif what == "data":
                param.data = torch.zeros(1)
            else:
                optimizer.state.pop(param, None)
        _ = [torch.full((size,), float("nan")) for _ in range(9)]

    monkeypatch.setattr(Wrapper, "action", staticmethod(drop))
    optimizer.step()
    for value in (*values, last.inner):
        torch.testing.assert_close(value, torch.full([size], -0.45), rtol=0, atol=1e-3)


def test_sharded_gradient_of_a_plain_parameter_is_refused(backend, monkeypatch):
    """Its error was an AttributeError, after the reference had updated other parameters."""
    params = make_params([9, 17])
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS)
    give_gradients(0, params)
    before = snapshot(optimizer, params)
    sharded = Wrapper(torch.ones(17))
    sharded.placements, sharded.device_mesh = ("Shard(0)",), "a mesh"
    params[1].grad = sharded
    with pytest.raises(
        ValueError, match=r'\["params"\]\[1\] is a plain tensor, but its gradient a'
    ):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


# -------------------------------------------------------------------------------------- other kinds


def mkldnn():
    return torch.ones(4, 4).to_mkldnn().requires_grad_(), torch.ones(4, 4).to_mkldnn()


def jagged():
    rows = [torch.ones(2), torch.ones(3)]
    param = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    return param, torch.ones_like(param)


@pytest.mark.parametrize("make", [mkldnn, jagged])
def test_parameter_of_another_layout_is_refused(backend, make):
    (first,) = make_params([9])
    second, second.grad = make()
    give_gradients(0, [first])
    optimizer = FusedSGDR([first, second], backend=backend, **OPTIONS)
    value = first.detach().clone()
    with pytest.raises(ValueError, match=rf"layout {second.layout}.*use torch.optim.SGD"):
        optimizer.step()
    assert torch.equal(first, value)


def test_average_of_a_wrong_dtype_is_refused_at_every_step(backend):
    """With "swa" the native step saw it at the end of a cycle only."""
    (param,) = make_params([9])
    optimizer = FusedSGDR([param], lr=0.1, T_0=5, ema_decay="swa", backend=backend)
    give_gradients(0, [param])
    optimizer.step()
    optimizer.state[param]["ema"] = torch.zeros(9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"of dtype torch\.float64; it must be of torch\.float32"):
        optimizer.step()


def test_momentum_dtype_set_later_on_a_complex_parameter_is_refused(backend):
    param = torch.nn.Parameter(numbers(9, torch.complex64))
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
    param.grad = numbers(9, torch.complex64, 1)
    optimizer.step()
    optimizer.param_groups[0]["momentum_dtype"] = torch.bfloat16
    with pytest.raises(ValueError, match=r"momentum_dtype=torch\.bfloat16 is for real"):
        optimizer.step()


def test_momentum_buffer_resized_to_another_shape_is_refused(backend):
    (param,) = make_params([(2, 3)])
    optimizer = FusedSGDR([param], backend=backend, **OPTIONS)
    give_gradients(0, [param])
    optimizer.step()
    optimizer.state[param]["momentum_buffer"].resize_(3, 2)
    with pytest.raises(ValueError, match=r"momentum_buffer of shape \(3, 2\)"):
        optimizer.step()


def test_invalid_option_is_an_error_of_a_skipped_step_too(backend):
    optimizer = FusedSGDR(make_params([9]), backend=backend, **OPTIONS)
    optimizer.param_groups[0]["momentum"] = -1
    optimizer.found_inf = torch.tensor(1.0)
    with pytest.raises(ValueError, match="momentum value: -1"):
        optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 0


def test_lazy_gradient_is_read_within_inference_mode(backend):
    params = make_params([33]) + make_params([33])
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS)
    for step in range(3):
        params[0].grad = numbers(33, torch.complex64, step).conj().imag
        params[1].grad = params[0].grad.resolve_neg()
        with torch.inference_mode():
            optimizer.step()
        assert torch.equal(*params)
        assert not any(optimizer.state[p]["momentum_buffer"].is_inference() for p in params)
    optimizer.step()
    assert torch.equal(*params)
