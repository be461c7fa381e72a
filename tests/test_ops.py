"""torch.ops.sgdr_fused.fused_step_: the step as a registered op."""

import pytest
import torch
from cases import ANY_OPTIONS
from pair import copies_of, draw, give_gradients, make_params, momentum_of, same_bits
from torch import library

from sgdr_fused import FusedSGDR, native
from sgdr_fused.compiled import TracedStepper
from sgdr_fused.groups import check_groups

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_missing)

SCHEDULE = {"T_0": 2, "T_mult": 2, "eta_min": 1e-3}


def op():
    return torch.ops.sgdr_fused.fused_step_


def arguments(sizes=(3, 70), dtype=torch.float32, momentum=0.9, **options):
    """Arguments of the op, for a group in which one parameter has no gradient."""
    generator = torch.Generator().manual_seed(0)
    params, grads, buffers = (
        ([draw(size, dtype, generator) for size in sizes] for _ in range(3 if momentum else 2))
        if momentum
        else (*([draw(s, dtype, generator) for s in sizes] for _ in range(2)), [])
    )
    state = torch.zeros(15 + len(sizes), dtype=torch.int64)
    state[3] = 2  # T_i
    state.view(torch.float64)[4] = 0.1
    options = {"momentum": momentum, "eta_max": 0.1, "T_0": 2} | options
    return (params, grads, buffers, state, list(range(len(sizes)))), options


