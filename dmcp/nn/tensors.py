"""How modules get at their tensors, hundreds of times in a pass."""

from __future__ import annotations

from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as its attribute says, which a module takes microseconds to find."""
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    found: Tensor | None = getattr(module, name)
    return found
