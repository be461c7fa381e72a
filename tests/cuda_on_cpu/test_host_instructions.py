"""How many instructions the host takes for a step on a GPU, by valgrind on the fake runtime.

A count is the same on every run, which a time is not.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fake_cuda import run
from test_path import options

SCRIPT = """
import os, sys
import torch, runtime_log as log
from sgdr_fused import FusedSGDR

log.set_deferred(True)  # no kernel runs
for tensors in (100, 600):
    params = [torch.nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(tensors)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=5, backend="native")
    for _ in range(3):
        optimizer.step()
os._exit(0)
"""


@pytest.mark.exhaustive
def test_host_takes_few_instructions_for_a_tensor(tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("there is no valgrind")
    # A dump before each step holds the instructions of the step before.
    step = "sgdr::Stepper::step(*"
    valgrind = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={tmp_path}/out",
        f"--toggle-collect={step}",
        f"--dump-before={step}",
        f"--dump-after={step}",
    ]
    ran = run(SCRIPT, under=valgrind, **options(timeout=1200))
    assert ran.returncode == 0, ran.stderr
    dumps = sorted(tmp_path.glob("out.*"), key=lambda path: int(path.suffix[1:]))
    totals = [int(re.search(r"^totals: (\d+)", d.read_text(), re.M)[1]) for d in dumps]
    of_steps = [total for total in totals if total > 0]
    assert len(of_steps) == 6, totals
    per_tensor = (of_steps[5] - of_steps[2]) / 500
    assert per_tensor <= 1000
