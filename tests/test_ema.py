"""ema_decay: averages of the weights, updated in the same pass."""

import copy
import pickle
import re

import pytest
import torch
from pair import (
    assert_same_state,
    assert_unchanged,
    give_gradients,
    make_params,
    same_bits,
    snapshot,
)
from torch.optim.swa_utils import AveragedModel

from sgdr_fused import EmaSchedule, FusedSGDR, native
from sgdr_fused.compiled import is_traceable
from sgdr_fused.device_state import DeviceState, sync_group_on_device

OPTIONS = {"lr": 0.1, "momentum": 0.9, "T_0": 3, "T_mult": 2}


def ema_of(optimizer, param):
    return optimizer.state[param]["ema"]


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_ema_follows_its_formula(backend, dtype, decay):
    params = make_params([1, 70, 1003], dtype)
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=decay, backend=backend)
    averages = None
    for step in range(9):
        give_gradients(step, params)
        optimizer.step()
        values = [p.detach().clone() for p in params]
        if averages is None:
            averages = values
        for average, value in zip(averages, values, strict=True):
            if step > 0 and decay > 0:
                average.mul_(decay).add_(value, alpha=1 - decay)
            else:
                average.copy_(value)
        for p, average in zip(params, averages, strict=True):
            assert same_bits(ema_of(optimizer, p), average)


def test_swa_equals_torchs_average_of_the_weights_at_cycle_ends(backend):
    model = torch.nn.Linear(70, 10)
    optimizer = FusedSGDR(model.parameters(), **OPTIONS, ema_decay="swa", backend=backend)
    averaged = AveragedModel(model)
    seen = 0
    for step in range(3 + 6 + 12 + 1):
        give_gradients(step, list(model.parameters()))
        optimizer.step()
        if optimizer.is_cycle_end:
            averaged.update_parameters(model)
            seen += 1
        for p, average in zip(model.parameters(), averaged.module.parameters(), strict=True):
            if seen == 0:
                assert "ema" not in optimizer.state[p]
            else:
                torch.testing.assert_close(ema_of(optimizer, p), average.detach())
    assert seen == 3


def test_ema_of_half_precision_parameters_is_float32(backend, half_dtype):
    params = make_params([70], half_dtype)
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=0.99, backend=backend)
    for step in range(5):
        give_gradients(step, params)
        optimizer.step()
    assert ema_of(optimizer, params[0]).dtype == torch.float32
    restored = FusedSGDR(make_params([70], half_dtype), **OPTIONS, ema_decay=0.99, backend=backend)
    restored.load_state_dict(optimizer.state_dict())
    loaded = restored.param_groups[0]["params"][0]
    assert same_bits(ema_of(restored, loaded), ema_of(optimizer, params[0]))


def test_swap_ema_swaps_the_averages_in_and_back(backend):
    params = [*make_params([7, 300]), *make_params([9], torch.bfloat16)]
    idle = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedSGDR([*params, idle], **OPTIONS, ema_decay=0.9, backend=backend)
    for step in range(5):
        give_gradients(step, params)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    with optimizer.swap_ema():
        for p in params:
            assert same_bits(p.detach(), ema_of(optimizer, p).to(p.dtype))
        assert idle.eq(1).all()
    assert all(same_bits(p.detach(), value) for p, value in zip(params, before, strict=True))


def test_swap_ema_restores_the_weights_after_an_error(backend):
    params = make_params([7])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=0.9, backend=backend)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    before = params[0].detach().clone()
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    assert same_bits(params[0].detach(), before)
    give_gradients(3, params)
    optimizer.step()


def test_step_inside_swap_ema_is_an_error(backend):
    params = make_params([7])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=0.9, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="within a swap_ema"):
        optimizer.step()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="within a swap_ema"):
        with optimizer.swap_ema():
            pass


