"""The interface of torch.optim.Optimizer, on top of a Stepper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, compiler
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from sgdr_fused.checkpoint import CheckpointCall
from sgdr_fused.compiled import guard_identity, step_groups
from sgdr_fused.cycle_end import CycleEnd
from sgdr_fused.device_state import host_copy
from sgdr_fused.groups import as_list, complete_new_group, listed
from sgdr_fused.native import is_profiling
from sgdr_fused.noted_groups import REFUSAL, NotedGroups
from sgdr_fused.options import (
    Backend,
    Clipping,
    plain_options,
    refuse_options_of_all_groups,
)
from sgdr_fused.state_dict import (
    adopted,
    clipping_in,
    fitted,
    saved_by_param,
    with_host_values,
    without_functions,
)
from sgdr_fused.steppers import (
    checked_backend,
    new_lock,
    new_stepper,
    stepper_after_refusal,
    traced_stepper,
)
from sgdr_fused.tensors import refuse_norm_of_flat_shards
from sgdr_fused.values import shown

__all__ = ["SteppedOptimizer"]

# The attributes that load_state_dict() sets.
_LOADED = ("state", "param_groups", "_clipping", "_noted_groups", "_stepper", "_cycle_end")


class SteppedOptimizer(Optimizer):
    """An optimizer whose steps a :class:`~sgdr_fused.steppers.Stepper` takes.

    Args:
        params: As for any torch optimizer.
        defaults: The options of a param group.
        clipping: The options of the whole optimizer.
        backend: Which stepper to use.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: ``backend="native"`` and there is no native backend.
    """

    _is_new = True
    _is_swapped = False
    # The state_dict that load_state_dict() is loading.
    _saved_state: Mapping[Tensor, Any] = MappingProxyType({})

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], clipping: Clipping, backend: Backend
    ) -> None:
        self.backend = checked_backend(backend)
        self._clipping = clipping
        # Whatever changes groups, state or stepper holds it, and so does a step.
        self._lock = new_lock()
        self._noted_groups = NotedGroups(self._shared_options())
        self._stepper = new_stepper(self.backend, clipping, self._lock, self._noted_groups)
        # torch explains why it takes no single tensor.
        super().__init__(
            params if isinstance(params, Tensor) else as_list("params", params), defaults
        )
        self._cycle_end = CycleEnd(self.param_groups[0])

    # ------------------------------------------------------------------------------------------
    # step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, then move the schedule one step on.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: A gradient does not fit its parameter, or an option of a group is out of
                its range.
            RuntimeError: A gradient is sparse, or ``backend="native"`` cannot run.

        After an error parameters, momentum and schedule are as they were.
        """
        # It is "compiler.", because torch.compile skips a method that names no module of torch's,
        # and then traces the ones that it calls.
        if compiler.is_dynamo_compiling():
            return None if self._step_in_graph(closure) else self._step_out_of_graph(closure)
        if not self.state:
            if call := CheckpointCall.for_new_state(self.param_groups):
                call.add_missing_keys(self.param_groups, self.state)
                return None
            if self._is_new:
                # The model may have been sharded after the optimizer was made.
                with self._lock:
                    self._check_clipping(self._clipping)
                self._is_new = False
        # Not in a function of its own, because a call costs time.
        try:
            if (
                self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_pre_hooks
                or _global_post_hooks
                or is_profiling()
            ):
                return self._observed_step() if closure is None else self._observed_step(closure)
            return self._step(closure)
        except BaseException:
            # A GradScaler removes them only after a step that succeeds.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self._is_swapped:
            raise RuntimeError(
                "step() was called within a swap_ema() block, where the parameters are averages; "
                "leave the block first"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        amp = self.__dict__
        found_inf = amp.get("found_inf")
        if found_inf is not None or self._clipping.skip_nonfinite:
            self._cycle_end.before_step(self.param_groups)
        while not self._stepper.step(
            self.param_groups, self.state, amp.get("grad_scale"), found_inf
        ):
            self._fall_back()
        return loss

    # torch's own wrapper: the profiler range and the hooks.
    _observed_step = Optimizer.profile_hook_step(_step)

    def _patch_step_function(self) -> None:
        # torch would wrap step() of this class and of its subclasses in a profiler range that
        # takes longer than a small step. step() uses that range only if hooks or a profiler need
        # it.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    def _step_in_graph(self, closure: Callable[[], Any] | None) -> bool:
        """The step that torch.compile traces, one op for each group; False if it cannot be."""
        # torch.compile guards what this method reads, so that no graph outlives a change of it, but
        # not what _init_group() reads. Of a dict it guards the length, not the truth; of a missing
        # attribute the answer of hasattr(), not that of getattr().
        grad_scale = self.grad_scale if hasattr(self, "grad_scale") else None
        found_inf = self.found_inf if hasattr(self, "found_inf") else None
        tensors: tuple[list[Tensor], ...] = ([], [], [], [])
        if (
            closure is not None
            or self._is_swapped
            or self.backend == "reference"
            or self._clipping.needs_norm
            or not isinstance(grad_scale, (Tensor, type(None)))
            or not isinstance(found_inf, (Tensor, type(None)))
            or len(self._optimizer_step_pre_hooks) > 0
            or len(self._optimizer_step_post_hooks) > 0
            or len(_global_pre_hooks) > 0
            or len(_global_post_hooks) > 0
            or not self._init_group(*tensors)
        ):
            return False
        step_groups(self.param_groups, tensors, grad_scale, found_inf)
        return True

    def _init_group(self, *tensors: list[Tensor]) -> bool:
        """Adds the tensors of the next step to the lists; False if the step cannot be traced.

        torch.compile runs a method of this name instead of tracing it, and makes the tensors in
        the lists inputs of the graph.
        """
        stepper = traced_stepper(self._stepper, self._noted_groups, self.param_groups)
        if stepper is None:
            return False
        self._stepper = stepper
        collected = stepper.collect(self.param_groups, self.state)
        for own, found in zip(tensors, collected, strict=True):
            own.extend(found)
        guard_identity(self.param_groups)
        return True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_out_of_graph(self, closure: Callable[[], Any] | None) -> Any:
        # Not self.step, which may be a subclass's, or compiled.
        return SteppedOptimizer.step(self, closure)

    def _step_param(self, index: int) -> None:
        """Updates one parameter, given its index over all groups; the schedule stays."""
        if self._is_swapped:
            raise RuntimeError(
                "backward() was called within a swap_ema() block, where the parameters are "
                "averages, but step_in_backward() would update them; leave the block first"
            )
        while not self._stepper.step_param(self.param_groups, self.state, index):
            self._fall_back()

    def _fall_back(self) -> None:
        with self._lock:
            self._stepper = stepper_after_refusal(
                self._stepper,
                self.backend,
                self._clipping,
                self._lock,
                self._noted_groups,
                self.param_groups,
                self.state,
            )

    def _set_clipping(self, clipping: Clipping) -> None:
        with self._lock:
            self._clipping = clipping
            self._noted_groups.shared = self._shared_options()
            self._stepper.set_clipping(*clipping)

    def _shared_options(self) -> dict[str, Any]:
        return self._clipping._asdict() | {"backend": self.backend}

    def _begin(self) -> None:
        """Begins where the groups' schedules have been put."""
        self._sync()
        self._cycle_end = CycleEnd(self.param_groups[0])

    def _sync(self) -> None:
        self._stepper.sync(self.param_groups, self.state)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses the wrapper by which a torch LR scheduler attaches itself to ``step``."""
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched"):
            self._noted_groups.take_back(self.param_groups)
            raise TypeError(REFUSAL)
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------
    # param groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose schedule joins at the step the others have reached.

        Args:
            param_group: ``params``, and the options that differ from the defaults.

        Raises:
            ValueError: An option is out of its range, a parameter is listed twice or missing, or
                the parameters are on several devices.
            TypeError: The group or its parameters have a wrong type. After any error the optimizer
                is as it was.
        """
        with self._lock:
            n_groups = len(self.param_groups)
            try:
                super().add_param_group(listed(param_group, n_groups))
                refuse_options_of_all_groups(self.param_groups[-1], self._shared_options())
                complete_new_group(self.param_groups)
                self._check_clipping(self._clipping)
                self._sync()
            except BaseException:
                del self.param_groups[n_groups:]
                raise

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, which can be loaded on any device.

        Returns:
            A state_dict like that of any torch optimizer; each of its ``param_groups`` contains the
            schedule's position and the options of the whole optimizer.

        Raises:
            ValueError: An option is out of its range.
        """
        checkpoint_call = CheckpointCall.current()
        with self._lock:
            self._make_plain()
            if checkpoint_call is not None:
                checkpoint_call.add_missing_keys(self.param_groups, self.state)
            packed = without_functions(super().state_dict())
            if self._is_on_device():
                packed = with_host_values(packed, *self._on_host())
            if checkpoint_call is not None:
                packed["state"] = checkpoint_call.with_placeholders(
                    self.param_groups, packed["state"]
                )
            # In the groups, because torch.distributed.checkpoint keeps nothing beside them.
            for group in packed["param_groups"]:
                group.update(self._clipping._asdict())
            return packed

    def _make_plain(self) -> None:
        """Puts plain Python values into the groups on the host, as a step would."""
        if not self._is_on_device():
            changes = [plain_options(group) for group in self.param_groups]
            for group, plain in zip(self.param_groups, changes, strict=True):
                group.update(plain)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from :meth:`state_dict`, or that of a ``torch.optim.SGD``.

        If both have parameter names, each group's state is matched by name, otherwise by position.
        The optimizer keeps its own names.

        Args:
            state_dict: Its tensors are copied. An SGD's has no schedule, so the schedule stays
                where it is; ``max_grad_norm`` and ``skip_nonfinite`` too.

        Raises:
            ValueError: It does not fit, is another optimizer's, or an option in it is out of its
                range.
            TypeError: It is no state_dict. After any error the optimizer is as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"state_dict must be a dict, but is {shown(state_dict)}; pass what state_dict() "
                "has returned"
            )

        def fit(_: Optimizer, final_state_dict: dict[str, Any]) -> dict[str, Any]:
            fitting = fitted(self.param_groups, final_state_dict)
            self._saved_state = saved_by_param(self.param_groups, fitting)
            return fitting

        with self._lock:
            before = {name: self.__dict__[name] for name in _LOADED}
            # Registered last, it sees the state_dict as the user's own hooks have changed it.
            hook = self.register_load_state_dict_pre_hook(fit)
            try:
                super().load_state_dict(dict(state_dict))
            except BaseException:
                self.__dict__.update(before)
                raise
            finally:
                hook.remove()
                self._saved_state = {}

    def _is_on_device(self) -> bool:
        return any(isinstance(group["step"], Tensor) for group in self.param_groups)

    def _on_host(self) -> tuple[list[dict[str, Any]], Mapping[Tensor, Any]]:
        """The groups with numbers, and the state without tensors that have no value yet."""
        if not self._is_on_device():
            return self.param_groups, self.state
        self._sync()
        return host_copy(self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        with self._lock:
            groups, state = self._on_host()
        return super().__getstate__() | {
            "backend": self.backend,
            "_clipping": self._clipping,
            "param_groups": groups,
            "state": state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state, from pickle or ``load_state_dict``; an error changes nothing."""
        if "param_groups" in self.__dict__:
            clipping = clipping_in(state["param_groups"], self._clipping)
            self._check_clipping(clipping)
            state = adopted(self.param_groups, state, self._saved_state)
            self._clipping = clipping
        else:
            self._lock = new_lock()
        try:
            super().__setstate__(state)
        finally:
            self.defaults.pop("differentiable", None)
        self._noted_groups = NotedGroups(self._shared_options())
        self._stepper = new_stepper(self.backend, self._clipping, self._lock, self._noted_groups)
        self._begin()

    def _check_clipping(self, clipping: Clipping) -> None:
        """Raises if the optimizer's parameters or state do not allow these options."""
        refuse_norm_of_flat_shards(self.param_groups, clipping)
