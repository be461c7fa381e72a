"""Snapshots: copies of the weights at the end of each cycle."""

import copy
import os
import re
import warnings

import pytest
import torch
from pair import give_gradients, same_bits

import sgdr_fused
from sgdr_fused import FusedSGDR
from sgdr_fused.snapshots import Snapshots


@pytest.fixture(params=["memory", "disk"])
def folder(request, tmp_path):
    """Where the snapshots are kept."""
    return None if request.param == "memory" else tmp_path / "snapshots"


def make(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
    )
    options = {"lr": 0.1, "momentum": 0.9, "T_0": 2, "T_mult": 2} | options
    optimizer = FusedSGDR(model.parameters(), **options)
    return model, optimizer


def train(model, optimizer, snapshots, steps):
    """Takes steps; returns the weights at each snapshot taken."""
    taken = []
    for step in range(steps):
        give_gradients(step, list(model.parameters()))
        model[1].running_mean += 1
        optimizer.step()
        if snapshots.update():
            taken.append({name: value.clone() for name, value in model.state_dict().items()})
    return taken


def test_weights_and_buffers_are_kept_at_each_cycles_end(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    taken = train(model, optimizer, snapshots, 2 + 4 + 8 + 1)
    assert snapshots.cycles == [0, 1, 2]
    for cycle, expected in zip(snapshots.cycles, taken, strict=True):
        found = snapshots.load(cycle)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_the_latest_snapshots_are_kept(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, keep=2, folder=folder)
    train(model, optimizer, snapshots, 30)
    assert snapshots.cycles == [2, 3]
    with pytest.raises(KeyError, match="no snapshot of cycle 0"):
        snapshots.load(0)


def test_each_cycle_end_is_one_snapshot(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 2)
    assert not snapshots.update()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()  # skipped
    assert not snapshots.update()


def skip_a_step(optimizer):
    """A step as a GradScaler takes it that has found an infinity."""
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def test_update_once_an_epoch_sees_each_cycle_though_a_step_was_skipped(folder, backend):
    """Then a cycle does not end with an epoch, and at no epoch's end T_cur is 0."""
    model, optimizer = make(steps_per_epoch=4, T_mult=1, backend=backend)
    snapshots = Snapshots(model, optimizer, folder=folder)
    skip_a_step(optimizer)
    for step in range(1, 12 * 4):
        give_gradients(step, list(model.parameters()))
        optimizer.step()
        if step % 4 == 3:
            snapshots.update()
    assert snapshots.cycles == [0, 1, 2, 3, 4]


def test_update_after_several_cycles_takes_the_latest(folder):
    model, optimizer = make(T_mult=1)
    snapshots = Snapshots(model, optimizer, folder=folder)
    for _ in range(2):
        for step in range(5):
            give_gradients(step, list(model.parameters()))
            optimizer.step()
        snapshots.update()
    assert snapshots.cycles == [1, 4]


def test_restart_ends_a_cycle_for_update(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 1)
    optimizer.restart()
    assert snapshots.update()
    assert not snapshots.update()
    assert snapshots.cycles == [0]


@pytest.mark.parametrize("jump", ["seek", "load_state_dict"])
def test_jump_in_the_schedule_ends_no_cycle(jump, folder):
    """Or the weights of the middle of a cycle replace the good snapshot of the one before."""
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    if jump == "seek":
        optimizer.seek(4)
    else:
        other = make()[1]
        other.seek(4)
        optimizer.load_state_dict(other.state_dict())
    assert train(model, optimizer, snapshots, 1) == []
    assert len(train(model, optimizer, snapshots, 1)) == 1
    assert snapshots.cycles == [1]


def test_snapshots_made_within_a_training_begin_with_its_next_end(folder):
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer), 3)
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 3)
    assert snapshots.cycles == [1]


def test_update_keeps_a_snapshot_that_take_has_taken(folder):
    """As a restart hook does, which is called at the cycle's end."""
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    optimizer.register_restart_hook(lambda o: snapshots.take(o.cycle - 1))
    for step in range(3):
        give_gradients(step, list(model.parameters()))
        optimizer.step()
        if step == 1:
            expected = model[0].weight.clone()
    assert not snapshots.update()
    assert torch.equal(snapshots.load(0)["0.weight"], expected)