def test_ema_state_dict_loads_into_a_model(backend):
    model = torch.nn.Linear(7, 3)
    optimizer = FusedSGDR(model.named_parameters(), **OPTIONS, ema_decay=0.9, backend=backend)
    for step in range(4):
        give_gradients(step, list(model.parameters()))
        optimizer.step()
    twin = copy.deepcopy(model)
    twin.load_state_dict(optimizer.ema_state_dict())
    assert same_bits(twin.weight.detach(), ema_of(optimizer, model.weight))
    assert not same_bits(twin.weight.detach(), model.weight.detach())


def test_ema_state_dict_needs_names(backend):
    optimizer = FusedSGDR(make_params([7]), **OPTIONS, ema_decay=0.9, backend=backend)
    with pytest.raises(ValueError, match="named_parameters"):
        optimizer.ema_state_dict()


@pytest.mark.parametrize("mode", [0.9, "swa", EmaSchedule(0.9), lambda step: 1 - 1 / (1 + step)])
def test_averages_resume_bit_for_bit(backend, mode, tmp_path):
    """A function is not saved, as with LambdaLR; the loading optimizer has its own."""
    params = make_params([70, 3])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=mode, backend=backend)
    for step in range(10):
        give_gradients(step, params)
        optimizer.step()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], tmp_path / "saved.pt")
    saved, values = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = [torch.nn.Parameter(value) for value in values]
    other = FusedSGDR(resumed, **OPTIONS, ema_decay=mode, backend=backend)
    other.load_state_dict(saved)
    for step in range(10, 23):
        give_gradients(step, params, resumed)
        optimizer.step()
        other.step()
        assert_same_state(optimizer, params, other, resumed, step)
        for p, q in zip(params, resumed, strict=True):
            assert same_bits(ema_of(optimizer, p), ema_of(other, q))


def test_equal_average_removed_from_the_state_begins_anew(backend):
    params = make_params([70])
    options = OPTIONS | {"T_0": 1, "T_mult": 1, "ema_decay": "swa", "backend": backend}
    optimizer = FusedSGDR(params, **options)
    for step in range(5):
        if step == 3:
            del optimizer.state[params[0]]["ema"]
        give_gradients(step, params)
        before = params[0].detach().clone()
        optimizer.step()
    assert optimizer.state[params[0]]["n_averaged"] == 2
    average = (before.double() + params[0].detach().double()) / 2
    torch.testing.assert_close(ema_of(optimizer, params[0]), average.float())


def test_group_may_have_no_average(backend):
    params = make_params([7, 7])
    groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": None}]
    optimizer = FusedSGDR(groups, **OPTIONS, ema_decay=0.9, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    assert "ema" in optimizer.state[params[0]]
    assert "ema" not in optimizer.state[params[1]]


@pytest.mark.parametrize("value", [1, 1.5, -0.1, float("nan"), "SWA", True])
def test_ema_decay_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="Invalid ema_decay value"):
        FusedSGDR(make_params([4]), **OPTIONS, ema_decay=value)


def test_ema_of_a_wrong_dtype_is_an_error_and_changes_nothing(backend):
    params = make_params([4])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=0.5, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.state[params[0]]["ema"] = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"state\['ema'\] of dtype torch.float16"):
        optimizer.step()
    assert same_bits(params[0].detach(), before)


# -------------------------------------------------------- ema_decay as a function of the step count


def alternating(step):
    """Of the values at the edges too: 0 takes the parameter, 1 leaves the average as it is."""
    return [0.9, 0.0, 1.0, 0.5][step % 4]


def test_ema_decay_may_be_a_function_of_the_applied_steps(backend, dtype):
    calls = []

    def decay(step):
        calls.append(step)
        return alternating(step)

    params = make_params([1, 70, 1003], dtype)
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=decay, backend=backend)
    averages = [None] * 3
    for step in range(11):
        give_gradients(step, params)
        optimizer.step()
        for i, p in enumerate(params):
            if averages[i] is None or alternating(step) == 0:
                averages[i] = p.detach().clone()
            else:
                averages[i].mul_(alternating(step)).add_(p.detach(), alpha=1 - alternating(step))
            assert same_bits(ema_of(optimizer, p), averages[i])
    assert calls == list(range(11)), "once for each step"


