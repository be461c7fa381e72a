"""A training that is killed while it saves, and resumed, many times.

    python tests/crash_and_resume.py --kills 100

A training is killed with SIGKILL at random moments of its saving: of the checkpoint after each
batch, of snapshots, and of what follows. After each kill every file must load. The training is
resumed until it ends, and must have written the very bits of one that nobody killed. Then the next
one begins, until there were as many kills as asked for.

Each training is a fork of this process, which therefore uses one thread only.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every training needs it, so it is imported before the forks

from sgdr_fused import FusedSGDR, saving
from sgdr_fused.snapshots import Snapshots

BATCHES = 20
WIDTH = 500  # 1 MB of weights, and of momentum and average, so that a save takes a while


def train(folder: Path) -> None:
    """Trains, or resumes what is in the folder, as a user's script does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH), torch.nn.Linear(WIDTH, 1)
    )
    optimizer = FusedSGDR(
        model.parameters(), lr=0.01, momentum=0.9, T_0=2, ema_decay="swa", skip_nonfinite=True
    )
    snapshots = Snapshots(model, optimizer, keep=5, folder=folder / "snapshots")
    batches = range(BATCHES)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = saving.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        batches = range(saved["batches_done"], BATCHES)
        snapshots.update()
    for batch in batches:
        input = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(batch))
        optimizer.zero_grad()
        scale = float("nan") if batch % 7 == 4 else 1.0  # a step that is skipped
        (scale * model(input).square().mean()).backward()
        optimizer.step()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "batches_done": batch + 1,
        }
        saving.save(state, checkpoint)
        snapshots.update()


def fork(train: Callable[[], None]) -> int:
    """The process id of a child that trains."""
    child = os.fork()
    if child == 0:
        try:
            train()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


def exit_code(child: int) -> int:
    """Waits for a child; below zero is the signal that has killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_with_notices(folder: Path, pipe: int) -> None:
    """Trains, and writes a byte to the pipe as each save begins."""
    save = saving.save

    def save_with_notice(obj: object, path: Path) -> None:
        os.write(pipe, b".")
        save(obj, path)

    saving.save = save_with_notice
    train(folder)


def train_and_kill(folder: Path, chance: random.Random, seconds_of_save: float) -> int:
    """Trains until a random moment after one of the next saves has begun; the exit code."""
    readable, writable = os.pipe()
    child = fork(lambda: train_with_notices(folder, writable))
    os.close(writable)
    for _ in range(chance.randint(1, 3)):
        if not os.read(readable, 1):
            break
    # The next notice also ends the wait: then this save was faster than the others.
    select.select([readable], [], [], chance.uniform(0, 1.2 * seconds_of_save))
    os.kill(child, signal.SIGKILL)
    os.close(readable)
    return exit_code(child)


def is_same(left: Any, right: Any) -> bool:
    """Whether two loaded files hold equal bits."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(is_same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(is_same, left, right))
    return bool(left == right)


def loaded_files(folder: Path) -> dict[str, Any]:
    """What is in the files that are not marked as unfinished; an error if one does not load."""
    files = (path for path in folder.rglob("*") if path.is_file() and not is_unfinished(path))
    return {path.relative_to(folder).as_posix(): saving.load(path) for path in files}


def is_unfinished(path: Path) -> bool:
    """Whether a file's name says that a process was writing it."""
    return path.name.startswith(".writing-")


def seconds_of_a_save(folder: Path) -> float:
    """How long a save of the checkpoint takes here."""
    state = saving.load(folder / "checkpoint.pt")
    begin = time.monotonic()
    for _ in range(5):
        saving.save(state, folder / "measured.pt")
    (folder / "measured.pt").unlink()
    return (time.monotonic() - begin) / 5


def crash_and_resume(kills: int, seed: int) -> str:
    """Does it, and says what happened.

    Args:
        kills: Number of times to kill a training.
        seed: Of the moments.

    Raises:
        AssertionError: A resumed training did not end as the one that nobody killed.
        ValueError: A file does not load.
    """
    chance, killed, killed_while_writing, trainings = random.Random(seed), 0, 0, 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        undisturbed = Path(root) / "undisturbed"
        undisturbed.mkdir()
        assert exit_code(fork(lambda: train(undisturbed))) == 0
        expected = loaded_files(undisturbed)
        assert len(expected) == 6
        seconds_of_save = seconds_of_a_save(undisturbed)
        while killed < kills:
            trainings += 1
            folder = Path(root) / f"training-{trainings}"
            folder.mkdir()
            code = -signal.SIGKILL
            while code == -signal.SIGKILL and killed < kills:
                code = train_and_kill(folder, chance, seconds_of_save)
                killed += code == -signal.SIGKILL
                killed_while_writing += any(map(is_unfinished, folder.rglob("*")))
                loaded_files(folder)
            if code == -signal.SIGKILL:
                code = exit_code(fork(lambda folder=folder: train(folder)))
            assert code == 0, code
            found = loaded_files(folder)
            assert found.keys() == expected.keys(), (sorted(found), sorted(expected))
            for name, content in found.items():
                assert is_same(content, expected[name]), name
            assert not any(map(is_unfinished, folder.rglob("*")))
    return (
        f"{killed} kills, {killed_while_writing} of them while a file was being written; "
        f"{trainings} trainings, each equal to the undisturbed one; "
        f"{time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(crash_and_resume(arguments.kills, arguments.seed))
