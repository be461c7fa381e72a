"""docs/distributed.md: torchrun starts its scripts."""

import os
import shutil
import subprocess
import sys

import pages
from exact_training import SCHEDULE

from sgdr_fused import CosineWarmRestarts

PAGE = pages.DOCS / "distributed.md"
SCRIPTS = [block.text for block in pages.blocks(PAGE) if block.language == "python"]
LR = CosineWarmRestarts(lr=0.1, T_0=SCHEDULE["T_0"], T_mult=SCHEDULE["T_mult"])


# torch's own threads sometimes abort at the end of a process on a busy machine, with
# torch.optim.SGD too.
ABORTS_AT_EXIT = "terminate called without an active exception"


def torchrun(script, folder, ranks, attempts=4):
    """Runs a script on ranks; returns rank 0's output and copies the files to the folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for attempt in range(attempts):
        working = folder.with_name(f"{folder.name}_{ranks}_ranks_{attempt}")
        shutil.copytree(folder, working)
        (working / "train.py").write_text(script)
        run = subprocess.run(
            [*command, f"--nproc-per-node={ranks}", "train.py"],
            cwd=working,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        if run.returncode == 0 or ABORTS_AT_EXIT not in run.stderr:
            break
    assert run.returncode == 0, run.stderr
    shutil.copytree(working, folder, dirs_exist_ok=True)
    return run.stdout


def expected(step):
    """The line that a script prints at its end."""
    return f"step {step}, lr {LR.lr_at(step)}\n"


def test_ddp_script_runs(tmp_path):
    assert torchrun(SCRIPTS[0], tmp_path, 2) == expected(12)


def test_fsdp2_script_continues_from_its_checkpoint_on_another_number_of_ranks(tmp_path):
    for ranks, step in ((2, 5), (1, 10)):
        assert torchrun(SCRIPTS[1], tmp_path, ranks) == expected(step)
