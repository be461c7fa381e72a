"""Ranks: processes that run a function together, with gloo on the CPU.

Python and torch take seconds to start, so the processes are kept and run one function after the
other, each in a process group of its own. One that hangs or dies takes the others along, and the
next function gets new ones.
"""

import multiprocessing
import os
import re
import time
import traceback
import warnings
from multiprocessing.connection import wait

from sgdr_fused import native

# Warnings of libraries, which our tests cannot avoid.
LIBRARIES_OWN_WARNINGS = [
    # The import of torch.distributed.optim
    ("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning),
    # FSDP1 with NO_SHARD
    ("ignore", "The `NO_SHARD` sharding strategy is deprecated", FutureWarning),
    # FSDP2 around a tensor-parallel layer, whose output is a view of a DTensor's shard
    ("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning),
]
if native.why_missing:
    LIBRARIES_OWN_WARNINGS.append(("ignore", ".*" + re.escape(native.why_missing), UserWarning))


class Ranks:
    """Runs functions on as many processes as they want.

    Args:
        timeout: Seconds that a function may take, start of the processes included.
    """

    def __init__(self, timeout=90):
        self.timeout = timeout
        self._workers = []

    def run(self, world_size, folder, function, *args, **kwargs):
        """Runs a function on each rank of a process group.

        Args:
            world_size: Number of ranks.
            folder: Where the ranks find each other; an empty folder of this test.
            function: Of a module's top level.
            args: For the function.
            kwargs: For the function.

        Returns:
            What the ranks returned, in their order.

        Raises:
            AssertionError: A rank raised something, died or took too long; all that did are shown.
        """
        deadline = time.monotonic() + self.timeout
        while len(self._workers) < world_size:
            self._workers.append(_Worker())
        store = os.path.join(folder, f"rendezvous-{time.monotonic_ns()}")
        waiting = dict(enumerate(self._workers[:world_size]))
        for rank, worker in waiting.items():
            worker.connection.send((rank, world_size, store, function, args, kwargs))
        results, errors = {}, {}
        while waiting:
            seconds = max(deadline - time.monotonic(), 0)
            if not wait([worker.connection for worker in waiting.values()], seconds):
                break
            for rank, worker in list(waiting.items()):
                if worker.connection.poll():
                    is_error, answer = worker.receive()
                    (errors if is_error else results)[rank] = answer
                    del waiting[rank]
            if errors:
                # Most of the others now wait for a rank that failed.
                deadline = min(deadline, time.monotonic() + 2)
        if errors or waiting:
            self.kill()
            errors |= dict.fromkeys(waiting, f"killed; it did not end within {self.timeout} s")
            by_error = {
                error: [r for r in sorted(errors) if errors[r] == error]
                for error in errors.values()
            }
            shown = "\n".join(f"--- ranks {ranks}: {error}" for error, ranks in by_error.items())
            raise AssertionError(f"{function.__name__} failed on ranks {sorted(errors)}\n{shown}")
        return [results[rank] for rank in range(world_size)]

    def kill(self):
        """Kills the processes."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._workers = []


class _Worker:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self):
        """Whether the function failed, and its traceback or result."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return True, f"died with exit code {self.process.exitcode}"


def _work(connection):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, world_size, store, function, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)  # past gloo's own clean-up, which now and then aborts the process
        answer = False, None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for action, message, category in LIBRARIES_OWN_WARNINGS:
                warnings.filterwarnings(action, message, category)
            try:
                file = dist.FileStore(store, world_size)
                dist.init_process_group("gloo", store=file, rank=rank, world_size=world_size)
                answer = False, function(*args, **kwargs)
                dist.barrier()
                dist.destroy_process_group()
            except BaseException:
                answer = True, traceback.format_exc()
        connection.send(answer)
