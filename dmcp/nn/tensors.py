"""How modules get at their tensors, hundreds of times in a pass."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as its attribute says, which a module takes microseconds to find."""
    if not _has(type(module), name):  # type: ignore[arg-type]
        for tensors in (module._parameters, module._buffers):
            if name in tensors:
                return tensors[name]
    found: Tensor | None = getattr(module, name)
    return found


@lru_cache(maxsize=256)
def _has(kind: type, name: str) -> bool:
    """Whether the class has such an attribute, as parametrisations do: it comes first."""
    return hasattr(kind, name)
