"""The networks of the paper, as plain ``torch.nn`` code, and any network by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from dmcp.errors import ConfigError
from dmcp.models.load import FORMS, from_elsewhere, is_file, resolve
from dmcp.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from dmcp.models.resnet import ResNet, resnet18, resnet50

__all__ = [
    "MobileNetV2",
    "ResNet",
    "build",
    "is_file",
    "mobilenet_v2",
    "names",
    "reinitialise",
    "resnet18",
    "resnet50",
    "resolve",
]

_MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"mobilenet_v2": mobilenet_v2, "resnet18": resnet18, "resnet50": resnet50}
)


def names() -> tuple[str, ...]:
    """The names of the networks in this package, sorted."""
    return tuple(sorted(_MODELS))


def build(name: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """Build a model by name with fresh weights.

    Args:
        name: one of `names()`, or of a network from elsewhere, see
            `dmcp.models.load.from_elsewhere`.
        num_classes: number of logits.
        **options: further arguments of the function of that name in this package.

    Raises:
        ConfigError: there is no such model, it refuses an argument's value, or its code fails.
        MissingDependencyError: the package it comes from is not installed.
    """
    if name in _MODELS:
        return _MODELS[name](num_classes=num_classes, **options)
    model = from_elsewhere(name, num_classes)
    if model is None:
        raise ConfigError(f"unknown model {name!r}: the models are {', '.join(names())}, {FORMS}")
    if options:
        raise ConfigError(f"model {name!r} takes no {', '.join(options)}: {', '.join(names())} do")
    return model


def reinitialise(model: nn.Module) -> None:
    """Draw fresh weights for the widths a network has now: also after pruning.

    A network with a method ``initialise()`` draws its own. In any other, every module with a
    method ``reset_parameters()``, as PyTorch's layers have, is reset by it, inner modules first;
    parameters of modules without one (a layer scale, a class token) keep their values, so hand in
    a network that was newly built. An initialisation that the network's constructor did on top of
    its layers' own is not repeated.
    """
    if callable(own := getattr(model, "initialise", None)):
        own()
        return
    model.apply(_reset)


def _reset(module: nn.Module) -> None:
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
