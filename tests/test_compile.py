"""A training step under torch.compile equals the eager one, without recompilation."""

import copy

import pytest
import torch
from pair import assert_same_state
from torch._dynamo.utils import counters
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sgdr_fused import FusedSGDR, native
from sgdr_fused.compiled import TracedStepper

pytestmark = [
    pytest.mark.skipif(native.extension is None, reason=native.why_missing),
    # Dynamo itself causes these: by its imports at the first graph, and as it inspects the loss,
    # which is passed from one graph to the next.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 2, "T_mult": 2}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend of torch.compile that runs graphs unchanged and keeps their code."""

    def __init__(self):
        self.code = []

    def __call__(self, graph, inputs):
        self.code.append(graph.code)
        return graph.forward

    @property
    def steps(self):
        """The graphs that take a step."""
        return [code for code in self.code if "fused_step_" in code]


def models(count=2):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return [copy.deepcopy(model) for _ in range(count)]


def training_step(model, optimizer):
    def run(x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return run


def batch(step):
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step))


def breaks():
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"momentum": 0.0}, {"reset_momentum": True, "maximize": True}],
    ids=str,
)
def test_compiled_training_step_equals_the_eager_one(options):
    ours, usual = models()
    compiled = FusedSGDR(ours.parameters(), **OPTIONS | options)
    eager = FusedSGDR(usual.parameters(), **OPTIONS | options)
    graphs = Graphs()
    steps = (
        torch.compile(training_step(ours, compiled), backend=graphs),
        training_step(usual, eager),
    )
    for i in range(15):  # over three restarts
        for step in steps:
            step(batch(i))
        assert compiled.get_last_lr() == eager.get_last_lr()
        assert (compiled.cycle, compiled.is_cycle_end) == (eager.cycle, eager.is_cycle_end)
    assert len(graphs.steps) == 1
    assert graphs.steps[0].count("ops.sgdr_fused.fused_step_(") == 1
    assert isinstance(compiled._stepper, TracedStepper)
    for optimizer, model in ((compiled, ours), (eager, usual)):
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(list(model.parameters())) == 4
    assert_same_state(compiled, list(ours.parameters()), eager, list(usual.parameters()))


