"""register_restart_hook: a function that is called where a cycle ends."""

import copy
import pickle

import pytest
import torch
from pair import give_gradients, make_params, make_scaler

from sgdr_fused import FusedSGDR


@pytest.fixture
def make(backend):
    """Makes an optimizer of cycles of 2, 4, 8 ... steps."""

    def make(n_groups=1, **options):
        params = make_params([5] * n_groups)
        give_gradients(0, params)
        options = {"lr": 0.1, "momentum": 0.9, "T_0": 2, "T_mult": 2, "backend": backend} | options
        return FusedSGDR([{"params": [param]} for param in params], **options)

    return make


def step_of(optimizer):
    return optimizer.param_groups[0]["step"]


def note_steps(optimizer, **options):
    """Registers a hook that notes at which steps it is called."""
    seen = []
    handle = optimizer.register_restart_hook(lambda o: seen.append(step_of(o)), **options)
    return seen, handle


def test_hook_is_called_after_each_cycles_last_step(make):
    optimizer = make()
    seen, _ = note_steps(optimizer)
    for _ in range(15):
        optimizer.step()
    assert seen == [2, 6, 14]


def test_hook_sees_the_optimizer_at_the_start_of_the_next_cycle(make):
    optimizer = make()
    seen = []
    optimizer.register_restart_hook(lambda o: seen.append((o, o.cycle, o.get_last_lr())))
    optimizer.step()
    optimizer.step()
    assert seen == [(optimizer, 1, [0.1])]


def test_hook_is_called_at_the_end_of_the_last_cycle_and_never_again(make):
    optimizer = make(n_cycles=2)
    seen, _ = note_steps(optimizer)
    for _ in range(20):
        optimizer.step()
    assert seen == [2, 6]


def test_end_of_the_warm_up_is_no_restart(make):
    optimizer = make(warmup_steps=3)
    seen, _ = note_steps(optimizer)
    for _ in range(6):
        optimizer.step()
    assert seen == [5]


def test_hook_is_called_each_step_if_cycles_have_one_step(make):
    optimizer = make(T_0=1, T_mult=1)
    seen, _ = note_steps(optimizer)
    for _ in range(3):
        optimizer.step()
    assert seen == [1, 2, 3]


def test_restart_calls_the_hook_at_once(make):
    optimizer = make()
    seen, _ = note_steps(optimizer)
    optimizer.step()
    optimizer.restart()
    assert seen == [1]
    for _ in range(4):
        optimizer.step()
    assert seen == [1, 5]


def test_failed_restart_does_not_call_the_hook(make):
    optimizer = make(n_cycles=1)
    seen, _ = note_steps(optimizer)
    with pytest.raises(ValueError, match="n_cycles"):
        optimizer.restart()
    assert seen == []


def test_skipped_step_does_not_call_the_hook_again(make):
    optimizer = make()
    seen, _ = note_steps(optimizer)
    scaler = make_scaler(1.0)
    param = optimizer.param_groups[0]["params"][0]
    for step in range(3):
        param.grad.fill_(float("inf") if step == 2 else 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert step_of(optimizer) == 2
    assert seen == [2]


def test_skipped_nonfinite_step_does_not_call_the_hook_again(make):
    optimizer = make(skip_nonfinite=True)
    seen, _ = note_steps(optimizer)
    for step in range(3):
        optimizer.param_groups[0]["params"][0].grad.fill_(float("nan") if step == 2 else 1.0)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert seen == [2]


def test_seek_and_load_state_dict_do_not_call_the_hook(make):
    optimizer, other = make(), make()
    for _ in range(2):
        other.step()
    seen, _ = note_steps(optimizer)
    optimizer.seek(2)
    optimizer.load_state_dict(other.state_dict())
    assert optimizer.is_cycle_end
    assert seen == []
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    assert seen == []


def test_step_skipped_after_a_seek_to_a_restart_does_not_call_the_hook(make):
    optimizer = make(skip_nonfinite=True)
    seen, _ = note_steps(optimizer)
    optimizer.seek(2)
    optimizer.param_groups[0]["params"][0].grad.fill_(float("nan"))
    optimizer.step()
    assert seen == []


def test_failed_step_does_not_call_the_hook(make):
    optimizer = make()
    seen, _ = note_steps(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = -1
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step()
    assert seen == []


def test_removed_hook_is_not_called(make):
    optimizer = make()
    seen, handle = note_steps(optimizer)
    others, _ = note_steps(optimizer)
    for _ in range(2):
        optimizer.step()
    handle.remove()
    handle.remove()
    for _ in range(4):
        optimizer.step()
    optimizer.restart()
    assert seen == [2]
    assert others == [2, 6, 6]


def test_with_block_removes_its_hook(make):
    optimizer = make()
    seen = []
    with optimizer.register_restart_hook(seen.append):
        optimizer.restart()
    optimizer.restart()
    assert seen == [optimizer]


def test_hook_may_remove_itself(make):
    optimizer = make()
    seen = []
    handle = optimizer.register_restart_hook(lambda _: (seen.append(1), handle.remove()))
    for _ in range(6):
        optimizer.step()
    optimizer.restart()
    assert seen == [1]


def test_each_group_can_have_its_own_hook(make):
    optimizer = make(n_groups=2)
    optimizer.param_groups[1]["T_0"] = 3
    optimizer.seek(0)
    firsts, _ = note_steps(optimizer)
    seconds, _ = note_steps(optimizer, group=-1)
    for _ in range(6):
        optimizer.step()
    assert (firsts, seconds) == ([2, 6], [3])
    optimizer.restart(group=1)
    assert (firsts, seconds) == ([2, 6], [3, 6])
    param = make_params([3])[0]
    optimizer.add_param_group({"params": [param]})
    optimizer.restart(group=2)
    assert (firsts, seconds) == ([2, 6], [3, 6])


@pytest.mark.parametrize("group", [1, -2])
def test_group_that_does_not_exist_is_an_error(group, make):
    optimizer = make()
    with pytest.raises(IndexError, match=f"group={group}"):
        optimizer.register_restart_hook(print, group=group)
    for _ in range(2):
        optimizer.step()


def test_hook_of_a_removed_group_is_not_called(make):
    """Steps and restart() raised a bare IndexError, and restart() only after it had restarted."""
    optimizer = make(2)
    seen, handle = note_steps(optimizer, group=1)
    del optimizer.param_groups[1]
    for _ in range(3):
        optimizer.step()
    optimizer.restart()
    assert seen == []
    assert optimizer.cycle == 2
    handle.remove()


def test_copy_has_no_hooks(make):
    optimizer = make()
    seen, _ = note_steps(optimizer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.restart()
        twin.step()
    assert seen == []


def test_hook_does_not_change_training(make):
    with_hook, without = make(), make()
    note_steps(with_hook)
    for _ in range(10):
        with_hook.step()
        without.step()
    for one, other in zip(with_hook.param_groups, without.param_groups, strict=True):
        assert torch.equal(one["params"][0], other["params"][0])
