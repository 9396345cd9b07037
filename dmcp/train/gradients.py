"""The gradients of many parameters in one tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmcp.train.distributed import World, average_gradients


class GradientBuffer:
    """One tensor per dtype that holds the gradients of parameters, whose ``.grad`` are its parts.

    What is added to ``.grad`` in place, by autograd or by `dmcp.nn` modules that accumulate, lands
    in it; zeroing and averaging over processes take one operation each.

    Args:
        parameters: those that every step gives a gradient; those that do not want one stay without.
        others: parameters whose gradients stay their own, and None in a step that gives them none,
            so that an optimiser leaves them as they are.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter] = ()
    ) -> None:
        parameters = list(parameters)
        inside = {id(parameter) for parameter in parameters}
        self._others = [parameter for parameter in others if id(parameter) not in inside]
        self._parts: list[tuple[nn.Parameter, Tensor]] = []
        self.flat: list[Tensor] = []
        by_dtype: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            if not parameter.requires_grad:
                self._others.append(parameter)
            else:
                by_dtype.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for (dtype, device), group in by_dtype.items():
            flat = torch.zeros(sum(p.numel() for p in group), dtype=dtype, device=device)
            self.flat.append(flat)
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                self._parts.append((parameter, _strided_like(part, parameter)))

    def zero(self) -> None:
        """Start a new step: every gradient is a part of the buffer, and zero."""
        for number, (parameter, part) in enumerate(self._parts):
            if part.stride() != parameter.stride():  # its memory format was changed
                part = _strided_like(part, parameter)
                self._parts[number] = parameter, part
            parameter.grad = part if parameter.requires_grad else None
        for parameter in self._others:
            parameter.grad = None
        for flat in self.flat:
            flat.zero_()

    def average(self, world: World) -> None:
        """Replace the gradients by their means over the processes."""
        if world.size == 1:
            return
        for flat in self.flat:
            dist.all_reduce(flat)
            flat /= world.size
        average_gradients(self._others, world)


def _strided_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The elements of a part in the order in which the parameter's lie: the fused optimisers of the
    CPU walk over memory, whatever the strides."""
    dense = torch.empty_like(parameter, device="meta")
    return part.as_strided(parameter.shape, dense.stride(), part.storage_offset())
