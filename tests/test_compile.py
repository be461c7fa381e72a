"""A training step under torch.compile equals the eager one, without recompilation."""

import copy

import pytest
import torch
from pair import assert_same_state
from torch._dynamo.utils import counters

from sgdr_fused import FusedSGDR, native
from sgdr_fused.compiled import TracedStepper

pytestmark = [
    pytest.mark.skipif(native.extension is None, reason=native.why_missing),
    # Dynamo itself causes these: by its imports at the first graph, and as it inspects the loss,
    # which is passed from one graph to the next.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # Dynamo warns of this on Python 3.13.0.
    pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning"),
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
