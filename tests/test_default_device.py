"""torch.set_default_device() and set_default_dtype() change nothing of a training."""

import ast
import copy
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pair import same_bits
from torch.utils._device import _device_constructors

import sgdr_fused
from sgdr_fused import FusedSGDR, native
from sgdr_fused.compiled import TracedStepper
from sgdr_fused.snapshots import Snapshots

GROUPS = {
    "plain": {},
    "nesterov": {"momentum": 0.9, "nesterov": True, "ema_decay": 0.9},
    "swa": {"momentum": 0.9, "ema_decay": "swa", "reset_momentum": True},
    "rounded": {"momentum": 0.9, "momentum_dtype": torch.bfloat16, "stochastic_rounding": True},
    "master": {"momentum": 0.9, "master_weights": True, "decoupled_weight_decay": True},
}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)


@contextmanager
def default_device_and_dtype(device, dtype):
    """Within the block, ``torch.zeros(1)`` has this device and dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(params=[("meta", torch.float64), ("meta", torch.float16)], ids=str)
def other_defaults(request):
    """A context with another default device and dtype."""
    return lambda: default_device_and_dtype(*request.param)


def draw(shape, dtype, generator):
    return torch.randn(shape, dtype=dtype, device="cpu", generator=generator)


def new_params(dtypes=DTYPES):
    generator = torch.Generator("cpu").manual_seed(1)
    return [draw((5, 40), dtype, generator).requires_grad_() for dtype in dtypes]


def give_grads(optimizer, step):
    generator = torch.Generator("cpu").manual_seed(100 + step)
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = draw(param.shape, param.dtype, generator)


def train(backend):
    """A training that uses every option and method; returns what is to be seen of it."""
    optimizer = FusedSGDR(
        [
            {"params": new_params(DTYPES[:-1] if name == "rounded" else DTYPES), **options}
            for name, options in GROUPS.items()
        ],
        lr=0.1,
        weight_decay=1e-2,
        T_0=2,
        T_mult=2,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        backend=backend,
    )
    seen = []

    def step(i):
        give_grads(optimizer, i)
        optimizer.step()
        seen.extend(optimizer.get_last_lr())
        seen.append(optimizer.grad_norm.item())

    for i in range(4):
        step(i)
    optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
    optimizer.step()
    optimizer.restart()
    step(5)
    optimizer.seek(9)
    optimizer.load_state_dict(optimizer.state_dict())
    step(6)
    with optimizer.swap_ema():
        seen += [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    optimizer = pickle.loads(pickle.dumps(copy.deepcopy(optimizer)))
    step(7)
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
    optimizer.grad_scale, optimizer.found_inf = 2.0, 0.0
    give_grads(optimizer, 8)
    optimizer.step()
    seen.append(optimizer.skipped_steps)
    seen += [p.detach() for g in optimizer.param_groups for p in g["params"]]
    for state in optimizer.state_dict()["state"].values():
        seen += state.values()
    return seen


def assert_same(ours, theirs):
    """Numbers are equal, tensors have equal bits."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, torch.Tensor):
            assert same_bits(mine, other)
        else:
            assert mine == other


def test_training_is_the_same_with_another_default_device_and_dtype(backend, other_defaults):
    usual = train(backend)
    with other_defaults():
        assert_same(train(backend), usual)


def take_over_a_pair(backend):
    (param,) = new_params([torch.float32])
    sgd = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, T_0=3)
    give_grads(sgd, 0)
    sgd.step()
    scheduler.step()
    optimizer = FusedSGDR.from_pair(sgd, scheduler, backend=backend)
    give_grads(optimizer, 1)
    optimizer.step()
    sgd, scheduler = optimizer.to_pair()
    give_grads(sgd, 2)
    sgd.step()
    return [param.detach(), *optimizer.get_last_lr(), sgd.state[param]["momentum_buffer"]]


def test_pair_is_taken_over_with_another_default_device_and_dtype(backend, other_defaults):
    usual = take_over_a_pair(backend)
    with other_defaults():
        assert_same(take_over_a_pair(backend), usual)


def step_in_backward(backend):
    params = new_params([torch.float32, torch.bfloat16])
    optimizer = FusedSGDR(
        params, lr=0.1, momentum=0.9, T_0=2, stochastic_rounding=True, backend=backend
    )
    optimizer.step_in_backward()
    for _ in range(3):
        sum(p.float().square().sum() for p in params).backward()
        optimizer.step()
    return [p.detach() for p in params]


def test_step_in_backward_is_the_same_with_another_default_device(backend, other_defaults):
    usual = step_in_backward(backend)
    with other_defaults():
        assert_same(step_in_backward(backend), usual)


def snapshots(folder):
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2, dtype=torch.float32)
    optimizer = FusedSGDR(model.parameters(), lr=0.1, T_0=2)
    kept = Snapshots(model, optimizer, folder=folder)
    for i in range(6):
        give_grads(optimizer, i)
        optimizer.step()
        kept.update()
    generator = torch.Generator("cpu").manual_seed(1)
    return [kept.predict(draw((3, 4), torch.float32, generator))]


@pytest.mark.parametrize("on_disk", [False, True], ids=["in_memory", "on_disk"])
def test_snapshots_are_the_same_with_another_default_device(tmp_path, on_disk, other_defaults):
    usual = snapshots(tmp_path / "usual" if on_disk else None)
    with other_defaults():
        assert_same(snapshots(tmp_path / "other" if on_disk else None), usual)


def compiled_steps():
    torch._dynamo.reset()
    params = new_params([torch.float32])
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=2)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for i in range(3):
        give_grads(optimizer, i)
        step()
    # An eager step of the stepper that torch.compile has left, with more than a float16 holds.
    optimizer.grad_scale, optimizer.found_inf = 1e5, 0.0
    give_grads(optimizer, 3)
    optimizer.step()
    assert isinstance(optimizer._stepper, TracedStepper)
    return [*optimizer.get_last_lr(), params[0].detach()]


@pytest.mark.skipif(native.extension is None, reason=native.why_missing)
# Dynamo's imports cause it.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_steps_are_the_same_with_another_default_device(other_defaults):
    usual = compiled_steps()
    with other_defaults():
        assert_same(compiled_steps(), usual)


def test_every_new_tensor_names_its_device():
    """Each call in the package to a function that heeds the default device."""
    makers = {maker.__name__ for maker in _device_constructors()}
    missing = [
        f"{path.name}:{call.lineno}"
        for path in Path(sgdr_fused.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in makers
        and "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not missing
