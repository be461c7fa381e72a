"""param_groups and state that the user has put together: taken as torch.optim.SGD does, or refused
with a reason before anything has changed."""

import gc
import weakref

import numpy
import pytest
import torch
from pair import Pair, assert_same, assert_unchanged, give_gradients, make_params, snapshot

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.1, "momentum": 0.9, "T_0": 4}


def stepped(backend, sizes=(5, 33, 2), **options):
    params = make_params(sizes)
    optimizer = FusedSGDR(params, backend=backend, **OPTIONS | options)
    give_gradients(0, params)
    optimizer.step()
    give_gradients(1, params)
    return optimizer, params


# ----------------------------------------------------------------------------------- the parameters

LISTABLE = {
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda params: (param for param in params),
    "filter": lambda params: filter(torch.is_tensor, params),
    "dict_values": lambda params: dict(enumerate(params)).values(),
    "dict_keys": lambda params: dict.fromkeys(params).keys(),
    "ParameterList": torch.nn.ParameterList,
}


@pytest.mark.parametrize("make", LISTABLE.values(), ids=LISTABLE.keys())
def test_params_that_are_no_list_are_listed_once(backend, make):
    """The native step read a tuple's memory as a list's; the reference used a generator up."""
    optimizer, ours = stepped(backend)
    theirs = make_params([5, 33, 2])
    pair = Pair(theirs, **OPTIONS)
    for step in range(4):
        give_gradients(step, ours)
        give_gradients(step, theirs)
        if step == 1:
            optimizer.param_groups[0]["params"] = make(ours)
        if step > 0:
            optimizer.step()
        pair.step()
    assert_same(optimizer, ours, pair, theirs)
    assert type(optimizer.param_groups[0]["params"]) is list


def test_parameter_that_is_listed_twice_is_updated_twice(backend):
    """torch.optim.SGD gives both places a new momentum buffer in the first step; the reference used
    the first place's in the second."""
    ours, theirs = make_params([33, 2]), make_params([33, 2])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    optimizer.param_groups[0]["params"].append(ours[0])
    pair.param_groups[0]["params"].append(theirs[0])
    for step in range(6):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "grad_scaler"])