@pytest.mark.parametrize(
    ("momentum", "more"),
    [
        (0.9, {}),
        (0.0, {"weight_decay": 1e-2}),
        (0.9, {"nesterov": True, "grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}),
        (0.5, {"dampening": 0.1, "reset_momentum": True, "n_cycles": 3, "T_mult": 1.5}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes(momentum, more, dtype):
    args, options = arguments(dtype=dtype, momentum=momentum, **more)
    results = library.opcheck(op().default, args, options)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("options", ANY_OPTIONS.values(), ids=ANY_OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_op_equals_the_reference(options, dtype):
    params = make_params([1, 70, 1003], dtype)
    twins = copies_of(params)
    by_op = FusedSGDR(params, lr=0.1, **SCHEDULE, **options)
    by_op._stepper = TracedStepper(check_groups)
    reference = FusedSGDR(twins, lr=0.1, **SCHEDULE, **options, backend="reference")
    for step in range(8):
        give_gradients(step, params, twins)
        if step in (0, 4):  # unfrozen later, missing once
            params[1].grad = twins[1].grad = None
        by_op.step()
        reference.step()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            assert same_bits(p.detach(), q.detach()), (step, i)
        assert by_op.get_last_lr() == reference.get_last_lr()
    assert isinstance(by_op._stepper, TracedStepper)
    ours, theirs = by_op.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for i, of_param in theirs["state"].items():
        assert set(ours["state"].get(i, {})) == set(of_param)
        if "momentum_buffer" in of_param:
            buffers = (side["state"][i]["momentum_buffer"] for side in (ours, theirs))
            assert same_bits(*buffers)


def by_op_and_reference(sizes=(1, 70), **options):
    """The op and the reference on equal parameters."""
    params = make_params(sizes)
    twins = copies_of(params)
    by_op = FusedSGDR(params, lr=0.1, **SCHEDULE | options)
    by_op._stepper = TracedStepper(check_groups)
    return by_op, params, FusedSGDR(twins, lr=0.1, **SCHEDULE | options, backend="reference"), twins


@pytest.mark.parametrize(
    "schedule",
    [
        {"n_cycles": 2},
        {"warmup_steps": 3, "warmup_start_lr": 0.02},
        {"cycle_decay": 0.5},
        {"anneal": "epoch", "steps_per_epoch": 3, "T_mult": 1},
        {"T_mult": 1.5},
    ],
    ids=str,
)
def test_op_follows_every_option_of_the_schedule(schedule):
    by_op, params, reference, twins = by_op_and_reference(momentum=0.9, **schedule)
    for step in range(12):
        give_gradients(step, params, twins)
        by_op.step()
        reference.step()
        assert by_op.get_last_lr() == reference.get_last_lr(), step
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, twins, strict=True))
    assert isinstance(by_op._stepper, TracedStepper)


def test_op_divides_the_gradients_by_the_scale_of_the_loss():
    by_op, params, reference, twins = by_op_and_reference(momentum=0.9)
    for step in range(4):
        give_gradients(step, params, twins)
        for param in params:
            param.grad.mul_(256)
        by_op.grad_scale, by_op.found_inf = torch.tensor(256.0), torch.tensor(0.0)
        by_op.step()
        reference.step()
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, twins, strict=True))


def test_restart_drops_the_momentum_of_a_parameter_that_the_op_was_not_given():
    by_op, params, reference, twins = by_op_and_reference(momentum=0.9, reset_momentum=True)
    for step in range(4):
        give_gradients(step, params, twins)
        if step == 1:  # the last of the first cycle
            params[1].grad = twins[1].grad = None
        by_op.step()
        reference.step()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            assert same_bits(p.detach(), q.detach()), (step, i)


def test_op_counts_a_skipped_step_and_changes_nothing_else():
    args, options = arguments()
    before = [[t.clone() for t in tensors] for tensors in args[:3]]
    state = args[3].clone()
    op()(*args, **options, found_inf=torch.tensor(1.0))
    for tensors, old in zip(args[:3], before, strict=True):
        assert all(same_bits(t, o) for t, o in zip(tensors, old, strict=True))
    state[6] += 1
    assert torch.equal(args[3], state)


def test_op_accepts_different_strides():
    generator = torch.Generator().manual_seed(0)
    values = [draw((4, 6), torch.float32, generator) for _ in range(3)]
    results = []
    for lay_out in (torch.clone, lambda t: t.t().contiguous().t()):
        args, options = arguments(sizes=(1,))
        tensors = [[values[0].clone()], [lay_out(values[1])], [lay_out(values[2])]]
        op()(*tensors, *args[3:], **options)
        results.append((tensors[0][0], tensors[2][0]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda a: a[1].pop(), ValueError, "as many grads"),
        (lambda a: a[2].pop(), ValueError, "a momentum_buffer for each param"),
        (lambda a: a[1].__setitem__(0, torch.zeros(4)), ValueError, r"grads\[0\] is of shape"),
        (lambda a: a[1].__setitem__(1, torch.zeros(70, dtype=torch.int32)), TypeError, "has dtype"),
        (lambda a: a[4].__setitem__(0, 3), ValueError, r"param_indices\[0\]=3 is no parameter"),
        (lambda a: a[0].__setitem__(0, torch.zeros(1).expand(3)), ValueError, "memory address"),
    ],
    ids=["grads", "buffers", "shape", "dtype", "index", "overlap"],
)
def test_op_refuses_bad_arguments_and_changes_nothing(spoil, error, message):
    args, options = arguments()
    spoil(args)
    before = [[t.clone() for t in tensors] for tensors in args[:3]]
    state = args[3].clone()
    with pytest.raises(error, match=message):
        op()(*args, **options)
    for tensors, old in zip(args[:3], before, strict=True):
        assert all(torch.equal(t, o) for t, o in zip(tensors, old, strict=True))
    assert torch.equal(args[3], state)


def test_op_refuses_a_wrong_group_state():
    (params, grads, buffers, _, indices), options = arguments()
    with pytest.raises(ValueError, match="group_state must be"):
        op()(params, grads, buffers, torch.zeros(9), indices, **options)


def test_op_continues_with_momentum_of_an_eager_step():
    """Two eager steps, then steps by the op."""
    params = make_params([70])
    twins = copies_of(params)
    mixed, usual = (FusedSGDR(p, lr=0.1, momentum=0.9, **SCHEDULE) for p in (params, twins))
    for step in range(6):
        give_gradients(step, params, twins)
        if step == 2:
            mixed._stepper = TracedStepper(check_groups)
        mixed.step()
        usual.step()
        assert same_bits(momentum_of(mixed, params[0]), momentum_of(usual, twins[0]))
        assert same_bits(params[0].detach(), twins[0].detach())
