"""What users of the pair suffer from, and FusedSGDR does not: one test each.

Where the torch at hand still has the bug, the test shows it as well.
"""

import math
import sys
import warnings

import pytest
import torch
from pair import (
    Pair,
    assert_same,
    assert_unchanged,
    copies_of,
    give_gradients,
    make_params,
    make_scaler,
    same_bits,
    snapshot,
)
from ranks import backends_here, run_ranks
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from sgdr_fused import CosineWarmRestarts, FusedSGDR


def test_skipped_first_step_changes_nothing(backend):
    """SGD(fused=True) leaves uninitialised memory as the momentum of a skipped first step.

    The next step takes it (5e33 was seen) for the running momentum, and parameters become NaN.
    """
    ours, theirs, expected = (make_params([1003]) for _ in range(3))
    optimizer = FusedSGDR(ours, lr=0.1, momentum=0.9, T_0=10, backend=backend)
    before = snapshot(optimizer, ours)
    scaler = make_scaler(4.0)
    ours[0].grad = torch.full_like(ours[0], math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert_unchanged(before, optimizer, ours)

    pair = Pair(expected, lr=0.1, momentum=0.9, T_0=10)
    give_gradients(0, ours, expected)
    ours[0].grad *= scaler.get_scale()
    scaler.step(optimizer)
    pair.step()
    assert_same(optimizer, ours, pair, expected)

    fused = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, fused=True)
    scaler = make_scaler(4.0)
    theirs[0].grad = torch.full_like(theirs[0], math.inf)
    scaler.step(fused)
    assert fused.state[theirs[0]]["momentum_buffer"] is not None, "torch has mended this: say so"


def test_every_element_of_a_half_precision_parameter_is_updated(backend, half_dtype):
    """SGD(fused=True) of torch 2.13 does not store whole vectors of half-precision parameters."""
    ours = make_params([1, 7, 8, 15, 16, 17, 31, 32, 33, 64, 1003], half_dtype)
    optimizer = FusedSGDR(ours, lr=0.5, momentum=0.9, T_0=100, backend=backend)
    for _ in range(3):
        before = copies_of(ours)
        for param in ours:
            param.grad = torch.ones_like(param)
        optimizer.step()
        for param, old in zip(ours, before, strict=True):
            assert (param != old).all(), f"{len(param)} elements"


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="a bug of torch 2.13 only")
def test_fused_sgd_of_torch_2_13_skips_half_precision_elements(half_dtype):
    """This is the bug that the test above guards against."""
    theirs = make_params([1003], half_dtype)
    before = theirs[0].detach().clone()
    theirs[0].grad = torch.ones_like(theirs[0])
    torch.optim.SGD(theirs, lr=0.5, momentum=0.9, fused=True).step()
    assert (theirs[0] == before).sum() > 500


def test_channels_last_parameter_with_a_contiguous_gradient(backend):
    """SGD(fused=True) walks both in memory order, so it silently updates wrong elements."""

    def channels_last():
        (param,) = make_params([(4, 3, 5, 7)])
        return [torch.nn.Parameter(param.detach().to(memory_format=torch.channels_last))]

    ours, loop, fused = channels_last(), channels_last(), channels_last()
    optimizer = FusedSGDR(ours, lr=0.1, momentum=0.9, T_0=10, backend=backend)
    pair = Pair(loop, lr=0.1, momentum=0.9, T_0=10)
    theirs = torch.optim.SGD(fused, lr=0.1, momentum=0.9, fused=True)
    for step in range(7):
        give_gradients(step, ours, loop, fused)
        assert ours[0].grad.is_contiguous()
        optimizer.step()
        pair.step()
        theirs.step()
        assert_same(optimizer, ours, pair, loop, f"after step {step}")
        if step == 0:
            assert not torch.allclose(loop[0], fused[0]), "torch has mended this: say so"


def test_parameter_may_be_unfrozen_later(backend):
    """SGD(fused=True) raises TypeError: it decides "is this the first step?" for all at once."""
    ours, loop, fused = (make_params([65, 33]) for _ in range(3))
    optimizer = FusedSGDR(ours, lr=0.1, momentum=0.9, T_0=10, backend=backend)
    pair = Pair(loop, lr=0.1, momentum=0.9, T_0=10)
    theirs = torch.optim.SGD(fused, lr=0.1, momentum=0.9, fused=True)
    for step in range(7):
        unfrozen = 1 if step < 3 else 2
        give_gradients(step, ours[:unfrozen], loop[:unfrozen], fused[:unfrozen])
        optimizer.step()
        pair.step()
        assert_same(optimizer, ours, pair, loop, f"after step {step}")
        if step < 3:
            theirs.step()
        elif step == 3:
            with pytest.raises(TypeError):
                theirs.step()


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this one process."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about itself
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            distributed.destroy_process_group()


