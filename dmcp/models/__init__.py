"""The networks of the paper, as plain ``torch.nn`` code, and a registry of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from dmcp.errors import ConfigError
from dmcp.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from dmcp.models.resnet import ResNet, resnet18, resnet50

__all__ = [
    "MobileNetV2",
    "ResNet",
    "build",
    "mobilenet_v2",
    "names",
    "resnet18",
    "resnet50",
]

_MODELS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"mobilenet_v2": mobilenet_v2, "resnet18": resnet18, "resnet50": resnet50}
)


def names() -> tuple[str, ...]:
    """The names that `build` accepts, sorted."""
    return tuple(sorted(_MODELS))


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a model by name with fresh weights.

    Args:
        name: one of `names()`.
        **kwargs: the arguments of the function of that name in this package.

    Raises:
        ConfigError: there is no such model, or it refuses an argument's value.
    """
    if name not in _MODELS:
        raise ConfigError(f"unknown model {name!r}: the models are {', '.join(names())}")
    return _MODELS[name](**kwargs)
