"""The bits do not depend on the instruction set or the number of threads."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ANY_OPTIONS, SIZES
from pair import assert_same, copies_of, give_gradients, make_params

from sgdr_fused import FusedSGDR, native

pytestmark = pytest.mark.skipif(native.extension is None, reason=native.why_missing)

TESTS = Path(__file__).parent
CAPABILITIES = ("default", "avx2", "avx512")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Runs in a separate process: prints the capability in force, and a digest of the results of each
# option and dtype.
DIGESTS = """
import hashlib, json, sys
import torch
from cases import ANY_OPTIONS, SIZES
from pair import give_gradients, make_params
from sgdr_fused import FusedSGDR

digests = {}
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for grad_scale in (1.0, 3.0):
        for name, options in ANY_OPTIONS.items():
            params = make_params(SIZES, dtype)
            optimizer = FusedSGDR(params, lr=0.05, T_0=3, backend="native", **options)
            for step in range(5):
                give_gradients(step, params)
                optimizer.found_inf = torch.zeros(())
                optimizer.grad_scale = torch.tensor(grad_scale)
                optimizer.step()
            digest = hashlib.sha256()
            for param in params:
                buffer = optimizer.state.get(param, {}).get("momentum_buffer", param)
                for tensor in (param.detach(), buffer.detach()):
                    digest.update(tensor.view(torch.uint8).numpy().tobytes())
            digests[f"{dtype} {name} {grad_scale}"] = digest.hexdigest()
json.dump([torch.backends.cpu.get_cpu_capability(), digests], sys.stdout)
"""


@functools.cache
def digests_with(capability):
    """The output of DIGESTS under ATEN_CPU_CAPABILITY, the variable that torch reads."""
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    in_force, digests = json.loads(done.stdout)
    if in_force != capability.upper():
        pytest.skip(f"asked for {capability}, this CPU has {in_force}")
    return digests


@pytest.mark.parametrize("capability", CAPABILITIES[1:])
def test_bits_do_not_depend_on_the_instruction_set(capability):
    baseline, digests = digests_with("default"), digests_with(capability)
    assert len(digests) == len(DTYPES) * 2 * len(ANY_OPTIONS)
    assert [name for name in digests if digests[name] != baseline[name]] == []


def test_digests_differ_between_options():
    """Otherwise the comparison above would prove nothing."""
    digests = digests_with("default")
    # In half precision, decoupled weight decay without momentum equals L2 decay bit for bit.
    full = [digest for name, digest in digests.items() if "decoupled" not in name]
    assert len(set(full)) == len(full)


def parallel_threshold():
    if not (TESTS.parent / "csrc").exists():
        pytest.skip("installed without its sources")
    header = TESTS.parent / "csrc" / "backend.h"
    return eval(re.search(r"kParallelNumel = ([0-9 <]+);", header.read_text())[1])


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_the_number_of_threads(dtype, threads):
    sizes = [*SIZES, 16383, 16384, 16385, parallel_threshold() + 1, 5, 50_000]
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "lr": 0.05, "T_0": 3}
    alone = make_params(sizes, dtype)
    together = copies_of(alone)
    one = FusedSGDR(alone, backend="native", **options)
    many = FusedSGDR(together, backend="native", **options)
    for step in range(3):
        give_gradients(step, alone, together)
        torch.set_num_threads(1)
        one.step()
        torch.set_num_threads(threads)
        many.step()
        assert_same(many, together, one, alone, f"after step {step}")


@pytest.mark.usefixtures("restore_threads")
def test_bits_of_every_option_do_not_depend_on_the_number_of_threads(any_options):
    sizes = [7, parallel_threshold() // 2, parallel_threshold() // 2 + 3, 1003]
    alone = make_params(sizes)
    together = copies_of(alone)
    one, many = (
        FusedSGDR(params, lr=0.05, T_0=2, backend="native", **any_options)
        for params in (alone, together)
    )
    for step in range(3):
        give_gradients(step, alone, together)
        torch.set_num_threads(1)
        one.step()
        torch.set_num_threads(4)
        many.step()
        assert_same(many, together, one, alone, f"after step {step}")
