"""Whatever a user does between steps, native equals reference, and an error changes nothing.

``SGDR_FUSED_FUZZ=10000 pytest tests/test_fuzz.py`` tries as many random cases; without it the cases
are few, and always the same.
"""

import copy
import io
import os
import pickle
import warnings

import pytest
import torch
from fuzz_faults import FAULTS, MUST_RAISE, is_plain
from fuzz_sides import Sides, assert_plain
from fuzz_values import (
    GOOD,
    Kind,
    bad_edits,
    clipping,
    good_edits,
    grad_kinds,
    kinds,
    new_groups,
    new_params,
    writable_layouts,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sgdr_fused import FusedSGDR, native

pytestmark = [
    pytest.mark.skipif(native.extension is None, reason=native.why_missing),
    # torch says it once, so that only one of two sides would raise.
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

CASES = int(os.environ.get("SGDR_FUSED_FUZZ", "0"))

indices = st.integers(0, 11)
many_grads = st.lists(st.none() | grad_kinds, min_size=1, max_size=4)
changes_of_list = ["in place", "reversed", "tuple", "without the first"]
odd_steps = [-1, 1.5, "1", None, 2**53, 2**63, 2**70]
roles = st.sampled_from(["momentum_buffer", "ema", "master_param", "n_averaged"])


def step_plainly(side):
    return side.optimizer.step()


def step_in_inference_mode(side):
    with torch.inference_mode():
        return side.optimizer.step()


def step_with_grad(side):
    with torch.enable_grad():
        return side.optimizer.step()


def step_with_closure(side):
    return side.optimizer.step(lambda: 1.5)


def step_scaled(found_inf, grad_scale):
    def step(side):
        side.optimizer.grad_scale, side.optimizer.found_inf = grad_scale, found_inf
        try:
            return side.optimizer.step()
        finally:
            del side.optimizer.grad_scale, side.optimizer.found_inf

    return step


WAYS_TO_STEP = {
    "plainly": step_plainly,
    "again": step_plainly,
    "and again": step_plainly,
    "in inference mode": step_in_inference_mode,
    "with grad": step_with_grad,
    "with a closure": step_with_closure,
    "scaled": step_scaled(torch.tensor(0.0), torch.tensor(256.0)),
    "scaled by a number": step_scaled(0.0, 0.125),
    "skipped": step_scaled(torch.tensor(1.0), torch.tensor(256.0)),
}


ways_to_step = st.sampled_from(list(WAYS_TO_STEP))


def set_grad(param, kind):
    param.grad = None
    if kind is not None:
        if param.is_complex() or not param.requires_grad:
            kind = kind._replace(dtype=None)  # torch takes no other
        else:
            param.grad_dtype = None
        param.grad = kind.make(param.shape, param.dtype)


class NativeAndReference(RuleBasedStateMachine):
    """A user of an optimizer, twice."""

    @initialize(groups=st.lists(new_groups, min_size=1, max_size=3), options=clipping)
    def construct(self, groups, options):
        self.sides = Sides(groups, options)
        self.is_stepping_in_backward = False
        self.note_good_options()

    def note_good_options(self):
        """Remembers the options of the last step that went well."""
        self.good = [
            [
                {k: v for k, v in g.items() if k in GOOD and k != "lr"}
                for g in s.optimizer.param_groups
            ]
            for s in self.sides.both
        ]

    def step(self, step=step_plainly):
        outcomes = self.sides.apply(step)
        if not self.sides.raised(outcomes):
            for side in self.sides.both:
                assert_plain(side.optimizer.param_groups)
            self.note_good_options()
        elif [len(s.optimizer.param_groups) for s in self.sides.both] == [
            len(g) for g in self.good
        ]:
            # Options that do not fit together would stop all further steps.
            for side, good in zip(self.sides.both, self.good, strict=True):
                for group, options in zip(side.optimizer.param_groups, good, strict=True):
                    group.update(options)
        return outcomes

    # --------------------------------------------------------------------------------------------
    # gradients and steps

    @rule(kinds=many_grads, how=ways_to_step)
    def step_with_gradients(self, kinds, how):
        for side in self.sides.both:
            for i, param in enumerate(side.params_in_groups()):
                set_grad(param, kinds[i % len(kinds)])
        self.step(WAYS_TO_STEP[how])

    @rule(kinds=many_grads, how=ways_to_step)
    def step_with_gradients_again(self, kinds, how):
        self.step_with_gradients(kinds, how)

    @rule(how=ways_to_step)
    def step_with_the_same_gradients(self, how):
        self.step(WAYS_TO_STEP[how])

    @rule(index=indices, kind=st.none() | grad_kinds)
    def set_one_gradient(self, index, kind):
        self.sides.apply(lambda side: set_grad(side.param(index), kind))

    @rule(seed=st.integers(0, 99), subset=st.integers(1, 255), twice=st.booleans())
    def backward(self, seed, subset, twice):
        def run(side):
            loss = torch.zeros((), dtype=torch.float64)
            for i, param in enumerate(side.params_in_groups()):
                if param.requires_grad and subset >> i % 8 & 1:
                    weights = Kind(None, "contiguous", "usual", seed + i)
                    for _ in range(1 + twice):
                        product = param * weights.make(param.shape, param.dtype)
                        product = product.real if product.is_complex() else product
                        loss = loss + product.to(torch.float64).sum()
            if loss.requires_grad:
                with warnings.catch_warnings():
                    # torch's, about the layout of a gradient.
                    warnings.simplefilter("ignore", UserWarning)
                    loss.backward()

        self.sides.apply(run, is_atomic=False)

    @rule()
    def zero_grad(self):
        self.sides.apply(lambda side: side.optimizer.zero_grad())

    # --------------------------------------------------------------------------------------------
    # options

    @rule(index=indices, edit=good_edits)
    def edit_option(self, index, edit):
        name, value = edit
        self.sides.apply(lambda side: side.group(index).update({name: value.make()}))

    @rule(index=indices, edit=bad_edits)
    def step_with_a_bad_option(self, index, edit):
        name, value = edit
        before = [dict(side.group(index)) for side in self.sides.both]
        self.sides.apply(lambda side: side.group(index).update({name: value.make()}))
        outcomes = self.sides.apply(step_plainly)
        if self.sides.raised(outcomes):
            for side, group in zip(self.sides.both, before, strict=True):
                side.group(index).update(group)

    @rule(index=indices, factor=st.sampled_from([0.5, 1, 2]))
    def scale_lr_by_hand(self, index, factor):
        def scale(side):
            side.group(index)["lr"] *= factor

        self.sides.apply(scale)

    @rule(index=indices)
    def set_lr_to_the_same_object(self, index):
        self.sides.apply(lambda side: side.group(index).update(lr=side.group(index)["lr"]))

    @rule(options=clipping)
    def change_clipping(self, options):
        def change(side):
            side.optimizer.max_grad_norm = options["max_grad_norm"]

        self.sides.apply(change)

        def change_the_other(side):
            side.optimizer.skip_nonfinite = options["skip_nonfinite"]

        self.sides.apply(change_the_other)

    # --------------------------------------------------------------------------------------------
    # schedule

    @rule(index=st.none() | indices)
    def restart(self, index):
        def restart(side):
            groups = len(side.optimizer.param_groups)
            side.optimizer.restart(None if index is None else index % groups)

        self.sides.apply(restart)

    @rule(step=st.integers(0, 60) | st.sampled_from(odd_steps))
    def seek(self, step):
        self.sides.apply(lambda side: side.optimizer.seek(step))

    @rule(group=indices)
    def count_cycles(self, group):
        def register(side):
            def count(optimizer):
                side.calls.append((optimizer.cycle, optimizer.param_groups[0]["step"]))

            groups = len(side.optimizer.param_groups)
            side.optimizer.register_restart_hook(count, group=group % groups)

        self.sides.apply(register)

    # --------------------------------------------------------------------------------------------
    # parameters and groups

    @rule(group=new_groups, edit=st.none() | bad_edits)
    def add_param_group(self, group, edit):
        if len(self.sides.both[0].pool) > 8:
            return

        def add(side):
            made = group.make()
            if edit is not None:
                made[edit[0]] = edit[1].make()
            side.optimizer.add_param_group(made)
            side.pool += made["params"]

        self.sides.apply(add)

    @rule(param=new_params, index=indices)
    def append_param(self, param, index):
        if len(self.sides.both[0].pool) > 8:
            return

        def append(side):
            made = param.make()
            group = side.group(index)
            group["params"] = [*group["params"], made]
            side.pool.append(made)

        self.sides.apply(append)

    @rule(index=indices, how=st.sampled_from(changes_of_list))
    def change_list_of_params(self, index, how):
        def change(side):
            group = side.group(index)
            params = group["params"]
            if how == "reversed":
                group["params"] = list(params)[::-1]
            elif how == "tuple":
                group["params"] = tuple(params)
            elif how == "without the first" and len(params) > 1:
                group["params"] = list(params)[1:]
            elif isinstance(params, list):
                params.reverse()

        self.sides.apply(change)

    @rule(index=indices)
    def delete_group(self, index):
        def delete(side):
            groups = side.optimizer.param_groups
            if len(groups) > 1:
                del groups[index % len(groups)]

        self.sides.apply(delete)

    @rule(index=indices, requires_grad=st.booleans())
    def freeze_or_unfreeze(self, index, requires_grad):
        def change(side):
            param = side.param(index)
            param.requires_grad_(requires_grad)
            if not requires_grad:
                param.grad = None

        self.sides.apply(change)

    @rule(index=indices, kind=kinds, keeps_dtype=st.booleans())
    def set_data(self, index, kind, keeps_dtype):
        def change(side):
            param = side.param(index)
            param.grad = None
            dtype = param.dtype if keeps_dtype or param.is_complex() else kind.dtype
            if dtype.is_complex and not param.is_complex():
                dtype = dtype.to_real()
            param.data = kind._replace(dtype=dtype).make(param.shape)

        self.sides.apply(change)

    @rule(index=indices, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    def convert_data(self, index, dtype):
        def change(side):
            param = side.param(index)
            if not param.is_complex():
                param.grad = None
                param.data = param.data.to(dtype)

        self.sides.apply(change)

    @rule(index=indices, other=indices)
    def share_memory(self, index, other):
        def share(side):
            param, other_param = side.param(index), side.param(other)
            is_alike = param.shape == other_param.shape
            is_alike &= param.is_complex() == other_param.is_complex()
            # What the native step has to copy it leaves to the reference where it is shared.
            if is_alike and is_plain(other_param):
                param.grad = None
                param.data = other_param.data

        self.sides.apply(share)

    # --------------------------------------------------------------------------------------------
    # state

    @rule(index=indices, role=roles, how=st.sampled_from(["deleted", "None", "empty", "no entry"]))
    def drop_state(self, index, role, how):
        def drop(side):
            state, param = side.optimizer.state, side.param(index)
            if param not in state:
                return
            if how == "no entry":
                del state[param]
            elif how == "empty":
                state[param] = {}
            elif role in state[param]:
                if how == "deleted":
                    del state[param][role]
                elif role != "n_averaged":
                    state[param][role] = None

        self.sides.apply(drop)

    @rule()
    def clear_state(self):
        self.sides.apply(lambda side: side.optimizer.state.clear())

    @rule(index=indices, role=roles, kind=kinds, layout=writable_layouts)
    def replace_buffer(self, index, role, kind, layout):
        def replace(side):
            param = side.param(index)
            of_param = side.optimizer.state.get(param, {})
            if isinstance(of_param.get(role), torch.Tensor):
                dtype = of_param[role].dtype if kind.seed % 2 else kind.dtype
                dtype = dtype.to_complex() if param.is_complex() else dtype
                dtype = dtype.to_real() if dtype.is_complex and not param.is_complex() else dtype
                if role != "momentum_buffer":
                    dtype = of_param[role].dtype
                of_param[role] = kind._replace(dtype=dtype).make(param.shape)

        self.sides.apply(replace)

    @rule(index=indices, name=st.sampled_from(sorted(FAULTS)))
    def step_with_a_fault(self, index, name):
        undo = []
        for side in self.sides.both:
            params = side.params_in_groups()
            if not params:
                return
            param = params[index % len(params)]
            if param.grad is None:
                set_grad(param, Kind(None, "contiguous", "usual", index))
            undo.append(FAULTS[name](side, param))
        if undo[0] is None:
            return
        outcomes = self.sides.apply(step_plainly)
        if name in MUST_RAISE:
            assert self.sides.raised(outcomes), f"{name} is no error"
        for revert in undo:
            revert()
        self.sides.assert_equal()

    # --------------------------------------------------------------------------------------------
    # saving and copying

    @rule()
    def save(self):
        def save(side):
            file = io.BytesIO()
            torch.save(side.optimizer.state_dict(), file)
            side.saved = file.getvalue()

        self.sides.apply(save)

    @rule(into_new=st.booleans())
    def load(self, into_new):
        def load(side):
            if side.saved is None:
                return
            saved = torch.load(io.BytesIO(side.saved), weights_only=True)
            if not into_new:
                side.optimizer.load_state_dict(saved)
                return
            groups = [{"params": list(g["params"])} for g in side.optimizer.param_groups]
            optimizer = FusedSGDR(groups, T_0=1, backend=side.backend)
            optimizer.load_state_dict(saved)
            if side.in_backward is None:
                side.optimizer = optimizer

        self.sides.apply(load)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how):
        def replace(side):
            if side.in_backward is not None:
                side.in_backward.remove()
                side.in_backward = None
            everything = (side.optimizer, side.pool)
            if how == "deepcopy":
                side.optimizer, side.pool = copy.deepcopy(everything)
            else:
                side.optimizer, side.pool = pickle.loads(pickle.dumps(everything))

        self.sides.apply(replace)

    # --------------------------------------------------------------------------------------------
    # averages, and steps within backward()

    @rule(within=st.sampled_from(["nothing", "step", "swap", "restart", "save", "zero_grad"]))
    def swap_ema(self, within):
        def swap(side):
            optimizer = side.optimizer
            with optimizer.swap_ema():
                looks = [p.detach().clone() for p in side.pool]
                if within == "step":
                    optimizer.step()
                elif within == "swap":
                    with optimizer.swap_ema():
                        pass
                elif within == "restart":
                    optimizer.restart()
                elif within == "save":
                    optimizer.state_dict()
            return [look.tolist() for look in looks]

        self.sides.apply(swap)

    @rule(on=st.booleans())
    def step_in_backward(self, on):
        def change(side):
            if on:
                side.in_backward = side.optimizer.step_in_backward()
            elif side.in_backward is not None:
                side.in_backward.remove()
                side.in_backward = None

        self.sides.apply(change)


NativeAndReference.TestCase.settings = settings(
    max_examples=CASES or 100,
    stateful_step_count=30,
    derandomize=not CASES,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
test_fuzz = NativeAndReference.TestCase
