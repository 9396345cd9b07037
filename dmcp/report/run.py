"""What the folder of a run holds, finished or not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmcp.errors import CheckpointError
from dmcp.report.chains import Chains
from dmcp.report.searches import OWN, find_searches
from dmcp.runs import RunFolder

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values: [n], [n]."""

SPENT = ("steps", "images_forward", "images_backward", "seconds")
"""What the ledger counts of a phase."""

Curves = Mapping[str, Mapping[str, Curve]]
"""Phase -> metric -> curve."""


@dataclass(frozen=True)
class Retained:
    """The retain probabilities of a search over its steps.

    Attributes:
        steps: [T].
        of: unit -> probabilities of its groups but the base [T, G].
    """

    steps: NDArray[np.int64]
    of: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds; None for what is not there (yet).

    Attributes:
        path: the folder.
        config: what was asked for.
        curves: what was recorded on the way.
        retained: the chains on the way.
        searches: finished searches, see `find_searches`.
        ledger: what the run cost.
        results: the table at the end.
    """

    path: Path
    config: Mapping[str, Any] | None
    curves: Curves | None
    retained: Retained | None
    searches: Mapping[str, Path]
    ledger: Mapping[str, Any] | None
    results: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """What there is of a run or a comparison.

        Raises:
            CheckpointError: the folder is none, or a file in it holds something else.
        """
        folder = RunFolder(path)
        searches = find_searches(path)
        if not searches and not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is not a run: it has neither config.json nor {OWN}")
        config, ledger, results = (
            _checked(path / name, folder.read_json(name), check) if (path / name).exists() else None
            for name, check in (
                ("config.json", _check_config),
                ("ledger.json", _check_ledger),
                ("results.json", _check_results),
            )
        )
        kind = (config or {}).get("kind", "search")
        if results is not None and ("networks" in results) == (kind == "compare"):
            raise CheckpointError(f"{path / 'results.json'} is not that of a {kind} run")
        return cls(
            path,
            config,
            _read(path / "metrics.jsonl", _curves),
            _read(path / "chains.jsonl", _retained),
            searches,
            ledger,
            results,
        )

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.path.resolve().name

    @property
    def kind(self) -> str:
        """``"search"``, ``"train"`` or ``"compare"``."""
        if self.config is None:
            return "search"
        return str(self.config.get("kind", "search"))

    def chains(self) -> Chains | None:
        """The chains of the run's own search, once it is finished.

        Raises:
            CheckpointError: its file holds something else, or what was recorded on the way is of
                other chains.
        """
        if "" not in self.searches:
            return None
        chains = Chains.read(self.searches[""])
        if self.retained is not None:
            recorded = {unit: q.shape[1] for unit, q in self.retained.of.items()}
            if recorded != {unit: len(q) for unit, q in chains.retain.items()}:
                raise CheckpointError(
                    f"{self.path / 'chains.jsonl'} is not of the search in {self.searches['']}: "
                    "its units or their groups are others"
                )
        return chains

    def targets(self) -> dict[str, float]:
        """Metric -> budget; nothing before the search is finished."""
        if chains := self.chains():
            return {metric: cost.budget for metric, cost in chains.costs.items()}
        return {}


def _checked(
    path: Path, data: dict[str, Any], check: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """The content of a file, if it is what its name says; it may have been made by something else.

    Raises:
        CheckpointError: it is not.
    """
    try:
        check(data)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is not that of a run") from None
    return data


def _check_config(config: dict[str, Any]) -> None:
    for part in ("network", "budget"):
        dict(config.get(part) or {})


def _check_ledger(ledger: dict[str, Any]) -> None:
    for phase in ledger["phases"].values():
        for part in SPENT:
            float(phase[part])
    dict(ledger.get("versions") or {})


def _check_results(results: dict[str, Any]) -> None:
    """Those of a run, or those of a comparison."""
    numbers, texts = ["macs", "params", "top1", "seconds"], ["network", "top5"]
    rows = results.get("networks")
    if rows is None:
        rows = [*results["rows"], *results["records"]]
        numbers, texts = ["macs", "params", "top1"], ["method", "track", "budget"]
    for row in rows:
        if not all(isinstance(row[name], int | float) for name in numbers):
            raise TypeError(f"{numbers} must be numbers")
        _ = [row[name] for name in texts]


def _read(path: Path, parse: Any) -> Any:
    """What the lines of a file hold, None without the file or without lines.

    Raises:
        CheckpointError: a line but the last, which may still be being written, is not a record.
    """
    if not path.exists():
        return None
    records = list(_lines(path))
    try:
        return parse(records) if records else None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} does not hold the records of a run") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    *lines, _torn = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise CheckpointError(f"line {number} of {path} is not a record") from None


def _curves(records: list[dict[str, Any]]) -> Curves:
    points: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        phase, step = str(record["phase"]), float(record["step"])
        for metric, value in record.items():
            if metric not in ("phase", "step"):
                points[phase][metric].append((step, float(value)))
    return {
        phase: {metric: _curve(values) for metric, values in metrics.items()}
        for phase, metrics in points.items()
    }


def _curve(points: list[tuple[float, float]]) -> Curve:
    steps, values = np.array(points).T
    return steps, values


def _retained(records: list[dict[str, Any]]) -> Retained:
    steps = np.array([int(record["step"]) for record in records])
    of = {
        str(unit): np.array([record["retain"][unit] for record in records], dtype=np.float64)
        for unit in records[-1]["retain"]
    }
    if not all(values.ndim == 2 for values in of.values()) or (np.diff(steps) <= 0).any():
        raise ValueError("not the chains over steps")
    return Retained(steps, of)
