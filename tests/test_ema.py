"""ema_decay: averages of the weights, updated in the same pass."""

import copy

import pytest
import torch
from pair import give_gradients, make_params, same_bits
from torch.optim.swa_utils import AveragedModel

from sgdr_fused import FusedSGDR

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


@pytest.mark.parametrize("mode", [0.9, "swa"])
def test_averages_resume_bit_for_bit(backend, mode, tmp_path):
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
