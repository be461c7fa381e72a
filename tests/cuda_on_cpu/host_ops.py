"""Torch's operations on the fake GPU's tensors, for scripts that run whole trainings.

Of torch's kernels the fake runtime has fill and copy only. Here every other operation runs on the
CPU, on copies of its tensors, and makes no call of the runtime. What copies between host and GPU,
or reads an element, remains torch's own CUDA code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import runtime_log
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_OF_CUDA = {
    _aten._local_scalar_dense,
    _aten._to_copy,
    _aten.copy_,
    _aten.detach,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
    _aten.fill_,
    _aten.zero_,
    _aten.clone,
    _aten.lift_fresh,
    _aten.record_stream,
    _aten.resize_,
    _aten.set_,
    _aten._pin_memory,
    _aten.is_pinned,
}
# They read from the GPU to know the size of their result, or whether two tensors are equal.
_WAITING = {_aten.equal, _aten.nonzero, _aten.masked_select, _aten.unique_dim, _aten._unique2}


class HostOps(TorchDispatchMode):
    """Within it, operations without a kernel run on the CPU."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        values = tree_leaves([args, kwargs])
        if (
            not any(map(_is_on_gpu, values))
            or name in _OF_CUDA
            or func.is_view
            or func.namespace != "aten"
        ):
            return func(*args, **kwargs)
        if name in _WAITING:
            raise NotImplementedError(f"{func} on the GPU would wait for it")
        for i, value in enumerate(values):
            if isinstance(value, Tensor) and not value.is_cuda:
                # As on a GPU, where a number may be in the memory of the CPU.
                if value.dim() > 0 or (i == 0 and func._schema.is_mutable):
                    raise RuntimeError(f"{func} of tensors on the CPU and on the GPU")
        copies: dict[int, tuple[Tensor, Tensor]] = {}

        def to_host(value: Any) -> Any:
            if not _is_on_gpu(value):
                return value
            if isinstance(value, torch.device):
                return torch.device("cpu")
            if id(value) not in copies:
                copies[id(value)] = value, _read(value)
            return copies[id(value)][1]

        results = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
        if func._schema.is_mutable:
            for on_gpu, copy in copies.values():
                _write(on_gpu, copy)
        original_of = {id(copy): on_gpu for on_gpu, copy in copies.values()}

        def to_gpu(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in original_of:
                return original_of[id(value)]
            size, stride = value.shape, value.stride()
            result = torch.empty_strided(size, stride, dtype=value.dtype, device="cuda")
            _write(result, value)
            return result

        return tree_map(to_gpu, results)


def _is_on_gpu(value: Any) -> bool:
    return (
        value.device.type == "cuda"
        if isinstance(value, Tensor)
        else (isinstance(value, torch.device) and value.type == "cuda")
    )


def _bytes_of(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _read(on_gpu: Tensor) -> Tensor:
    copy = torch.empty_strided(on_gpu.shape, on_gpu.stride(), dtype=on_gpu.dtype, device="cpu")
    runtime_log.move(copy.data_ptr(), on_gpu.data_ptr(), _bytes_of(on_gpu))
    return copy


def _write(on_gpu: Tensor, copy: Tensor) -> None:
    assert copy.stride() == on_gpu.stride()
    runtime_log.move(on_gpu.data_ptr(), copy.data_ptr(), _bytes_of(on_gpu))
