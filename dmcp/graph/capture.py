"""Turning a model into a program of ATen operators."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dmcp.errors import TraceError


def capture(
    model: nn.Module,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    *,
    training: bool,
    dynamic_shapes: Any = None,
) -> torch.export.ExportedProgram:
    """Every operator the model runs on these inputs, by ``torch.export``, which is told the sizes
    that may change (``dynamic_shapes``).

    Raises:
        TraceError: its control flow depends on values, or something in it cannot be followed; the
            message holds the line of code.
    """
    try:
        with in_mode(model, training=training), warnings.catch_warnings():
            # Recurrent layers hold their parameters in a list too; what else a model keeps goes.
            warnings.filterwarnings("ignore", message="The tensor attribute")
            return torch.export.export(
                model, inputs, dict(keywords), dynamic_shapes=dynamic_shapes, strict=False
            )
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be captured by torch.export: {_explain(error)}"
        ) from error


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in training or evaluation mode while the context is open; whatever a forward
    pass leaves on a module is gone behind it."""
    before = {module: dict(vars(module)) for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


def _explain(error: Exception) -> str:
    """The first line of an error, and the line of the model's code that raised it."""
    text = str(error).strip()
    first = next(iter(text.splitlines()), type(error).__name__)
    place = re.search(r'raised this error:\s+File "(.+)", line (\d+).*\n\s*(.*)', text)
    if place is not None:
        return f"{first} At {place[1]}:{place[2]}: {place[3].strip()}"
    caused = re.search(r"Caused by: \((?!_export)(.+:\d+) in \w+\)", text)
    return f"{first} At {caused[1]}" if caused is not None else first
