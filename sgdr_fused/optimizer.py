"""FusedSGDR: arguments, state and state_dict; no arithmetic."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.optimizer import _global_optimizer_post_hooks as _global_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as _global_pre_hooks

from sgdr_fused import checkpoint, ema, interop, native
from sgdr_fused.compiled import TracedStepper, is_traceable, step_groups
from sgdr_fused.device_state import (
    DeviceState,
    host_copy,
    sync_group_on_device,
    sync_group_on_host,
    to_host,
)
from sgdr_fused.grad_norm import shard_axes, sum_over_shards
from sgdr_fused.groups import check_group, drop_momentum, move_group, position_of
from sgdr_fused.in_backward import StepInBackward, refuse_clipping
from sgdr_fused.reference import Clipping, ReferenceStepper
from sgdr_fused.restart_hook import RestartHook
from sgdr_fused.schedule import Anneal, CosineWarmRestarts, Position, is_finite
from sgdr_fused.tensors import (
    check_tensors,
    dtypes_of_state,
    kinds_of_tensors,
    local_tensor,
    named_params,
    placed_like,
)

__all__ = ["FusedSGDR"]

Backend = Literal["auto", "native", "reference"]

_is_profiling: Callable[[], bool] = getattr(native.extension, "is_profiling", lambda: True)


class FusedSGDR(Optimizer):
    r"""SGD with momentum and a cosine schedule with warm restarts, in one fused step.

    Replaces :class:`torch.optim.SGD` together with
    :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`: delete ``scheduler.step()`` and
    pass the scheduler's arguments here. In float32 and float64 on the CPU the parameters are the
    pair's bit for bit.

    The schedule counts applied steps: a step that a GradScaler skips changes nothing, the schedule
    included. Each of the options from ``lr`` to ``decoupled_weight_decay`` can also be given per
    param group, and changed there between steps. ``param_group["lr"]`` is the LR of the next step;
    a value written to it holds for that step, as with a torch scheduler, and
    ``param_group["initial_lr"]`` is the peak :math:`\eta_{max}` to change for good. A torch LR
    scheduler on top is refused; ``ReduceLROnPlateau``, which cannot be told from a hand that sets
    ``lr``, would have each of its changes last one step: call :meth:`restart` instead.

    Args:
        params: Parameters, named parameters or dicts of param groups, as for any torch optimizer;
            real or complex, of dtype float64, float32, float16 or bfloat16 (complex64, complex128).
        lr: Peak of the first cycle. A one-element tensor is read once.
        momentum: Momentum factor :math:`\mu`.
        dampening: Dampening :math:`\tau` of the momentum.
        weight_decay: Weight decay :math:`\lambda`, as an L2 penalty.
        nesterov: Use Nesterov momentum; needs momentum and no dampening.
        T_0: Length of the first cycle, in epochs of ``steps_per_epoch`` steps; by default in
            optimizer steps.
        T_mult: Factor by which each cycle is longer than the one before, >= 1.
        eta_min: LR that each cycle falls towards; at most ``lr``.
        steps_per_epoch: Optimizer steps in an epoch.
        anneal: ``"step"``, or ``"epoch"`` to change the LR only at the start of an epoch.
        warmup_steps: Steps of a linear ramp before the first cycle.
        warmup_start_lr: LR at the foot of that ramp.
        cycle_decay: Factor by which each cycle's peak is lower than the one before.
        n_cycles: Number of cycles, after which the LR stays at ``eta_min``; None: endless.
        reset_momentum: Drop the momentum at each restart.
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Multiply the parameter by ``1 - lr * weight_decay`` instead (SGDW).
        max_grad_norm: Scale the gradients down to at most this norm, as
            :func:`torch.nn.utils.clip_grad_norm_` over the parameters of all groups; the gradients
            themselves are not written. DTensor shards are summed up over their ranks.
        skip_nonfinite: Skip a step whose gradients hold an infinity or NaN: nothing changes, the
            schedule included, but for :attr:`skipped_steps`.
        ema_decay: Keep an average of each parameter,
            :math:`\bar p \leftarrow d \bar p + (1 - d) p` with this :math:`d`, in float32 (or
            float64); it starts as the parameter after its first step. ``"swa"``: the equal average
            of the weights at the ends of the cycles. See :meth:`swap_ema`.
        momentum_dtype: Dtype of the momentum buffers, in place of the parameter's; to one narrower
            than the arithmetic they are rounded stochastically.
        stochastic_rounding: Round float16 and bfloat16 parameters and buffers stochastically, so
            that small updates are not lost.
        master_weights: Keep a float32 copy of float16 and bfloat16 parameters in the state. It is
            the copy that is trained: a value written to the parameter is overwritten.
        seed: Of the random numbers, from 0 to 2^64 - 1. They depend on it, on the parameter's
            place, the element and the number of applied steps, and on nothing else.
        backend: ``"native"`` raises where the native step cannot run, ``"reference"`` runs the
            plain PyTorch step, ``"auto"`` takes the former where it can and says so once where it
            cannot.

    Raises:
        ValueError: An argument is out of its range; the message names it and its value.
        RuntimeError: ``backend="native"`` and there is no native backend.

    Example:
        >>> optimizer = FusedSGDR(model.parameters(), lr=0.1, momentum=0.9, T_0=1000, T_mult=2)
        >>> for input, target in batches:
        >>>     optimizer.zero_grad()
        >>>     loss_fn(model(input), target).backward()
        >>>     optimizer.step()  # and no scheduler.step()

    References:
        Update: :class:`torch.optim.SGD`, after Sutskever et al., *On the importance of
        initialization and momentum in deep learning*, ICML 2013. Schedule: Loshchilov and Hutter,
        *SGDR*, ICLR 2017, https://arxiv.org/abs/1608.03983. Decoupled weight decay: the same,
        *Decoupled Weight Decay Regularization*, ICLR 2019, https://arxiv.org/abs/1711.05101,
        algorithm 1.
    """

    # GradScaler then leaves the gradients alone and sets grad_scale and found_inf for the step.
    _step_supports_amp_scaling = True

    _clipping = Clipping()
    _in_backward: StepInBackward | None = None
    _is_swapped = False
    _restart_hooks: tuple[RestartHook, ...] = ()
    # Of the load_state_dict() under way.
    _saved_state: Mapping[Tensor, Any] = MappingProxyType({})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        T_0: int,
        T_mult: float = 1,
        eta_min: float = 0.0,
        steps_per_epoch: int = 1,
        anneal: Anneal = "step",
        warmup_steps: int = 0,
        warmup_start_lr: float = 0.0,
        cycle_decay: float = 1.0,
        n_cycles: int | None = None,
        reset_momentum: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        ema_decay: float | Literal["swa"] | None = None,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        if backend not in get_args(Backend):
            raise ValueError(
                f"Expected backend to be one of {get_args(Backend)}, but got {backend!r}"
            )
        if backend == "native" and native.extension is None:
            raise RuntimeError(f'backend="native" is not available: {native.why_missing}')
        self.backend = backend
        self._clipping = _checked_clipping(max_grad_norm, skip_nonfinite)
        self._stepper = self._new_stepper()
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "T_0": T_0,
            "T_mult": T_mult,
            "eta_min": eta_min,
            "steps_per_epoch": steps_per_epoch,
            "anneal": anneal,
            "warmup_steps": warmup_steps,
            "warmup_start_lr": warmup_start_lr,
            "cycle_decay": cycle_decay,
            "n_cycles": n_cycles,
            "reset_momentum": reset_momentum,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "ema_decay": ema_decay,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults)

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
        if is_compiling():
            return self._step_in_graph(closure)
        if not self.state and checkpoint.is_initialisation(self.param_groups):
            checkpoint.name_missing(self.param_groups, self.state)
            return None
        # Spelled out here, for the calls that a function of its own would cost.
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_pre_hooks
            or _global_post_hooks
            or _is_profiling()
        ):
            return self._observed_step() if closure is None else self._observed_step(closure)
        return self._step(closure)

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
        while not self._stepper.step(
            self.param_groups, self.state, amp.get("grad_scale"), amp.get("found_inf")
        ):
            self._fall_back()
        return loss

    def _step_in_graph(self, closure: Callable[[], Any] | None) -> Any:
        """The step as torch.compile traces it: one op for each group, or a break."""
        if closure is None and not (
            self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        ):
            tensors: tuple[list[Tensor], ...] = ([], [], [], [])
            if self._init_group(*tensors):
                amp = self.__dict__
                step_groups(self.param_groups, tensors, amp.get("grad_scale"), amp.get("found_inf"))
                return None
        return self._step_out_of_graph(closure)

    def _init_group(self, *tensors: list[Tensor]) -> bool:
        """Puts the tensors of the next step into the lists; False where it cannot be traced.

        torch.compile runs a method of this name instead of tracing it, and takes what is in the
        lists afterwards for inputs of the graph.
        """
        if self.backend == "reference" or self._clipping.needs_norm or self._is_swapped:
            return False
        if not is_traceable(self.param_groups):
            return False
        if not isinstance(self._stepper, TracedStepper):
            self._stepper = TracedStepper()
        for own, found in zip(
            tensors, self._stepper.collect(self.param_groups, self.state), strict=True
        ):
            own.extend(found)
        return True

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _step_out_of_graph(self, closure: Callable[[], Any] | None) -> Any:
        return self.step(closure)

    # torch's own wrapper: the profiler range and the hooks.
    _observed_step = Optimizer.profile_hook_step(_step)

    def step_in_backward(self) -> StepInBackward:
        """Update each parameter within ``backward()``, as soon as its gradient is there, and free
        the gradient.

        So the gradients of a model are never there all at once. Call :meth:`step` once an
        iteration as before: it moves the schedule one step on, and updates what ``backward()`` did
        not reach. Each ``backward()`` updates, so gradients cannot be accumulated over several,
        and a GradScaler, which has to see all of them first, cannot be used.

        Returns:
            A handle, whose ``remove()`` makes :meth:`step` update all parameters again.

        Raises:
            ValueError: ``max_grad_norm`` or ``skip_nonfinite`` is set, which need all gradients
                before the first update.
            RuntimeError: It has been called already.

        Example:
            >>> optimizer.step_in_backward()
            >>> for input, target in batches:
            >>>     loss_fn(model(input), target).backward()
            >>>     optimizer.step()  # no zero_grad()
        """
        if self._in_backward is not None:
            raise RuntimeError("step_in_backward() was called already; remove() its handle first")
        self._in_backward = StepInBackward(self)
        return self._in_backward

    def _step_param(self, index: int) -> None:
        while not self._stepper.step_param(self.param_groups, self.state, index):
            self._fall_back()

    def _patch_step_function(self) -> None:
        # torch would wrap step() of this class or a subclass in a profiler range that costs more
        # than a small step. Ours opens the range and runs the hooks itself when there is somebody
        # to see them.
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    def _fall_back(self) -> None:
        """Takes the reference path from here on, or leaves the path of torch.compile."""
        if isinstance(self._stepper, TracedStepper):
            to_host(self.param_groups, self.state)
            self._stepper = self._new_stepper()
            return
        check_tensors(self.param_groups, self.state)
        reason = (
            "the native step does not take a device, dtype or tensor subclass in use: "
            + kinds_of_tensors(self.param_groups)
        )
        if self.backend == "native":
            raise RuntimeError(f'backend="native" cannot take this step: {reason}')
        to_host(self.param_groups, self.state)
        self._stepper = ReferenceStepper(_SLOWER + reason)
        self._stepper.set_clipping(*self._clipping)

    def _new_stepper(self) -> Any:
        if self.backend == "reference":
            stepper: Any = ReferenceStepper()
        elif native.extension is None:
            stepper = ReferenceStepper(_SLOWER + native.why_missing)
        else:
            sync = sync_group_on_device if native.extension.has_cuda else sync_group_on_host
            stepper = native.extension.Stepper(sync, local_tensor, shard_axes, sum_over_shards)
        stepper.set_clipping(*self._clipping)
        return stepper

    def _sync(self) -> None:
        self._stepper.sync(self.param_groups, self.state)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses the wrapper by which a torch LR scheduler attaches itself to ``step``."""
        if name == "step" and hasattr(value, "_wrapped_by_lr_sched"):
            raise TypeError(
                "FusedSGDR computes its own learning rate, so a torch LR scheduler "
                "would fight with it; "
                "remove the scheduler and pass T_0, T_mult, eta_min, warmup_steps, "
                "... to FusedSGDR instead; "
                "a trainer that insists on one takes sgdr_fused.trainers.as_scheduler(optimizer)"
            )
        super().__setattr__(name, value)

    # --------------------------------------------------------------------------------------
    # clipping and averages

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that the gradients are scaled down to, or None. May be set."""
        return self._clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._clipping = self._allowed(max_grad_norm, self._clipping.skip_nonfinite)
        self._stepper.set_clipping(*self._clipping)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with an infinite or NaN gradient is skipped. May be set."""
        return self._clipping.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, skip_nonfinite: bool) -> None:
        self._clipping = self._allowed(self._clipping.max_grad_norm, skip_nonfinite)
        self._stepper.set_clipping(*self._clipping)

    def _allowed(self, max_grad_norm: float | None, skip_nonfinite: bool) -> Clipping:
        clipping = _checked_clipping(max_grad_norm, skip_nonfinite)
        if self._in_backward is not None:
            refuse_clipping(clipping)
        return clipping

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last step, before clipping.

        Of dtype float64 and shape (), on the parameters' device. None before the first step, and
        where neither ``max_grad_norm`` nor ``skip_nonfinite`` asks for it.
        """
        norm = self._stepper.grad_norm
        return torch.tensor(norm, dtype=torch.float64) if isinstance(norm, float) else norm

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped, by ``skip_nonfinite`` or by a GradScaler."""
        return int(self.param_groups[0]["skipped_steps"])

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Evaluate with the averages: within the ``with`` block they stand in the parameters'
        place.

        A parameter without an average (no step yet, or with ``"swa"`` no end of a cycle) stays as
        it is. Buffers of the model, such as BatchNorm's statistics, are not averaged: call
        :func:`torch.optim.swa_utils.update_bn` within the block where the model has any.

        Raises:
            RuntimeError: :meth:`step` was called within the block.
        """
        if self._is_swapped:
            raise RuntimeError("swap_ema() was called within a swap_ema() block")
        _, state = self._on_host()
        self._is_swapped = True
        try:
            with ema.swapped_in(self.param_groups, state):
                yield
        finally:
            self._is_swapped = False

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The averages under their parameters' names, to be loaded into a model like this one.

        Returns:
            Copies, in float32 (or float64). A parameter without an average stands for itself.

        Raises:
            ValueError: The optimizer was made without names, that is, not with
                ``model.named_parameters()``.
        """
        groups, state = self._on_host()
        return ema.averages_by_name(groups, state)

    # --------------------------------------------------------------------------------------
    # schedule

    def get_last_lr(self) -> list[float]:
        """Each group's LR for the next step, under the name that torch's schedulers use."""
        return [float(group["lr"]) for group in self.param_groups]

    @property
    def cycle(self) -> int:
        """Index of the current cycle of group 0."""
        return position_of(self.param_groups[0]).cycle

    @property
    def is_cycle_end(self) -> bool:
        """Whether a cycle of group 0 has just ended, by its length or by :meth:`restart`."""
        position = position_of(self.param_groups[0])
        return position.T_cur == 0 and position.cycle > 0

    def restart(self, group: int | None = None) -> None:
        """Begin the next cycle now, on a plateau for example.

        Args:
            group: Index of the param group; None: all of them.

        Raises:
            ValueError: The group has no further cycle, because of ``n_cycles``.
        """
        groups = self.param_groups if group is None else [self.param_groups[group]]
        starts = [CosineWarmRestarts.of_group(g).restart(position_of(g)) for g in groups]
        for param_group, start in zip(groups, starts, strict=True):
            device_state = DeviceState.of(param_group)
            move_group(param_group, start)
            if not param_group["reset_momentum"]:
                continue
            if device_state is None:
                drop_momentum(param_group, self.state)
            else:
                device_state.is_empty["momentum_buffer"].fill_(1)
        self._sync()
        for hook in self._restart_hooks:
            hook.after_restart(groups)

    def register_restart_hook(
        self, hook: Callable[[FusedSGDR], object], group: int = 0
    ) -> RestartHook:
        """Call a function where a cycle ends: after its last step, the last cycle's too, and at
        each :meth:`restart`.

        A step that is skipped does not call it again, nor do :meth:`seek` and
        :meth:`load_state_dict`. On a GPU the host waits for each step, to know whether it has ended
        a cycle; the replays of a CUDA graph call no hook.

        Args:
            hook: What to call, with the optimizer, in which the next cycle has begun.
            group: Index of the param group whose cycles they are.

        Returns:
            A handle, whose ``remove()`` ends it. Pickle and deepcopy leave hooks out, as in torch.

        Raises:
            IndexError: There is no such group.

        Example:
            >>> optimizer.register_restart_hook(lambda o: print(f"cycle {o.cycle - 1} has ended"))
        """
        return RestartHook(self, hook, group)

    def seek(self, step: int) -> None:
        """Jump every group's schedule to a step, as if that many had been applied; momentum stays
        as it is.

        Args:
            step: Number of applied steps, >= 0. The effects of earlier ``restart()`` calls are
                forgotten.

        Raises:
            ValueError: ``step`` is negative or not an integer.
        """
        positions = [CosineWarmRestarts.of_group(g).position(step) for g in self.param_groups]
        for group, position in zip(self.param_groups, positions, strict=True):
            move_group(group, position)
        self._sync()

    # -----------------------------------------------------------------------------------------
    # state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose schedule joins at the step the others have reached.

        Args:
            param_group: ``params``, and the options that differ from the defaults.

        Raises:
            ValueError: An option is out of its range, a parameter is listed twice, or the
                parameters are on several devices.
        """
        super().add_param_group(_without_duplicates(param_group))
        group = self.param_groups[-1]
        try:
            _check_devices(group["params"], len(self.param_groups) - 1)
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
            group["lr"] = float(lr)
            group["initial_lr"] = float(group.get("initial_lr", lr))
            group.setdefault("skipped_steps", 0)
            move_group(group, self._joining_position(group))
            check_group(group)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        self._sync()

    def _joining_position(self, group: dict[str, Any]) -> Position:
        schedule = CosineWarmRestarts.of_group(group)
        first = self.param_groups[0]
        if first is group:
            return schedule.position(0)
        # In step with the others, restart() calls included, where it follows the same cycles.
        if (
            replace(CosineWarmRestarts.of_group(first), lr=schedule.lr, eta_min=schedule.eta_min)
            == schedule
        ):
            return position_of(first)
        return schedule.position(position_of(first).step)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, to be loaded on any device.

        Returns:
            As of any torch optimizer; ``param_groups`` say where the schedule stands.
        """
        is_for_checkpoint = checkpoint.is_at_work()
        if is_for_checkpoint:
            checkpoint.name_missing(self.param_groups, self.state)
        packed = super().state_dict()
        if self._is_on_device():
            groups, state = self._on_host()
            params = [param for group in groups for param in group["params"]]
            for own, group in zip(groups, packed["param_groups"], strict=True):
                group.update({name: own[name] for name in group if name != "params"})
            for index in packed["state"]:
                if isinstance(index, int):
                    packed["state"][index] = state[params[index]]
        if is_for_checkpoint:
            packed["state"] = checkpoint.completed(self.param_groups, packed["state"])
        return packed

    def _is_on_device(self) -> bool:
        return any(isinstance(group["step"], Tensor) for group in self.param_groups)

    def _on_host(self) -> tuple[list[dict[str, Any]], Mapping[Tensor, Any]]:
        """The groups with numbers, and the state without buffers that hold nothing."""
        if not self._is_on_device():
            return self.param_groups, self.state
        self._sync()
        return host_copy(self.param_groups, self.state)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        groups, state = self._on_host()
        return super().__getstate__() | {
            "backend": self.backend,
            "_clipping": self._clipping,
            "param_groups": groups,
            "state": state,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state over, from pickle or ``load_state_dict``; an error changes nothing."""
        stepper = None
        if "param_groups" in self.__dict__:
            stepper = self._new_stepper()
            state = self._adopted(state)
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)
        self._stepper = self._new_stepper() if stepper is None else stepper
        self._sync()

    def _adopted(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """A loaded state, checked, and completed from our own groups where it is an SGD's."""
        groups = []
        for i, (own, saved) in enumerate(
            zip(self.param_groups, loaded["param_groups"], strict=True)
        ):
            group = {key: value for key, value in saved.items() if key not in _ONLY_SGD}
            group.setdefault("initial_lr", group.get("lr", own["initial_lr"]))
            is_ours = all(name in group for name in Position._fields)
            group = {key: value for key, value in own.items() if key != "lr"} | group
            group |= position_of(group)._asdict()
            group["skipped_steps"] = int(group["skipped_steps"])
            try:
                group["initial_lr"] = float(group["initial_lr"])
                check_group(group)
                if not is_ours:
                    move_group(group, position_of(group))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"the state_dict does not fit: param_groups[{i}]: {error!r}"
                ) from error
            groups.append(group)

        is_from_checkpoint = checkpoint.is_at_work()
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for name, of_group, param in named_params(groups):
            if param not in loaded["state"]:
                continue
            of_param = {k: v for k, v in loaded["state"][param].items() if v is not None}
            if is_from_checkpoint:
                of_param = checkpoint.without_blanks(of_param)
            for role, dtype in dtypes_of_state(of_group, param).items():
                if role in of_param:
                    saved = self._as_saved(param, role, of_param[role], name)
                    copied = saved.to(param.device, dtype, copy=True)
                    of_param[role] = placed_like(param, copied)
            state[param] = of_param
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` gave, or that of a ``torch.optim.SGD``.

        Args:
            state_dict: The tensors in it are copied. Of an SGD's, whose schedule is not known, the
                schedule stays where it is.

        Raises:
            ValueError: It does not fit, or an option in it is out of its range; the optimizer is
                as it was.
        """
        # After all of the user's own.
        hook = self.register_load_state_dict_pre_hook(_note_saved_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._saved_state = {}

    def _as_saved(self, param: Tensor, role: str, tensor: Any, name: str) -> Tensor:
        """The tensor as it was before torch rounded it to its parameter's dtype."""
        saved = self._saved_state.get(param, {}).get(role, tensor)
        if not isinstance(saved, Tensor) or saved.shape != param.shape:
            found = tuple(saved.shape) if isinstance(saved, Tensor) else repr(saved)
            raise ValueError(
                f"the state_dict does not fit: {name} has shape {tuple(param.shape)}, "
                f"its {role} {found}; was it saved from another model?"
            )
        return saved

    # ---------------------------------------------------------------------------------------
    # interop

    @classmethod
    def from_pair(
        cls,
        sgd: torch.optim.SGD,
        scheduler: CosineAnnealingWarmRestarts,
        *,
        steps_per_epoch: int = 1,
        anneal: Anneal = "step",
        backend: Backend = "auto",
    ) -> FusedSGDR:
        """Take over a running training of ``torch.optim.SGD`` with its scheduler, mid-cycle too.

        The new optimizer continues with the pair's parameters, momentum buffers (the same tensors:
        step only one of the two from here on), options and place in the schedule.

        Args:
            sgd: The optimizer.
            scheduler: Its scheduler.
            steps_per_epoch: Optimizer steps in one unit of the scheduler's ``T_0``: 1 if
                ``scheduler.step()`` was called at each optimizer step.
            anneal: ``"epoch"`` if it was called once an epoch.
            backend: As for the constructor.

        Returns:
            An optimizer whose next step is the one that the pair would take.

        Raises:
            TypeError: The two are not such a pair.
            ValueError: They are in a state that FusedSGDR cannot continue; the message says which.
        """
        return interop.from_pair(
            cls, sgd, scheduler, steps_per_epoch=steps_per_epoch, anneal=anneal, backend=backend
        )

    def to_pair(self) -> tuple[torch.optim.SGD, CosineAnnealingWarmRestarts]:
        """Hand the training over to ``torch.optim.SGD`` and its scheduler, mid-cycle too.

        Returns:
            The pair, on the same parameters and momentum buffers. Call ``scheduler.step()`` after
            each step, or after each epoch if ``anneal="epoch"``.

        Raises:
            ValueError: An option has no counterpart in the pair; the message says which.
        """
        return interop.to_pair(self)


