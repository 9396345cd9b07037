"""The namespace ``torch.ops.dmcp`` and how an op joins it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("dmcp", "DEF")

Kernel = Callable[..., Any]


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
    LIBRARY.define(schema)
    LIBRARY.impl(name, eager, "CompositeExplicitAutograd")
    for key, kernel in (("CPU", cpu), ("CUDA", cuda)):
        if kernel is not None:
            LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"dmcp::{name}", fake, lib=LIBRARY)
