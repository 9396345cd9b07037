"""Channel units: which tensor axes share one width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from dmcp.errors import ConfigError
from dmcp.graph.tensors import known_as

FIXED = -1
"""Unit number of channels that belong to no unit (the model's inputs): they are always kept."""


@dataclass(frozen=True)
class Member:
    """One place in a module that a unit decides.

    Attributes:
        module: qualified name of the module.
        role: ``"out"`` if the module produces or scales the unit's channels (convolution and
            linear outputs, norms, depthwise convolution), ``"in"`` if it consumes them.
        channels: LongTensor [C // step] or [C // step, k]; row i holds the module's channels that
            carry the unit's channels i * step … (i + 1) * step - 1.
        tensors: (name, dimension) of the module's parameters and buffers that these index.
    """

    module: str
    role: Literal["out", "in"]
    channels: Tensor
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ChannelUnit:
    """A set of tensor axes that are tied together: one width decides them all.

    Attributes:
        name: qualified name of the first module, in execution order, that produces it, without
            what ``torch.compile`` puts into names.
        channels: full width, the number of channels this module produces for it.
        choices: ascending widths the unit may take, multiples of ``step``.
        searchable: whether its width may change.
        reason: why not, where it may not; otherwise empty.
        members: the module axes it decides.
        step: how many consecutive channels are kept or dropped together: more than one where
            grouped convolutions, shuffles, halves of a split or norm groups tie them.
    """

    name: str
    channels: int
    choices: tuple[int, ...]
    searchable: bool
    reason: str
    members: tuple[Member, ...] = field(repr=False)
    step: int = 1


@dataclass(frozen=True)
class AxisMap:
    """What each position of a tensor dimension carries.

    Attributes:
        unit: LongTensor [size], number of the unit in ``ChannelGraph.units``, or ``FIXED``.
        index: LongTensor [size], the number of the step inside its unit.
    """

    unit: Tensor
    index: Tensor

    def kept(self, kept: Mapping[int, Tensor]) -> Tensor:
        """Positions that stay, ascending: LongTensor.

        Args:
            kept: unit number -> BoolTensor [C // step] of the steps that stay; units left out
                stay whole.
        """
        stays = torch.ones_like(self.unit, dtype=torch.bool)
        for number, mine in self.units.items():
            if number in kept:
                stays[mine] = kept[number][self.index[mine]]
        return stays.nonzero().flatten()

    @cached_property
    def units(self) -> dict[int, Tensor]:
        """Number of each unit on the axis -> BoolTensor [size] of its positions."""
        numbers = self.unit.unique().tolist()
        return {number: self.unit == number for number in numbers if number != FIXED}

    def counts(self) -> tuple[int, dict[int, int]]:
        """``(constant, {unit: k})``: the axis has constant + sum of k * (width // step)
        channels."""
        fixed = int((self.unit == FIXED).sum())
        per_unit = {}
        for number, mine in self.units.items():
            index = self.index[mine]
            per_unit[number] = len(index) // len(index.unique())
        return fixed, per_unit


def check_widths(units: Sequence[ChannelUnit], widths: Mapping[str, int]) -> dict[str, int]:
    """Complete a mapping unit name -> width with the full widths, after checking it.

    Raises:
        ConfigError: an unknown unit, a width that is not a multiple of its step in 1..channels, or
            a changed width of an unsearchable unit.
    """
    known = {unit.name: unit for unit in units}
    widths = {known_as(name, known): width for name, width in widths.items()}
    for name, width in widths.items():
        if name not in known:
            raise ConfigError(f"widths: no unit is called {name!r}; units are {list(known)}")
        unit = known[name]
        if isinstance(width, bool) or not isinstance(width, Integral):
            raise ConfigError(f"widths[{name!r}] must be an int, got {width!r}")
        if not 1 <= width <= unit.channels:
            raise ConfigError(f"widths[{name!r}] must lie in 1..{unit.channels}, got {width}")
        if width != unit.channels and not unit.searchable:
            raise ConfigError(
                f"widths[{name!r}]: the unit keeps its {unit.channels} channels: {unit.reason}"
            )
        if width % unit.step:
            raise ConfigError(f"widths[{name!r}] must be a multiple of {unit.step}, got {width}")
    return {name: int(widths.get(name, unit.channels)) for name, unit in known.items()}