def test_compiled_step_does_not_recompile_as_the_lr_changes():
    ours, theirs = models()
    optimizer = FusedSGDR(ours.parameters(), **OPTIONS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        step = torch.compile(training_step(ours, optimizer), backend="eager")
        for i in range(15):
            step(batch(i))
    our_breaks, our_graphs = breaks(), counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    step = torch.compile(training_step(theirs, sgd), backend="eager")
    for i in range(3):
        step(batch(i))
    assert our_breaks <= breaks()
    assert our_graphs <= counters["stats"]["unique_graphs"]


def test_inductor_step_equals_the_eager_one():
    ours, usual = models()
    compiled = FusedSGDR(ours.parameters(), **OPTIONS)
    eager = FusedSGDR(usual.parameters(), **OPTIONS)

    def step_of(optimizer):
        return lambda: optimizer.step()

    compiled_step = torch.compile(step_of(compiled))
    for i in range(6):
        for model in (ours, usual):
            model(batch(i)).square().mean().backward()
        for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
            p.grad = q.grad.clone()
        compiled_step()
        eager.step()
        for optimizer in (compiled, eager):
            optimizer.zero_grad()
    for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
        assert torch.equal(p, q)
    assert breaks() == 0


def test_eager_and_compiled_steps_may_take_turns():
    ours, usual = models()
    compiled = FusedSGDR(ours.parameters(), **OPTIONS)
    eager = FusedSGDR(usual.parameters(), **OPTIONS)
    in_graph = torch.compile(training_step(ours, compiled), backend="eager")
    out_of_graph = training_step(ours, compiled)
    usual_step = training_step(usual, eager)
    for i in range(12):
        (out_of_graph if i % 3 == 0 else in_graph)(batch(i))
        usual_step(batch(i))
        assert compiled.get_last_lr() == eager.get_last_lr(), i
    for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
        assert torch.equal(p, q)


def test_changes_between_steps_apply_to_the_compiled_step():
    ours, usual = models()
    compiled = FusedSGDR(ours.parameters(), **OPTIONS)
    eager = FusedSGDR(usual.parameters(), **OPTIONS)
    steps = [
        torch.compile(training_step(ours, compiled), backend="eager"),
        training_step(usual, eager),
    ]
    actions = {
        2: lambda o: o.restart(),
        4: lambda o: o.seek(9),
        6: lambda o: o.param_groups[0].update(lr=0.05),
        8: lambda o: o.param_groups[0].update(initial_lr=0.2),
        10: lambda o: o.param_groups[0].update(momentum=0.5),
    }
    for i in range(13):
        for optimizer in (compiled, eager):
            if i in actions:
                actions[i](optimizer)
        for step in steps:
            step(batch(i))
        assert compiled.get_last_lr() == eager.get_last_lr(), i
    for p, q in zip(ours.parameters(), usual.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1},
        {"ema_decay": 0.9},
        {"momentum_dtype": torch.bfloat16},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_options_that_the_op_lacks_run_outside_the_graph(options):
    ours, usual = models()
    compiled = FusedSGDR(ours.parameters(), **OPTIONS, **options)
    eager = FusedSGDR(usual.parameters(), **OPTIONS, **options)
    graphs = Graphs()
    steps = [
        torch.compile(training_step(ours, compiled), backend=graphs),
        training_step(usual, eager),
    ]
    for i in range(7):
        for step in steps:
            step(batch(i))
    assert not graphs.steps
    assert_same_state(compiled, list(ours.parameters()), eager, list(usual.parameters()))


def test_skipped_compiled_step_changes_nothing():
    (model,) = models(1)
    optimizer = FusedSGDR(model.parameters(), **OPTIONS)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for i, bad in enumerate([True, False, True, True, False]):
        model(batch(i)).square().mean().backward()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(float(bad))
        before = [p.detach().clone() for p in model.parameters()]
        step()
        unmoved = list(map(torch.equal, model.parameters(), before))
        assert unmoved == [bad] * 4, i
    assert optimizer.state_dict()["param_groups"][0]["step"] == 2
    assert optimizer.skipped_steps == 3


def run_twice(changes, steps=8):
    """Trains one parameter with a compiled step and one with an eager step, and compares them.

    Args:
        changes: What is done to the optimizer before a step, by the step's index.
        steps: Number of steps.
    """
    seen = []
    for compile_or_not in (lambda f: torch.compile(f, backend="eager"), lambda f: f):
        torch._dynamo.reset()
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
        optimizer = FusedSGDR(params, **OPTIONS)
        step = compile_or_not(lambda optimizer=optimizer: optimizer.step())
        lrs = []
        for i in range(steps):
            changes.get(i, lambda _: None)(optimizer)
            for factor, param in enumerate(optimizer.param_groups[0]["params"], 1):
                param.grad = torch.linspace(-3, 2, 6) * factor * (i + 1)
            step()
            lrs += optimizer.get_last_lr()
        params += optimizer.param_groups[0]["params"]
        seen.append((lrs, optimizer.skipped_steps, [param.detach() for param in params]))
    (lrs, skipped, params), (eager_lrs, eager_skipped, eager_params) = seen
    assert lrs == eager_lrs
    assert skipped == eager_skipped
    assert all(map(torch.equal, params, eager_params))


def setting(**attributes):
    """A change that sets attributes of the optimizer, or deletes those that are to be None."""

    def change(optimizer):
        for name, value in attributes.items():
            delattr(optimizer, name) if value is None else setattr(optimizer, name, value)

    return change


def replace_first_param(optimizer):
    optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(6))


SCALED = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}


@pytest.mark.parametrize(
    "changes",
    {
        "max_grad_norm": {3: setting(max_grad_norm=0.5)},
        "max_grad_norm_for_a_while": {
            3: setting(max_grad_norm=0.5),
            5: lambda o: setattr(o, "max_grad_norm", None),
        },
        "backend": {3: setting(backend="reference")},
        "grad_scale": {3: setting(**SCALED)},
        "grad_scale_for_a_while": {
            3: setting(**SCALED),
            5: setting(grad_scale=None, found_inf=None),
        },
        "grad_scale_first": {0: setting(**SCALED), 4: setting(grad_scale=None, found_inf=None)},
        "found_inf": {
            3: setting(found_inf=torch.tensor(0.0)),
            4: setting(found_inf=torch.tensor(1.0)),
            6: setting(found_inf=None),
        },
        "grad_scale_as_a_float": {
            3: setting(grad_scale=2.0, found_inf=0.0),
            5: setting(grad_scale=4.0),
            6: setting(found_inf=1.0),
        },
        "lr_as_a_tensor": {
            3: lambda o: o.param_groups[0].update(lr=torch.tensor(0.3, dtype=torch.float64))
        },
        "T_cur_as_a_tensor": {3: lambda o: o.param_groups[0].update(T_cur=torch.tensor(3))},
        "params_reversed": {3: lambda o: o.param_groups[0]["params"].reverse()},
        "param_replaced": {3: replace_first_param},
        "load_state_dict": {3: lambda o: o.load_state_dict(o.state_dict())},
    }.items(),
    ids=lambda item: item[0],
)
def test_compiled_step_notices_a_change_made_after_the_compilation(changes):
    run_twice(changes[1])


