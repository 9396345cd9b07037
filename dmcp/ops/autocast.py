"""What ``torch.autocast`` asks of the ops that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """``x`` as autocast gives it to convolutions and linear layers; itself outside of it."""
    if not x.is_floating_point() or x.dtype == torch.float64 or not in_autocast(x):
        return x
    dtype = torch.get_autocast_dtype(x.device.type)
    return x if x.dtype == dtype else x.to(dtype)


def in_autocast(x: Tensor) -> bool:
    """Whether it is on for the device of ``x``."""
    if x.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
