"""Structures in the formats that others publish, for a traced network.

Each is held against the network layer by layer; the first that does not fit is named in the error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph
from dmcp.structure.document import parse_json, read_bytes
from dmcp.structure.importers.autoslim import from_autoslim, read_yaml
from dmcp.structure.importers.mmrazor import from_mmrazor, is_mmrazor
from dmcp.structure.importers.npy import from_npy, read_npy
from dmcp.structure.importers.torch_pruning import from_history, is_history, read_history
from dmcp.structure.structure import Structure

__all__ = [
    "Importer",
    "from_autoslim",
    "from_history",
    "from_mmrazor",
    "from_npy",
    "open_structure",
    "read_history",
    "read_npy",
    "read_structure",
    "read_yaml",
]

Importer = Callable[[ChannelGraph], Structure]
"""What an opened file gives for a traced network."""


def read_structure(path: Path, graph: ChannelGraph) -> Structure:
    """The structure in a file of dmcp's own or another format, held against a traced network.

    Args:
        path: dmcp's JSON; DMCP's ``.npy``; MMRazor's JSON; AutoSlim's lists as ``.yml`` or JSON,
            with ``#<row>`` after the name where there are several; Torch-Pruning's history as
            ``.pth``, ``.pt`` or JSON.
        graph: of the network.

    Returns:
        The structure with the width of every unit, the network's hash and its costs.

    Raises:
        StructureError: the file is missing or malformed, or of another network. No code of it runs.
    """
    opened = open_structure(path)
    return (opened.on if isinstance(opened, Structure) else opened)(graph)


def open_structure(path: Path) -> Structure | Importer:
    """A file as for `read_structure`, before there is a network: a structure if it is dmcp's own.

    Raises:
        StructureError: the file is missing or malformed.
    """
    name = re.fullmatch(r"(.+)#(\d+)", str(path))
    row = None
    if name is not None and not path.exists():
        path, row = Path(name[1]), int(name[2])
    data = read_bytes(path)
    with _blaming(path):
        found = _opened(path.suffix, data, row)
    return found if isinstance(found, Structure) else _of(path, found)


def _opened(suffix: str, data: bytes, row: int | None) -> Structure | Importer:
    if suffix in (".yml", ".yaml"):
        return partial(from_autoslim, read_yaml(data), row=row)
    parsed = None if suffix in (".npy", ".pt", ".pth") else parse_json(data)
    if row is not None and (not isinstance(parsed, list) or is_history(parsed)):
        raise StructureError(f"it is no file of several lists, and has no number {row}")
    if suffix == ".npy":
        return partial(from_npy, read_npy(data))
    if suffix in (".pt", ".pth"):
        return partial(from_history, read_history(data))
    if is_mmrazor(parsed):
        return partial(from_mmrazor, parsed)
    if is_history(parsed):
        return partial(from_history, parsed)
    if isinstance(parsed, list):
        return partial(from_autoslim, parsed, row=row)
    return Structure.from_json(parsed)


def _of(path: Path, importer: Importer) -> Importer:
    """The same, whose errors say which file it is."""

    def read(graph: ChannelGraph) -> Structure:
        with _blaming(path):
            return importer(graph)

    return read


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    try:
        yield
    except StructureError as error:
        raise StructureError(f"{path}: {error}") from None
