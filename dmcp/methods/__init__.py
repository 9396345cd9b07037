"""Pruning methods, one file each: from a network, images and budgets to structures."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dmcp.errors import ConfigError
from dmcp.methods.dmcp import DMCP
from dmcp.methods.lab import Lab, Spent
from dmcp.methods.method import Method, Pruned
from dmcp.methods.uniform import Uniform, uniform_widths

__all__ = [
    "DMCP",
    "Lab",
    "Method",
    "Pruned",
    "Spent",
    "Uniform",
    "get",
    "names",
    "uniform_widths",
]

_METHODS: Mapping[str, Method] = MappingProxyType({"uniform": Uniform(), "dmcp": DMCP()})


def names() -> tuple[str, ...]:
    """The names that `get` accepts."""
    return tuple(_METHODS)


def get(name: str) -> Method:
    """A method by name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _METHODS:
        raise ConfigError(f"unknown method {name!r}: the methods are {', '.join(names())}")
    return _METHODS[name]
