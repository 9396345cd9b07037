"""The namespace ``torch.ops.dmcp`` and how an op joins it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dmcp.backends import native_nodes

LIBRARY = torch.library.Library("dmcp", "DEF")

Kernel = Callable[..., Any]

_CPU_KERNELS: dict[str, Kernel] = {}
_original = True
"""Whether all of these are in use: none is `replaced`."""

_NODES = native_nodes()


def register(
    schema: str,
    *,
    eager: Kernel,
    fake: Kernel,
    cpu: Kernel | None = None,
    cuda: Kernel | None = None,
) -> None:
    """Defines one op and its kernels; the dispatcher then picks by the device of the tensors.

    Autograd belongs in an ``autograd.Function`` around the op: a call costs a third of what
    ``torch.library.custom_op`` costs.

    Args:
        schema: the op's signature, e.g. ``"retain(Tensor alpha, Tensor offsets) -> Tensor"``.
        eager: plain PyTorch, for every device without a kernel of its own.
        fake: the shapes and dtypes of the outputs, for ``torch.compile``.
        cpu: the kernel of CPU tensors, if it is there.
        cuda: the kernel of CUDA tensors, if it is there.
    """
    name = schema[: schema.index("(")]
    if cpu is not None:
        _CPU_KERNELS[name] = cpu
    LIBRARY.define(schema)
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    for key, kernel in (("CPU", cpu), ("CUDA", cuda)):
        if kernel is not None:
            LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"dmcp::{name}", fake, lib=LIBRARY)


@contextmanager
def replaced(kernels: Mapping[str, Kernel], key: str) -> Iterator[None]:
    """While the context is open, other kernels compute some ops, by their names, on the tensors of
    a dispatch key, ``"CPU"`` or ``"CUDA"``."""
    global _original
    hidden = {n: _CPU_KERNELS.pop(n) for n in kernels if key == "CPU" and n in _CPU_KERNELS}
    before, _original = _original, _original and not hidden
    try:
        with torch.library._scoped_library("dmcp", "IMPL") as library:
            for name, kernel in kernels.items():
                library.impl(name, kernel, key)
            yield
    finally:
        _CPU_KERNELS.update(hidden)
        _original = before


def op(name: str, x: Tensor) -> Kernel:
    """What to call for an op of this namespace inside of an ``autograd.Function``.

    That is the op, but for plain CPU tensors that nobody watches its kernel itself: on a small
    layer the way through the dispatcher and back to Python takes a third of the time.
    """
    kernel = _CPU_KERNELS.get(name)
    if kernel is None or not _is_plain(x):
        return getattr(torch.ops.dmcp, name).default
    return kernel


def has_node(x: Tensor) -> bool:
    """Whether to ask the C++ node of an op, ``torch.ops.dmcp.<op>_node``, first. It gives None for
    arguments that it does not take."""
    return _NODES and _original and _is_plain(x)


def _is_plain(x: Tensor) -> bool:
    """Whether it is a tensor on the CPU that nobody watches."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )
