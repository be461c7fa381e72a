"""What the fuzz test draws: tensors, gradients, options, and values of every number type."""

import math
from typing import NamedTuple

import numpy as np
import torch
from cases import LAYOUTS
from hypothesis import strategies as st
from pair import draw

REAL = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)

# Without dimensions, empty, around the widths of vectors, and of four dimensions.
SHAPES = ((), (0,), (1,), (3,), (8,), (17,), (33,), (65,), (1025,), (2, 3), (5, 1), (0, 4))
SHAPES += ((2, 3, 4, 5), (1, 2, 1, 3))


class Kind(NamedTuple):
    """A tensor to be made.

    Attributes:
        dtype: Its dtype; None for a gradient: the parameter's.
        layout: How it lies in memory, a key of ``LAYOUTS_OF_ANY``.
        numbers: Which numbers it holds, a key of ``NUMBERS``.
        seed: Of the numbers.
    """

    dtype: torch.dtype | None
    layout: str
    numbers: str
    seed: int

    def make(self, shape, dtype=None):
        """A new tensor of this kind."""
        x = draw(shape, self.dtype or dtype, torch.Generator().manual_seed(self.seed))
        return LAYOUTS_OF_ANY[self.layout](NUMBERS[self.numbers](x))


# ------------------------------------------------------------------------------------------------
# numbers and layouts


def _with_some(*values):
    def replace(x):
        # Every third element, so that vectors and tails have some.
        for i, value in enumerate(values):
            x.view(-1)[i :: 3 * len(values)] = value
        return x

    return replace


NUMBERS = {
    "usual": lambda x: x,
    "zeros": lambda x: x * 0.0,  # of both signs
    "large": lambda x: x * (torch.finfo(x.dtype).max / 4),
    "small": lambda x: x * torch.finfo(x.dtype).tiny,
    "inf": _with_some(math.inf, -math.inf),
    "nan": _with_some(math.nan),
}


def _of_four_dimensions(name):
    def lay_out(x):
        return LAYOUTS[name](x) if x.ndim == 4 else x

    return lay_out


def _every_second(x):
    if x.ndim == 0:
        return x
    part = x.new_full([*x.shape[:-1], 2 * x.shape[-1]], -7)[..., ::2]
    return part.copy_(x)


def _misaligned(x):
    return x.new_full([x.numel() + 3], -7)[3:].view(x.shape).copy_(x)