def test_compiled_step_notices_skip_nonfinite():
    """Set after an optimizer's step is compiled, it skips as an eager step would."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGDR([param], **OPTIONS)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for gradient in (1.0, 1.0):
        param.grad = torch.full((3,), gradient)
        step()
    optimizer.skip_nonfinite = True
    before = param.detach().clone()
    param.grad = torch.full((3,), torch.nan)
    step()
    assert torch.equal(param, before)
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "overflow"])
def test_grad_scaler_that_starts_after_the_compilation_unscales(bad):
    """scaler.step() calls the method that the user has compiled."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = FusedSGDR([param], lr=1.0, T_0=1000, anneal="epoch", steps_per_epoch=1000)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        optimizer.zero_grad()
        param.sum().backward()
        optimizer.step()
    assert param.item() == -2
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(param.sum() * (torch.inf if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert param.item() == (-2 if bad else -4)
    assert optimizer.skipped_steps == (2 if bad else 0)
    optimizer.zero_grad()
    param.sum().backward()
    optimizer.step()
    assert param.item() == (-3 if bad else -5)


def fused_sgdr(params):
    return FusedSGDR(params, lr=0.1, T_0=2)


def torchs_sgd(params):
    return torch.optim.SGD(params, lr=0.1)


@pytest.mark.parametrize("make_optimizer", [fused_sgdr, torchs_sgd])
@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda _, hook: register_optimizer_step_pre_hook(hook),
        lambda _, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["pre", "post", "global_pre", "global_post"],
)
def test_step_hook_registered_after_the_compilation_is_called(make_optimizer, register):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([param])
    step = torch.compile(lambda: optimizer.step(), backend="eager")

    def take_steps():
        for _ in range(2):
            param.grad = torch.ones(3)
            step()

    take_steps()
    calls = []
    handle = register(optimizer, lambda *_: calls.append(1))
    take_steps()
    assert len(calls) == 2
    handle.remove()
    take_steps()
    assert len(calls) == 2


def test_restart_hook_registered_after_the_compilation_is_called():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGDR([param], lr=0.1, T_0=2)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    cycles = []
    for i in range(8):
        if i == 3:
            optimizer.register_restart_hook(lambda o: cycles.append(o.cycle))
        param.grad = torch.ones(3)
        step()
    assert cycles == [2, 3, 4]


def test_step_in_backward_begun_after_the_compilation_updates_once():
    ours, usual = models()
    optimizers = [FusedSGDR(model.parameters(), **OPTIONS) for model in (ours, usual)]

    def train(model, optimizer):
        def step(x):
            model(x).square().mean().backward()
            optimizer.step()

        return step

    steps = [
        torch.compile(train(ours, optimizers[0]), backend="eager"),
        train(usual, optimizers[1]),
    ]
    handles = []
    for i in range(10):
        for optimizer, step in zip(optimizers, steps, strict=True):
            if i == 3:
                optimizer.zero_grad()
                handles.append(optimizer.step_in_backward())
            elif i == 6:
                handles.pop(0).remove()
            elif i != 4 and i != 5:
                optimizer.zero_grad()
            step(batch(i))
    assert optimizers[0].get_last_lr() == optimizers[1].get_last_lr()
    assert all(map(torch.equal, ours.parameters(), usual.parameters()))


def test_compiled_step_within_swap_ema_is_an_error():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGDR([param], **OPTIONS)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    param.grad = torch.ones(3)
    step()
    before = param.detach().clone()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match=r"within a swap_ema\(\) block"):
        step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_step_of_a_subclass_runs_once_when_compiled(options):
    calls = []

    class Counting(FusedSGDR):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Counting([param], **OPTIONS, **options)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(3):
        param.grad = torch.ones(3)
        step()
    assert len(calls) == 3
    assert int(optimizer.param_groups[0]["step"]) == 3
