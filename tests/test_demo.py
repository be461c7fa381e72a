import json
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "digits.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output, numbers and picture of two epochs of the demo."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    picture = tmp_path_factory.mktemp("demo") / "digits.png"
    command = [sys.executable, str(DEMO), "--epochs", "2", "--out", str(picture)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return printed, json.loads(picture.with_suffix(".json").read_text()), picture.read_bytes()


def test_demo_equals_the_pair_bit_for_bit(demo):
    _, results, _ = demo
    assert results["largest_loss_difference"] == 0
    assert results["same_parameters_as_the_pair"]
    accuracies = list(results["test_accuracy"].values())
    assert accuracies[0] == accuracies[1] > 0.8


def test_demo_resumes_within_a_cycle_bit_for_bit(demo):
    _, results, _ = demo
    assert results["resumed_is_identical"]
    assert 0 < results["resumed_at_step"] < results["steps"]
    assert results["resumed_at_step"] not in results["restarts"]


def test_demo_prints_its_progress_and_draws_a_picture(demo):
    printed, results, picture = demo
    assert f"step   {results['steps']} of {results['steps']}" in printed
    assert "\r" not in printed
    assert picture.startswith(b"\x89PNG")