_SLOWER = "FusedSGDR takes the slower reference path: "

_ONLY_SGD = ("foreach", "differentiable", "fused")


def _checked_clipping(max_grad_norm: float | None, skip_nonfinite: bool) -> Clipping:
    if max_grad_norm is not None and not (is_finite(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(
            f"Invalid max_grad_norm value: {max_grad_norm!r}; max_grad_norm must be None or a "
            "finite float > 0"
        )
    return Clipping(max_grad_norm, bool(skip_nonfinite))


def _note_saved_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    # Of unlike lengths torch will complain.
    optimizer._saved_state = {  # type: ignore[attr-defined]
        param: state_dict["state"].get(index, {})
        for param, index in zip(params, saved, strict=False)
    }


def _without_duplicates(param_group: dict[str, Any]) -> dict[str, Any]:
    """The group with its parameters as a list; raises where one is listed twice."""
    if not isinstance(param_group, dict) or isinstance(
        param_group.get("params"), (Tensor, set, type(None))
    ):
        return param_group  # for torch's own messages
    params = list(param_group["params"])
    seen: dict[int, int] = {}
    for i, entry in enumerate(params):
        first = seen.setdefault(id(entry[1] if isinstance(entry, tuple) else entry), i)
        if first != i:
            raise ValueError(
                "optimizer contains a parameter group with duplicate parameters: "
                f"params[{first}] and params[{i}] are one tensor; list it once"
            )
    return param_group | {"params": params}


def _check_devices(params: list[Tensor], group: int) -> None:
    for i, param in enumerate(params):
        if param.device != params[0].device:
            raise ValueError(
                f'param_groups[{group}]["params"][{i}] is on {param.device}, but params[0] is on '
                f"{params[0].device}; give each device a param group of its own"
            )
