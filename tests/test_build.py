"""setup.py says what it would build, and why. Nothing is built here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def setup(**variables):
    """Exit status and stderr of `setup.py --name`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SGDR_", "TORCH_", "CUDA_"))}
    ran = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
    )
    return ran.returncode, ran.stderr


def test_no_cuda_backend_without_cuda_in_torch():
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    pytest.importorskip("setuptools")
    status, said = setup()
    assert status == 0
    assert "building the CPU backend" in said
    assert "no CUDA backend: this torch is built without CUDA" in said
    status, said = setup(SGDR_FUSED_CUDA="1")
    assert status != 0
    assert "SGDR_FUSED_CUDA=1, but this torch is built without CUDA" in said


def test_cuda_backend_with_cuda_in_torch_and_nvcc():
    if torch.version.cuda is None or shutil.which("nvcc") is None:
        pytest.skip("needs a torch with CUDA, and an nvcc")
    status, said = setup()
    assert status == 0
    if "nvcc is of CUDA" in said:
        pytest.skip("nvcc is of another major version than torch's")
    assert "building the CPU and CUDA backends" in said
    assert "compute capability 7.5;8.0;8.6;8.9;9.0" in said
    assert "+PTX" in said
    status, said = setup(TORCH_CUDA_ARCH_LIST="8.0")
    assert said.count("for compute capability 8.0\n") == 1
    status, said = setup(SGDR_FUSED_CUDA="0")
    assert status == 0
    assert "no CUDA backend: SGDR_FUSED_CUDA=0" in said


def test_no_cuda_backend_without_nvcc(tmp_path):
    if torch.version.cuda is None:
        pytest.skip("this torch has no CUDA")
    status, said = setup(CUDA_HOME=str(tmp_path))
    assert status == 0
    assert "no CUDA backend: there is no nvcc" in said
    status, said = setup(CUDA_HOME=str(tmp_path), SGDR_FUSED_CUDA="1")
    assert status != 0
    assert "SGDR_FUSED_CUDA=1, but there is no nvcc" in said


def test_oldest_torch_is_the_same_everywhere():
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for page in ("README.md", "docs/quick_start.md"):
        assert f"torch >= {oldest}" in (ROOT / page).read_text(), page
    tested = re.search(r"CUDA_TORCH-torch==([\d.]+)", (ROOT / ".ci/run").read_text())[1]
    assert tested.startswith(f"{oldest}.")