def test_fsdp2_training_equals_the_pair(backend, mesh):
    """SGD(fused=True): "aten._fused_sgd_.default does not have a sharding strategy registered"."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))

    plain, ours, theirs = model(), model(), model()
    fully_shard(ours, mesh=mesh)
    fully_shard(theirs, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in ours.parameters())

    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    optimizer = FusedSGDR(ours.parameters(), T_0=3, T_mult=2, backend=backend, **options)
    pair = Pair(plain.parameters(), T_0=3, T_mult=2, **options)
    for step in range(10):
        batch = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
        for network, stepped in ((ours, optimizer), (plain, pair)):
            for param in network.parameters():
                param.grad = None
            network(batch).square().sum().backward()
            stepped.step()
        for sharded, whole in zip(ours.parameters(), plain.parameters(), strict=True):
            assert same_bits(sharded.full_tensor().detach(), whole.detach()), f"step {step}"

    fused = torch.optim.SGD(theirs.parameters(), fused=True, **options)
    theirs(torch.ones(11, 7)).square().sum().backward()
    with pytest.raises(Exception, match="_fused_sgd_"):
        fused.step()


def test_dtensor_parameters_are_updated_shard_by_shard(backend, mesh):
    """The same without FSDP; the gradient's placements may differ from the parameter's."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    (plain,) = make_params([(8, 6)])
    ours = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    optimizer = FusedSGDR([ours], lr=0.1, momentum=0.9, T_0=3, backend=backend)
    pair = Pair([plain], lr=0.1, momentum=0.9, T_0=3)
    for step in range(7):
        give_gradients(step, [plain])
        placement = Shard(0) if step % 2 else Replicate()
        ours.grad = distribute_tensor(plain.grad.clone(), mesh, [placement])
        optimizer.step()
        pair.step()
        assert same_bits(ours.full_tensor().detach(), plain.detach()), f"step {step}"


TWO_RANKS = """
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from pair import Pair, give_gradients, make_params, same_bits
from sgdr_fused import FusedSGDR

rank, store, backends = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2), sys.argv[3:]
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for backend in backends:
    (plain,) = make_params([(5, 6)])  # 3 rows for the one, 2 for the other
    ours = torch.nn.Parameter(distribute_tensor(plain.detach().clone(), mesh, [Shard(0)]))
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "T_0": 3}
    optimizer, pair = FusedSGDR([ours], backend=backend, **options), Pair([plain], **options)
    for step in range(7):
        give_gradients(step, [plain])
        placement = [Shard(0), Replicate(), Shard(1)][step % 3]
        ours.grad = distribute_tensor(plain.grad.clone(), mesh, [placement])
        optimizer.step()
        pair.step()
        assert ours.to_local().shape == (3 - rank, 6)
        assert same_bits(ours.full_tensor().detach(), plain.detach()), (backend, step)
dist.barrier()
os._exit(0)  # past gloo's own clean-up, which now and then aborts the process
"""


def test_two_processes_each_update_their_shard(tmp_path):
    """The same on two ranks, where each has a part; the gradient may have any placements."""
    pytest.importorskip("torch.distributed.tensor")
    run_ranks(TWO_RANKS, str(tmp_path / "store"), *backends_here())


def test_schedule_does_not_advance_on_a_skipped_step(backend):
    """The pair's scheduler.step() does not know of the GradScaler and advances anyway."""
    ours, theirs = make_params([9]), make_params([9])
    optimizer = FusedSGDR(ours, lr=0.1, T_0=10, backend=backend)
    pair = Pair(theirs, lr=0.1, T_0=10)
    our_scaler, their_scaler = make_scaler(2.0), make_scaler(2.0)
    for param in (ours[0], theirs[0]):
        param.grad = torch.full_like(param, math.nan)
    our_scaler.step(optimizer)
    their_scaler.step(pair.sgd)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notices, and says that the order of calls is wrong
        pair.scheduler.step()
    assert optimizer.get_last_lr() == [0.1]
    assert optimizer.param_groups[0]["step"] == 0
    assert pair.scheduler.get_last_lr() < [0.1]


def test_lr_at_finds_every_restart_exactly():
    """scheduler.step(epoch) takes a floating-point logarithm: int(math.log(243, 3)) == 4."""
    schedule = CosineWarmRestarts(lr=1.0, T_0=1, T_mult=3)
    assert schedule.position(121) == (121, 5, 0, 243)
    assert schedule.lr_at(121) == 1.0

    scheduler = Pair(make_params([1]), lr=1.0, T_0=1, T_mult=3).scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step(121)
    assert scheduler.get_last_lr()[0] < 1e-9, "torch has mended this: say so"


