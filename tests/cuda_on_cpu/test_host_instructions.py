"""How many instructions the host takes for a step on a GPU, by valgrind on the fake runtime.

A count is the same on every run, which a time is not.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_cuda import run
from test_path import options

SCRIPT = """
import ctypes, os, sys
import torch, runtime_log as log
from sgdr_fused import FusedSGDR

counter = ctypes.CDLL(sys.argv[1])
log.set_deferred(True)  # no kernel runs
for tensors in (100, 600):
    params = [torch.nn.Parameter(torch.zeros(3, device="cuda")) for _ in range(tensors)]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=5, backend="native")
    for _ in range(3):
        counter.zero()
        optimizer.step()
    counter.dump()
os._exit(0)
"""

COUNTER = """
#include <valgrind/callgrind.h>
void zero(void) { CALLGRIND_ZERO_STATS; }
void dump(void) { CALLGRIND_DUMP_STATS; }
"""


def instructions(tmp_path: Path) -> list[int]:
    """Of a step of 100 tensors, and of one of 600, without what the kernels would do."""
    if shutil.which("valgrind") is None or not Path("/usr/include/valgrind/callgrind.h").exists():
        pytest.skip("there is no valgrind")
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = tmp_path / "counter.so"
    compiler = ["gcc", "-shared", "-fPIC", str(tmp_path / "counter.c"), "-o", str(counter)]
    subprocess.run(compiler, check=True)
    valgrind = [
        "valgrind",
        "--tool=callgrind",
        f"--callgrind-out-file={tmp_path}/out",
        "--toggle-collect=sgdr::Stepper::step(*",
        "--toggle-collect=cudaLaunchKernel",  # called in there: not counted
    ]
    ran = run(SCRIPT, counter, under=valgrind, **options(timeout=1200))
    assert ran.returncode == 0, ran.stderr
    dumps = [(tmp_path / name).read_text() for name in ("out.1", "out.2")]
    return [int(re.search(r"^(?:totals|summary): (\d+)", dump, re.M)[1]) for dump in dumps]


@pytest.mark.exhaustive
def test_host_takes_few_instructions_for_a_tensor(tmp_path: Path) -> None:
    of_few, of_many = instructions(tmp_path)
    assert of_few > 100_000  # else something else was counted
    assert (of_many - of_few) / 500 <= 1150
