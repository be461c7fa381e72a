"""examples/bfloat16.py."""

import json

import pytest
from pages import REPOSITORY, example_module

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    with example_module("bfloat16") as module:
        yield module


def test_results_hold_every_way_and_seed(example, tmp_path, capsys):
    example.main(["--epochs", "1", "--seeds", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "bfloat16.json").read_text())
    assert set(written["accuracies"]) == set(example.WAYS)
    assert all(len(found) == 2 for found in written["accuracies"].values())
    assert (tmp_path / "bfloat16.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(example.WAYS)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([0.9, 0.91, 0.92], True),
        ([0.91, 0.9, 0.93], True),
        ([0.8, 0.82, 0.81], False),
        ([0.899, 0.909, 0.919], True),
        ([0.89, 0.90, 0.91], False),
    ],
)
def test_verdict_depends_on_the_standard_error(example, found, verdict):
    assert example.reaches(found, [0.9, 0.91, 0.92]) is verdict


def test_committed_results_support_the_page(example):
    written = json.loads((REPOSITORY / "examples" / "bfloat16.json").read_text())
    assert written["reaches"] == {
        example.FULL: True,
        example.NEAREST: False,
        example.STOCHASTIC: True,
        example.MASTER: True,
    }
    for way, found in written["accuracies"].items():
        assert (
            example.reaches(found, written["accuracies"][example.FULL]) is (written["reaches"][way])
        )
