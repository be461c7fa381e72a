"""Gradients, parameters, groups, buffers and options may come, go or change between steps."""

import pytest
import torch
from pair import Pair, assert_same, copies_of, give_gradients, make_params

from sgdr_fused import CosineWarmRestarts, FusedSGDR, Position

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "T_0": 3, "T_mult": 2}


class SideBySide:
    """Our optimizer and the pair on equal parameters, stepped and compared together."""

    def __init__(self, backend, sizes=(65, 8, 33), **options):
        self.options = OPTIONS | options
        self.ours = make_params(sizes)
        self.theirs = copies_of(self.ours)
        self.optimizer = FusedSGDR(self.ours, backend=backend, **self.options)
        self.pair = Pair(self.theirs, **self.options)
        self.steps = 0

    @property
    def sides(self):
        return (self.optimizer, self.ours), (self.pair, self.theirs)

    def step(self, *, missing=(), times=1):
        """Takes steps in which some parameters have no gradient, and compares after each."""
        for _ in range(times):
            give_gradients(self.steps, self.ours, self.theirs)
            for i in missing:
                self.ours[i].grad = self.theirs[i].grad = None
            self.optimizer.step()
            self.pair.step()
            assert_same(
                self.optimizer, self.ours, self.pair, self.theirs, f"after step {self.steps}"
            )
            self.steps += 1


def test_parameter_without_a_gradient_is_unchanged(backend):
    both = SideBySide(backend)
    untouched = both.ours[1].detach().clone()
    both.step(missing=[1], times=7)
    assert torch.equal(both.ours[1], untouched)
    assert "momentum_buffer" not in both.optimizer.state.get(both.ours[1], {})


def test_step_without_any_gradient_advances_the_schedule(backend):
    both = SideBySide(backend)
    both.step(missing=[0, 1, 2], times=4)
    assert both.optimizer.cycle == 1
    both.step(times=3)


def test_each_parameter_has_its_own_first_step(backend):
    """With dampening, which the first step does not apply."""
    both = SideBySide(backend, dampening=0.5)
    both.step(missing=[1, 2], times=2)
    both.step(missing=[2], times=2)
    both.step(times=3)


def test_momentum_survives_missing_gradients(backend):
    both = SideBySide(backend)
    both.step(times=3)
    both.step(missing=[0, 2], times=3)
    both.step(times=3)


def test_parameter_frozen_and_unfrozen_continues(backend):
    both = SideBySide(backend)
    for requires_grad, missing in ((True, []), (False, [1]), (True, [])):
        for side in (both.ours, both.theirs):
            side[1].requires_grad_(requires_grad)
        both.step(missing=missing, times=3)


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_group_added_mid_run_has_its_own_first_step(backend, steps_before):
    both = SideBySide(backend, dampening=0.5)
    both.step(times=steps_before)
    new = make_params([17], seed=1)
    for (optimizer, side), param in zip(
        ((both.optimizer, both.ours), (both.pair.sgd, both.theirs)),
        (new[0], *copies_of(new)),
        strict=True,
    ):
        optimizer.add_param_group({"params": [param], "lr": optimizer.param_groups[0]["lr"]})
        side.append(param)
    # The pair's scheduler has to be told what ours knows.
    peak = both.options["lr"]
    both.optimizer.param_groups[1].update(initial_lr=peak)
    both.optimizer.seek(steps_before)
    both.pair.param_groups[1].update(initial_lr=peak)
    both.pair.scheduler.base_lrs.append(peak)
    both.step(times=5)


def test_parameter_moved_to_other_memory_is_updated_there(backend):
    both = SideBySide(backend)
    both.step(times=2)
    old = both.ours[0].data
    for side in (both.ours, both.theirs):
        side[0].data = side[0].data.clone() * 2
    before = old.clone()
    both.step(times=3)
    assert torch.equal(old, before), "the old memory is written no more"


def test_parameter_changed_to_another_layout_is_updated(backend):
    both = SideBySide(backend, sizes=[(4, 3, 5, 6)])
    both.step(times=2)
    both.ours[0].data = both.ours[0].data.to(memory_format=torch.channels_last)
    both.step(times=3)


