"""Plain Python: a file that builds the network from ``torch.nn``, and its weights beside it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from torch import nn

from dmcp.errors import ConfigError, ExportError, require
from dmcp.export.check import check
from dmcp.export.files import staged
from dmcp.export.program import Example, as_inputs, capture_batch, frozen
from dmcp.export.source import source_of

_HEADER = '''"""{title}, exported by dmcp {version}: {parameters:,} parameters.

Takes {shapes}, for any N.

It needs torch and safetensors only; `load` reads the weights beside this file. In
training mode, layers of torch.nn that are called as modules do what they always do, and
the code between them what it did in evaluation mode, where it was recorded.
"""'''
_LOAD = '''

def load(weights: str | Path = WEIGHTS) -> {title}:
    """The network with its weights, in evaluation mode on the CPU."""
    network = {title}()
    network.load_state_dict(load_file(weights){assign})
    return network.eval()'''


def to_python(model: nn.Module, example: Example, path: str | Path) -> float:
    """Write a network as a Python file of plain PyTorch, with its weights beside it.

    Modules keep their names, so that the state dict is that of the network; those that differ in
    plain values only share a class. Layers of ``torch.nn`` are built and called as such, the code
    between them is that of the captured operators.

    Args:
        model: the network; it is exported in evaluation mode and not changed.
        example: a batch of inputs, or several that the network takes in turn: the first dimension
            of each counts the images. The file is compared with the network on these.
        path: the file, ``network.py``, which is replaced if it exists, as the weights
            ``network.safetensors`` are.

    Returns:
        The largest difference that was found, see `dmcp.export.check.check`.

    Raises:
        ConfigError: the file is not named ``….py``.
        TraceError: the network cannot be captured, or works for one batch size only.
        ExportError: something in it has no form in Python (the message names it and its place), or
            the file gives something else than the network; nothing is written then.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", "export", "exporting to Python")
    path = Path(path)
    if path.suffix != ".py":
        raise ConfigError(f"path must be that of a Python file, got {str(path)!r}")
    inputs, network = as_inputs(example), frozen(model)
    source = source_of(network, capture_batch(network, inputs))
    shapes = ", ".join(f"[N, {', '.join(map(str, each.shape[1:]))}]" for each in inputs)
    header = _HEADER.format(
        title=source.title,
        version=version("dmcp"),
        parameters=sum(each.numel() for each in network.parameters()),
        shapes=shapes,
    )
    # Tensors that are assigned keep their types; those that are copied into keep their ties.
    load = _LOAD.format(title=source.title, assign="" if source.tied else ", assign=True")
    state = {name: each.detach().contiguous().clone() for name, each in source.state.items()}
    with staged(path.parent) as stage:
        file = stage / path.name
        file.write_text(_file(header, source.classes, load), encoding="utf-8")
        file.with_suffix(".safetensors").write_bytes(safetensors.save(state))
        return check("Python", network, load_python(file), inputs)


def load_python(path: str | Path) -> nn.Module:
    """Run a file that `to_python` wrote, and load its weights.

    This runs the code of the file, as importing it would.

    Raises:
        ExportError: it cannot be run.
    """
    path = Path(path)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        # As an import compiles it: without the ``__future__`` of this file here.
        code = compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
        exec(code, vars(module))
        network: nn.Module = module.load()
    except Exception as error:
        raise ExportError(f"{path.name} cannot be run: {type(error).__name__}: {error}") from error
    return network


def _file(header: str, classes: list[str], load: str) -> str:
    body = "\n".join(classes) + "\n" + load
    imports = ["from pathlib import Path", ""]
    if re.search(r"\btorch\.", body):
        imports.append("import torch")
    if re.search(r"\bF\.", body):
        imports.append("import torch.nn.functional as F")
    imports.append("from safetensors.torch import load_file")
    imports.append("from torch import Tensor, nn" if "Tensor" in body else "from torch import nn")
    weights = 'WEIGHTS = Path(__file__).with_suffix(".safetensors")'
    return "\n".join([header, "", *imports, "", weights, body, ""])
