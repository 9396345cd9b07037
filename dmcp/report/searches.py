"""The figures of finished searches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dmcp.errors import CheckpointError
from dmcp.report.chains import Chains
from dmcp.report.distributions import draw_channels, draw_costs
from dmcp.report.figure import save
from dmcp.report.widths import draw_widths
from dmcp.runs import RunFolder

_OWN = "search.json"
"""What the search of a run is called."""


def find_searches(run: Path) -> dict[str, Path]:
    """The finished searches in a folder and the folders in it.

    A ``search.json`` is one. A comparison has a ``search-<budget>.json`` of every method with
    chains, finished once there is a ``found.json`` beside it.

    Returns:
        Name -> file. The name is the file's path in the folder without its suffix, empty for the
        folder's own ``search.json``.

    Raises:
        CheckpointError: there is none.
    """
    found = {
        str(path.relative_to(run))[: -len(".json")]: path
        for path in sorted(run.rglob("search*.json"))
        if path.name == _OWN or ((path.parent / "found.json").exists() and _holds_chains(path))
    }
    if not found:
        raise CheckpointError(f"{run} is not a finished search: it has no {_OWN}")
    return {"" if path == run / _OWN else name: path for name, path in found.items()}


def draw_search(search: Path, folder: Path, *, every_unit: bool = False) -> list[Path]:
    """Draw how costs and channels of a search's structures are distributed, and its widths.

    Args:
        search: the file of the search.
        folder: where the figures go.
        every_unit: show the channels of all units rather than of twelve.

    Returns:
        The files.

    Raises:
        CheckpointError: the file holds no search.
    """
    chains = Chains.read(search)
    figures = {f"costs-{metric}": draw_costs(chains, metric) for metric in chains.costs}
    figures["channels"] = draw_channels(chains, units=None if every_unit else 12)
    full = {unit: chains.units[unit] for unit in chains.choices}
    figures["widths"] = draw_widths(_structures(search, chains), full)
    return [path for name, figure in figures.items() for path in save(figure, folder / name)]


def _structures(search: Path, chains: Chains) -> Mapping[str, Mapping[str, float]]:
    """The structures that the search's folder holds for it, else what the chains expect."""
    folder = RunFolder(search.parent)
    try:
        if search.name != _OWN:
            budget = search.stem.removeprefix("search-")
            return {folder.path.name: folder.read_json("found.json")[budget]["widths"]}
        if (folder.path / "results.json").exists():
            structures: dict[str, dict[str, float]] = folder.read_json("results.json")["widths"]
            return {name: structure for name, structure in structures.items() if name != "dense"}
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
