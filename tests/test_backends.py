"""Which backend takes the step, the errors and warnings of the native one, and threads."""

import sys
import threading
import warnings
import weakref

import pytest
import torch
from pair import (
    Pair,
    assert_same,
    assert_unchanged,
    copies_of,
    draw,
    give_gradients,
    make_params,
    snapshot,
)

from sgdr_fused import CosineWarmRestarts, FusedSGDR, native

OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "T_0": 3}
needs_native = pytest.mark.skipif(native.extension is None, reason=native.why_missing)


# ------------------------------------------------------------------------------- without extension


@pytest.fixture
def no_extension(monkeypatch):
    """The state after an installation without a compiler."""
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "why_missing", "it was never built")


@pytest.mark.usefixtures("no_extension")
def test_missing_extension_warns_once_and_results_are_right():
    ours, theirs = make_params([33]), make_params([33])
    optimizer, pair = FusedSGDR(ours, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(5):
        give_gradients(step, ours, theirs)
        if step == 0:
            with pytest.warns(UserWarning, match=r"several times slower.*: it was never built"):
                optimizer.step()
        else:
            optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)


@pytest.mark.usefixtures("no_extension")
def test_missing_native_backend_is_an_error():
    with pytest.raises(RuntimeError, match=r"backend=\"native\" is not available: it was never"):
        FusedSGDR(make_params([3]), backend="native", **OPTIONS)


@pytest.mark.usefixtures("no_extension")
def test_reference_backend_needs_no_extension(recwarn):
    params = make_params([3])
    optimizer = FusedSGDR(params, backend="reference", **OPTIONS)
    give_gradients(0, params)
    optimizer.step()
    assert not recwarn.list


# --------------------------------------------------- tensors that the native backend cannot update


class Tagged(torch.Tensor):
    """A tensor subclass with its own dispatch, whose memory the native step cannot reach."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x):
            return x.inner if isinstance(x, Tagged) else x

        kwargs = {key: unwrap(value) for key, value in (kwargs or {}).items()}
        result = func(*(unwrap(arg) for arg in args), **kwargs)
        if args and isinstance(args[0], Tagged) and func._schema.is_mutable:
            return args[0]
        return Tagged(result) if isinstance(result, torch.Tensor) else result


def tagged_params(values):
    return [torch.nn.Parameter(Tagged(v.detach().clone())) for v in values]


def test_unknown_tensor_subclass_falls_back_to_the_reference_and_warns_once():
    theirs = make_params([9, 5])
    ours = tagged_params(theirs)
    optimizer, pair = FusedSGDR(ours, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(5):
        give_gradients(step, theirs)
        for our, their in zip(ours, theirs, strict=True):
            our.grad = Tagged(their.grad.clone())
        if step == 0:
            with pytest.warns(UserWarning, match="slower than torch.optim.SGD") as caught:
                optimizer.step()
            assert len(caught) == 1
            assert caught[0].filename == __file__
            assert "torch.float32 on cpu" in str(caught[0].message)
        else:
            optimizer.step()
        pair.step()
        for our, their in zip(ours, theirs, strict=True):
            assert torch.equal(our.inner, their), step


@needs_native
def test_native_backend_refuses_an_unknown_tensor_subclass_and_changes_nothing():
    plain = make_params([9])
    ours = tagged_params(make_params([5]))
    optimizer = FusedSGDR([*plain, *ours], backend="native", **OPTIONS)
    give_gradients(0, plain)
    ours[0].grad = Tagged(torch.ones(5))
    before = snapshot(optimizer, plain)
    with pytest.raises(RuntimeError, match=r"backend=\"native\" cannot take this step.*Parameter"):
        optimizer.step()
    assert_unchanged(before, optimizer, plain)
    ours[0].grad = None
    optimizer.step()


@needs_native
@pytest.mark.parametrize("device", ["meta"])
def test_native_backend_refuses_an_unsupported_device(device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match=f"on {device}"):
        FusedSGDR([param], backend="native", **OPTIONS).step()


@needs_native
def test_unsupported_device_falls_back_to_the_reference():
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = FusedSGDR([param], **OPTIONS)
    param.grad = torch.ones(3, device="meta")
    with pytest.warns(UserWarning, match="on meta"):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_parameter_subclass_without_its_own_dispatch_is_updated(backend):
    class Named(torch.nn.Parameter):
        pass

    (theirs,) = make_params([9])
    ours = Named(theirs.detach().clone())
    optimizer, pair = FusedSGDR([ours], backend=backend, **OPTIONS), Pair([theirs], **OPTIONS)
    for step in range(4):
        give_gradients(step, [ours], [theirs])
        optimizer.step()
        pair.step()
        assert torch.equal(ours, theirs)


def test_lazy_parameter_is_skipped_until_it_has_a_shape(backend):
    model = torch.nn.LazyLinear(3)
    optimizer = FusedSGDR(model.parameters(), backend=backend, **OPTIONS)
    optimizer.step()
    torch.manual_seed(0)
    model(torch.ones(2, 4)).sum().backward()
    theirs = copies_of(list(model.parameters()))
    for param, their in zip(model.parameters(), theirs, strict=True):
        their.grad = param.grad.clone()
    pair = Pair(theirs, **OPTIONS)
    optimizer.seek(0)
    optimizer.step()
    pair.step()
    assert_same(optimizer, list(model.parameters()), pair, theirs)


@needs_native
def test_auto_uses_the_native_backend_without_a_warning():
    params = make_params([9])
    optimizer = FusedSGDR(params, **OPTIONS)
    assert type(optimizer._stepper) is native.extension.Stepper
    give_gradients(0, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert type(optimizer._stepper) is native.extension.Stepper


def test_backend_is_the_requested_one():
    for backend in ("auto", "reference"):
        assert FusedSGDR(make_params([3]), backend=backend, **OPTIONS).backend == backend


# ------------------------------------------------------------------------------------------ threads


def in_threads(*functions):
    """Runs functions in parallel threads; re-raises the first error."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[f]) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("sizes", [[9] * 50, [300_001, 17]], ids=["small", "large"])
