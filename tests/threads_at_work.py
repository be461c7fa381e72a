"""Several threads at one optimizer; a scenario each, which tests/test_threads.py reports on.

    python threads_at_work.py native

runs each scenario in a process of its own, because what goes wrong here may be a crash, and prints
as JSON what became of it: "ok", what was raised, or the signal that ended it.
"""

import copy
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import traceback

import torch

from sgdr_fused import CosineWarmRestarts, FusedSGDR

NUMEL = 100_000  # of two parameters: enough for a step to let go of the GIL
TIMEOUT = 60
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def steps_of(backend):
    return 40 if backend == "native" else 6


def make_optimizer(backend, numel=NUMEL, **options):
    """An optimizer of two groups with equal numbers in all elements, and gradients of ones."""
    params = [torch.nn.Parameter(torch.zeros(numel)) for _ in range(2)]
    options = {"max_grad_norm": 1e9, "skip_nonfinite": True} | options
    options = {"lr": 0.1, "momentum": 0.9, "T_0": 7} | options
    groups = [{"params": [param]} for param in params]
    optimizer = FusedSGDR(groups, backend=backend, **options)
    for param in params:
        param.grad = torch.ones(numel)
    return optimizer


def params_of(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def run_together(*functions):
    """Runs functions on a thread each; the first one's end is the others' sign to end.

    Args:
        functions: The first is called once, the others over and over again.

    Raises:
        Exception: What one of them has raised.
    """
    done = threading.Event()
    errors = []

    def repeat(function):
        while not done.is_set():
            function()

    def guarded(function, *args):
        try:
            function(*args)
        except Exception as error:
            errors.append(error)
            done.set()

    threads = [threading.Thread(target=guarded, args=(repeat, f)) for f in functions[1:]]
    for thread in threads:
        thread.start()
    guarded(functions[0])
    done.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def assert_whole(optimizer):
    """Asserts that all elements of each tensor have seen the same updates."""
    for param in params_of(optimizer):
        for tensor in (param, *optimizer.state[param].values()):
            assert tensor.eq(tensor[0]).all()


def step_while(backend, disturb, **options):
    """Steps on one thread while another does something over and over again."""
    optimizer = make_optimizer(backend, **options)

    def steps():
        for _ in range(steps_of(backend)):
            optimizer.step()

    run_together(steps, lambda: disturb(optimizer))
    assert_whole(optimizer)
    before = params_of(optimizer)[0].detach().clone()
    optimizer.step()
    assert not params_of(optimizer)[0].equal(before)
    return optimizer


# ------------------------------------------------------------------------------------------------
# methods wait for each other


def step_twice_at_once(backend, numel):
    together, alone = (make_optimizer(backend, numel=numel) for _ in range(2))

    def steps():
        for _ in range(steps_of(backend)):
            together.step()

    threads = [threading.Thread(target=steps) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(2 * steps_of(backend)):
        alone.step()
    assert together.param_groups[0]["step"] == 2 * steps_of(backend)
    assert together.get_last_lr() == alone.get_last_lr()
    for param, expected in zip(params_of(together), params_of(alone), strict=True):
        assert param.equal(expected)


@scenario
def step_and_step(backend):
    step_twice_at_once(backend, NUMEL)


@scenario
def step_and_step_of_small_tensors(backend):
    step_twice_at_once(backend, 10)


@scenario
def step_and_seek(backend):
    step_while(backend, lambda optimizer: optimizer.seek(3))


@scenario
def step_and_restart(backend):
    step_while(backend, lambda optimizer: optimizer.restart(), reset_momentum=True)


@scenario
def step_and_add_param_group(backend):
    def add(optimizer):
        if len(optimizer.param_groups) < 50:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})

    optimizer = make_optimizer(backend)
    run_together(
        lambda: [optimizer.step() for _ in range(steps_of(backend))], lambda: add(optimizer)
    )
    assert len({group["step"] for group in optimizer.param_groups}) == 1


@scenario
def step_and_state_dict(backend):
    def check(optimizer):
        for group in optimizer.state_dict()["param_groups"]:
            schedule = CosineWarmRestarts.of_group(group)
            position = schedule.position(group["step"])
            assert position.T_cur == group["T_cur"]
            assert group["lr"] == schedule.lr_of(position)

    step_while(backend, check)