def test_generator_is_listed_once_at_a_first_step_that_clips(backend, scaled):
    """What looks at the parameters before the step must not use the generator up."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = FusedSGDR([param], lr=1.0, T_0=2, max_grad_norm=1.0, backend=backend)
    optimizer.param_groups[0]["params"] = (p for p in [param])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled)
    scaler.scale(param.sum() * 2).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(param.detach(), torch.tensor([-1.0]))


def test_params_that_were_listed_stay_listed_after_an_error(backend):
    optimizer, params = stepped(backend)
    optimizer.param_groups[0]["params"] = iter(params)
    params[0].grad.data = torch.zeros(1, 5)
    with pytest.raises(ValueError, match="gradient of shape"):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] == params


NO_PARAMS = {
    "set": set,
    "tensor": lambda params: params[1],
    "str": lambda params: "weight",
    "bytes": lambda params: b"weight",
    "ndarray": lambda params: numpy.ones(3),
    "int": lambda params: 3,
    "dict": lambda params: dict(enumerate(params)),
    "None": lambda params: None,
    "Module": lambda params: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("make", NO_PARAMS.values(), ids=NO_PARAMS.keys())
def test_params_that_cannot_be_listed_are_refused(backend, make):
    optimizer, params = stepped(backend)
    wrong = make(params)
    before = snapshot(optimizer, params)
    optimizer.param_groups[0]["params"] = wrong
    name = rf'param_groups\[0\]\["params"\] is of type {type(wrong).__name__}'
    with pytest.raises(TypeError, match=name):
        optimizer.step()
    assert optimizer.param_groups[0]["params"] is wrong
    optimizer.param_groups[0]["params"] = params
    assert_unchanged(before, optimizer, params)
    optimizer.step()


@pytest.mark.parametrize(
    "wrong", ["weight", None, 3, numpy.ones(3)], ids=lambda w: type(w).__name__
)
def test_entry_of_params_that_is_no_tensor_is_refused(backend, wrong):
    optimizer, params = stepped(backend)
    before = snapshot(optimizer, params)
    for replace_list in (False, True):
        own = optimizer.param_groups[0]["params"]
        if replace_list:
            own = optimizer.param_groups[0]["params"] = list(own)
        own.append(wrong)
        name = rf'param_groups\[0\]\["params"\]\[3\] is of type {type(wrong).__name__}'
        with pytest.raises(TypeError, match=name):
            optimizer.step()
        del own[3]
        assert_unchanged(before, optimizer, params)


# --------------------------------------------------------------------------------------- the groups


@pytest.mark.parametrize("wrong", [None, 3, "group", []], ids=repr)
def test_group_that_is_no_dict_is_refused(backend, wrong):
    optimizer, params = stepped(backend)
    before = snapshot(optimizer, params)
    optimizer.param_groups.append(wrong)
    with pytest.raises(TypeError, match=rf"param_groups\[1\] is of type {type(wrong).__name__}"):
        optimizer.step()
    optimizer.param_groups.pop()
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("missing", [None, "params", "lr", "scheduled_lr", "T_i", "ema_decay"])
def test_group_without_an_entry_is_refused(backend, missing):
    optimizer, params = stepped(backend)
    before = snapshot(optimizer, params)
    group = dict(optimizer.param_groups[0], params=[]) if missing else {}
    group.pop(missing, None)
    optimizer.param_groups.append(group)
    with pytest.raises(
        ValueError, match=rf"param_groups\[1\] has no '{missing or ''}.*add_param_gr"
    ):
        optimizer.step()
    optimizer.param_groups.pop()
    assert_unchanged(before, optimizer, params)


def test_entry_deleted_from_a_group_is_named(backend):
    optimizer, _ = stepped(backend)
    del optimizer.param_groups[0]["momentum"]
    with pytest.raises(ValueError, match=r"param_groups\[0\] has no 'momentum'"):
        optimizer.step()


def test_param_groups_that_are_no_list_are_refused(backend):
    optimizer, _ = stepped(backend)
    optimizer.param_groups = tuple(optimizer.param_groups)
    with pytest.raises(TypeError, match=r"optimizer.param_groups is of type tuple"):
        optimizer.step()


# ---------------------------------------------------------------------------------------- the state


def test_state_may_be_a_plain_dict(backend):
    """torch makes it a defaultdict."""
    ours, theirs = make_params([5, 33]), make_params([5, 33])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    optimizer.state = {}
    for step in range(3):
        give_gradients(step, ours)
        give_gradients(step, theirs)
        optimizer.step()
        pair.step()
    assert_same(optimizer, ours, pair, theirs)


@pytest.mark.parametrize("wrong", [None, [], "state"], ids=repr)
def test_state_that_is_no_dict_is_refused(backend, wrong):
    optimizer, params = stepped(backend)
    before, state = snapshot(optimizer, params), optimizer.state
    optimizer.state = wrong
    with pytest.raises(TypeError, match=rf"optimizer.state is of type {type(wrong).__name__}"):
        optimizer.step()
    optimizer.state = state
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize("wrong", [3, [torch.zeros(33)], "buffer"], ids=lambda w: type(w).__name__)
def test_state_of_a_parameter_that_is_no_dict_is_refused(backend, wrong):
    optimizer, params = stepped(backend)
    before, of_param = snapshot(optimizer, params), optimizer.state[params[1]]
    optimizer.state[params[1]] = wrong
    with pytest.raises(
        TypeError, match=rf"optimizer.state\[param\] is of type {type(wrong).__name__}"
    ):
        optimizer.step()
    optimizer.state[params[1]] = of_param
    assert_unchanged(before, optimizer, params)


# ------------------------------------------------------------------------------- after an error


def test_step_that_raises_puts_edited_groups_back(backend):
    """The LR that follows from the edit was written before the bad gradient was seen."""
    optimizer, params = stepped(backend)
    optimizer.add_param_group({"params": make_params([3], seed=5), "lr": 0.5})
    group, second = optimizer.param_groups
    edits = {"T_0": 7, "initial_lr": 0.2, "eta_min": 0.05}
    group.update(edits)
    second.update(edits)
    params[-1].grad.data = torch.zeros(7)
    before = [dict(g) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match="gradient of shape"):
        optimizer.step()
    assert [dict(g) for g in optimizer.param_groups] == before
    assert [list(g) for g in optimizer.param_groups] == [list(g) for g in before]
    params[-1].grad.data = torch.zeros(2)
    optimizer.step()
    assert group["lr"] != before[0]["lr"]


def test_bad_option_of_a_later_group_leaves_the_earlier_ones_alone(backend):
    optimizer, _ = stepped(backend)
    optimizer.add_param_group({"params": make_params([3], seed=5)})
    first, second = optimizer.param_groups
    first["initial_lr"], first["lr"] = 0.4, torch.tensor(0.3)
    second["momentum"] = -1.0
    before = [dict(g) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"momentum value: -1\.0"):
        optimizer.step()
    assert [dict(g) for g in optimizer.param_groups] == before
    assert first["lr"] is before[0]["lr"]


class Interrupted(BaseException):
    pass


class InterruptedParam(torch.nn.Parameter):
    """Its hash raises when it is told to, as a signal's handler may within any Python code."""

    raises_after = None

    def __hash__(self):
        cls = InterruptedParam
        if cls.raises_after is not None:
            cls.raises_after -= 1
            if cls.raises_after < 0:
                cls.raises_after = None
                raise Interrupted
        return super().__hash__()


