"""The pair, torch.optim.SGD's for-loop and CosineAnnealingWarmRestarts, and comparisons with it."""

import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Pair:
    """What FusedSGDR replaces, stepped as one."""

    def __init__(self, params, *, T_0, T_mult=1, eta_min=0.0, **options):
        self.sgd = torch.optim.SGD(params, foreach=False, fused=False, **options)
        self.scheduler = CosineAnnealingWarmRestarts(
            self.sgd, T_0=T_0, T_mult=T_mult, eta_min=eta_min
        )

    def step(self):
        """One optimizer step, then one of the schedule."""
        self.sgd.step()
        self.scheduler.step()

    @property
    def param_groups(self):
        return self.sgd.param_groups

    @property
    def state(self):
        return self.sgd.state


def make_params(sizes, dtype=torch.float32, seed=0):
    """Parameters of the given sizes or shapes, none of whose elements is zero."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(draw(size, dtype, generator)) for size in sizes]


def copies_of(params):
    """Parameters of equal values, dtypes and strides, in separate memory."""
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def draw(size, dtype, generator):
    """Nonzero random numbers of magnitude up to 2, as long as the mantissa.

    Made of integers: torch.randn gives other numbers with other instruction sets.
    """
    if dtype.is_complex:
        parts = [draw(size, dtype.to_real(), generator) for _ in range(2)]
        return torch.complex(*parts)
    limit = 2**53 if dtype == torch.float64 else 2**24
    numbers = torch.randint(1, limit, to_size(size), generator=generator)
    signs = torch.randint(0, 2, to_size(size), generator=generator) * 2 - 1
    return (numbers * signs).to(torch.float64).div(limit // 2).to(dtype)


def to_size(size):
    """Turns an int into a one-dimensional shape."""
    return (size,) if isinstance(size, int) else size


# The tensors that a parameter may have in the optimizer's state.
ROLES = ("momentum_buffer", "ema", "master_param")


def give_gradients(step, *sides):
    """Gives the parameters of all sides equal gradients, each in separate memory."""
    generator = torch.Generator().manual_seed(10_000 + step)
    for params in zip(*sides, strict=True):
        grad = draw(params[0].shape, params[0].dtype, generator)
        for param in params:
            param.grad = grad.clone()


def make_scaler(init_scale, **options):
    """A GradScaler that has scaled a loss; without that, its step() is an error."""
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **options)
    scaler.scale(torch.zeros(()))
    return scaler


def _clone(tensor):
    return None if tensor is None else tensor.clone()


def momentum_of(optimizer, param):
    """The momentum buffer, or None: torch leaves a None where there is no momentum."""
    return optimizer.state.get(param, {}).get("momentum_buffer")


def same_bits(left, right):
    """Whether two tensors are bitwise equal, signs of zeros included; all NaNs count as equal."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.is_complex():
        left, right = (torch.view_as_real(side.resolve_conj()) for side in (left, right))
    bits = _BITS[left.dtype.itemsize]
    equal = left.contiguous().view(bits) == right.contiguous().view(bits)
    return bool((equal | (left.isnan() & right.isnan())).all())


def assert_same_state(left, left_params, right, right_params, where=""):
    """Asserts that parameters, all their state and the schedule are bitwise equal."""
    assert_same(left, left_params, right, right_params, where)
    for i, params in enumerate(zip(left_params, right_params, strict=True)):
        ours, theirs = (o.state.get(p, {}) for o, p in zip((left, right), params, strict=True))
        assert ours.keys() == theirs.keys(), f"state of parameter {i} {where}"
        for name, value in ours.items():
            if name in ROLES:
                assert same_bits(value, theirs[name]), f"{name} of parameter {i} differs {where}"
            else:
                assert value == theirs[name], f"{name} of parameter {i} differs {where}"
    for name in ("step", "cycle", "T_cur", "T_i", "skipped_steps"):
        ours, theirs = ([group[name] for group in o.param_groups] for o in (left, right))
        assert ours == theirs, f"{name} differs {where}"


def assert_same(ours, our_params, theirs, their_params, where=""):
    """Asserts that parameters, momentum buffers and learning rates are bitwise equal."""
    for i, (our, their) in enumerate(zip(our_params, their_params, strict=True)):
        assert same_bits(our.detach(), their.detach()), f"parameter {i} differs {where}"
        our_buffer, their_buffer = momentum_of(ours, our), momentum_of(theirs, their)
        assert (our_buffer is None) == (their_buffer is None), f"momentum_buffer {i} {where}"
        if our_buffer is not None:
            assert same_bits(our_buffer, their_buffer), f"momentum_buffer {i} differs {where}"
    our_lrs = [float(group["lr"]) for group in ours.param_groups]
    their_lrs = [float(group["lr"]) for group in theirs.param_groups]
    assert our_lrs == their_lrs, where


def snapshot(optimizer, params):
    """Everything that a step may change, copied; ``assert_unchanged`` compares with it."""
    return {
        "params": [p.detach().clone() for p in params],
        **{role: [_clone(optimizer.state.get(p, {}).get(role)) for p in params] for role in ROLES},
        "groups": [
            {key: value for key, value in group.items() if key not in ("params", "skipped_steps")}
            for group in optimizer.param_groups
        ],
        "members": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "state": {id(p): set(of_param) for p, of_param in optimizer.state.items() if of_param},
    }


def assert_unchanged(before, optimizer, params):
    """Asserts that nothing but the count of skipped steps has changed since the snapshot."""
    after = snapshot(optimizer, params)
    for name in ("params", *ROLES):
        for i, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            assert (old is None) == (new is None), f"{name} {i}"
            assert old is None or same_bits(old, new), f"{name} {i} changed"
    for name in ("groups", "members", "state"):
        assert before[name] == after[name], name
