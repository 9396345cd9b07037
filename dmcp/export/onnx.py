"""ONNX: the form that most runtimes read."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import ExportError, require
from dmcp.export.check import check
from dmcp.export.files import staged
from dmcp.export.program import Example, as_inputs, capture_batch, frozen

_PURPOSE = "exporting to ONNX"


def to_onnx(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write a network as ONNX, for batches of any size, after running it in ONNX Runtime.

    The opset is the one that this PyTorch writes by default.

    Args:
        model: the network; it is exported in evaluation mode and not changed.
        example: a batch of inputs, or several that the network takes in turn: the first dimension
            of each counts the images. The file is compared with the network on these.
        path: the file, which is replaced if it exists.

    Returns:
        The largest difference that was found, see `dmcp.export.check.check`.

    Raises:
        TraceError: the network cannot be captured, or works for one batch size only.
        ExportError: ONNX has no form of one of its operators, or the file gives something else
            than the network; nothing is written then.
        MissingDependencyError: onnx, onnxscript or onnxruntime is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "export", _PURPOSE)
    path, inputs, network = Path(path), as_inputs(example), frozen(model)
    program = capture_batch(network, inputs)
    with staged(path.parent) as stage:
        with _silent():
            try:
                exported = torch.onnx.export(program, dynamo=True, verbose=False)
                assert exported is not None
                exported.save(stage / path.name, external_data=False)
            except Exception as error:
                raise ExportError(f"ONNX has no form of this network: {_reason(error)}") from error
        return check("ONNX", network, OnnxNetwork(stage / path.name), inputs)


class OnnxNetwork:
    """An ONNX file in ONNX Runtime, on the CPU, with as many threads as PyTorch uses.

    Args:
        path: the file.

    Raises:
        ExportError: it is not an ONNX file, or ONNX Runtime cannot run it.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        runtime = require("onnxruntime", "export", "running ONNX files")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        # Threads that wait for work after a call would slow down whatever is measured beside it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot run {path}: {_reason(error)}") from error
        self.inputs = [each.name for each in self._session.get_inputs()]
        """Names of the inputs, in order."""

    def __call__(self, *inputs: Tensor) -> Any:
        """The output as a tensor, or a tuple of tensors where there are several."""
        arrays = [each.detach().numpy() for each in inputs]
        outputs = self._session.run(None, dict(zip(self.inputs, arrays, strict=True)))
        tensors = tuple(torch.from_numpy(each) for each in outputs)
        return tensors[0] if len(tensors) == 1 else tensors


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings and notes of the exporter, which are about its own parts."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _reason(error: Exception) -> str:
    """The first line of what an exporter or a runtime says is at the bottom of it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
