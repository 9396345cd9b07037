"""Reading tensors back from the device without stopping it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on its way to the host.

    The device makes it when it gets there; the host goes on until it asks for the numbers, and
    waits only for what the device had to do before the copy.

    Args:
        tensor: on any device; may change afterwards.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._done: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._copy = tensor.to("cpu", copy=True)
            return
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        self._copy.copy_(tensor, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The copy, in the memory of the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


class Snapshot:
    """The chains of a moment, on their way to the host.

    Args:
        choices: searchable unit -> its widths, ascending.
        retain: q of all groups but the bases, concatenated in the order of ``choices``: [T].
    """

    def __init__(self, choices: Mapping[str, tuple[int, ...]], retain: Tensor) -> None:
        self.choices = choices
        self._copy = HostCopy(retain)

    def retain(self) -> dict[str, list[float]]:
        """Searchable unit -> retain probability of every group but the base."""
        parts = self._copy.wait().split([len(grid) - 1 for grid in self.choices.values()])
        return {unit: part.tolist() for unit, part in zip(self.choices, parts, strict=True)}
