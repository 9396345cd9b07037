"""``torch.export``: the captured program itself, for PyTorch without the network's code."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError, ExportError
from dmcp.export.check import check
from dmcp.export.files import staged
from dmcp.export.program import Example, as_inputs, capture_batch, frozen


def to_torch(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write a network as a program of ``torch.export``, for batches of any size.

    ``torch.export.load(path).module()`` gives it back. That function unpickles parts of a file and
    evaluates others, so a file made with ill intent can run code in it: use it on your own files.

    Args:
        model: the network; it is exported in evaluation mode and not changed.
        example: a batch of inputs, or several that the network takes in turn: the first dimension
            of each counts the images. The file is compared with the network on these, and does not
            hold them.
        path: the file, ``network.pt2``, which is replaced if it exists.

    Returns:
        The largest difference that was found, see `dmcp.export.check.check`.

    Raises:
        ConfigError: the file is not named ``….pt2``.
        TraceError: the network cannot be captured, or works for one batch size only.
        ExportError: the file cannot be written or gives something else than the network; nothing
            is written then.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ConfigError(f"path must be that of a .pt2 file, got {str(path)!r}")
    inputs, network = as_inputs(example), frozen(model)
    program = capture_batch(network, inputs)
    program.example_inputs = (tuple(torch.zeros_like(each) for each in inputs), {})
    with staged(path.parent) as stage:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it counts layouts that have no holes as such
                torch.export.save(program, stage / path.name)
        except Exception as error:
            raise ExportError(f"torch.export cannot save this network: {error}") from error
        return check("torch.export", network, TorchNetwork(stage / path.name), inputs)


class TorchNetwork:
    """A file of `to_torch` as PyTorch runs it.

    Args:
        path: a file of your own, see `to_torch`.

    Raises:
        ExportError: PyTorch cannot load it.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._module = torch.export.load(path).module()
        except Exception as error:
            raise ExportError(f"torch.export cannot load {path}: {error}") from error

    def __call__(self, *inputs: Tensor) -> object:
        return self._module(*inputs)
