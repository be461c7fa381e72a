import copy

import pytest
import torch
from torch import nn

from sgdr_fused import FusedSGDR
from sgdr_fused.trainers import SchedulerView, as_scheduler


@pytest.fixture
def optimizer():
    """An optimizer of two groups, with gradients."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": params[0]}, {"params": params[1], "lr": 0.01}]
    return FusedSGDR(groups, lr=0.1, T_0=7)


def test_view_is_a_torch_scheduler(optimizer):
    view = as_scheduler(optimizer)
    assert isinstance(view, torch.optim.lr_scheduler.LRScheduler)
    assert view.optimizer is optimizer
    assert view.base_lrs == [0.1, 0.01]


def test_view_changes_neither_lr_nor_schedule(optimizer):
    view = as_scheduler(optimizer)
    for call in (view.step, lambda: view.step(5), lambda: view.step_update(5, metric=1.0)):
        call()
        assert optimizer.get_last_lr() == [0.1, 0.01]
        assert view.last_epoch == 0


def test_view_keeps_the_lr_of_the_last_step_until_it_is_stepped(optimizer):
    """A torch scheduler does the same, so a trainer logs the same numbers."""
    view = as_scheduler(optimizer)
    optimizer.step()
    assert view.get_last_lr() == [0.1, 0.01]
    assert view.get_lr() == optimizer.get_last_lr() != [0.1, 0.01]
    view.step()
    assert view.get_last_lr() == optimizer.get_last_lr()
    assert view.last_epoch == 1


def test_state_of_the_view_is_plain_and_saved_in_a_checkpoint(optimizer, tmp_path):
    view = as_scheduler(optimizer)
    optimizer.step()
    torch.save(view.state_dict(), tmp_path / "scheduler.pt")
    view.step()
    view.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert view.get_last_lr() == [0.1, 0.01]


def test_view_loads_the_state_of_a_torch_scheduler(optimizer):
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(sgd, 7)
    view = as_scheduler(optimizer)
    view.load_state_dict(scheduler.state_dict())
    assert view.get_last_lr() == [0.1]


def test_view_copies_a_tensor_lr(optimizer):
    """On a GPU the kernel overwrites that tensor."""
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.25)
    view = as_scheduler(optimizer)
    lr.fill_(0.5)
    assert view.get_last_lr() == [0.25, 0.01]
    assert all(type(value) is float for value in view.get_last_lr() + view.state_dict()["_last_lr"])


def test_view_sees_groups_that_are_added(optimizer):
    view = as_scheduler(optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    view.step()
    assert view.get_last_lr() == [0.1, 0.01, 0.5]


def test_view_of_another_optimizer_is_refused():
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"FusedSGDR, but got a SGD"):
        as_scheduler(sgd)


def test_error_for_a_torch_scheduler_points_to_the_view(optimizer):
    with pytest.raises(TypeError, match="as_scheduler"):
        torch.optim.lr_scheduler.StepLR(optimizer, 3)


def test_optimizer_with_a_view_can_be_copied(optimizer):
    view = copy.deepcopy(as_scheduler(optimizer))
    assert isinstance(view, SchedulerView)
    view.optimizer.step()
    view.step()
    assert view.last_epoch == 1
    assert optimizer.get_last_lr() == [0.1, 0.01]