@pytest.mark.parametrize("when", ["first_step", "restart"])
def test_interrupted_native_step_has_done_everything_or_nothing(when):
    """A signal's handler runs in Python code only, which once ran after the update."""
    seen = set()
    for raises_after in range(200):
        params = [InterruptedParam(torch.ones(3)) for _ in range(3)]
        options = OPTIONS | {"T_0": 1, "reset_momentum": True, "ema_decay": 0.5}
        optimizer = FusedSGDR(params, backend="native", **options)
        give_gradients(0, params)
        if when == "restart":
            optimizer.step()
            optimizer.param_groups[0]["params"] = list(params)
        before = snapshot(optimizer, params)
        InterruptedParam.raises_after = raises_after
        try:
            optimizer.step()
        except Interrupted:
            pass
        is_whole = InterruptedParam.raises_after is not None
        InterruptedParam.raises_after = None
        seen.add(is_whole)
        if is_whole:
            break
        if optimizer.param_groups[0]["step"] == before["groups"][0]["step"]:
            assert_unchanged(before, optimizer, params)
    assert seen == {True, False}


# ------------------------------------------------------------------------------ what is kept alive


def test_state_that_was_cleared_after_a_first_step_is_made_anew(backend):
    """The state was empty again, as before the first step, so its freed dicts were used."""
    ours, theirs = make_params([5, 33]), make_params([5, 33])
    optimizer, pair = FusedSGDR(ours, backend=backend, **OPTIONS), Pair(theirs, **OPTIONS)
    for step in range(5):
        give_gradients(step, ours)
        give_gradients(step, theirs)
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, theirs)
        optimizer.state.clear()
        pair.state.clear()
        _ = [{"a": i} for i in range(50)]  # may take the freed memory


def test_state_that_was_dropped_is_freed_at_once(backend):
    optimizer, params = stepped(backend)
    buffers = [weakref.ref(optimizer.state[param]["momentum_buffer"]) for param in params]
    optimizer.state[params[0]] = {}
    assert buffers[0]() is None
    optimizer.state[params[1]].clear()
    assert buffers[1]() is None
    optimizer.state.clear()
    assert buffers[2]() is None


def test_parameters_of_a_deleted_group_are_freed_at_once(backend):
    optimizer, params = stepped(backend)
    optimizer.add_param_group({"params": make_params([7])})
    optimizer.step()
    added = weakref.ref(optimizer.param_groups[1]["params"][0])
    del optimizer.param_groups[1]
    assert added() is None
    first = weakref.ref(params[0])
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = params = params[1:]
    assert first() is None


def attribute(optimizer, params):
    params[0].optimizer = optimizer


def gradient_hook(optimizer, params):
    params[0].register_hook(lambda grad: optimizer.param_groups and None)


def restart_hook(optimizer, params):
    optimizer.register_restart_hook(lambda o: params and optimizer)


@pytest.mark.parametrize("refer", [attribute, gradient_hook, restart_hook])
def test_model_that_refers_to_its_optimizer_is_freed(backend, refer):
    """As with torch.optim.SGD: 20 models left 239 MB behind."""
    optimizer, params = stepped(backend)
    refer(optimizer, params)
    optimizer.step()
    alive = [weakref.ref(optimizer), *map(weakref.ref, params)]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


# -------------------------------------------------------------------------- moves of the schedule


@pytest.mark.parametrize(
    "move", [lambda o: o.seek(21), lambda o: o.restart()], ids=["seek", "restart"]
)
def test_move_of_a_schedule_with_an_invalid_option_changes_nothing(backend, move):
    optimizer, params = stepped(backend, reset_momentum=True)
    optimizer.param_groups[0].update(nesterov=True, momentum=0)
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum"):
        move(optimizer)
    assert_unchanged(before, optimizer, params)


@pytest.mark.parametrize(
    "move", [lambda o: o.seek(1.5), lambda o: o.restart()], ids=["seek", "restart"]
)
def test_move_that_is_refused_leaves_an_edit_as_it_is(backend, move):
    """The LR that follows from the edit was written before the argument was checked."""
    optimizer, params = stepped(backend, n_cycles=1)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=r"step value: 1\.5|n_cycles=1"):
        move(optimizer)
    assert_unchanged(before, optimizer, params)
