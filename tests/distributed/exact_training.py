"""A training whose gradients are exact, so that no order of summation changes a bit.

Several processes add gradients in another order than one does. Here every number that is added
is a multiple of 2^-15 below 2^8, which float32 holds exactly: inputs and targets are small
integers, weights are rounded to multiples of 1/32 on their way into the forward pass, and the loss
is linear in the output. The optimizer's results use all bits of a float32.
"""

import torch
from pair import Pair, draw, same_bits
from torch import nn

from sgdr_fused import FusedSGDR

OPTIONS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
SCHEDULE = {"T_0": 3, "T_mult": 2, "eta_min": 1e-3}
STEPS = 8
BATCH, INPUTS, HIDDEN, OUTPUTS = 8, 7, 12, 5


class CoarseLinear(nn.Linear):
    """A linear layer with weights rounded to multiples of 1/32; gradients pass through."""

    def forward(self, input):
        return nn.functional.linear(input, _coarse(self.weight), _coarse(self.bias))


def _coarse(weight):
    fixed = weight.detach()
    return weight + (torch.round(fixed * 32) / 32 - fixed)


def network():
    """The model, always with the same weights; of its last bias, one of four ranks gets nothing."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(CoarseLinear(INPUTS, HIDDEN), nn.ReLU(), CoarseLinear(HIDDEN, OUTPUTS))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(draw(param.shape, param.dtype, generator) / 2)
    return model


def loss_of(model, step, rank=0, part=0):
    """The loss on one rank's batch of a step, or on a part of it."""
    generator = torch.Generator().manual_seed(step * 1000 + rank * 10 + part)
    input = torch.randint(-3, 4, (BATCH, INPUTS), generator=generator).float()
    target = torch.randint(0, 2, (BATCH, OUTPUTS), generator=generator).float() * 2 - 1
    return (model(input) * target).sum() / 64


def fused(model, **options):
    """Our optimizer for a model."""
    return FusedSGDR(model.parameters(), **OPTIONS | SCHEDULE | options)


class SingleProcess:
    """The same training in one process: every rank's batches, one after the other.

    Args:
        ranks: Number of ranks whose batches it takes.
        parts: Number of batches that a rank accumulates.
        make_optimizer: Takes the model; None: the pair.
    """

    def __init__(self, ranks, parts=1, make_optimizer=None):
        self.ranks, self.parts, self.steps = ranks, parts, 0
        self.model = network()
        self.optimizer = (
            make_optimizer(self.model)
            if make_optimizer
            else Pair(self.model.parameters(), **OPTIONS | SCHEDULE)
        )

    def step(self):
        """One step of training."""
        for param in self.model.parameters():
            param.grad = None
        for rank in range(self.ranks):
            for part in range(self.parts):
                loss = loss_of(self.model, self.steps, rank, part)
                (loss / (self.ranks * self.parts)).backward()
        for param in self.model.parameters():
            exact = param.grad * 2**15
            assert torch.equal(exact, exact.round())
            assert exact.abs().max() < 2**23
        self.optimizer.step()
        self.steps += 1

    def assert_same(self, model, where=""):
        """Asserts that a model, sharded or not, has the same weights, bit for bit."""
        for (name, whole), param in zip(
            self.model.named_parameters(), model.parameters(), strict=True
        ):
            assert same_bits(whole_tensor(param), whole.detach()), f"{name} {where}"

    def assert_same_state(self, optimizer, where=""):
        """Asserts that an optimizer has the same schedule, and state sharded as its parameters."""
        ours, singles = (
            [p for g in o.param_groups for p in g["params"]] for o in (optimizer, self.optimizer)
        )
        for i, (param, whole) in enumerate(zip(ours, singles, strict=True)):
            state, expected = (
                {role: value for role, value in o.state.get(p, {}).items() if value is not None}
                for o, p in ((optimizer, param), (self.optimizer, whole))
            )
            assert state.keys() == expected.keys(), f"state of parameter {i} {where}"
            for role, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert getattr(state[role], "placements", 0) == getattr(param, "placements", 0)
                    assert same_bits(whole_tensor(state[role]), value), f"{role} {i} {where}"
                else:
                    assert state[role] == value, f"{role} {i} {where}"
        for name in ("lr", "step", "cycle", "T_cur", "T_i", "skipped_steps"):
            found, expected = (
                [group[name] for group in o.param_groups] for o in (optimizer, self.optimizer)
            )
            assert found == expected, f"{name} {where}"


def whole_tensor(tensor):
    """The full tensor, if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
