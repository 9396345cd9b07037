"""What the modules of a pass ask of tensors, hundreds of times in each."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as its attribute says, which a module takes microseconds to find."""
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            return tensors[name]
    found: Tensor | None = getattr(module, name)
    return found


def as_autocast(x: Tensor) -> tuple[Tensor, torch.dtype]:
    """``x`` as ``torch.autocast`` gives it to convolutions and linear layers, and the dtype that
    the parameters have which go with it in our kernels."""
    device = "cpu" if x.is_cpu else x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x, x.dtype
    dtype = torch.get_autocast_dtype(device)
    return x if x.dtype == dtype else x.to(dtype), torch.float32