def resumed(model, optimizer, folder, loads_first=False):
    """What a new process makes of a checkpoint."""
    model, optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    new_model, new_optimizer = make()
    if not loads_first:
        snapshots = Snapshots(new_model, new_optimizer, folder=folder)
    new_optimizer.load_state_dict(optimizer)
    new_model.load_state_dict(model)
    if loads_first:
        snapshots = Snapshots(new_model, new_optimizer, folder=folder)
    return new_model, new_optimizer, snapshots


@pytest.mark.parametrize("loads_first", [True, False])
def test_cycle_that_ended_just_before_a_crash_is_taken_after_resuming(folder, loads_first):
    """The process saved its checkpoint, and was killed between step() and update()."""
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer, folder=folder), 5)
    give_gradients(5, list(model.parameters()))
    optimizer.step()
    new_model, new_optimizer, snapshots = resumed(model, optimizer, folder, loads_first)
    assert snapshots.update()
    assert not snapshots.update()
    assert snapshots.cycles[-1] == 1
    assert torch.equal(snapshots.load(1)["0.weight"], model[0].weight)
    assert train(new_model, new_optimizer, snapshots, 7) == []
    assert len(train(new_model, new_optimizer, snapshots, 1)) == 1


def test_cycle_with_a_snapshot_is_not_taken_again_after_resuming(folder):
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer, folder=folder), 6)
    snapshots = resumed(model, optimizer, folder)[2]
    assert snapshots.update() == (folder is None)


def test_missing_snapshot_is_said_when_it_is_too_late_to_take_it(tmp_path):
    """The loop calls update() after each step only, so the weights are a step too late."""
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer, folder=tmp_path), 5)
    give_gradients(5, list(model.parameters()))
    optimizer.step()
    new_model, new_optimizer, snapshots = resumed(model, optimizer, tmp_path)
    with pytest.warns(UserWarning, match="has no snapshot of cycle 1, .* call update\\(\\) right"):
        train(new_model, new_optimizer, snapshots, 1)
    train(new_model, new_optimizer, snapshots, 7)
    assert snapshots.cycles == [0, 2]


def test_new_folder_within_a_cycle_needs_no_warning(tmp_path):
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer), 5)
    new_model, new_optimizer, snapshots = resumed(model, optimizer, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(new_model, new_optimizer, snapshots, 1)
    assert snapshots.cycles == [1]


def test_prediction_is_the_mean_of_the_snapshots(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 15)
    inputs = torch.randn(5, 3)
    expected = []
    for cycle in snapshots.cycles:
        twin, _ = make()
        twin.load_state_dict(snapshots.load(cycle))
        expected.append(torch.softmax(twin.eval()(inputs), dim=-1))
    torch.testing.assert_close(snapshots.predict(inputs), torch.stack(expected).mean(0).detach())
    raw = snapshots.predict(inputs, of_output=lambda output: output)
    assert not torch.allclose(raw, snapshots.predict(inputs))


class Named(torch.nn.Module):
    """A model with two inputs, which come as a dict, a tuple or separately."""

    def __init__(self, takes):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.takes = takes

    def forward(self, *args, scale=None, **kwargs):
        if self.takes == "dict":
            kwargs, args = args[0], ()
        if self.takes == "tuple":
            args = args[0]
        input, shift = args or (kwargs["input"], kwargs["shift"])
        return {"logits": self.layer(input) + shift * (1 if scale is None else scale)}


@pytest.mark.parametrize(
    ("takes", "args", "kwargs"),
    [
        ("dict", ({"input": torch.ones(5, 3), "shift": 1.0},), {}),
        ("tuple", ((torch.ones(5, 3), 1.0),), {}),
        ("separate", (torch.ones(5, 3), 1.0), {}),
        ("separate", (torch.ones(5, 3), 2.0), {"scale": 0.5}),
        ("separate", (), {"input": torch.ones(5, 3), "shift": 1.0}),
    ],
    ids=["one_dict", "one_tuple", "two_tensors", "and_a_keyword", "keywords_only"],
)
def test_predict_passes_any_arguments_on_to_the_model(takes, args, kwargs):
    model = Named(takes)
    snapshots = Snapshots(model, FusedSGDR(model.parameters(), lr=0.1, T_0=2))
    snapshots.take(0)
    found = snapshots.predict(*args, **kwargs, of_output=lambda output: output["logits"])
    assert torch.equal(found, model.layer(torch.ones(5, 3)) + 1)


def test_output_that_is_no_tensor_is_an_error_that_says_what_to_do():
    model = Named("separate")
    snapshots = Snapshots(model, FusedSGDR(model.parameters(), lr=0.1, T_0=2))
    snapshots.take(0)
    with pytest.raises(TypeError, match="the model's output is no tensor, but a dict; pass an of_"):
        snapshots.predict(torch.ones(5, 3), 1.0)
    with pytest.raises(TypeError, match="the result of of_output is no tensor, but a float"):
        snapshots.predict(torch.ones(5, 3), 1.0, of_output=lambda _: 1.0)


def test_prediction_does_not_change_the_model(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 10)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]

    def fail(_output):
        raise ZeroDivisionError

    snapshots.predict(torch.randn(5, 3))
    with pytest.raises(ZeroDivisionError):
        snapshots.predict(torch.randn(5, 3), of_output=fail)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_snapshots_continue_in_a_folder(tmp_path):
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer, folder=tmp_path), 6)
    resumed, other = make()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    snapshots = Snapshots(resumed, other, folder=tmp_path)
    train(resumed, other, snapshots, 8)
    assert snapshots.cycles == [0, 1, 2]