SCHEDULES = {
    "ratio": EmaSchedule(0.999),
    "power": EmaSchedule(0.98, warmup="power", power=0.75, gamma=2.0),
    "start and interval": EmaSchedule(0.9, start_step=5, every=3, warmup=None),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backends_agree_on_a_scheduled_decay(schedule, dtype):
    if native.extension is None:
        pytest.skip(native.why_missing)
    options = OPTIONS | {"ema_decay": schedule, "master_weights": dtype == torch.bfloat16}
    sides = [make_params([70, 1003], dtype) for _ in range(2)]
    optimizers = [
        FusedSGDR(params, **options, backend=backend)
        for params, backend in zip(sides, ("native", "reference"), strict=True)
    ]
    for step in range(30):
        give_gradients(step, *sides)
        for optimizer in optimizers:
            optimizer.step()
        assert_same_state(optimizers[0], sides[0], optimizers[1], sides[1], step)
        assert optimizers[0].param_groups[0]["ema_decay"] == schedule(step)


def diffusers_decay(optimization_step, decay, after, use_ema_warmup, inv_gamma, power):
    """EMAModel.get_decay() of diffusers; ModelEmaV3.get_decay() of timm with use_warmup."""
    step = max(0, optimization_step - after - 1)
    if step <= 0:
        return 0.0
    if use_ema_warmup:
        value = 1 - (1 + step / inv_gamma) ** -power
    else:
        value = (1 + step) / (10 + step)
    return max(min(value, decay), 0.0)


@pytest.mark.parametrize("after", [0, 7])
def test_ema_schedule_equals_those_of_diffusers_and_timm(after):
    ratio = EmaSchedule(0.99, start_step=after)
    power = EmaSchedule(0.99, start_step=after, warmup="power", gamma=2.0, power=0.75)
    for step in range(3000):
        # Both count before they average: the first update has number 1.
        assert ratio(step) == diffusers_decay(step + 1, 0.99, after, False, 1.0, 2 / 3)
        assert power(step) == diffusers_decay(step + 1, 0.99, after, True, 2.0, 0.75)
    assert ratio(2999) == power(2999) == 0.99


def test_ema_schedule_averages_at_its_interval():
    schedule = EmaSchedule(0.9, start_step=2, every=3, warmup=None)
    assert [schedule(step) for step in range(9)] == [0, 0, 0, 1, 1, 0.9, 1, 1, 0.9]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("decay", value) for value in (1.0, -0.1, float("nan"))),
        *(("start_step", value) for value in (-1, 0.5)),
        *(("every", value) for value in (0, 1.5)),
        ("warmup", "linear"),
        ("gamma", 0.0),
        ("power", -1.0),
    ],
)
def test_ema_schedule_out_of_range_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name} value: {value!r}"):
        EmaSchedule(**{name: value})


def test_each_group_may_have_a_function_and_change_it(backend):
    params = make_params([7, 7])
    groups = [{"params": params[:1], "ema_decay": alternating}, {"params": params[1:]}]
    optimizer = FusedSGDR(groups, **OPTIONS, ema_decay=0.5, backend=backend)
    for step, change in enumerate(
        [None, lambda step: 1.0, 0.25, alternating, lambda step: step / 9]
    ):
        if change is not None:
            optimizer.param_groups[1]["ema_decay"] = change
        give_gradients(step, params)
        before = [ema_of(optimizer, p).clone() for p in params] if step else None
        optimizer.step()
        if step:
            decay = change if isinstance(change, float) else change(step)
            for p, average, d in zip(params, before, (alternating(step), decay), strict=True):
                expected = average.mul(d).add(p.detach(), alpha=1 - d) if d else p.detach()
                assert same_bits(ema_of(optimizer, p), expected)


