"""What ``torch.autocast`` asks of the ops that it does not know."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """``x`` as autocast gives it to convolutions and linear layers; itself outside of it."""
    if x.dtype == torch.float64 or not in_autocast(x):
        return x
    dtype = torch.get_autocast_dtype(x.device.type)
    return x if x.dtype == dtype else x.to(dtype)


def in_autocast(x: Tensor) -> bool:
    """Whether it is on for the device of ``x``."""
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