def test_optimizers_in_two_threads_are_independent(backend, sizes):
    def train(params, optimizer, barrier=None):
        for step in range(8):
            give_gradients(step, params)
            if barrier is not None:
                barrier.wait(timeout=60)
            optimizer.step()

    alone = [make_params(sizes, seed=seed) for seed in range(2)]
    together = [copies_of(params) for params in alone]
    ones = [FusedSGDR(params, backend=backend, **OPTIONS) for params in alone]
    many = [FusedSGDR(params, backend=backend, **OPTIONS) for params in together]
    for params, optimizer in zip(alone, ones, strict=True):
        train(params, optimizer)
    barrier = threading.Barrier(2)
    in_threads(
        lambda: train(together[0], many[0], barrier),
        lambda: train(together[1], many[1], barrier),
    )
    for i in range(2):
        assert_same(many[i], together[i], ones[i], alone[i])


class LargeStep:
    """A step of 50 million elements, and another thread that runs once the step releases the GIL.

    The switch interval of an hour keeps the interpreter from releasing the GIL between bytecodes;
    a step is one call into C++. If the system is too busy to wake the other thread during the
    step, we try again: if the step holds the GIL, no number of trials helps.
    """

    TRIALS = 10

    def __init__(self):
        self.param = torch.nn.Parameter(torch.zeros(50_000_000))
        self.param.grad = torch.ones_like(self.param)
        self.optimizer = FusedSGDR([self.param], lr=0.5, T_0=100, backend="native")
        self.is_stepping = False

    def step_beside(self, other):
        """Takes a step, and runs `other` in a thread as soon as possible after its start."""
        go = threading.Lock()
        go.acquire()

        def wait():
            with go:
                other()

        thread = threading.Thread(target=wait)
        thread.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(3600)
        try:
            self.is_stepping = True
            go.release()
            self.optimizer.step()
            self.is_stepping = False
        finally:
            sys.setswitchinterval(interval)
        thread.join()


@needs_native
def test_large_step_lets_other_python_threads_run():
    large = LargeStep()
    seen = []
    for _ in range(large.TRIALS):
        large.step_beside(lambda: seen.append(large.is_stepping))
        if seen[-1]:
            break
    assert seen[-1]


@needs_native
def test_gradient_that_another_thread_removes_during_a_step_lives_until_its_end():
    large = LargeStep()
    seen = []
    memory = torch.ones_like(large.param)  # which a step that let go of the gradient may still read
    for _ in range(large.TRIALS):
        large.param.grad = memory.detach()
        grad = weakref.ref(large.param.grad)

        def remove(grad=grad):
            large.param.grad = None
            seen.append((large.is_stepping, grad() is not None))

        large.step_beside(remove)
        assert grad() is None
        if seen[-1][0]:
            break
    assert seen[-1] == (True, True)


@needs_native
def test_step_waits_for_the_step_of_another_thread():
    large = LargeStep()
    seen = []

    def step_too():
        began_beside = large.is_stepping
        large.optimizer.step()
        seen.append((began_beside, large.is_stepping))

    for _ in range(large.TRIALS):
        large.step_beside(step_too)
        if seen[-1][0]:
            break
    assert seen[-1] == (True, False)
    assert large.optimizer.param_groups[0]["step"] == 2 * len(seen)
    rates = sum(CosineWarmRestarts(lr=0.5, T_0=100).lr_at(step) for step in range(2 * len(seen)))
    torch.testing.assert_close(large.param[:3], torch.full([3], -rates))


def test_step_from_a_gradient_hook_of_another_thread_has_the_same_bits(backend):
    """backward() and step() run in another thread."""
    ours, theirs = make_params([33]), make_params([33])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(4):
        grad = draw([33], torch.float32, torch.Generator().manual_seed(step))

        def train(grad=grad):
            optimizer.zero_grad()
            (ours[0] * grad).sum().backward()
            optimizer.step()

        in_threads(train)
        theirs[0].grad = grad.clone()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)