def test_skipped_step_does_not_count_for_the_function(backend):
    calls = []
    params = make_params([7])
    optimizer = FusedSGDR(
        params, **OPTIONS, ema_decay=lambda step: calls.append(step) or 0.9, backend=backend
    )
    for step in range(6):
        give_gradients(step, params)
        optimizer.found_inf = torch.tensor(float(step in (2, 3)))
        optimizer.step()
    assert calls == [0, 1, 2, 3]


def test_averages_with_a_function_in_backward(backend):
    params, theirs = make_params([7, 70]), make_params([7, 70])
    options = OPTIONS | {"ema_decay": EmaSchedule(0.9), "backend": backend}
    optimizer, expected = FusedSGDR(params, **options), FusedSGDR(theirs, **options)
    optimizer.step_in_backward()
    for step in range(8):
        for side in (params, theirs):
            sum((p * p * (step + 1)).sum() for p in side).backward()
        optimizer.step()
        expected.step()
        expected.zero_grad()
        assert_same_state(optimizer, params, expected, theirs, step)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), None, "0.5", [0.5]])
def test_function_that_returns_no_decay_is_an_error_and_changes_nothing(backend, value):
    values = [0.5, 0.5, value]
    params = make_params([7, 70])
    groups = [{"params": params[:1]}, {"params": params[1:], "ema_decay": values.__getitem__}]
    optimizer = FusedSGDR(groups, **OPTIONS, ema_decay=0.9, backend=backend)
    for step in range(2):
        give_gradients(step, params)
        optimizer.step()
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError, match=re.escape(f"Invalid ema_decay(2) value: {value!r}")):
        optimizer.step()
    assert_unchanged(before, optimizer, params)
    with pytest.raises(ValueError, match=r"Invalid ema_decay\(2\) value"):
        optimizer.add_param_group(
            {"params": make_params([3]), "ema_decay": lambda step: values[step]}
        )
    assert len(optimizer.param_groups) == 2
    values[2] = 0.5
    optimizer.step()


def test_error_of_the_function_itself_changes_nothing(backend):
    params = make_params([7])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=[0.5].__getitem__, backend=backend)
    give_gradients(0, params)
    optimizer.step()
    before = snapshot(optimizer, params)
    with pytest.raises(IndexError):
        optimizer.step()
    assert_unchanged(before, optimizer, params)


def test_optimizer_without_a_function_keeps_its_own_decay(backend):
    params = make_params([7])
    saved = FusedSGDR(params, **OPTIONS, ema_decay=EmaSchedule(), backend=backend).state_dict()
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=0.9, backend=backend)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["ema_decay"] == 0.9


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_a_scheduled_decay(backend, copied):
    params = make_params([70])
    optimizer = FusedSGDR(params, **OPTIONS, ema_decay=EmaSchedule(0.9), backend=backend)
    for step in range(3):
        give_gradients(step, params)
        optimizer.step()
    other = copied(optimizer)
    theirs = other.param_groups[0]["params"]
    for step in range(3, 8):
        give_gradients(step, params, theirs)
        optimizer.step()
        other.step()
        assert_same_state(optimizer, params, other, theirs, step)


def test_step_with_a_function_as_ema_decay_is_not_traced():
    optimizer = FusedSGDR(make_params([7]), **OPTIONS)
    assert is_traceable(optimizer.param_groups) is (native.extension is not None)
    optimizer.param_groups[0]["ema_decay"] = EmaSchedule()
    assert not is_traceable(optimizer.param_groups)


def test_function_as_ema_decay_is_refused_in_a_cuda_graph(monkeypatch):
    """A group on a GPU, whose memory is on the host here: the host has to evaluate each step."""
    optimizer = FusedSGDR(make_params([7]), **OPTIONS, ema_decay=alternating, backend="reference")
    (group,) = optimizer.param_groups
    device_state = DeviceState.make(group, optimizer.state)
    group["step"].fill_(2)
    sync_group_on_device(group, device_state, optimizer.state)
    assert group["ema_decay"] == 1.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"ema_decay is a function.*CUDA graph"):
        sync_group_on_device(group, device_state, optimizer.state)