def test_snapshots_of_an_abandoned_run_are_dropped(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, keep=2, folder=folder)
    train(model, optimizer, snapshots, 2)
    early = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, snapshots, 4 + 8 + 16)
    assert snapshots.cycles == [2, 3]
    model.load_state_dict(early[0])
    optimizer.load_state_dict(early[1])
    taken = train(model, optimizer, snapshots, 4)
    assert snapshots.cycles == [1]
    assert torch.equal(snapshots.load(1)["0.weight"], taken[0]["0.weight"])


def test_resuming_one_step_before_a_cycles_end_takes_its_snapshot(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, snapshots, 3)
    optimizer.load_state_dict(saved)
    assert len(train(model, optimizer, snapshots, 1)) == 1


def test_loaded_snapshot_is_a_copy(folder):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 2)
    before = snapshots.load(0)["0.weight"].clone()
    loaded = snapshots.load(0)
    loaded.pop("1.weight")
    loaded["0.weight"].zero_()
    assert torch.equal(snapshots.load(0)["0.weight"], before)
    assert "1.weight" in snapshots.load(0)


class WithExtraState(torch.nn.Linear):
    """A layer that also saves something that is no tensor."""

    note = "unset"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_model_with_an_extra_state_predicts(folder):
    model = WithExtraState(3, 2)
    optimizer = FusedSGDR(model.parameters(), lr=0.1, T_0=2)
    snapshots = Snapshots(model, optimizer, folder=folder)
    snapshots.take(0)
    model.note = "set"
    inputs = torch.randn(5, 3)
    expected = torch.softmax(model(inputs), dim=-1).detach()
    torch.testing.assert_close(snapshots.predict(inputs), expected)
    assert model.note == "set"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            torch.nn.Linear(3, 5),
            r"'bias' has shape \(2,\) in it, but has shape \(5,\) in the model",
        ),
        (torch.nn.Linear(3, 2, bias=False), "'bias' has shape .* but is missing in the model"),
        (torch.nn.Sequential(torch.nn.Linear(3, 2)), "'0.bias' is missing in it"),
    ],
    ids=["other_shape", "less", "other_names"],
)
def test_snapshot_of_another_model_is_an_error_that_changes_nothing(tmp_path, other, message):
    model = torch.nn.Linear(3, 2)
    Snapshots(model, FusedSGDR(model.parameters(), lr=0.1, T_0=2), folder=tmp_path).take(0)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    snapshots = Snapshots(other, FusedSGDR(other.parameters(), lr=0.1, T_0=2), folder=tmp_path)
    with pytest.raises(ValueError, match=f"cycle 0 is of another model: {message}"):
        snapshots.predict(torch.randn(5, 3))
    assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)


