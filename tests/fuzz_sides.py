"""Two optimizers side by side, native and reference, of which everything stays equal."""

import math
import re

import torch
from pair import same_bits

from sgdr_fused import FusedSGDR

PLAIN_TYPES = (int, float, bool, str, type(None), torch.dtype, list)


class Side:
    """One optimizer, all parameters that it has or had, and what its hooks have seen."""

    def __init__(self, backend, groups, options):
        self.backend = backend
        self.calls = []
        groups = [group.make() for group in groups]
        self.pool = [param for group in groups for param in group["params"]]
        self.optimizer = FusedSGDR(groups, T_0=3, backend=backend, **options)
        self.in_backward = None
        self.saved = None

    def param(self, index):
        return self.pool[index % len(self.pool)]

    def group(self, index):
        groups = self.optimizer.param_groups
        return groups[index % len(groups)]

    def params_in_groups(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Sides:
    """Applies operations to both, and asserts that they agree."""

    def __init__(self, groups, options):
        self.both = [Side(backend, groups, options) for backend in ("native", "reference")]
        self.assert_equal()

    def apply(self, operation, is_atomic=True):
        """Applies an operation to each side.

        Args:
            operation: A function of a side.
            is_atomic: Whether it changes nothing if it raises.

        Returns:
            The results, or the exceptions.
        """
        outcomes = []
        for side in self.both:
            before = Picture(side)
            try:
                outcomes.append(operation(side))
            except Exception as error:
                outcomes.append(error)
                if is_atomic:
                    before.assert_same(Picture(side), f"{side.backend} has raised {error!r}, yet")
        native, reference = (describe(outcome) for outcome in outcomes)
        assert native == reference, f"native: {native}\nreference: {reference}"
        self.assert_equal()
        return outcomes

    def raised(self, outcomes):
        return isinstance(outcomes[0], Exception)

    def assert_equal(self):
        native, reference = (Picture(side) for side in self.both)
        native.assert_equal(reference)


def assert_plain(param_groups):
    """Asserts that a checkpoint of the groups can be loaded with weights_only=True."""
    for group in param_groups:
        for key, value in group.items():
            assert type(value) in PLAIN_TYPES, f"{key}={value!r}"


def describe(outcome):
    """What two outcomes have to have in common."""
    if isinstance(outcome, Exception):
        without_addresses = re.sub(r"\d{12,}|0x[0-9a-f]+", "...", str(outcome))
        return f"{type(outcome).__name__}: {without_addresses}"
    if isinstance(outcome, torch.Tensor):
        return f"{outcome.dtype} {outcome.tolist()}"
    return repr(outcome)


class TensorPicture:
    """A tensor: what it holds, how it lies in memory, and which object it is."""

    def __init__(self, tensor):
        self.is_strided = tensor.layout == torch.strided and tensor.device.type == "cpu"
        self.kind = (tensor.dtype, tensor.shape, tensor.layout, tensor.device)
        self.kind += (tensor.requires_grad, tensor.is_inference())
        # So that its id is not given to another one.
        self.tensor = tensor
        self.place = None
        if self.is_strided:
            self.kind += (tensor.stride(), tensor.is_conj(), tensor.is_neg())
            self.place = None if tensor._is_zerotensor() else tensor.data_ptr()
            self.numbers = tensor.detach().clone()

    def assert_equal(self, other, what):
        assert self.kind == other.kind, what
        if self.is_strided and self.numbers.numel() and not self.numbers._is_zerotensor():
            assert same_bits(self.numbers.resolve_neg(), other.numbers.resolve_neg()), what

    def assert_same(self, other, what):
        assert self.tensor is other.tensor, what
        assert self.place == other.place, what
        self.assert_equal(other, what)


class Picture:
    """Everything that belongs to a side at one moment."""

    def __init__(self, side):
        optimizer = side.optimizer
        self.optimizer = optimizer
        index_of = {id(param): i for i, param in enumerate(side.pool)}

        def name(param):
            return index_of[id(param)] if id(param) in index_of else repr(param)

        self.tensors = {}
        for i, param in enumerate(side.pool):
            self._add(("param", i), param)
            self._add(("grad", i), param.grad)
        self.numbers = {}
        self.keys = set()
        self.types_of_params = []
        for param, of_param in optimizer.state.items():
            if not isinstance(of_param, dict):
                self.numbers["state", name(param)] = repr(of_param)
                continue
            for key, value in of_param.items():
                self.keys.add((name(param), key))
                self._add((key, name(param)), value)
        for i, group in enumerate(optimizer.param_groups):
            if not isinstance(group, dict):
                self.numbers["group", i] = repr(group)
                continue
            for key, value in group.items():
                if key == "params":
                    # A tuple may become a list, and a tensor a number, in a call that raises.
                    self.types_of_params.append(type(value))
                    value = self._members(value, name)
                elif isinstance(value, torch.Tensor) and value.numel() == 1:
                    value = value.item()
                self._add((key, i), value)
        norm = optimizer.grad_norm
        self._add("grad_norm", None if norm is None else norm.item())
        for attribute in ("max_grad_norm", "skip_nonfinite", "grad_scale", "found_inf"):
            self._add(attribute, getattr(optimizer, attribute, None))
        self._add("defaults", sorted(optimizer.defaults))
        self._add("calls", list(side.calls))

    @staticmethod
    def _members(params, name):
        if isinstance(params, (list, tuple)):
            return [name(param) for param in params]
        return type(params).__name__

    def _add(self, key, value):
        if isinstance(value, torch.Tensor):
            self.tensors[key] = TensorPicture(value)
        elif value is not None or not isinstance(key, tuple) or key[0] != "grad":
            self.numbers[key] = value

    def assert_equal(self, other):
        """Asserts that another side looks the same, in memory of its own."""
        assert self.keys == other.keys
        assert self.types_of_params == other.types_of_params
        assert self.numbers.keys() == other.numbers.keys()
        for key, value in self.numbers.items():
            theirs = other.numbers[key]
            assert type(value) is type(theirs), f"{key}: {value!r} and {theirs!r}"
            assert is_same_number(value, theirs), f"{key}: {value!r} and {theirs!r}"
        assert self.tensors.keys() == other.tensors.keys()
        for key, tensor in self.tensors.items():
            tensor.assert_equal(other.tensors[key], f"{key}: {tensor.kind}")

    def assert_same(self, after, what):
        """Asserts that nothing has changed since."""
        assert after.optimizer is self.optimizer, what
        assert after.keys == self.keys, f"{what} state has changed"
        assert after.numbers.keys() == self.numbers.keys(), what
        for key, value in self.numbers.items():
            now = after.numbers[key]
            assert is_same_number(value, now), f"{what} {key} changed from {value!r} to {now!r}"
        assert after.tensors.keys() == self.tensors.keys(), what
        for key, tensor in self.tensors.items():
            tensor.assert_same(after.tensors[key], f"{what} {key} has changed")


def is_same_number(left, right):
    """Whether two values are equal, NaN to itself and arrays included."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    if type(left) is not type(right):
        # A number may have been stored as a plain one.
        return repr(float(left)) == repr(float(right)) if are_numbers(left, right) else False
    return repr(left) == repr(right)


def are_numbers(*values):
    return all(hasattr(value, "__float__") for value in values)