def _odd_strides(x):
    # The stride of a dimension of size 1 may be anything.
    strides = [0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


LAYOUTS_OF_ANY = {
    "contiguous": lambda x: x,
    "channels_last": _of_four_dimensions("channels_last"),
    "cropped": _of_four_dimensions("cropped"),
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim >= 2 else x,
    "every_second": _every_second,
    "misaligned": _misaligned,
    "odd_strides": _odd_strides,
    "conjugate": lambda x: x.conj() if x.is_complex() else x,
    "negative": lambda x: torch._neg_view(x),
    # Several elements at one address: for gradients only.
    "expanded": lambda x: x.reshape(-1)[:1].sum().expand(x.shape),
}

writable_layouts = st.sampled_from([name for name in LAYOUTS_OF_ANY if name != "expanded"])
seeds = st.integers(0, 999)
often_usual = st.sampled_from(["usual"] * 6 + list(NUMBERS))


class NewParam(NamedTuple):
    """A parameter to be made."""

    shape: tuple[int, ...]
    kind: Kind
    requires_grad: bool

    def make(self):
        tensor = self.kind.make(self.shape)
        return torch.nn.Parameter(tensor, requires_grad=self.requires_grad)


dtypes = st.sampled_from(REAL + COMPLEX)
kinds = st.builds(Kind, dtypes, writable_layouts, often_usual, seeds)
new_params = st.builds(
    NewParam, st.sampled_from(SHAPES), kinds, st.sampled_from([True, True, True, False])
)
grad_kinds = st.builds(
    Kind,
    st.sampled_from([None, None, None, *REAL]),
    st.sampled_from(sorted(LAYOUTS_OF_ANY)),
    often_usual,
    seeds,
)

# ------------------------------------------------------------------------------------------------
# options

# The usual value of an option first. All values of one option are valid, yet not all combinations:
# a later step then has to refuse them.
GOOD = {
    "lr": (0.1, 0.01, 0.5, 0.0, 1),
    "initial_lr": (0.1, 0.02, 0.75, 1),
    "momentum": (0, 0.9, 0.5, 1, 1.25),
    "dampening": (0, 0.3, -0.5, 1),
    "weight_decay": (0, 0.01, 0.5, 1),
    "nesterov": (False, True),
    "T_0": (3, 1, 2, 5),
    "T_mult": (1, 2, 1.5, 1.0000001),
    "eta_min": (0.0, 0.001, 0.01),
    "steps_per_epoch": (1, 2, 3),
    "anneal": ("step", "epoch"),
    "warmup_steps": (0, 1, 4),
    "warmup_start_lr": (0.0, 0.05, 1.0),
    "cycle_decay": (1.0, 0.5, 0.0),
    "n_cycles": (None, 1, 2, 10),
    "reset_momentum": (False, True),
    "maximize": (False, True),
    "decoupled_weight_decay": (False, True),
    "ema_decay": (None, 0.9, "swa", 0.0),
    "momentum_dtype": (None, torch.bfloat16, torch.float16, torch.float32, torch.float64),
    "stochastic_rounding": (False, True),
    "master_weights": (False, True),
    "seed": (0, 12345, 2**64 - 1),
}
BAD = (-1, 1e400, -1e400, math.nan, 10**400, 2**63, 2**70, 2.5, "0.1", b"1", (), [], {}, object)
BAD += (None, 1j, torch.ones(2), torch.ones(0), np.ones(2), "abc", slice(0))

clipping = st.fixed_dictionaries(
    {
        "max_grad_norm": st.sampled_from([None, None, 0.1, 1e9]),
        "skip_nonfinite": st.booleans(),
    }
)


class As(NamedTuple):
    """A value and the type in which it is given; the same object for neither of the two sides."""

    value: object
    number_type: str

    def make(self):
        """The value in that type, where the value is a number."""
        value = self.value
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return value + 0
        if not isinstance(value, (bool, int, float)):
            return value
        return NUMBER_TYPES[self.number_type](value)


def _numpy(value):
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value) if -(2**63) <= value < 2**63 else value
    return np.float64(value)


def _float32(value):
    return np.float32(value) if isinstance(value, float) else _numpy(value)


def _tensor(value):
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


NUMBER_TYPES = {"plain": lambda value: value, "numpy": _numpy, "float32": _float32}
NUMBER_TYPES |= {"tensor": _tensor}
number_types = st.sampled_from(["plain", "plain", *NUMBER_TYPES])


def _as_any_type(values):
    return st.builds(As, st.sampled_from(values), number_types)


good_edits = st.sampled_from(list(GOOD)).flatmap(
    lambda name: st.tuples(st.just(name), _as_any_type(GOOD[name]))
)
bad_edits = st.tuples(
    st.sampled_from(list(GOOD)),
    _as_any_type(BAD),
)


@st.composite
def group_options(draw_value):
    """Options of a new group that fit together, often with some that are about the update."""

    def pick(*values):
        return draw_value(st.sampled_from(values))

    names = draw_value(st.lists(st.sampled_from(list(GOOD)), max_size=6, unique=True))
    options = {name: pick(*GOOD[name]) for name in names}
    options["momentum"] = pick(0.9, 0.5, 1.25, 0)
    options |= pick({"nesterov": True}, {"dampening": 0.3}, {})
    options |= pick({"stochastic_rounding": True}, {"master_weights": True}, {}, {})
    if options.get("nesterov"):
        options |= {"momentum": options["momentum"] or 0.9, "dampening": 0}
    if options.get("stochastic_rounding") and options.get("master_weights"):
        del options["master_weights"]
    if options.get("eta_min", -1) >= min(options.get("lr", 0.1), options.get("initial_lr", 0.1)):
        del options["eta_min"]
    return {name: As(value, draw_value(number_types)) for name, value in options.items()}


class NewGroup(NamedTuple):
    """A param group to be made."""

    params: list[NewParam]
    options: dict[str, As]

    def make(self):
        options = {name: value.make() for name, value in self.options.items()}
        params = [param.make() for param in self.params]
        if any(param.is_complex() for param in params):
            options.pop("momentum_dtype", None)
        return {"params": params, "lr": 0.1, **options}


new_groups = st.builds(NewGroup, st.lists(new_params, min_size=1, max_size=3), group_options())