def test_cycle_with_seven_digits_is_found_again(tmp_path):
    snapshots = Snapshots(*make(), folder=tmp_path)
    snapshots.take(1_000_000)
    assert snapshots.cycles == [1_000_000]
    assert snapshots.load(1_000_000)


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=tmp_path)
    snapshots.take(0)
    before = snapshots.load(0)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(OSError, match="no space left"):
        snapshots.take(0)
    assert same_bits(snapshots.load(0)["0.weight"], before["0.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000.pt"]


def test_prediction_without_a_snapshot_is_an_error(folder):
    snapshots = Snapshots(*make(), folder=folder)
    with pytest.raises(RuntimeError, match="no cycle has ended"):
        snapshots.predict(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("cycle", "error"),
    [
        (-1, ValueError),
        (-(2**70), ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("0", TypeError),
    ],
)
def test_take_of_no_cycle_is_an_error_that_deletes_nothing(cycle, error, folder):
    """take(optimizer.cycle - 1) in the first cycle is take(-1)."""
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=folder)
    train(model, optimizer, snapshots, 6)
    with pytest.raises(error, match=re.escape(f"Invalid cycle value: {cycle!r}")):
        snapshots.take(cycle)
    assert snapshots.cycles == [0, 1]


def test_what_a_killed_process_left_unfinished_is_removed(tmp_path):
    (tmp_path / ".writing-snapshot-000000.pt-0123abcd").write_bytes(b"PK")
    (tmp_path / ".writing-x1y2z3").write_bytes(b"PK")
    (tmp_path / "notes.txt").touch()
    Snapshots(*make(), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_snapshot_of_torch_save_still_loads(tmp_path):
    """Files of an earlier version, which have no checksum."""
    model, optimizer = make()
    torch.save(model.state_dict(), tmp_path / "snapshot-000003.pt")
    snapshots = Snapshots(model, optimizer, folder=tmp_path)
    assert snapshots.cycles == [3]
    assert torch.equal(snapshots.load(3)["0.weight"], model[0].weight)


def damage(path, how):
    whole = path.read_bytes()
    if how == "flipped bit":
        path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:])
    elif how == "no snapshot":
        sgdr_fused.save({"model": {}}, path)
    else:
        path.write_bytes({"empty": b"", "foreign": b"hello", "cut": whole[:-500]}[how])


@pytest.mark.parametrize("how", ["flipped bit", "empty", "foreign", "cut", "no snapshot"])
def test_damaged_snapshot_is_an_error_that_names_the_file(how, tmp_path):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=tmp_path)
    train(model, optimizer, snapshots, 2)
    path = tmp_path / "snapshot-000000.pt"
    damage(path, how)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=re.escape(str(path))):
        snapshots.predict(torch.randn(5, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_files_than_keep_do_not_count_and_are_deleted_after_resuming(tmp_path):
    """The process was killed after it wrote a snapshot, before it deleted the oldest."""
    model, optimizer = make()
    train(model, optimizer, Snapshots(model, optimizer, folder=tmp_path), 14)
    snapshots = Snapshots(model, optimizer, keep=2, folder=tmp_path)
    assert snapshots.cycles == [1, 2]
    assert not snapshots.update()
    assert len(list(tmp_path.iterdir())) == 2


def test_killed_take_leaves_no_snapshot_of_an_abandoned_run(tmp_path, monkeypatch):
    model, optimizer = make()
    snapshots = Snapshots(model, optimizer, folder=tmp_path)
    train(model, optimizer, snapshots, 14)

    def killed(*_):
        raise SystemExit

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):
        snapshots.take(0)
    assert snapshots.cycles == [0]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_out_of_range_is_an_error(keep):
    with pytest.raises(ValueError, match="Invalid keep value"):
        Snapshots(*make(), keep=keep)
