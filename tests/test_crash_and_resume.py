"""Trainings that are killed while they save; ``crash_and_resume.py`` alone does it 100 times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sgdr_fused

SCRIPT = Path(__file__).with_name("crash_and_resume.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings are forks")
def test_training_killed_while_it_saves_resumes_to_the_same_bits():
    """After each kill every file loads, and no snapshot is missing at the end."""
    environment = os.environ | {"PYTHONPATH": str(Path(sgdr_fused.__file__).parent.parent)}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills=5"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("5 kills"), ran.stdout