@scenario
def step_and_load_state_dict(backend):
    optimizer = make_optimizer(backend)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [1.0]
    for _ in range(steps_of(backend)):
        expected.append(float(torch.tensor(expected[-1]) * 0.9 + 1))
    run_together(
        lambda: [optimizer.step() for _ in range(steps_of(backend))],
        lambda: optimizer.load_state_dict(saved),
    )
    assert_whole(optimizer)
    step = optimizer.param_groups[0]["step"]
    for param in params_of(optimizer):
        assert float(optimizer.state[param]["momentum_buffer"][0]) == expected[step - 1]


@scenario
def step_and_swap_ema(backend):
    def swap(optimizer):
        try:
            with optimizer.swap_ema():
                pass
        except RuntimeError:
            pass

    optimizer = make_optimizer(backend, ema_decay=0.5)

    def steps():
        for _ in range(steps_of(backend)):
            try:
                optimizer.step()
            except RuntimeError as error:
                if "swap_ema" not in str(error):
                    raise

    run_together(steps, lambda: swap(optimizer))
    assert_whole(optimizer)


# ------------------------------------------------------------------------------------------------
# what a step has begun with it finishes with


@scenario
def step_and_pop_groups(backend):
    def pop_and_append(optimizer):
        group = optimizer.param_groups.pop()
        optimizer.seek(2)
        optimizer.param_groups.append(group)

    step_while(backend, pop_and_append)


@scenario
def step_and_replace_lists_of_params(backend):
    def replace(optimizer):
        for group in optimizer.param_groups:
            group["params"] = list(group["params"])
            group["params"].append(torch.nn.Parameter(torch.zeros(3)))
            group["params"].pop()

    step_while(backend, replace)


@scenario
def step_and_replace_gradients(backend):
    def replace(optimizer):
        # Not None: torch itself crashes where another thread reads param.grad meanwhile.
        for param in params_of(optimizer):
            param.grad = torch.ones(NUMEL)

    step_while(backend, replace)


@scenario
def step_and_replace_data(backend):
    if backend == "reference":
        return  # torch's own operators crash

    def replace(optimizer):
        for param in params_of(optimizer):
            param.data = torch.zeros(NUMEL)

    step_while(backend, replace)


@scenario
def step_and_clear_state(backend):
    def clear(optimizer):
        optimizer.state.clear()

    optimizer = make_optimizer(backend)
    run_together(
        lambda: [optimizer.step() for _ in range(steps_of(backend))], lambda: clear(optimizer)
    )
    optimizer.step()
    assert_whole(optimizer)


@scenario
def step_and_edit_options(backend):
    def edit(optimizer):
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0 if group["weight_decay"] else 1e-3
            group["lr"] = 0.05

    optimizer = step_while(backend, edit)
    assert all(isinstance(group["lr"], float) for group in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------
# fork


def step_in_child(optimizer):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        optimizer.step()
        os._exit(0 if optimizer.param_groups[0]["step"] == 4 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child has ended with status {status}"
    optimizer.step()


@scenario
def fork_and_step(backend):
    optimizer = make_optimizer(backend, numel=100)
    for _ in range(3):
        optimizer.step()
    step_in_child(optimizer)


@scenario
def fork_and_step_of_large_tensors_on_one_thread(backend):
    torch.set_num_threads(1)
    optimizer = make_optimizer(backend)
    for _ in range(3):
        optimizer.step()
    step_in_child(optimizer)


# ------------------------------------------------------------------------------------------------


def outcome_of(function, backend):
    """Runs a scenario in a process of its own."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            faulthandler.enable(said)
            signal.alarm(TIMEOUT)
            # Threads take turns often.
            sys.setswitchinterval(1e-5)
            status = 0
            try:
                function(backend)
            except BaseException:
                traceback.print_exc(file=said)
                status = 1
            said.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read()
    if os.WIFSIGNALED(status):
        return f"ended by signal {os.WTERMSIG(status)}\n{text}"
    return text or ("ok" if status == 0 else f"ended with status {status}")


def main():
    backend, *names = sys.argv[1:]
    # Imports what the first step imports, so that not every process has to.
    make_optimizer(backend, numel=1).step()
    outcomes = {name: outcome_of(SCENARIOS[name], backend) for name in names or SCENARIOS}
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
