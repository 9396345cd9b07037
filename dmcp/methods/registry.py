"""The methods by name, and which of them the ablations compare."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dmcp.errors import ConfigError
from dmcp.methods import amc, bn_gamma, metapruning, random_search
from dmcp.methods.amc import AMC
from dmcp.methods.autoslim import AutoSlim
from dmcp.methods.bernoulli import Bernoulli
from dmcp.methods.bn_gamma import BNGamma
from dmcp.methods.dmcp import DMCP
from dmcp.methods.fpgm import FPGM
from dmcp.methods.group_norm import GroupNorm
from dmcp.methods.l1 import L1
from dmcp.methods.metapruning import MetaPruning
from dmcp.methods.method import Method
from dmcp.methods.random_search import RandomSearch
from dmcp.methods.sfp import SFP
from dmcp.methods.uniform import Uniform

PRESETS = ("short", "paper")
"""Hyper-parameters for minutes on small data, and those that were published."""

_METHODS: Mapping[str, Mapping[str, Method]] = MappingProxyType(
    {
        "uniform": {"short": Uniform()},
        "dmcp": {"short": DMCP()},
        "dmcp-pretrained": {"short": DMCP(warm_up="pretrained")},
        "dmcp-sampled": {"short": DMCP(sampling="markov")},
        "dmcp-single-search": {"short": DMCP(single_search=True)},
        "bernoulli": {"short": Bernoulli()},
        "bernoulli-subsets": {"short": Bernoulli(subsets=True)},
        "autoslim": {"short": AutoSlim()},
        "metapruning": {"short": MetaPruning(), "paper": metapruning.PAPER},
        "amc": {"short": AMC(), "paper": amc.PAPER},
        "fpgm": {"short": FPGM()},
        "sfp": {"short": SFP()},
        "random": {"short": RandomSearch(), "paper": random_search.PAPER},
        "l1": {"short": L1()},
        "bn_gamma": {"short": BNGamma(), "paper": bn_gamma.PAPER},
        "group_norm": {"short": GroupNorm()},
    }
)

COMPARISONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "warm-up": ("dmcp", "dmcp-pretrained"),
        "gates": ("dmcp", "bernoulli", "bernoulli-subsets"),
        "sampling": ("dmcp", "dmcp-sampled"),
        "budgets": ("dmcp", "dmcp-single-search"),
    }
)
"""The ablations by name: what each compares."""


def names(*, variants: bool = False) -> tuple[str, ...]:
    """The methods of the tables; with ``variants`` also DMCP's ablations: all that `get` takes."""
    return tuple(name for name in _METHODS if variants or not name.startswith("dmcp-"))


def get(name: str, preset: str = "short") -> Method:
    """A method by name.

    Args:
        name: one of ``names(variants=True)``.
        preset: one of `PRESETS`; the same where a method has nothing of its own to set.

    Raises:
        ConfigError: there is no such method or preset.
    """
    if name not in _METHODS:
        raise ConfigError(f"unknown method {name!r}: the methods are {', '.join(_METHODS)}")
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    presets = _METHODS[name]
    return presets.get(preset, presets["short"])


def comparison(name: str) -> tuple[str, ...]:
    """The methods of a named comparison, one of `COMPARISONS`.

    Raises:
        ConfigError: there is none.
    """
    if name not in COMPARISONS:
        raise ConfigError(
            f"unknown comparison {name!r}: the comparisons are {', '.join(COMPARISONS)}"
        )
    return COMPARISONS[name]