def test_replaced_gradient_is_used(backend):
    both = SideBySide(backend)
    both.step()
    old = both.ours[0].grad
    both.step()
    assert both.ours[0].grad is not old
    for _, side in both.sides:
        side[0].grad.mul_(3)  # changed in place, after which both have it
        side[0].grad = side[0].grad + 1
    both.optimizer.step()
    both.pair.step()
    assert_same(both.optimizer, both.ours, both.pair, both.theirs)


def test_state_cleared_by_the_user_makes_the_next_step_the_first(backend):
    both = SideBySide(backend, dampening=0.5)
    both.step(times=3)
    for stepper, _ in both.sides:
        stepper.state.clear()
    both.step(times=3)


def test_state_of_one_parameter_removed_makes_its_next_step_the_first(backend):
    both = SideBySide(backend, dampening=0.5)
    both.step(times=3)
    both.optimizer.state.pop(both.ours[1])
    both.pair.state.pop(both.theirs[1])
    both.step(times=3)


def test_momentum_buffer_set_to_none_makes_the_next_step_the_first(backend):
    both = SideBySide(backend, dampening=0.5)
    both.step(times=3)
    for stepper, side in both.sides:
        stepper.state[side[2]]["momentum_buffer"] = None
    both.step(times=3)


def test_momentum_buffer_replaced_by_the_user_is_used(backend):
    both = SideBySide(backend)
    both.step(times=3)
    for stepper, side in both.sides:
        stepper.state[side[0]]["momentum_buffer"] = torch.full([65], 0.25)
    both.step()
    for stepper, side in both.sides:
        stepper.state[side[0]] = {"momentum_buffer": torch.full([65], -0.25)}
    both.step(times=2)


def test_state_replaced_by_another_dict_is_used(backend):
    both = SideBySide(backend)
    both.step(times=3)
    for optimizer, side in ((both.optimizer, both.ours), (both.pair.sgd, both.theirs)):
        state = type(optimizer.state)(dict)
        state[side[1]] = {"momentum_buffer": torch.full([8], 0.5)}
        optimizer.state = state
    both.step(times=2)


def test_parameter_removed_from_its_group_is_unchanged(backend):
    both = SideBySide(backend)
    both.step(times=2)
    for stepper, _ in both.sides:
        del stepper.param_groups[0]["params"][0]
    removed = both.ours[0].detach().clone()
    both.step(times=2)
    assert torch.equal(both.ours[0], removed)


def test_parameter_replaced_in_its_group_is_updated(backend):
    both = SideBySide(backend)
    both.step(times=2)
    (new,) = make_params([33], seed=3)
    for (stepper, side), param in zip(both.sides, (new, *copies_of([new])), strict=True):
        stepper.param_groups[0]["params"][2] = param
        side[2] = param
    both.step(times=3)


def test_removed_group_is_unchanged(backend):
    ours = make_params([9, 5])
    groups = [{"params": [param]} for param in ours]
    optimizer = FusedSGDR(groups, backend=backend, **OPTIONS)
    give_gradients(0, ours)
    optimizer.step()
    first = ours[0].detach().clone()
    del optimizer.param_groups[0]
    optimizer.step()
    assert torch.equal(ours[0], first)
    assert optimizer.param_groups[0]["step"] == 2


