"""Snapshots: copies of the weights at the end of each cycle."""

import copy

import pytest
import torch
from pair import give_gradients, same_bits

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
    optimizer = FusedSGDR(model.parameters(), lr=0.1, momentum=0.9, T_0=2, T_mult=2, **options)
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


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_out_of_range_is_an_error(keep):
    with pytest.raises(ValueError, match="Invalid keep value"):
        Snapshots(*make(), keep=keep)
