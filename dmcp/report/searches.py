"""The searches in a folder, and the structures they found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmcp.errors import CheckpointError
from dmcp.report.chains import Chains
from dmcp.report.front import DENSE
from dmcp.runs import RunFolder

OWN = "search.json"
"""What the search of a run is called."""


def find_searches(run: Path) -> dict[str, Path]:
    """The finished searches in a folder and the folders in it.

    A ``search.json`` is one. A comparison has a ``search-<budget>.json`` of every method with
    chains, finished once there is a ``found.json`` beside it.

    Returns:
        Name -> file. The name is the file's path in the folder without its suffix, empty for the
        folder's own ``search.json``.
    """
    found = {
        str(path.relative_to(run))[: -len(".json")]: path
        for path in sorted(run.rglob("search*.json"))
        if path.name == OWN or ((path.parent / "found.json").exists() and _holds_chains(path))
    }
    return {"" if path == run / OWN else name: path for name, path in found.items()}


def structures_of(search: Path, chains: Chains) -> Mapping[str, Mapping[str, float]]:
    """The structures that the search's folder holds for it, else what the chains expect.

    Args:
        search: its file.
        chains: what it holds.

    Raises:
        CheckpointError: the folder holds something else in their place.
    """
    folder = RunFolder(search.parent)
    try:
        if search.name != OWN:
            budget = search.stem.removeprefix("search-")
            return {folder.path.name: folder.read_json("found.json")[budget]["widths"]}
        if (folder.path / "results.json").exists():
            structures: dict[str, dict[str, float]] = folder.read_json("results.json")["widths"]
            return {name: structure for name, structure in structures.items() if name != DENSE}
        if (folder.path / "widths.json").exists():
            return {"dmcp": folder.read_json("widths.json")["widths"]}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder.path} holds no structures of {search.name}") from None
    return {"expected": chains.expected_widths()}


def _holds_chains(path: Path) -> bool:
    try:
        Chains.read(path)
    except CheckpointError:
        return False
    return True
