"""A wrapper that subclasses the optimizer and passes it groups only, as Horovod's does."""

import pytest
import torch
from pair import assert_same_state, give_gradients, make_params

from sgdr_fused import FusedSGDR


class _DistributedOptimizer(torch.optim.Optimizer):
    """The parts of horovod/torch/optimizer.py that touch the wrapped optimizer."""

    def __init__(self, params, backward_passes_per_step=1):
        super(self.__class__, self).__init__(params)
        self.backward_passes_per_step = backward_passes_per_step
        self.synchronized = 0

    def load_state_dict(self, *args, **kwargs):
        super(self.__class__, self).load_state_dict(*args, **kwargs)

    def step(self, closure=None):
        self.synchronized += 1
        return super(self.__class__, self).step(closure)

    def zero_grad(self):
        return super(self.__class__, self).zero_grad()


def wrapped(optimizer):
    """hvd.DistributedOptimizer(optimizer)."""
    name, attributes = type(optimizer).__name__, dict(_DistributedOptimizer.__dict__)
    return type(name, (type(optimizer),), attributes)(optimizer.param_groups)


OPTIONS = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "T_0": 4, "T_mult": 2, "eta_min": 1e-3}


def make(**options):
    params = make_params([9, 70])
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.3, "weight_decay": 0.1}]
    return FusedSGDR(groups, **OPTIONS | options), params


def test_wrapper_that_passes_groups_only_works_without_T_0():
    optimizer, params = make()
    expected, copies = make()
    wrapper = wrapped(optimizer)
    assert isinstance(wrapper, FusedSGDR)
    for step in range(20):
        give_gradients(step, params, copies)
        wrapper.step()
        expected.step()
        assert_same_state(wrapper, params, expected, copies, f"after step {step}")
    assert wrapper.synchronized == 20
    assert wrapper.param_groups == [
        group | {"params": own["params"]}
        for group, own in zip(expected.param_groups, wrapper.param_groups, strict=True)
    ]


def test_wrapper_continues_where_the_groups_are():
    """Nothing that a group holds is lost: its place, an LR set by hand, the skipped steps."""
    optimizer, params = make(momentum=0, nesterov=False)
    expected, copies = make(momentum=0, nesterov=False)
    for side, own in ((optimizer, params), (expected, copies)):
        for step in range(6):
            give_gradients(step, own)
            side.step()
        side.restart(group=1)
        side.param_groups[0]["lr"] = 0.77
        side.param_groups[0]["skipped_steps"] = 3
    wrapper = wrapped(optimizer)
    assert wrapper.get_last_lr() == [0.77, 0.3]
    assert wrapper.skipped_steps == 3
    for step in range(6, 30):
        give_gradients(step, params, copies)
        wrapper.step()
        expected.step()
        assert_same_state(wrapper, params, expected, copies, f"after step {step}")


def test_wrapper_takes_a_new_group_and_a_state_dict():
    optimizer, params = make()
    wrapper = wrapped(optimizer)
    for step in range(3):
        give_gradients(step, params)
        wrapper.step()
    other = wrapped(make()[0])
    other.load_state_dict(wrapper.state_dict())
    assert other.param_groups[0]["step"] == 3
    added = make_params([5])
    with pytest.raises(TypeError, match=r"needs T_0.*param_groups\[2\] has none"):
        wrapper.add_param_group({"params": added})
    assert len(wrapper.param_groups) == 2
    wrapper.add_param_group({"params": added, "T_0": 4, "T_mult": 2})
    assert wrapper.param_groups[2]["step"] == 3


def test_place_in_the_schedule_that_is_none_is_an_error():
    optimizer, _ = make()
    optimizer.param_groups[0]["T_i"] = 0
    with pytest.raises(ValueError, match="Invalid T_i value: 0"):
        wrapped(optimizer)
