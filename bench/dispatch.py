"""What a piece of code asks of PyTorch: calls of operators, and waits of the host for the device.

with Calls() as calls:
    search.step(images, labels)
calls.total, calls.host_reads
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset(
    f"aten::{name}"
    for name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
)
"""Operators whose answer, or the size of it, the host waits for."""
_COPIES = frozenset(("aten::_to_copy", "aten::copy_"))


class Calls(TorchDispatchMode):
    """Counts the operators that are called while it is entered, forward and backward.

    What is counted is what gets through the dispatcher to a device's kernel, views included:
    composite operators count as the ones they are made of, what a kernel calls inside itself does
    not count, nor do the kernels of a compiled graph, but the operators it calls do.

    Attributes:
        names: ``"aten::convolution"`` -> number of calls.
        host_reads: those after which the host waits for numbers: scalars (``item``, ``bool``),
            results whose size depends on numbers, copies from a device to the host. A copy does
            not show where the device is the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.names.total()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that compiled code runs as such."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.names[name] += 1
        if name in _READS or (name in _COPIES and _leaves_device(args, result)):
            self.host_reads[name] += 1
        return result


def _leaves_device(args: tuple[Any, ...], result: Any) -> bool:
    """Whether a copy brings numbers to the host: ``_to_copy(source)``, ``copy_(target, source)``"""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return tensors[-1].device.type != "cpu" and result.device.type == "cpu"
