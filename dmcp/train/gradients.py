"""The gradients of many parameters in one tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmcp.train.distributed import World


class GradientBuffer:
    """One tensor per dtype that holds the gradients of parameters, whose ``.grad`` are its parts.

    What is added to ``.grad`` in place, by autograd or by `dmcp.nn` modules that accumulate, lands
    in it; zeroing and averaging over processes take one operation each.

    Args:
        parameters: those that want a gradient; the others stay without.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        self.flat: list[Tensor] = []
        by_dtype: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                by_dtype.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), group in by_dtype.items():
            flat = torch.zeros(sum(p.numel() for p in group), dtype=dtype, device=device)
            self.flat.append(flat)
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                self._parts.append((parameter, _strided_like(part, parameter)))

    def zero(self) -> None:
        """Start a new step: every gradient is a part of the buffer, and zero."""
        for parameter, part in self._parts:
            parameter.grad = part
        for flat in self.flat:
            flat.zero_()

    def average(self, world: World) -> None:
        """Replace the gradients by their means over the processes."""
        if world.size == 1:
            return
        for flat in self.flat:
            dist.all_reduce(flat)
            flat /= world.size


def _strided_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The elements of a part in the order in which the parameter's lie, as optimisers like them."""
    dense = torch.empty_like(parameter, device="meta")
    return part.as_strided(parameter.shape, dense.stride(), part.storage_offset())
