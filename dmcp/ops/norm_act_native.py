"""The ops of `dmcp.ops.norm_act` through ``dmcp._native``: C++ for CPU and for CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmcp.ops.layout import Placed, empty_like, place, place_like
from dmcp.ops.norm_act_eager import ACTIVATIONS, Activation, stats_dtype

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""What ``dmcp._native`` calls the dtypes of activations."""

_NO_RESIDUAL, _RESIDUAL_BEFORE, _RESIDUAL_AFTER = range(3)

_ADDING = ("norm_stats", "norm_act_sums")
"""The ops that add up over channels; on CUDA they want memory for the sums of the blocks."""

Launch = Callable[..., None]
"""From the name of an op, the placed x, and what ``dmcp._native`` takes behind x's description up
to where CPU and CUDA entries differ."""


class NativeKernels:
    """The four ops, as far as CPU and CUDA have them in common."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def norm_stats(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> tuple[Tensor, Tensor]:
        placed = place(x)
        mean = x.new_empty(x.shape[1], dtype=stats_dtype(x))
        var = torch.empty_like(mean)
        running = _dense(running_mean, running_var)
        results = (*_addresses((mean, var)), *_addresses(running))
        self._launch("norm_stats", placed, *_pitched(placed), *results, momentum)
        _write_back(running, running_mean, running_var)
        return mean, var

    def norm_act(
        self,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        eps: float,
        act: Activation,
        before: bool,
    ) -> Tensor:
        placed = place(x)
        y = empty_like(placed)
        vectors = _dense(mean, var, weight, bias, scale)
        added, kind = _added(residual, placed, before)
        tensors = (*_pitched(placed), *_pitched(added), *_pitched(y))
        affine = (*_addresses(vectors), eps, ACTIVATIONS.index(act))
        self._launch("norm_act", placed, *affine, kind, *tensors)
        return y.tensor

    def norm_act_sums(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        eps: float,
        act: Activation,
    ) -> tuple[Tensor, Tensor]:
        placed = place(x)
        incoming = place_like(grad, placed)
        vectors = _dense(mean, var, weight, bias, scale)
        added, _ = _added(residual, placed, True)
        grad_residual = None if residual is None else empty_like(placed)
        sums = mean.new_empty(3, x.shape[1])
        tensors = (*_pitched(incoming), *_pitched(placed), *_pitched(added))
        affine = (*_addresses(vectors), eps, ACTIVATIONS.index(act))
        outputs = (*_pitched(grad_residual), sums.data_ptr())
        self._launch("norm_act_sums", placed, *affine, *tensors, *outputs)
        return sums, x.new_empty(0) if grad_residual is None else grad_residual.tensor

    def norm_act_grad(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        sums: Tensor | None,
        count: float,
        eps: float,
        act: Activation,
    ) -> Tensor:
        placed = place(x)
        incoming = place_like(grad, placed)
        grad_x = empty_like(placed)
        vectors = _dense(mean, var, weight, bias, scale)
        (total,) = _dense(sums)
        tensors = (*_pitched(incoming), *_pitched(placed), *_pitched(grad_x))
        affine = (*_addresses(vectors), eps, ACTIVATIONS.index(act))
        self._launch("norm_act_grad", placed, *affine, *_addresses([total]), count, *tensors)
        return grad_x.tensor


class CpuKernels(NativeKernels):
    """For CPU tensors; the ops of training in one call each, because a call takes as long as the
    work on a small layer.

    Args:
        native: the module.
        isa: the kernels for this instruction set, one of ``native.cpu_isas()``.
    """

    def __init__(self, native: Any, isa: str) -> None:
        def launch(name: str, placed: Placed, *arguments: Any) -> None:
            getattr(native, f"{name}_cpu")(*described(placed), *arguments, isa)

        super().__init__(launch)

    def norm_act_train(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        act: Activation,
        before: bool,
    ) -> tuple[Tensor, Tensor]:
        placed = place(x)
        y = empty_like(placed)
        moments = x.new_empty((2, x.shape[1]), dtype=stats_dtype(x))
        running = _dense(running_mean, running_var)
        vectors = _dense(weight, bias, scale)
        added, kind = _added(residual, placed, before)
        statistics = (*_rows(moments), *_addresses(running), momentum)
        affine = (*_addresses(vectors), eps, ACTIVATIONS.index(act))
        tensors = (*_pitched(placed), *_pitched(added), *_pitched(y))
        self._launch("norm_act_train", placed, *statistics, *affine, kind, *tensors)
        _write_back(running, running_mean, running_var)
        return y.tensor, moments

    def norm_act_train_backward(
        self,
        grad: Tensor,
        x: Tensor,
        moments: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        eps: float,
        act: Activation,
        add_weight: Tensor | None = None,
        add_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        placed = place(x)
        incoming = place_like(grad, placed)
        grad_x = empty_like(placed)
        moments = moments.contiguous()
        vectors = _dense(weight, bias, scale)
        sums = moments.new_empty((3, x.shape[1]))
        affine = (*_rows(moments), *_addresses(vectors), eps, ACTIVATIONS.index(act))
        tensors = (*_pitched(incoming), *_pitched(placed), *_pitched(grad_x))
        targets = [_addable(target, sums) for target in (add_weight, add_bias)]
        added = (sums.data_ptr(), *_addresses(targets))
        self._launch("norm_act_train_backward", placed, *affine, *tensors, *added)
        for target, given in zip(targets, (add_weight, add_bias), strict=True):
            if given is not None and target is not None and target is not given:
                given[: x.shape[1]] += target
        return grad_x.tensor, sums


class CudaKernels(NativeKernels):
    """For CUDA tensors, on the current stream.

    Args:
        native: the module.
    """

    def __init__(self, native: Any) -> None:
        def launch(name: str, placed: Placed, *arguments: Any) -> None:
            x, shape = placed.tensor, described(placed)
            with torch.cuda.device(x.device):
                if name in _ADDING:
                    size = native.norm_workspace_cuda(*shape)
                    workspace = x.new_empty(size, dtype=torch.uint8)
                    arguments = (*arguments, workspace.data_ptr())
                stream = torch.cuda.current_stream().cuda_stream
                getattr(native, f"{name}_cuda")(*shape, *arguments, stream)

        super().__init__(launch)


def described(placed: Placed) -> tuple[int, int, int, bool, int]:
    """What every kernel is told first: batch, channels, pixels, layout and dtype."""
    x = placed.tensor
    batch, channels, *_ = x.shape
    pixels = x.numel() // max(batch * channels, 1)
    return batch, channels, pixels, placed.channels_last, DTYPES[x.dtype]


def _added(residual: Tensor | None, placed: Placed, before: bool) -> tuple[Placed | None, int]:
    if residual is None:
        return None, _NO_RESIDUAL
    return place_like(residual, placed), _RESIDUAL_BEFORE if before else _RESIDUAL_AFTER


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _rows(pair: Tensor) -> tuple[int, int]:
    """The addresses of the two rows of [2, C]."""
    first = pair.data_ptr()
    return first, first + pair.nbytes // 2


def _pitched(placed: Placed | None) -> tuple[int, int]:
    return (0, 0) if placed is None else (placed.tensor.data_ptr(), placed.pitch)


def _dense(*vectors: Tensor | None) -> list[Tensor | None]:
    """Without gaps; who takes their addresses has to keep them until the kernel has run."""
    return [vector if vector is None else vector.contiguous() for vector in vectors]


def _addable(target: Tensor | None, sums: Tensor) -> Tensor | None:
    """``target`` if a kernel may add to its first elements as they lie, else zeros to add to it."""
    if target is None or (target.is_contiguous() and target.dtype == sums.dtype):
        return target
    return sums.new_zeros(sums.shape[1])


def _write_back(updated: Sequence[Tensor | None], *given: Tensor | None) -> None:
    """Where `_dense` made a copy, what a kernel wrote to it."""
    for target, source in zip(given, updated, strict=True):
        if target is not source and target is not None and source is not None:
            target.copy_(source)
