"""The calls that the fake CUDA runtime got, for scripts that fake_cuda.run() runs."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass

_runtime = ctypes.CDLL(None)
_runtime.fake_log_text.restype = ctypes.c_char_p
_runtime.fake_pending.restype = ctypes.c_size_t

# Besides these, a copy between a GPU and pageable memory: CUDA may let the host wait for it.
_SYNCHRONIZING = {
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaStreamQuery",
    "cudaEventQuery",
    "cudaMemcpy",
    "cudaFree",
}


@dataclass(frozen=True)
class Call:
    """One call of the runtime: its name, and what is known of it, such as kernel, grid, stream."""

    name: str
    fields: dict[str, str]

    @property
    def is_launch(self) -> bool:
        """True for a kernel; the launch of a graph is none."""
        return "kernel" in self.fields

    @property
    def synchronizes(self) -> bool:
        """True if the host may have to wait for the device, or asks it how far it is."""
        return self.name in _SYNCHRONIZING or self.fields.get("host") == "pageable"


def clear() -> None:
    """Forgets the calls so far."""
    _runtime.fake_log_clear()


def calls(name: str = "") -> list[Call]:
    """The calls since clear(), or those of them whose names begin with `name`."""
    lines = _runtime.fake_log_text().decode().splitlines()
    parsed = [line.split() for line in lines if line.startswith(name)]
    return [Call(first, dict(field.split("=", 1) for field in rest)) for first, *rest in parsed]


def launches(kernel: str = "") -> list[Call]:
    """The launches of kernels with `kernel` in their mangled names."""
    return [call for call in calls() if call.is_launch and kernel in call.fields["kernel"]]


def copies(kind: str = "") -> list[Call]:
    """The copies: all, or those of one kind, such as "D2H"."""
    return [call for call in calls("cudaMemcpy") if kind in call.fields["kind"]]


def synchronizing() -> list[Call]:
    """The calls that synchronise the host with the device, see Call.synchronizes."""
    return [call for call in calls() if call.synchronizes]


def set_deferred(deferred: bool) -> None:
    """From now on, nothing runs on the device until something synchronises."""
    _runtime.fake_set_deferred(int(deferred))


def pending() -> int:
    """How many launches, copies and fills have not run yet."""
    return int(_runtime.fake_pending())


def move(to: int, source: int, size: int) -> None:
    """Copies from or to a device's memory, given addresses and bytes; in no log."""
    _runtime.fake_move(ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size))


def report(**values: object) -> None:
    """Hands values to fake_cuda.report(), the caller of this script; they travel as JSON."""
    print("REPORT " + json.dumps(values), flush=True)
