"""FSDP1, `FullyShardedDataParallel`: each rank updates its part of flattened parameters."""

import math

import pytest
import torch
import torch.distributed as dist
from exact_training import STEPS, SingleProcess, fused, loss_of, network
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

SHARDED, WHOLE = (
    [
        pytest.param({"use_orig_params": use, "strategy": strategy}, id=f"{strategy}-{id}")
        for id, use in (("flat", False), ("orig_params", True))
    ]
    for strategy in ("FULL_SHARD", "NO_SHARD")
)


def sharded(model, use_orig_params, strategy):
    return FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )


def train(kind, options, max_norm=None):
    """Compares with our own optimizer in one process; ``max_norm``: FSDP1 itself clips."""
    clipped = {} if max_norm is None else {"max_grad_norm": max_norm}
    single = SingleProcess(
        dist.get_world_size(), 1, lambda model: fused(model, **options | clipped)
    )
    model = sharded(network(), **kind)
    optimizer = fused(model, **options)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        if max_norm is not None:
            norm = model.clip_grad_norm_(max_norm)
        optimizer.step()
        single.step()
        if max_norm is not None:
            assert math.isclose(float(norm), float(single.optimizer.grad_norm), rel_tol=1e-5)
            single.model.load_state_dict(whole_weights(model))  # sums are rounded differently
        else:
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                single.assert_same(model, f"at step {step}")
        assert optimizer.get_last_lr() == single.optimizer.get_last_lr()
    if "max_grad_norm" in options:
        norm = float(single.optimizer.grad_norm)
        assert math.isclose(float(optimizer.grad_norm), norm, rel_tol=1e-13)


def whole_weights(model):
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {
            name.removeprefix("_fsdp_wrapped_module."): param.detach().clone()
            for name, param in model.named_parameters()
        }


@pytest.mark.parametrize("kind", SHARDED + WHOLE)
def test_training_equals_that_of_one_process(ranks, backend, kind):
    ranks(2, train, kind, {"backend": backend})


@pytest.mark.parametrize("kind", WHOLE)
def test_no_shard_clips_by_the_whole_norm(ranks, backend, kind):
    ranks(2, train, kind, {"backend": backend, "max_grad_norm": 0.5, "skip_nonfinite": True})


@pytest.mark.parametrize("kind", SHARDED)
def test_clip_grad_norm_of_the_model_clips_by_the_whole_norm(ranks, kind):
    ranks(2, train, kind, {}, max_norm=0.5)


def norm_is_refused(kind, options, words):
    model = sharded(network(), **kind)
    with pytest.raises(ValueError, match=words):
        fused(model, **options)
    optimizer = fused(model, backend=options.pop("backend"))
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=words):
        setattr(optimizer, name, value)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    loss_of(model, 0, dist.get_rank()).backward()
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"max_grad_norm": 0.5, "skip_nonfinite": True},
            r'^max_grad_norm=0\.5 needs .* param_groups\[0\]\["params"\]\[0\] is a shard of '
            r"FullyShardedDataParallel .FSDP1.*model\.clip_grad_norm_\(0\.5\).*fully_shard",
        ),
        ({"skip_nonfinite": True}, r"^skip_nonfinite=True needs .*ShardedGradScaler.*fully_shard"),
    ],
    ids=["max_grad_norm", "skip_nonfinite"],
)
@pytest.mark.parametrize("kind", SHARDED)
def test_norm_of_one_ranks_shards_is_refused(ranks, backend, kind, options, words):
    """Ranks would clip by 0.092 and 0.176 where 0.198 is right, or skip each for itself."""
    ranks(2, norm_is_refused, kind, options | {"backend": backend}, words)


def model_is_sharded_after_the_optimizer_was_made(options):
    model = network()
    optimizer = fused(model, **options)
    model = sharded(model, use_orig_params=True, strategy="FULL_SHARD")
    loss_of(model, 0, dist.get_rank()).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=r"^max_grad_norm=0\.5 needs the norm over all ranks"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.param_groups[0]["step"] == 0


def test_norm_is_refused_when_the_model_is_sharded_after_the_optimizer_was_made(ranks, backend):
    options = {"max_grad_norm": 0.5, "backend": backend}
    ranks(2, model_is_sharded_after_the_optimizer_was_made, options)


def overflow_on_the_last_rank(kind):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = sharded(network(), **kind)
    optimizer = fused(model)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    lrs = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, rank)).backward()
        if step == 1 and rank == world_size - 1:
            next(p.grad for p in model.parameters() if p.grad is not None).fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        lrs += optimizer.get_last_lr()
    return lrs, scaler.get_scale()


@pytest.mark.parametrize("kind", SHARDED)
def test_overflow_on_one_rank_skips_the_step_on_all(ranks, kind):
    """A fused step of torch's is skipped on that rank only, and the ranks diverge."""
    (lrs, scale), other = ranks(2, overflow_on_the_last_rank, kind)
    assert (lrs, scale) == other
    assert scale == 2
    assert lrs[1] == lrs[0] != lrs[2]


# ---------------------------------------------------------------------------- step_in_backward()


def refuse_flat_params():
    optimizer = fused(sharded(network(), use_orig_params=False, strategy="FULL_SHARD"))
    with pytest.raises(RuntimeError, match=r"is a flat parameter.*fully_shard\(\)"):
        optimizer.step_in_backward()


def test_step_in_backward_refuses_flat_parameters(ranks):
    """Their hooks see one rank's gradient, before it is summed."""
    ranks(2, refuse_flat_params)


def update_original_params(backend):
    ours, usual = (
        sharded(network(), use_orig_params=True, strategy="FULL_SHARD") for _ in range(2)
    )
    sides = [fused(model, backend=backend) for model in (ours, usual)]
    sides[0].step_in_backward()
    for step in range(4):
        for model, optimizer in zip((ours, usual), sides, strict=True):
            if model is usual:
                optimizer.zero_grad()
            loss_of(model, step, dist.get_rank()).backward()
            optimizer.step()
        assert all(map(torch.equal, ours.parameters(), usual.parameters()))


def test_step_updates_what_has_no_gradient_within_backward(ranks, backend):
    """With use_orig_params the gradients are there only when backward() has ended."""
    ranks(2, update_original_params, backend)
