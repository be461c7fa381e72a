"""The page on several processes: its scripts are started by torchrun."""

import os
import subprocess
import sys

import pages
import pytest
from exact_training import SCHEDULE

from sgdr_fused import CosineWarmRestarts

PAGE = pages.DOCS / "distributed.md"
SCRIPTS = [block.text for block in pages.blocks(PAGE) if block.language == "python"]
LR = CosineWarmRestarts(lr=0.1, T_0=SCHEDULE["T_0"], T_mult=SCHEDULE["T_mult"])


def torchrun(script, folder, ranks):
    """What rank 0 prints."""
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", "train.py"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def expected(step):
    """The line in which a script says where it is."""
    return f"step {step}, lr {LR.lr_at(step)}\n"


@pytest.mark.slow
def test_ddp_script_runs(tmp_path):
    assert torchrun(SCRIPTS[0], tmp_path, 2) == expected(12)


@pytest.mark.slow
def test_fsdp2_script_goes_on_where_its_checkpoint_is_on_any_number_of_ranks(tmp_path):
    for ranks, step in ((2, 5), (1, 10), (4, 15)):
        assert torchrun(SCRIPTS[1], tmp_path, ranks) == expected(step)
