"""Trainers read the LR, which lies on the GPU: what they log is right, and no step waits for it."""

import pytest
import torch
from trainings import (
    STEPS,
    TRAININGS,
    assert_logs_and_checkpoint_are_right,
    fused_with_view,
    pair,
    waits_per_step,
)

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("default"),  # the trainers' own differ there
]


@pytest.fixture(params=TRAININGS)
def train(request):
    module, function = TRAININGS[request.param]
    pytest.importorskip(module, exc_type=ImportError)
    return function


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_trainer_logs_and_saves_the_lr_of_each_step(train, device, tmp_path):
    assert_logs_and_checkpoint_are_right(*train(tmp_path, device, fused_with_view, STEPS, every=1))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_trainer_waits_for_the_gpu_no_more_often_than_with_the_pair(train, device, tmp_path):
    fused, torchs = (waits_per_step(train, tmp_path, device, o) for o in (fused_with_view, pair))
    assert fused <= torchs
