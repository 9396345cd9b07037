"""AutoSlim's ``channel_num_list``: the channels of every convolution in order.

From github.com/JiahuiYu/slimmable_networks: apps/autoslim_{mobilenet_v1,mobilenet_v2,resnet}
_train_val.yml hold them, ``pop_channels`` in models/autoslim_*.py takes them one by one::

    channel_num_list:
      - [16, 32, 48, 48, 88, …, 744, 1000]  # 150M
      - [16, 32, 48, 64, 112, …, 1128, 1000]  # 325M

A list has one number for every convolution but the depthwise ones, whose channels are their
inputs'. A block's projection shortcut comes before its other convolutions. The last number is that
of the classes; the network's own are kept.
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from itertools import dropwhile, islice
from typing import Any

from torch import nn

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure.document import check_schema, parse_json
from dmcp.structure.importers.claims import Claim, widths_of
from dmcp.structure.structure import Structure

_LISTS = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "array", "minItems": 2, "items": {"type": "integer", "minimum": 1}},
}


def from_autoslim(lists: Any, graph: ChannelGraph, row: int | None = None) -> Structure:
    """The structure of one list, for a network of the same layers.

    Args:
        lists: a list of channel numbers, or several of them.
        graph: of the network.
        row: which of several.

    Raises:
        StructureError: the data are malformed, or a layer does not fit the network.
    """
    lists = [lists] if lists and not isinstance(lists[0], list) else lists
    check_schema(lists, _LISTS, "channel_num_list")
    if row is None and len(lists) > 1:
        raise StructureError(f"it has {len(lists)} lists: name one, <file>#0 … #{len(lists) - 1}")
    if not 0 <= (row := row or 0) < len(lists):
        raise StructureError(f"it has {len(lists)} lists, no number {row}")
    *numbers, _classes = lists[row]
    layers = _convolutions(graph)
    if len(numbers) != len(layers):
        raise StructureError(
            f"the list has {len(numbers)} convolutions and the classes, the network has "
            f"{len(layers)} that are not depthwise"
        )
    claims = [
        Claim(f"number {place} of the list ({layer})", layer, "out", channels)
        for place, (layer, channels) in enumerate(zip(layers, numbers, strict=True))
    ]
    return Structure.of(graph, widths_of(graph, claims), note="Read from a list of AutoSlim.")


def read_yaml(data: bytes) -> list[Any]:
    """The lists under ``channel_num_list:`` of a YAML file, each in brackets on a line.

    Raises:
        StructureError: there are none, or others.
    """
    lines = data.decode(errors="replace").splitlines()
    below = dropwhile(lambda line: not line.startswith("channel_num_list:"), lines)
    rows = []
    for line in islice(below, 1, None):
        entry = line.partition("#")[0].strip()
        if re.fullmatch(r"- *\[[\d, ]*\]", entry):
            rows.append(parse_json(entry.removeprefix("-").encode()))
        elif entry and line[0] in " -":
            raise StructureError(f"{reprlib.repr(entry)} is no list in brackets on one line")
        elif entry:
            break
    if not rows:
        raise StructureError("it has no lists under channel_num_list")
    return rows


def _convolutions(graph: ChannelGraph) -> list[str]:
    """Names of all convolutions but the depthwise ones, in AutoSlim's order."""
    reads = {
        node.module: node.inputs
        for node in graph.nodes
        if node.kind == "dense"
        and node.module is not None
        and node.module in graph.modules
        and isinstance(graph.model.get_submodule(node.module), nn.Conv2d)
    }
    order = list(reads)
    first: dict[tuple[int, ...], int] = {}
    for number, layer in enumerate(order):
        first.setdefault(reads[layer], number)
    units = {layer: tuple(graph.modules[layer].outputs.units) for layer in order}
    shared = Counter(units.values())
    # A shortcut reads what its block reads, and its outputs are tied to another layer's.
    return sorted(order, key=lambda layer: (first[reads[layer]], shared[units[layer]] < 2))
