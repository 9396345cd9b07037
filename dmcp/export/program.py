"""What every export begins with: a copy of the network, and its program for any batch size."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dmcp.errors import ConfigError, ExportError, TraceError
from dmcp.graph.capture import capture

Example = Tensor | Sequence[Tensor]
"""A batch of inputs: the first dimension of every tensor counts the images."""


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The inputs of a network on the CPU, at least two images of each.

    Raises:
        ConfigError: the example is no batch.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    for each in inputs:
        if not isinstance(each, Tensor) or not each.ndim or not len(each):
            found = list(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise ConfigError(f"example must hold tensors with a batch dimension, got {found}")
    sizes = {len(each) for each in inputs}
    if len(sizes) != 1:
        raise ConfigError(
            f"example must hold tensors of one batch size, got {sorted(sizes) or 'none'}"
        )
    # torch.export takes a size of 1 for a constant.
    repeats = 2 if sizes == {1} else 1
    return tuple(torch.cat([each.detach().cpu()] * repeats) for each in inputs)


def frozen(model: nn.Module) -> nn.Module:
    """A copy of a network on the CPU, in evaluation mode.

    Raises:
        ExportError: it cannot be copied, as where it keeps what a forward has computed.
    """
    try:
        return copy.deepcopy(model).cpu().eval()
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        raise ExportError(f"{type(model).__name__} cannot be copied: {reason}") from error


def capture_batch(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Every operator of a network in evaluation mode, for batches of any size.

    Raises:
        TraceError: the network cannot be captured, or works for one batch size only.
    """
    batch = Dim("batch")
    shapes = tuple({0: batch} for _ in inputs)
    try:
        return capture(model, inputs, {}, training=False, dynamic_shapes=shapes)
    except TraceError as error:
        if "Constraints violated (batch)" not in str(error):
            raise
        raise TraceError(
            f"{type(model).__name__} works for batches of {len(inputs[0])} only, as in the example"
        ) from error
