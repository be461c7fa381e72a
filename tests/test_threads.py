"""Threads at one optimizer wait for each other, and none crashes it; see threads_at_work.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from threads_at_work import SCENARIOS

from sgdr_fused import native


@pytest.fixture(scope="module")
def outcomes():
    """Runs all scenarios of a backend, once."""
    found = {}

    def outcomes_of(backend):
        if backend not in found:
            script = Path(__file__).parent / "threads_at_work.py"
            ran = subprocess.run(
                [sys.executable, script, backend],
                env=os.environ | {"PYTHONPATH": str(Path(native.__file__).parent.parent)},
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stderr
            found[backend] = json.loads(ran.stdout), ran.stderr
        return found[backend]

    return outcomes_of


@pytest.mark.parametrize("name", SCENARIOS)
def test_threads(backend, name, outcomes):
    outcome, said = outcomes(backend)
    assert outcome[name] == "ok", said
