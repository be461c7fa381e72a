"""Runs a script in two processes, as the ranks of a process group."""

import os
import subprocess
import sys
from pathlib import Path

from cases import BACKENDS

from sgdr_fused import native


def backends_here() -> list[str]:
    """The backends that are built: a script tests them all, as its processes start slowly."""
    return [name for name in BACKENDS if name != "native" or native.extension is not None]


def run_ranks(script: str, *arguments: str) -> None:
    """Runs a script with the rank and arguments in sys.argv; fails with a failing rank's stderr."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), *arguments],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
