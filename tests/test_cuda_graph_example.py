"""examples/cuda_graph.py."""

import pytest
import torch
from pages import example_module


@pytest.fixture(scope="module")
def example():
    with example_module("cuda_graph") as module:
        yield module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_trains(example, capsys):
    runs = example.main(["--epochs", "2"])
    assert list(runs) == ["eager"]
    assert runs["eager"].accuracy > 0.8
    assert runs["eager"].losses[-5:].mean() < 0.5 * runs["eager"].losses[0]
    assert "There is no GPU here" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replays_have_the_losses_of_the_eager_run(example):
    eager, graph = example.main(["--epochs", "2"]).values()
    torch.testing.assert_close(graph.losses, eager.losses, rtol=1e-3, atol=1e-3)
    assert graph.restarts == eager.restarts == 3
