"""Channel units: which tensor axes share one width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dmcp.errors import ConfigError

FIXED = -1
"""Unit number of channels that belong to no unit (the model's inputs): they are always kept."""


@dataclass(frozen=True)
class Member:
    """One module axis that a unit decides.

    Attributes:
        module: qualified name of the module.
        role: ``"out"`` if the module produces or scales the unit's channels (convolution and
            linear outputs, batch norm, depthwise convolution), ``"in"`` if it consumes them.
        channels: LongTensor [C] or [C, k]; row i holds the module's channels that carry
            channel i of the unit (k > 1 after a flatten, say).
    """

    module: str
    role: Literal["out", "in"]
    channels: Tensor


@dataclass(frozen=True)
class ChannelUnit:
    """A set of tensor axes that are tied together: one width decides them all.

    Attributes:
        name: qualified name of the first module, in execution order, that produces it.
        channels: full width.
        choices: ascending widths the unit may take.
        searchable: whether its width may change.
        reason: why not, where it may not; otherwise empty.
        members: the module axes it decides.
    """

    name: str
    channels: int
    choices: tuple[int, ...]
    searchable: bool
    reason: str
    members: tuple[Member, ...] = field(repr=False)


@dataclass(frozen=True)
class AxisMap:
    """What each position of a module axis carries.

    Attributes:
        unit: LongTensor [size], number of the unit in ``ChannelGraph.units``, or ``FIXED``.
        index: LongTensor [size], the channel's place inside its unit.
    """

    unit: Tensor
    index: Tensor

    def kept(self, kept: Mapping[int, Tensor]) -> Tensor:
        """Positions that stay, ascending: LongTensor.

        Args:
            kept: unit number -> BoolTensor [channels] of the channels that stay; units left out
                stay whole.
        """
        stays = torch.ones_like(self.unit, dtype=torch.bool)
        for number, channels in kept.items():
            mine = self.unit == number
            stays[mine] = channels[self.index[mine]]
        return stays.nonzero().flatten()

    def counts(self, units: int) -> tuple[int, dict[int, int]]:
        """``(constant, {unit: k})``: the axis has constant + sum of k * width channels."""
        fixed = int((self.unit == FIXED).sum())
        per_unit = {}
        for number in range(units):
            index = self.index[self.unit == number]
            if len(index):
                per_unit[number] = len(index) // (int(index.max()) + 1)
        return fixed, per_unit


def check_widths(units: Sequence[ChannelUnit], widths: Mapping[str, int]) -> dict[str, int]:
    """Complete a mapping unit name -> width with the full widths, after checking it.

    Raises:
        ConfigError: an unknown unit, a width outside 1..channels, or a changed width of an
            unsearchable unit.
    """
    known = {unit.name: unit for unit in units}
    for name, width in widths.items():
        if name not in known:
            raise ConfigError(f"widths: no unit is called {name!r}; units are {list(known)}")
        unit = known[name]
        if isinstance(width, bool) or not isinstance(width, int):
            raise ConfigError(f"widths[{name!r}] must be an int, got {width!r}")
        if not 1 <= width <= unit.channels:
            raise ConfigError(f"widths[{name!r}] must lie in 1..{unit.channels}, got {width}")
        if width != unit.channels and not unit.searchable:
            raise ConfigError(
                f"widths[{name!r}]: the unit keeps its {unit.channels} channels: {unit.reason}"
            )
    return {name: widths.get(name, unit.channels) for name, unit in known.items()}
