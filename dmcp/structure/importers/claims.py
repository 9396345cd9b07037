"""From what a file says about layers to the widths of units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.graph.units import FIXED, AxisMap


@dataclass(frozen=True)
class Claim:
    """A file says how many channels a layer has.

    Attributes:
        says: where in the file, for messages.
        module: qualified name of the layer in the traced network.
        role: whether its inputs or its outputs are meant.
        channels: how many.
    """

    says: str
    module: str
    role: Literal["in", "out"]
    channels: int


def axis_of(graph: ChannelGraph, says: str, module: str, role: str) -> AxisMap | None:
    """The channels at one end of a layer; None for inputs that never shrink.

    Raises:
        StructureError: the network has no such layer.
    """
    if module not in graph.modules:
        raise StructureError(f"{says}: the network has no layer {module!r}")
    axes = graph.modules[module]
    return axes.outputs if role == "out" else axes.inputs


def widths_of(graph: ChannelGraph, claims: Iterable[Claim]) -> dict[str, int]:
    """The widths of the units that the claims speak of.

    Raises:
        StructureError: the first claim that contradicts an earlier one or the network.
    """
    claims = [claim for claim in claims if _is_free(graph, claim)]
    found: dict[int, int] = {}
    by: dict[int, str] = {}
    for claim in claims:
        fixed, per_unit = _axis(graph, claim).counts()
        if len(per_unit) != 1:
            continue  # a concatenation, whose parts other claims decide
        ((number, times),) = per_unit.items()
        unit = graph.units[number]
        steps, rest = divmod(claim.channels - fixed, times)
        width = steps * unit.step
        if found.get(number, width) != width:
            raise StructureError(
                f"{claim.says} has {claim.channels} channels, but {by[number]}, which unit "
                f"{unit.name!r} ties to it, leaves {found[number]}"
            )
        if rest or not 0 < width <= unit.channels:
            size = len(_axis(graph, claim).unit)
            raise StructureError(f"{claim.says} has {claim.channels} channels of {size}")
        if width < unit.channels and not unit.searchable:
            raise StructureError(
                f"{claim.says} has {claim.channels} channels, but unit {unit.name!r} keeps its "
                f"{unit.channels}: {unit.reason}"
            )
        found[number] = width
        by.setdefault(number, claim.says)
    for claim in claims:
        _check(graph, claim, found)
    return {graph.units[number].name: width for number, width in found.items()}


def _is_free(graph: ChannelGraph, claim: Claim) -> bool:
    return axis_of(graph, claim.says, claim.module, claim.role) is not None


def _axis(graph: ChannelGraph, claim: Claim) -> AxisMap:
    axis = axis_of(graph, claim.says, claim.module, claim.role)
    assert axis is not None
    return axis


def _check(graph: ChannelGraph, claim: Claim, widths: Mapping[int, int]) -> None:
    """Hold the length of a whole axis against a claim."""
    fixed, per_unit = _axis(graph, claim).counts()
    length = fixed + sum(
        times * (widths.get(number, graph.units[number].channels) // graph.units[number].step)
        for number, times in per_unit.items()
    )
    if length != claim.channels:
        names = ", ".join(graph.units[number].name for number in per_unit)
        raise StructureError(
            f"{claim.says} has {claim.channels} channels, but its units ({names}) leave {length}"
        )


def unit_at(graph: ChannelGraph, says: str, axis: AxisMap, positions: range) -> int:
    """The number of the one unit that these channels of an axis belong to.

    Raises:
        StructureError: they are not there, or belong to several or to none.
    """
    if not 0 <= positions.start < positions.stop <= len(axis.unit):
        raise StructureError(
            f"{says}: the layer has {len(axis.unit)} channels, none from {positions.start} to "
            f"{positions.stop}"
        )
    units = axis.unit[positions.start : positions.stop].unique().tolist()
    if len(units) != 1 or units == [FIXED]:
        raise StructureError(f"{says}: these channels of the layer are not those of one unit")
    number: int = units[0]
    return number
