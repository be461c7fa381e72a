"""optax under jit with donated buffers, in a process of its own: jax brings threads and GPU memory.

The process gets a case's shapes, makes the same workload and checks its own update. Then it answers
one request a line, so that its calls take their turn among those of the other candidates. On the
CPU it may use as many cores as torch has threads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Seconds
from benchmarks.shapes import Shapes, numel

__all__ = ["LeftOut", "OptaxStep", "Process", "start"]

# More take minutes to compile; more take too much memory for two processes.
MOST_TENSORS, MOST_ELEMENTS = 200, 1 << 27


class LeftOut(Exception):
    """Why optax does not take part."""


# ------------------------------------------------------------------------------------ this process


@dataclass(frozen=True)
class Process:
    """The other process, as a candidate.

    Attributes:
        name: The candidate's name.
        process: The process.
    """

    name: str
    process: subprocess.Popen[str]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)  # closes its input, at which it ends

    def hot(self, calls: int) -> Seconds:
        """The mean of consecutive calls."""
        return self._ask({"calls": calls})

    def cold(self) -> Seconds:
        """A single call, with cold caches."""
        return self._ask({"calls": 0})

    def _ask(self, request: dict[str, int]) -> Seconds:
        time.sleep(0.005)  # until this process's threads no longer spin
        return Seconds(*self.ask(request))

    def ask(self, request: Any) -> Any:
        """Sends a line and reads the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise LeftOut(f"its process ended with status {self.process.wait()}")
        return json.loads(answer)


def start(name: str, device: str, threads: int, shapes: Shapes) -> Process:
    """Starts the process and waits until it has checked its update.

    Args:
        name: The candidate's name.
        device: "cpu" or "cuda".
        threads: Number of cores that it may use.
        shapes: The parameters' shapes.

    Raises:
        LeftOut: It cannot take part.
    """
    for module in ("jax", "optax"):
        if importlib.util.find_spec(module) is None:
            raise LeftOut(f"{module} is not installed")
    if len(shapes) > MOST_TENSORS:
        raise LeftOut("compiling so many tensors takes minutes")
    if numel(shapes) > MOST_ELEMENTS:
        raise LeftOut("two processes would need too much memory")
    environment = os.environ | {
        "JAX_PLATFORMS": device,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The threads that write the buffer must not spin while XLA works.
        "OMP_WAIT_POLICY": "passive",
        "OMP_NUM_THREADS": str(threads),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.optax_process"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    candidate = Process(name, process)
    try:
        reason = candidate.ask({"device": device, "threads": threads, "shapes": shapes})
        if reason:
            raise LeftOut(reason)
    except LeftOut:
        candidate.__exit__()
        raise
    return candidate


# ----------------------------------------------------------------------------------- the other one


class OptaxStep:
    """optax's SGD with weight decay and the schedule, jitted, with donated parameters and state.

    Args:
        params: The parameters, with gradients.
        **without: Other options than the benchmarks'.

    Attributes:
        params: Arrays with the parameters' values.
    """

    def __init__(self, params: list[Any], **without: Any) -> None:
        import jax
        import optax
        from jax import numpy as jnp

        from benchmarks.workload import OPTIONS, SCHEDULE

        options = OPTIONS | SCHEDULE | without
        # Copies: donated memory must not be torch's.
        self.params = [jnp.array(param.cpu().numpy(), copy=True) for param in params]
        self._grads = [jnp.array(param.grad.cpu().numpy(), copy=True) for param in params]
        T_0, T_mult = options["T_0"], options["T_mult"]
        begins = jnp.array([T_0 * (T_mult**i - 1) // (T_mult - 1) for i in range(25)])

        def lr(step: Any) -> Any:
            cycle = jnp.sum(step >= begins) - 1
            progress = (step - begins[cycle]) / (T_0 * T_mult**cycle)
            height = options["lr"] - options["eta_min"]
            return options["eta_min"] + height * (1 + jnp.cos(jnp.pi * progress)) / 2

        optimizer = optax.chain(
            optax.add_decayed_weights(options["weight_decay"]),
            optax.sgd(lr, options["momentum"], options["nesterov"]),
        )

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._state = optimizer.init(self.params)
        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._wait = jax.block_until_ready

    def __call__(self) -> None:
        """Enqueues one step."""
        self.params, self._state = self._update(self.params, self._state, self._grads)

    def wait(self) -> None:
        """Waits for the steps."""
        self._wait(self.params)


def _serve() -> None:
    """Answers the other process's requests."""
    request = json.loads(sys.stdin.readline())
    if request["device"] == "cpu":
        cores = sorted(os.sched_getaffinity(0))[: request["threads"]]
        os.sched_setaffinity(0, cores)  # before XLA counts them
    import torch

    from benchmarks.harness import Clock
    from benchmarks.workload import CHECKED_STEPS, Workload

    shapes = [tuple(shape) for shape in request["shapes"]]
    try:
        workload = Workload(shapes)
        step = OptaxStep(workload.params)
        for _ in range(CHECKED_STEPS):
            step()
        import numpy

        workload.check("optax", [torch.from_numpy(numpy.array(array)) for array in step.params])
    except Exception as error:
        other = isinstance(error, AssertionError)
        reason = "makes another update" if other else f"does not run here: {error}"
        print(json.dumps(reason.partition("\n")[0]), flush=True)
        return
    del workload
    clock = Clock(request["device"], wait=step.wait)
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        calls = json.loads(line)["calls"]
        print(json.dumps(clock.hot(step, calls) if calls else clock.cold(step)), flush=True)


if __name__ == "__main__":
    _serve()
