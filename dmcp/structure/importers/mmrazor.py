"""Channel configurations of MMRazor 1.x (``fix_subnet.json``, ``DMCP_R50_2G.json`` and the like).

From github.com/open-mmlab/mmrazor: ``config_template`` in
mmrazor/models/mutables/mutable_channel/units/{channel,mutable_channel,sequential_mutable_channel}
_unit.py writes an entry for each unit, configs/pruning/mmcls/dmcp holds published ones::

    {"channel_unit_cfg": {"units": {
        "backbone.layer1.0.conv1_(0, 64)_64": {
            "init_args": {"num_channels": 64, "divisor": 1, "min_value": 1, "min_ratio": 0.9, …},
            "channels": {"input_related": [{"name", "start", "end", …}], "output_related": […]},
            "choice": 22}}}}

A ``choice`` is a number of channels, or a share of them if it has a decimal point. ``init_args``
and ``channels`` may be missing; a unit's name then says where it is. ``num_channels`` is compared
with the network wherever it matters. It is not for a plain number, since the published
DMCP_MBV2_100M.json gives there the channels of MobileNetV2 1.0× for a structure of 1.5×.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure.document import check_schema
from dmcp.structure.importers.claims import axis_of, unit_at
from dmcp.structure.structure import Structure

_COUNT = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_CHANNELS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "start": _COUNT, "end": _COUNT},
    },
}
_UNITS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["choice"],
        "properties": {
            "choice": {"type": "number", "minimum": 0, "maximum": 2**31 - 1},
            "init_args": {
                "type": "object",
                "properties": {
                    **dict.fromkeys(("num_channels", "divisor", "min_value"), _COUNT),
                    "min_ratio": {"type": "number", "minimum": 0, "maximum": 1},
                },
            },
            "channels": {
                "type": "object",
                "properties": {"input_related": _CHANNELS, "output_related": _CHANNELS},
            },
        },
    },
}

_NAME = re.compile(r"(?P<module>.+)_\((?P<start>\d{1,9}), (?P<end>\d{1,9})\)_(?P<channels>\d{1,9})")


def is_mmrazor(data: Any) -> bool:
    """Whether parsed JSON is meant to be such a file."""
    if not isinstance(data, dict) or not data:
        return False
    return "channel_unit_cfg" in data or all(map(_NAME.fullmatch, data))


def from_mmrazor(data: Any, graph: ChannelGraph) -> Structure:
    """The structure that parsed JSON describes, for a network of the same layers.

    Raises:
        StructureError: the data are malformed, or a unit does not fit the network.
    """
    units = _units(data)
    check_schema(units, _UNITS, "units")
    widths: dict[str, int] = {}
    for name, entry in units.items():
        number = _unit(name, entry, graph)
        unit = graph.units[number]
        width = _width(name, entry, unit.channels)
        if not 0 < width <= unit.channels:
            raise StructureError(f"{name}: {width} channels of {unit.channels}")
        if widths.setdefault(unit.name, width) != width:
            raise StructureError(
                f"{name}: {width} channels, but unit {unit.name!r}, which it belongs to, has "
                f"{widths[unit.name]} already"
            )
    return Structure.of(graph, widths, note="Read from a channel configuration of MMRazor.")


def _units(data: Mapping[str, Any]) -> Any:
    config = data.get("channel_unit_cfg", {"units": data})
    return config.get("units") if isinstance(config, dict) else None


def _unit(name: str, entry: Mapping[str, Any], graph: ChannelGraph) -> int:
    """The number of the one unit that an entry's channels belong to."""
    numbers = {unit_at(graph, *place) for place in _places(name, entry, graph)}
    if len(numbers) != 1:
        units = ", ".join(sorted(graph.units[number].name for number in numbers))
        raise StructureError(f"{name}: its channels belong to several units here: {units}")
    return numbers.pop()


def _places(name: str, entry: Mapping[str, Any], graph: ChannelGraph) -> Iterator[Any]:
    """(where the file says it, axis, positions) of the channels that an entry ties together."""
    listed = entry.get("channels", {})
    for key, role in (("output_related", "out"), ("input_related", "in")):
        for channel in listed.get(key, ()):
            says = f"{name}, {channel['name']}"
            axis = axis_of(graph, says, _module(channel["name"], graph), role)
            if axis is None:
                raise StructureError(f"{says}: the inputs of the network do not shrink")
            end = channel.get("end", len(axis.unit))
            yield says, axis, range(channel.get("start", 0), end)
    if not any(listed.values()):
        match = _NAME.fullmatch(name)
        if match is None:
            raise StructureError(f"{name}: neither its name nor its channels say which layer it is")
        axis = axis_of(graph, name, _module(match["module"], graph), "out")
        assert axis is not None
        start = int(match["start"])
        yield name, axis, range(start, int(match["end"]) if start else len(axis.unit))


def _width(name: str, entry: Mapping[str, Any], channels: int) -> int:
    """What MMRazor makes of a choice."""
    choice, settings = entry["choice"], entry.get("init_args", {})
    match = _NAME.fullmatch(name)
    said = settings.get("num_channels", int(match["channels"]) if match else channels)
    if said != channels and (isinstance(choice, float) or "channels" in entry):
        raise StructureError(f"{name}: {said} channels, {channels} here")
    width = max(1, int(channels * choice)) if isinstance(choice, float) else choice
    divisor, least = max(1, settings.get("divisor", 1)), settings.get("min_value", 1)
    rounded = max(least, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < settings.get("min_ratio", 0.9) * width else rounded


def _module(theirs: str, graph: ChannelGraph) -> str:
    """The network's name of a layer that MMClassification's models have inside a backbone."""
    name = re.sub(r"^(backbone|head|architecture\.backbone)\.", "", theirs)
    if name in graph.modules:
        return name
    return _mobilenet_v2(name) or name


def _mobilenet_v2(name: str) -> str | None:
    """MMClassification's name of a layer of MobileNetV2 as `dmcp.models` has it."""
    stems = {"conv1.conv": "conv1", "conv1.bn": "bn1", "conv2.conv": "conv_last"}
    stems["conv2.bn"] = "bn_last"
    if name in stems:
        return stems[name]
    match = re.fullmatch(r"(layer(\d)\.\d)\.conv\.(\d)\.(conv|bn)", name)
    if match is None:
        return None
    layers = ["expand", "depthwise", "project"]
    if match[2] == "1":
        layers = layers[1:]  # its block does not expand
    if int(match[3]) >= len(layers):
        return None
    return f"{match[1]}.{layers[int(match[3])]}" + ("_bn" if match[4] == "bn" else "")