def test_groups_in_another_order_keep_their_options(backend):
    def groups(params):
        return [{"params": params[:1]}, {"params": params[1:], "lr": 0.3, "momentum": 0.5}]

    ours = make_params([9, 5])
    theirs = copies_of(ours)
    optimizer = FusedSGDR(groups(ours), backend=backend, **OPTIONS)
    pair = Pair(groups(theirs), **OPTIONS)
    for step in range(4):
        give_gradients(step, ours, theirs)
        optimizer.step()
        pair.step()
        if step == 1:
            optimizer.param_groups.reverse()
    optimizer.param_groups.reverse()
    assert_same(optimizer, ours, pair, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_training_continues_in_a_module_converted_to_another_dtype(backend, dtype):
    """The momentum stays float32, as in torch, where the next step mixes the two dtypes."""
    ours, theirs = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
    theirs.load_state_dict(ours.state_dict())
    optimizer = FusedSGDR(ours.parameters(), backend=backend, **OPTIONS)
    expected = FusedSGDR(theirs.parameters(), backend="reference", **OPTIONS)
    for step in range(5):
        if step == 2:
            ours.to(dtype)
            theirs.to(dtype)
        give_gradients(step, list(ours.parameters()), list(theirs.parameters()))
        optimizer.step()
        expected.step()
        params = list(ours.parameters()), list(theirs.parameters())
        assert_same(optimizer, params[0], expected, params[1], f"after step {step}")
        assert params[0][0].dtype == (dtype if step >= 2 else torch.float32)
        assert optimizer.state[params[0][0]]["momentum_buffer"].dtype == torch.float32


# ------------------------------------------------------------------------- options between steps


@pytest.mark.parametrize(
    "changes",
    [
        {"momentum": 0.5},
        {"dampening": 0.5},
        {"weight_decay": 0.0},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"nesterov": True},
        {"momentum": 0.7, "dampening": 0.1, "weight_decay": 0.0},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_option_changed_between_steps_applies_from_the_next(backend, changes):
    both = SideBySide(backend)
    both.step(times=2)
    for stepper, _ in both.sides:
        stepper.param_groups[0].update(changes)
    both.step(times=3)
    for stepper, _ in both.sides:
        stepper.param_groups[0].update({key: both.pair.sgd.defaults[key] for key in changes})
    both.step(times=3)


def test_momentum_switched_off_and_on_between_steps(backend):
    """The buffer is kept meanwhile, as in torch."""
    both = SideBySide(backend)
    for momentum in (0.9, 0, 0.9):
        for stepper, _ in both.sides:
            stepper.param_groups[0]["momentum"] = momentum
        both.step(times=2)


def test_momentum_switched_on_between_steps(backend):
    both = SideBySide(backend, momentum=0)
    both.step(times=2)
    for stepper, _ in both.sides:
        stepper.param_groups[0]["momentum"] = 0.9
    both.step(times=3)


def test_lr_set_by_hand_applies_to_one_step(backend):
    """The pair behaves the same: its scheduler computes the next LR anew."""
    both = SideBySide(backend)
    both.step(times=2)
    for lr in (0.7, 0.0, 0.01):
        for stepper, _ in both.sides:
            stepper.param_groups[0]["lr"] = lr
        both.step()
        assert both.optimizer.get_last_lr() != [lr]
        both.step()


def test_lr_reduced_on_a_plateau_applies_to_one_step(backend):
    """ReduceLROnPlateau is indistinguishable from setting lr by hand, so it is not refused."""
    both = SideBySide(backend)
    both.step(times=2)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(both.optimizer, factor=0.5, patience=0)
    plateau.step(1.0)
    lr = both.optimizer.get_last_lr()[0]
    plateau.step(2.0)
    assert both.optimizer.get_last_lr() == [lr / 2]
    both.pair.param_groups[0]["lr"] = lr / 2
    both.step(times=2)


def test_lr_set_by_hand_before_the_first_step_applies_to_it(backend):
    both = SideBySide(backend)
    for stepper, _ in both.sides:
        stepper.param_groups[0]["lr"] = 0.02
    both.step(times=2)


def test_lr_set_by_hand_may_be_a_tensor(backend):
    both = SideBySide(backend)
    both.step()
    both.optimizer.param_groups[0]["lr"] = torch.tensor(0.25, dtype=torch.float64)
    both.pair.param_groups[0]["lr"] = 0.25
    both.step(times=2)


def test_lr_set_by_hand_may_be_an_integer(backend):
    both = SideBySide(backend)
    both.step()
    for stepper, _ in both.sides:
        stepper.param_groups[0]["lr"] = 1
    both.step(times=2)


def lr_of_next_step(optimizer, param):
    """The LR that a step really uses: with p = 0 and grad = 1 the parameter moves by it."""
    param.data.zero_()
    param.grad = torch.ones_like(param)
    optimizer.step()
    return -param.item()


@pytest.mark.parametrize(
    "before",
    ["construction", "step", "restart", "seek", "load_state_dict", "failed step"],
)
@pytest.mark.parametrize(
    "changes",
    [{"initial_lr": 0.5}, {"eta_min": 0.125}, {"initial_lr": 1.0, "eta_min": 0.25}],
    ids=lambda changes: "-".join(changes),
)
def test_peak_or_floor_changed_between_steps_applies_from_the_next(backend, before, changes):
    param = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = FusedSGDR([param], lr=0.25, T_0=7, T_mult=2, backend=backend)
    group = optimizer.param_groups[0]
    if before != "construction":
        for _ in range(3):
            lr_of_next_step(optimizer, param)
    if before == "restart":
        optimizer.restart()
    elif before == "seek":
        optimizer.seek(9)
    elif before == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
        group = optimizer.param_groups[0]
    elif before == "failed step":
        param.grad = torch.ones((), dtype=torch.float64).to_sparse()
        with pytest.raises(RuntimeError):
            optimizer.step()
    position = {name: group[name] for name in ("step", "cycle", "T_cur", "T_i")}
    group.update(changes)

    schedule = CosineWarmRestarts.of_group(group)
    for _ in range(3):
        expected = schedule.lr_of(Position(**position))
        assert lr_of_next_step(optimizer, param) == expected
        position = schedule.advance(Position(**position))._asdict()


def test_changed_T_0_applies_from_the_next_cycle(backend):
    (param,) = make_params([3])
    optimizer = FusedSGDR([param], lr=0.1, T_0=3, backend=backend)
    optimizer.step()
    optimizer.param_groups[0]["T_0"] = 5
    seen = []
    for _ in range(8):
        optimizer.step()
        seen.append((optimizer.param_groups[0]["T_cur"], optimizer.param_groups[0]["T_i"]))
    # The running cycle keeps its length.
    assert seen == [(2, 3), (0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (0, 5), (1, 5)]


def test_users_own_group_entry_is_ignored(backend):
    both = SideBySide(backend)
    both.step()
    both.optimizer.param_groups[0]["name"] = "backbone"
    both.step(times=2)
    del both.optimizer.param_groups[0]["name"]
    both.step(times=2)


def test_parameter_may_move_between_groups_with_and_without_an_average():
    """The concatenated list of parameters stays the same."""

    def run(backend):
        params = make_params((65, 8, 33))
        groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": 0.9}]
        optimizer = FusedSGDR(groups, backend=backend, **OPTIONS)
        without, with_average = (group["params"] for group in optimizer.param_groups)

        def step(seed):
            give_gradients(seed, params)
            optimizer.step()

        step(0)
        step(1)
        without.append(with_average.pop(0))
        step(2)
        state = optimizer.state[params[1]]
        state["momentum_buffer"] = state["momentum_buffer"].clone()
        step(3)
        with_average.insert(0, without.pop())
        step(4)
        return [*params, *(optimizer.state[param]["ema"] for param in params[1:])]

    for expected, actual in zip(run("reference"), run("native"), strict=True):
        assert torch.equal(expected, actual)


def test_state_of_one_option_and_shape_is_not_taken_for_that_of_others():
    """A buffer is kept while another shape and other options are in use, then used again."""

    def run(backend):
        (param,) = params = make_params((5,))
        whole = param.detach().clone()
        optimizer = FusedSGDR(params, backend=backend, **OPTIONS)
        (group,) = optimizer.param_groups

        def steps(*seeds):
            for seed in seeds:
                give_gradients(seed, params)
                optimizer.step()

        steps(0, 1)
        param.grad = None
        param.data = whole[:4].clone()
        group.update(momentum=0, ema_decay=0.9)
        steps(2, 3)
        param.grad = None
        param.data = whole.clone()
        group.update(momentum=0.9, ema_decay=None)
        steps(4)
        return param, optimizer.state[param]["momentum_buffer"]

    for expected, actual in zip(run("reference"), run("native"), strict=True):
        assert torch.equal(expected, actual)


def test_master_copy_that_is_not_in_use_may_have_any_shape(backend):
    params = make_params((5,))
    optimizer = FusedSGDR(params, backend=backend, master_weights=True, **OPTIONS)
    other_params = copies_of(params)
    other = FusedSGDR(other_params, backend=backend, **OPTIONS)
    for seed in range(2):
        give_gradients(seed, params, other_params)
        optimizer.step()
        other.step()
        optimizer.state[params[0]]["master_param"] = torch.ones(3)
    assert torch.equal(params[0], other_params[0])
