"""Torch-Pruning's pruning history.

From github.com/VainF/Torch-Pruning: ``Group.prune`` in torch_pruning/dependency/group.py records
it, ``DependencyGraph.load_pruning_history`` in dependency/graph.py repeats it::

    [["layer1.0.conv1", true, [3, 17, 20]], ["fc", false, [0, 5]], …]

Each entry is the name of a layer, whether its outputs (or else its inputs) are meant, and the
channels that go, by their place among those that were left then. Everything tied to them goes too.
It is kept as JSON, or in a file of ``torch.save`` by itself or as ``"pruning"`` beside the weights.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.graph.units import FIXED, AxisMap
from dmcp.structure.document import check_schema
from dmcp.structure.importers.claims import axis_of
from dmcp.structure.importers.npy import check_opcodes
from dmcp.structure.structure import Structure

_HISTORY = {"type": "array", "items": {"type": "array", "minItems": 3, "maxItems": 3}}
_INDICES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}}


def is_history(data: Any) -> bool:
    """Whether parsed JSON is meant to be a history."""
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, list) and bool(first) and isinstance(first[0], str)


def read_history(data: bytes) -> Any:
    """The history in a file of ``torch.save``, which runs no code.

    Raises:
        StructureError: it is no such file, or holds more than tensors and plain data.
    """
    try:
        _check_archive(data)
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all with the same meaning here
        reason = next(iter(str(error).splitlines()), "")
        raise StructureError(f"it is no torch file of plain data: {reason}") from None
    return found.get("pruning") if isinstance(found, dict) else found


def _check_archive(data: bytes) -> None:
    """Refuse what ``torch.load`` would crash on, or unpack without bounds."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise StructureError("its parts are compressed")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise StructureError(f"it has {len(pickles)} parts data.pkl, not one")
        check_opcodes(archive.read(pickles[0]))


def from_history(history: Any, graph: ChannelGraph) -> Structure:
    """The structure that a history leaves of the very network it is of, with its channels.

    Raises:
        StructureError: the history is malformed, or a step does not fit the network.
    """
    history = _listed(history)
    check_schema(history, {"type": "array"}, "history")
    rows = [_listed(row) for row in history]
    check_schema(rows, _HISTORY, "history")
    stays = [
        torch.ones(unit.channels // unit.step, dtype=torch.bool, device="cpu")
        for unit in graph.units
    ]
    for number, (module, outputs, indices) in enumerate(rows):
        says = f"history[{number}]"
        check_schema(module, {"type": "string"}, f"{says}[0]")
        check_schema(outputs, {"type": "boolean"}, f"{says}[1]")
        check_schema(_listed(indices), _INDICES, f"{says}[2]")
        says = f"{says}, {module}"
        axis = axis_of(graph, says, module, "out" if outputs else "in")
        if axis is None:
            raise StructureError(f"{says}: the inputs of the network do not shrink")
        _drop(says, axis, list(indices), stays)
    kept = {
        unit.name: mask.repeat_interleave(unit.step).nonzero().flatten()
        for unit, mask in zip(graph.units, stays, strict=True)
        if not mask.all()
    }
    return Structure.of(graph, kept=kept, note="Read from a pruning history of Torch-Pruning.")


def _drop(says: str, axis: AxisMap, indices: list[int], stays: list[Tensor]) -> None:
    """Drop the channels at these places among those of an axis that are left."""
    left = axis.kept(dict(enumerate(stays)))
    if any(index >= len(left) for index in indices):
        raise StructureError(f"{says} drops channel {max(indices)} of {len(left)} that are left")
    gone = left[indices]
    if (axis.unit[gone] == FIXED).any():
        raise StructureError(f"{says} drops inputs of the network")
    for number in axis.unit[gone].unique().tolist():
        stays[number][axis.index[gone[axis.unit[gone] == number]]] = False
    dropped = len(left) - len(axis.kept(dict(enumerate(stays))))
    if dropped != len(set(indices)):
        raise StructureError(
            f"{says} drops {len(set(indices))} channels, but with what is tied to them {dropped} "
            "of the layer go"
        )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
