"""Training in half precision: what runs in it, and how gradients survive it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dmcp.errors import CheckpointError, ConfigError

Precision = Literal["float32", "bfloat16", "float16"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def check_precision(precision: str) -> None:
    """Raises ConfigError unless it is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {PRECISIONS}, got {precision!r}")


class MixedPrecision:
    """Activations in ``precision``, parameters and their gradients in float32.

    Gradients of float16 activations may be too small for float16, so the loss is scaled up, as far
    as no gradient overflows; a step with one that did is left out.

    Args:
        precision: ``"float32"`` leaves everything as it is, also the caller's own autocast.
        device: where the network is.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.precision = precision
        self._device = device.type
        self._dtype: torch.dtype = getattr(torch, precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of forward passes and losses."""
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device, self._dtype)

    def backward(self, loss: Tensor, *, retain_graph: bool = False) -> None:
        """The gradients of the loss, scaled."""
        self._scaler.scale(loss).backward(retain_graph=retain_graph)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update parameters by their scaled gradients."""
        if self._scaler.is_enabled():
            _begin_momentum(optimizer)
        self._scaler.step(optimizer)

    def update(self) -> None:
        """Once after the updates of an iteration: adapt the scale."""
        self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {"precision": self.precision, **self._scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: it is of another precision.
        """
        if state["precision"] != self.precision:
            raise CheckpointError(
                f"the checkpoint's precision is {state['precision']}, the run's is {self.precision}"
            )
        scaler = {key: value for key, value in state.items() if key != "precision"}
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(scaler)


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """A fused SGD whose first step is left out keeps memory that nobody wrote as its momentum, and
    adds it to the weights in the second one. From zeros, the first step is what it would be
    (without dampening, which the first step leaves out)."""
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"] or group["dampening"]:
            continue
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter.grad)
