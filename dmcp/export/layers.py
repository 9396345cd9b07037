"""The constructor calls that layers of ``torch.nn`` are built by."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dmcp.export.expression import literal


@dataclass(frozen=True)
class Value:
    """An argument of a constructor.

    Attributes:
        name: of the argument.
        value: plain data.
        usual: whether the constructor takes this value if it is left out.
        positional: whether it stands by its place.
    """

    name: str
    value: Any
    usual: bool = False
    positional: bool = False


@dataclass(frozen=True)
class Layer:
    """``nn.Conv2d(24, 40, 3, stride=2)``: a layer of ``torch.nn`` by its arguments."""

    function: str
    values: tuple[Value, ...]


def layer_of(module: nn.Module) -> Layer | None:
    """How to build a layer of ``torch.nn`` again, None if that would be another one.

    A layer that was patched, hooked or parametrised is none of ``torch.nn``.
    """
    kind = type(module)
    if getattr(nn, kind.__name__, None) is not kind or module._modules or "forward" in vars(module):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    arguments = _arguments(module)
    if arguments is None or not _builds(module, arguments):
        return None
    values = []
    for parameter in _parameters(kind):
        name = parameter.name
        if name not in arguments:
            continue
        value = arguments[name]
        if isinstance(value, tuple) and len(set(value)) == 1:  # (3, 3), written as 3
            single = {**arguments, name: value[0]}
            if _builds(module, single):
                arguments, value = single, value[0]
        rest = {key: each for key, each in arguments.items() if key != name}
        required = parameter.default is parameter.empty
        usual = not required and _builds(module, rest)
        values.append(Value(name, value, usual, positional=required))
    if not _builds(module, {each.name: each.value for each in values if not each.usual}):
        values = [replace(each, usual=False) for each in values]
    return Layer(f"nn.{kind.__name__}", tuple(values))


def _parameters(kind: type[nn.Module]) -> list[inspect.Parameter]:
    parameters = inspect.signature(kind).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each
        for each in parameters
        if each.kind not in kinds and each.name not in ("device", "dtype")
    ]


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """The constructor's arguments, which layers keep under the same names."""
    arguments = {}
    for parameter in _parameters(type(module)):
        name = parameter.name
        value = getattr(module, name, parameter.default)
        if isinstance(value, nn.Parameter) or (value is None and name == "bias"):
            value = value is not None
        if isinstance(value, list):
            value = tuple(value)
        try:
            literal(value)
        except ValueError:
            return None
        if value != parameter.default or hasattr(module, name):
            arguments[name] = value
    return arguments


def _builds(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the constructor gives the same layer, but for its weights."""
    try:
        with torch.device("meta"):
            built = type(module)(**arguments)
    except Exception:  # which it may answer in any way
        return False
    return _settings(built) == _settings(module)


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = {name: each for name, each in vars(module).items() if name[0] != "_"}
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
    shapes = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    return {**plain, "training": None, "state": shapes}
