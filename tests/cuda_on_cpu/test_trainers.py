"""Trainings in Lightning, Hugging Face, Accelerate and timm, whole, on the fake CUDA runtime.

The Python that SGDR_CUDA_PYTHON names needs the trainers; a test whose trainer it lacks is skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_cuda import FOLDER, REPOSITORY, report
from test_path import options, require_cuda_extension

TRAINERS = ["lightning", "lightning_with_progress_bar", "hugging_face", "accelerate", "timm"]

RUN_TRAININGS = """
import importlib, sys, tempfile, traceback, warnings
from pathlib import Path
import runtime_log as log
from host_ops import HostOps
import trainings
from trainings import STEPS, TRAININGS, fused_with_view, pair

warnings.simplefilter("ignore")

def logs(train, folder):
    logged = train(folder, "cuda", fused_with_view, STEPS, every=1)
    trainings.assert_logs_and_checkpoint_are_right(*logged)

def waits(train, folder):
    fused, torchs = (
        trainings.waits_per_step(train, folder, "cuda", side) for side in (fused_with_view, pair)
    )
    assert fused <= torchs, (fused, torchs)

def outcome(check, train):
    try:
        with HostOps(), tempfile.TemporaryDirectory() as folder:
            check(train, Path(folder))
        return ""
    except BaseException:
        return traceback.format_exc()

assert list(TRAININGS) == sys.argv[1:]
for name, (module, train) in TRAININGS.items():
    try:
        importlib.import_module(module)
    except ImportError as error:
        log.report(**{name: {"missing": str(error)}})
    else:
        log.report(**{name: {check.__name__: outcome(check, train) for check in (logs, waits)}})
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    require_cuda_extension()
    paths = [FOLDER, REPOSITORY / "tests/trainers", REPOSITORY / "tests", REPOSITORY]
    environment = {"PYTHONPATH": ":".join(map(str, paths))}
    return report(RUN_TRAININGS, *TRAINERS, **options(environment=environment))


@pytest.fixture(params=TRAINERS)
def errors(request: pytest.FixtureRequest, found: dict[str, Any]) -> dict[str, str]:
    of_trainer: dict[str, str] = found[request.param]
    if "missing" in of_trainer:
        pytest.skip(of_trainer["missing"])
    return of_trainer


@pytest.mark.exhaustive
def test_trainer_logs_and_saves_the_lr_of_each_step(errors: dict[str, str]) -> None:
    assert errors["logs"] == ""


@pytest.mark.exhaustive
def test_trainer_waits_for_the_gpu_no_more_often_than_with_the_pair(errors: dict[str, str]) -> None:
    assert errors["waits"] == ""
