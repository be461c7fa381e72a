"""FusedSGDR: the options, and what they offer besides torch's interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, SequentialLR
from torch.optim.optimizer import ParamsT

from sgdr_fused import ema, interop
from sgdr_fused.groups import check_groups
from sgdr_fused.in_backward import StepInBackward
from sgdr_fused.in_backward_checks import refuse_clipping
from sgdr_fused.options import GROUP_OPTIONS, REQUIRED, Backend, Clipping, checked_clipping
from sgdr_fused.reference import ReferenceStepper
from sgdr_fused.schedule import Anneal
from sgdr_fused.scheduled import ScheduledOptimizer
from sgdr_fused.shards import find_flat_shard

__all__ = ["FusedSGDR"]


class FusedSGDR(ScheduledOptimizer):
    r"""SGD with momentum and a cosine schedule with warm restarts, in one fused step.

    Replaces :class:`torch.optim.SGD` together with
    :class:`torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`: delete ``scheduler.step()`` and
    pass the scheduler's arguments here. In float32 and float64 on the CPU the parameters are the
    pair's bit for bit.

    The schedule counts applied steps: a step that a GradScaler skips changes nothing, the schedule
    included. Each option except ``max_grad_norm``, ``skip_nonfinite`` and ``backend`` can also be
    given per param group, and changed there between steps. ``param_group["lr"]`` is the LR of the
    next step; a value written to it holds for that step, as with a torch scheduler. To change the
    peak :math:`\eta_{max}` for good, set ``param_group["initial_lr"]``. Attaching a torch LR
    scheduler raises an error. ``ReduceLROnPlateau`` is indistinguishable from setting ``lr`` by
    hand, so each of its changes would last one step: call :meth:`restart` instead.

    Args:
        params: Parameters, named parameters or dicts of param groups, as for any torch optimizer;
            real or complex, of dtype float64, float32, float16 or bfloat16 (complex64, complex128).
        lr: Peak of the first cycle. A one-element tensor is read once.
        momentum: Momentum factor :math:`\mu`.
        dampening: Dampening :math:`\tau` of the momentum.
        weight_decay: Weight decay :math:`\lambda`, as an L2 penalty.
        nesterov: Use Nesterov momentum; needs momentum and no dampening.
        T_0: Length of the first cycle, in epochs of ``steps_per_epoch`` steps; by default in
            optimizer steps. Required, here or in each param group.
        T_mult: Factor by which each cycle is longer than the one before, >= 1.
        eta_min: LR that each cycle descends to; at most ``lr``.
        steps_per_epoch: Optimizer steps in an epoch.
        anneal: ``"step"``, or ``"epoch"`` to change the LR only at the start of an epoch.
        warmup_steps: Steps of a linear ramp before the first cycle.
        warmup_start_lr: LR of the ramp's first step.
        cycle_decay: Factor by which each cycle's peak is lower than the one before.
        n_cycles: Number of cycles, after which the LR stays at ``eta_min``; None: endless.
        reset_momentum: Drop the momentum at each restart.
        maximize: Ascend instead of descend.
        decoupled_weight_decay: Multiply the parameter by ``1 - lr * weight_decay`` instead (SGDW).
        max_grad_norm: Scale the gradients down to at most this norm, as
            :func:`torch.nn.utils.clip_grad_norm_` over the parameters of all groups; the gradients
            themselves are not written. Infinity only measures :attr:`grad_norm`. For DTensor shards
            the norm is over all ranks. FSDP1's shards do not tell their ranks: an error.
        skip_nonfinite: Skip a step whose gradients hold an infinity or NaN: nothing changes, the
            schedule included, except :attr:`skipped_steps`.
        ema_decay: Keep an average of each parameter,
            :math:`\bar p \leftarrow d \bar p + (1 - d) p` with this :math:`d`, in float32 (or
            float64); it starts as the parameter after its first step. ``"swa"``: the equal average
            of the weights at the ends of the cycles. A function of the number of applied steps:
            its value is each step's :math:`d`, from 0 to 1; see :class:`EmaSchedule`. See
            :meth:`swap_ema`.
        momentum_dtype: Dtype of the momentum buffers, instead of the parameter's. If it is narrower
            than the dtype of the arithmetic, buffers are rounded stochastically.
        stochastic_rounding: Round float16 and bfloat16 parameters and buffers stochastically, so
            that small updates are not lost.
        master_weights: Keep a float32 copy of float16 and bfloat16 parameters in the state. Steps
            update the copy, and overwrite the parameter with it.
        seed: Seed of the random numbers, from 0 to 2^64 - 1. They depend only on it, the
            parameter's index over all groups, the element and the number of applied steps.
        backend: ``"native"`` raises if the native step cannot run, ``"reference"`` runs the plain
            PyTorch step, ``"auto"`` runs the native step if it can; otherwise it falls back to
            plain PyTorch and warns once.

    Raises:
        ValueError: An argument is out of its range; the message names it and its value.
        TypeError: There is no ``T_0``.
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

    _in_backward: StepInBackward | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        T_0: int = REQUIRED,
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
        ema_decay: float | Literal["swa"] | Callable[[int], float] | None = None,
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        master_weights: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        arguments = locals()
        # A wrapper that subclasses the optimizer passes groups only, which hold all options.
        given = (option.name for option in GROUP_OPTIONS if arguments[option.name] is not REQUIRED)
        defaults = {name: arguments[name] for name in given}
        super().__init__(params, defaults, checked_clipping(max_grad_norm, skip_nonfinite), backend)

    # ------------------------------------------------------------------------------------------
    # step

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves the gradients alone, and sets grad_scale and found_inf instead.

        A ShardedGradScaler would then set found_inf without a look at the other ranks.
        """
        with self._lock:
            check_groups(self.param_groups)
            params = (param for group in self.param_groups for param in group["params"])
            return find_flat_shard(params) is None

    def step_in_backward(self) -> StepInBackward:
        """Update each parameter within ``backward()``, as soon as its gradient is complete, and
        free the gradient.

        A model's gradients then never exist all at once. Call :meth:`step` once an iteration as
        before: it moves the schedule one step on, updates the parameters that ``backward()`` did
        not reach, and frees their gradients. A second gradient of a parameter before the next
        :meth:`step` is an error in ``backward()``, so gradients cannot be accumulated. Parameters
        that are added or unfrozen later, or leave the groups, are followed from the next
        :meth:`step` on. Pickle and deepcopy leave the hooks out.

        Returns:
            A handle; its ``remove()`` makes :meth:`step` update all parameters again.

        Raises:
            ValueError: ``max_grad_norm`` or ``skip_nonfinite`` is set, which need all gradients
                before the first update.
            RuntimeError: It was called before, here or on another optimizer of a parameter, and
                the handle is not removed; a parameter has a gradient; two parameters share memory;
                or DistributedDataParallel, FullyShardedDataParallel or a GradScaler is in use.
                Where this shows later, ``backward()`` raises the error before it updates.

        Example:
            >>> optimizer.step_in_backward()
            >>> for input, target in batches:
            >>>     loss_fn(model(input), target).backward()
            >>>     optimizer.step()  # no zero_grad()
        """
        if self._in_backward is not None and self._in_backward.is_active:
            raise RuntimeError("step_in_backward() was called already; remove() its handle first")
        refuse_clipping(self._clipping)
        self._in_backward = StepInBackward(self, self._step_param)
        return self._in_backward

    # --------------------------------------------------------------------------------------
    # clipping and averages

    @property
    def uses_native(self) -> bool:
        """Whether the native backend takes the steps, and not plain PyTorch, which is slower."""
        return not isinstance(self._stepper, ReferenceStepper)

    @property
    def max_grad_norm(self) -> float | None:
        """Norm that the gradients are scaled down to, or None. May be set."""
        return self._clipping.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, max_grad_norm: float | None) -> None:
        self._change_clipping(max_grad_norm, self._clipping.skip_nonfinite)

    @property
    def skip_nonfinite(self) -> bool:
        """Whether a step with an infinite or NaN gradient is skipped. May be set."""
        return self._clipping.skip_nonfinite

    @skip_nonfinite.setter
    def skip_nonfinite(self, skip_nonfinite: bool) -> None:
        self._change_clipping(self._clipping.max_grad_norm, skip_nonfinite)

    def _change_clipping(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        clipping = checked_clipping(max_grad_norm, skip_nonfinite)
        self._check_clipping(clipping)
        self._set_clipping(clipping)

    def _check_clipping(self, clipping: Clipping) -> None:
        super()._check_clipping(clipping)
        if self._in_backward is not None and self._in_backward.is_active:
            refuse_clipping(clipping)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients at the last step, before clipping.

        A float64 tensor of shape (), on the GPU if a native step ran there, else on the CPU. None
        before the first step, and unless ``max_grad_norm`` or ``skip_nonfinite`` is set.
        """
        norm = self._stepper.grad_norm
        if not isinstance(norm, float):
            return norm
        return torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were skipped, by ``skip_nonfinite`` or by a GradScaler."""
        return int(self.param_groups[0]["skipped_steps"])

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Evaluate with the averages: within the ``with`` block they replace the parameters.

        A parameter without an average (no step yet, or with ``"swa"`` no end of a cycle) stays as
        it is. Buffers of the model, such as BatchNorm's statistics, are not averaged: if the model
        has any, call :func:`torch.optim.swa_utils.update_bn` within the block.

        Raises:
            RuntimeError: :meth:`step` was called within the block.
        """
        if self._is_swapped:
            raise RuntimeError("swap_ema() was called within a swap_ema() block")
        with self._lock:
            _, state = self._on_host()
            self._is_swapped = True
        try:
            with ema.swapped_in(self.param_groups, state, self._lock):
                yield
        finally:
            self._is_swapped = False

    def ema_state_dict(self) -> dict[str, Tensor]:
        """The averages under their parameters' names, for ``load_state_dict()`` of a model.

        Returns:
            Copies, in float32 (or float64). If a parameter has no average, its own value.

        Raises:
            ValueError: The optimizer does not know the names, because it was not made with
                ``model.named_parameters()``.
        """
        groups, state = self._on_host()
        return ema.averages_by_name(groups, state)

    # ---------------------------------------------------------------------------------------
    # interop

    @classmethod
    def from_pair(
        cls,
        sgd: torch.optim.SGD,
        scheduler: CosineAnnealingWarmRestarts | SequentialLR,
        *,
        steps_per_epoch: int = 1,
        anneal: Anneal = "step",
        backend: Backend = "auto",
    ) -> FusedSGDR:
        """Continue a training of ``torch.optim.SGD`` and its scheduler, also within a cycle.

        The new optimizer has the pair's parameters, momentum buffers, options and place in the
        schedule. The buffers are the same tensors: from here on step only one of the two.

        Args:
            sgd: The optimizer.
            scheduler: Its scheduler, which may be a ``SequentialLR`` of ``LinearLR`` and that one.
            steps_per_epoch: Optimizer steps in one unit of the scheduler's ``T_0``: 1 if
                ``scheduler.step()`` was called at each optimizer step.
            anneal: ``"epoch"`` if it was called once an epoch.
            backend: As in the constructor.

        Returns:
            An optimizer whose next step is the one that the pair would take.

        Raises:
            TypeError: The two are not such a pair.
            ValueError: They are in a state that FusedSGDR cannot continue; the message says which.
        """
        groups, schedule = interop.arguments_of_pair(sgd, scheduler, steps_per_epoch)
        optimizer = cls(
            groups, **schedule, steps_per_epoch=steps_per_epoch, anneal=anneal, backend=backend
        )
        optimizer._continue_pair(sgd, scheduler)
        return optimizer

    def _continue_pair(
        self, sgd: torch.optim.SGD, scheduler: CosineAnnealingWarmRestarts | SequentialLR
    ) -> None:
        interop.continue_pair(self.param_groups, self.state, sgd, scheduler)
        self._begin()

    def to_pair(self) -> tuple[torch.optim.SGD, CosineAnnealingWarmRestarts]:
        """Continue the training with ``torch.optim.SGD`` and its scheduler, also within a cycle.

        Returns:
            The pair, on the same parameters and momentum buffers. Call ``scheduler.step()`` after
            each step, or after each epoch if ``anneal="epoch"``.

        Raises:
            ValueError: An option has no counterpart in the pair; the message says which.
        """
        return interop.to_pair(*self._on_host(), self._clipping)
