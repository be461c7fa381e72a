"""torch.distributed.checkpoint: save on two ranks, load on another number of ranks."""

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from exact_training import SingleProcess, fused, loss_of, network
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

BATCHES = 2  # of a step, however many ranks share them


class Run:
    """A training under FSDP2, beside an uninterrupted one in a single process."""

    def __init__(self, options):
        self.single = SingleProcess(BATCHES, make_optimizer=lambda model: fused(model, **options))
        self.model = network()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (self.model[0], self.model[2], self.model):
            fully_shard(layer, mesh=mesh)
        self.optimizer = fused(self.model, **options)

    def train(self, until):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        batches = range(BATCHES) if world_size == 1 else [rank % BATCHES]
        for step in range(self.single.steps, until):
            self.optimizer.zero_grad()
            for batch in batches:
                (loss_of(self.model, step, batch) / len(batches)).backward()
            self.optimizer.step()
            self.single.step()
            self.assert_same(f"after step {step}")

    def assert_same(self, where):
        self.single.assert_same(self.model, where)
        self.single.assert_same_state(self.optimizer, where)

    def state_dicts(self, options):
        return {
            "model": get_model_state_dict(self.model, options=options),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer, options=options),
        }

    def load(self, state_dicts, options):
        set_model_state_dict(self.model, state_dicts["model"], options=options)
        set_optimizer_state_dict(
            self.model, self.optimizer, state_dicts["optimizer"], options=options
        )


def save(folder, options, step, how):
    run = Run(options)
    run.train(until=step)
    dcp.save(run.state_dicts(how), checkpoint_id=folder)
    run.assert_same("after it was saved")
    run.train(until=step + 3)


def load(folder, options, step, how, steps_before=0):
    run = Run(options)
    run.train(until=steps_before)
    state_dicts = run.state_dicts(how)
    run.assert_same("after its state was taken for a template")
    dcp.load(state_dicts, checkpoint_id=folder)
    run.load(state_dicts, how)
    if steps_before > step:
        run.single = Run(options).single
    while run.single.steps < step:
        run.single.step()
    run.assert_same("as loaded")
    run.train(until=step + 5)


CASES = {
    "momentum": ({}, 5),
    "no_momentum": ({"momentum": 0, "nesterov": False}, 5),
    "before_the_first_step": ({"nesterov": False, "dampening": 0.1, "ema_decay": 0.9}, 0),
    "average_that_is_not_there_yet": ({"ema_decay": "swa"}, 2),
    "average": ({"ema_decay": "swa"}, 4),
    "momentum_dropped_just_now": ({"reset_momentum": True}, 3),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    """Options, and the step after which the state is saved."""
    return request.param


@pytest.fixture(params=[False, True], ids=["nested", "flat"])
def how(request):
    """The two forms of an optimizer's state that torch knows."""
    return StateDictOptions(flatten_optimizer_state_dict=request.param)


def test_training_saved_on_two_ranks_continues_on_one_and_four(ranks, tmp_path, case, how):
    ranks(2, save, tmp_path / "checkpoint", *case, how)
    for world_size in (1, 4):
        ranks(world_size, load, tmp_path / "checkpoint", *case, how)


@pytest.mark.parametrize("steps_before", [3, 7])
def test_running_training_may_return_to_a_checkpoint(ranks, tmp_path, how, steps_before):
    """Also at a restart, which has just dropped the momentum that the checkpoint has."""
    options = {"reset_momentum": True}
    ranks(2, save, tmp_path / "checkpoint", options, 5, how)
    ranks(2, load, tmp_path / "checkpoint", options, 5, how, steps_before)


def save_and_load_from_rank_0(options, step):
    """The whole state is on rank 0, as for torch.save()."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved, loaded = Run(options), Run(options)
    saved.train(until=step)
    state_dicts = saved.state_dicts(whole)
    if dist.get_rank() != 0:
        assert state_dicts == {"model": {}, "optimizer": {}}
    loaded.load(state_dicts, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    loaded.single = saved.single
    loaded.assert_same("as loaded")
    loaded.train(until=step + 5)


# Without a tensor in the state, torch does not know on which devices to spread it.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"no_momentum"}))
def test_state_of_rank_0_is_spread_over_the_ranks(ranks, name):
    ranks(2, save_and_load_from_rank_0, *CASES[name])