def test_half_an_epoch_is_not_lost(backend):
    """scheduler.step(9.5) keeps last_epoch as 9, so that step() goes on at 10, and not at 10.5."""
    (param,) = make_params([3])
    optimizer = FusedSGDR(
        [param], lr=1.0, T_0=20, steps_per_epoch=2, backend=backend
    )  # cycles of 40 steps
    optimizer.seek(19)
    optimizer.step()
    optimizer.step()
    assert optimizer.get_last_lr()[0] == (1 + math.cos(math.pi * 10.5 / 20)) / 2

    scheduler = Pair(make_params([1]), lr=1.0, T_0=20).scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler.step(9.5)
        scheduler.step()
    assert scheduler.last_epoch == 10


def test_training_is_resumed_at_any_step(backend):
    """CosineAnnealingWarmRestarts(last_epoch=100) resumes at step 1 of 20, not at 31 of 80."""
    ours, all_the_way = make_params([3]), make_params([3])
    pair = Pair(all_the_way, lr=0.1, T_0=10, T_mult=2)
    for _ in range(101):
        pair.sgd.step()
        pair.scheduler.step()

    optimizer = FusedSGDR(ours, lr=0.1, T_0=10, T_mult=2, backend=backend)
    optimizer.seek(101)
    group = optimizer.param_groups[0]
    assert (group["T_cur"], group["T_i"]) == (31, 80)
    assert (pair.scheduler.T_cur, pair.scheduler.T_i) == (31, 80)
    assert optimizer.get_last_lr() == pair.scheduler.get_last_lr()

    sgd = torch.optim.SGD([{"params": make_params([1]), "initial_lr": 0.1}], lr=0.1)
    resumed = CosineAnnealingWarmRestarts(sgd, T_0=10, T_mult=2, last_epoch=100)
    assert (resumed.T_cur, resumed.T_i) != (31, 80), "torch has mended this: say so"


def test_group_added_later_joins_at_the_current_step(backend):
    """The pair's scheduler raises ValueError at its next step: no base LR for the new group."""
    ours, theirs = make_params([9, 5]), make_params([9, 5])
    optimizer = FusedSGDR(ours[:1], lr=0.1, momentum=0.9, T_0=5, T_mult=2, backend=backend)
    pair = Pair(theirs[:1], lr=0.1, momentum=0.9, T_0=5, T_mult=2)
    for step in range(8):
        give_gradients(step, ours[:1], theirs[:1])
        optimizer.step()
        pair.step()
    optimizer.add_param_group({"params": ours[1:], "lr": 0.3})
    first, second = optimizer.param_groups
    assert [second[name] for name in ("step", "cycle", "T_cur", "T_i")] == [8, 1, 3, 10]
    assert second["lr"] == 0.3 * (1 + math.cos(math.pi * 3 / 10)) / 2
    give_gradients(8, ours)
    optimizer.step()
    assert second["T_cur"] == first["T_cur"] == 4

    pair.sgd.add_param_group({"params": theirs[1:], "lr": 0.3})
    give_gradients(8, theirs)
    pair.sgd.step()
    with pytest.raises(ValueError, match="zip"):
        pair.scheduler.step()


def test_eta_min_above_a_groups_lr_is_an_error(backend):
    """The pair has one eta_min for all groups; the LR of a group below it rises."""
    first, second = make_params([3, 3])
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.001}]
    with pytest.raises(ValueError, match=r"eta_min=0\.01 is above lr=0\.001"):
        FusedSGDR(groups, T_0=10, eta_min=0.01, backend=backend)

    groups[1]["eta_min"] = 0.0001
    FusedSGDR(groups, T_0=10, eta_min=0.01, backend=backend)

    first, second = make_params([3, 3])
    pair = Pair(
        [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.001}], T_0=10, eta_min=0.01
    )
    for _ in range(3):
        pair.step()
    assert pair.scheduler.get_last_lr()[1] > 0.001


def test_step_runs_no_python_per_parameter():
    """The pair spends 2.6 to 4.8 ms of Python on a step of 1000 tiny tensors."""

    def calls_of_a_step(n_params):
        params = make_params([3] * n_params)
        optimizer = FusedSGDR(params, lr=0.1, momentum=0.9, T_0=10, backend="native")
        for step in range(2):
            give_gradients(step, params)
            optimizer.step()
        calls = []
        give_gradients(2, params)
        sys.setprofile(lambda _, event, arg: calls.append(event))
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        return len(calls)

    assert calls_of_a_step(1000) == calls_of_a_step(2) > 0


def test_step_only_reads_gradients(backend):
    """Copies share no memory either. The other tests rely on both."""
    ours = make_params([65])
    theirs = copies_of(ours)
    optimizer = FusedSGDR(
        ours, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, T_0=10, backend=backend
    )
    for step in range(3):
        give_gradients(step, ours, theirs)
        optimizer.step()
        assert torch.equal(ours[0].grad, theirs[0].grad)
    assert not torch.equal(ours[0], theirs[0])
