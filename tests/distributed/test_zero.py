"""ZeroRedundancyOptimizer: each rank updates some of the parameters and sends them on."""

import torch.distributed as dist
from exact_training import OPTIONS, SCHEDULE, STEPS, SingleProcess, loss_of, network
from torch.nn.parallel import DistributedDataParallel

from sgdr_fused import FusedSGDR


class Run:
    """A training with DDP and ZeroRedundancyOptimizer, next to one in a single process."""

    def __init__(self, backend="auto"):
        # Here, as the import warns; see LIBRARIES_OWN_WARNINGS.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        self.single = SingleProcess(dist.get_world_size())
        self.model = DistributedDataParallel(network())
        self.optimizer = ZeroRedundancyOptimizer(
            self.model.parameters(), FusedSGDR, backend=backend, **OPTIONS | SCHEDULE
        )

    def train(self, until):
        for step in range(self.single.steps, until):
            self.optimizer.zero_grad()
            loss_of(self.model, step, dist.get_rank()).backward()
            self.optimizer.step()
            self.single.step()
            self.single.assert_same(self.model, f"at step {step}")
            # A rank without parameters, too, knows where the schedule stands.
            lr = [group["lr"] for group in self.optimizer.param_groups]
            assert lr == self.single.optimizer.scheduler.get_last_lr()


def train(backend):
    Run(backend).train(STEPS)


def test_training_equals_that_of_one_process(ranks, world_size, backend):
    ranks(world_size, train, backend)


def save():
    run = Run()
    run.train(until=5)
    run.optimizer.consolidate_state_dict(to=0)
    return None if dist.get_rank() else (run.model.state_dict(), run.optimizer.state_dict())


def load(model, optimizer):
    run = Run()
    for _ in range(5):
        run.single.step()
    run.model.load_state_dict(model)
    run.optimizer.load_state_dict(optimizer)
    assert run.optimizer.optim.get_last_lr() == run.single.optimizer.scheduler.get_last_lr()
    run.train(until=9)


def test_consolidated_state_continues_the_schedule(ranks):
    saved = ranks(2, save)[0]
    ranks(2, load, *saved)
