"""The tables of a report, as text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dmcp.cost.metrics import METRICS
from dmcp.report.front import DENSE
from dmcp.report.published import beside_published
from dmcp.report.run import SPENT, Run

_NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: above it.
        columns, rows: its cells; numbers stand to the right of texts.
        texts: how many columns, from the left, are texts.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1


def results_table(run: Run) -> Table:
    """The networks of a finished run."""
    assert run.results is not None
    rows = [
        [
            str(row["network"]),
            _count(row["macs"]),
            _count(row["params"]),
            _percent([row["top1"]]),
            _percent([row["top5"]]),
            _seconds(row["seconds"]),
        ]
        for row in run.results["networks"]
    ]
    return Table(
        "Trained networks", ("network", "MACs", "params", "top-1 %", "top-5 %", "seconds"), rows
    )


def comparison_tables(run: Run) -> list[Table]:
    """The rows of a comparison, a table for each track."""
    assert run.results is not None
    columns = ["budget", "method", "top-1 %", "seeds", "MACs", "params", "ms"]
    columns += ["searched: forward", "backward", "seconds"]
    rows = run.results["rows"]
    tracks = dict.fromkeys(row["track"] for row in rows if row["track"])
    tables = []
    for track in tracks or [None]:
        cells = [
            [
                str(row["budget"] or _NONE),
                str(row["method"]),
                _mean(100 * row["top1"], 100 * row["top1_deviation"], row["seeds"]),
                str(row["seeds"]),
                _count(row["macs"]),
                _count(row["params"]),
                f"{row['latency_ms']:.2f}",
                *(
                    [_count(row["forward"]), _count(row["backward"])]
                    if row["budget"]
                    else [_NONE, _NONE]
                ),
                _seconds(row["search_seconds"]) if row["budget"] else _NONE,
            ]
            for row in rows
            if row["track"] in (track, None)
        ]
        tables.append(Table(f"Track {track}" if track else "Networks", columns, cells, texts=2))
    network = _network(run).get("model")
    measured = [{**row, "network": network, "distilled": row["track"] == "C"} for row in rows]
    return tables + published_tables(measured)


def published_tables(rows: Iterable[Mapping[str, Any]]) -> list[Table]:
    """What the paper printed for the same networks at about the same MACs, beside them, if it did.

    Args:
        rows: ``network``, ``method``, ``macs``, ``top1``, and whether it was ``distilled``.
    """
    lines = [
        [
            beside.method,
            _count(beside.macs),
            f"{beside.top1:.2f}",
            published.method + (" (distilled)" if published.distilled else ""),
            _count(published.macs),
            f"{published.top1:.1f}",
        ]
        for row in rows
        for beside in beside_published([row])
        if (published := beside.published) and published.distilled == row["distilled"]
    ]
    columns = ("network", "MACs", "top-1 %", "published", "MACs", "top-1 %")
    return [Table("Beside the paper's results on ImageNet", columns, lines)] if lines else []


def ledger_table(ledger: Mapping[str, Any]) -> Table:
    """What the phases of a run cost, and all of them together."""
    phases = ledger["phases"]
    total = {part: sum(phase[part] for phase in phases.values()) for part in SPENT}
    rows = [
        [str(name), *(_count(phase[part]) for part in SPENT[:-1]), _seconds(phase["seconds"])]
        for name, phase in [*phases.items(), ("all", total)]
    ]
    return Table("", ("phase", "steps", "images forward", "backward", "seconds"), rows)


@dataclass(frozen=True)
class Family:
    """Runs of the same network on the same data: what one front holds.

    Attributes:
        name: says which.
        rows: of the networks they trained, see `_row`.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]

    def records(self) -> list[dict[str, Any]]:
        """As `dmcp.report.draw_front` takes them."""
        keys = ("method", "budget", "macs", "top1")
        return [{**{key: row[key] for key in keys}, "track": None} for row in self.rows]

    def table(self) -> Table:
        """A line for each network, with means over seeds."""
        lines = [
            [
                same[0]["method"],
                same[0]["bound"],
                str(len(same)),
                _count(mean(row["macs"] for row in same)),
                _count(mean(row["params"] for row in same)),
                _percent([row["top1"] for row in same]),
                _percent([row["top5"] for row in same]),
                _seconds(mean(row["seconds"] for row in same)),
            ]
            for same in self._cells()
        ]
        columns = ("network", "budget", "runs", "MACs", "params", "top-1 %", "top-5 %", "seconds")
        return Table("", columns, lines, texts=2)

    @property
    def repeated(self) -> bool:
        """Whether a network was trained with several seeds."""
        return len(self._cells()) < len(self.rows)

    def published(self) -> list[Table]:
        """See `published_tables`."""
        return published_tables(
            {**same[0], **{key: mean(row[key] for row in same) for key in ("macs", "top1")}}
            for same in self._cells()
        )

    def _cells(self) -> list[list[Mapping[str, Any]]]:
        """The rows, those that differ in their seed alone together."""
        cells: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for row in self.rows:
            cells[row["method"], row["budget"]].append(row)
        return list(cells.values())


def families(runs: Iterable[Run]) -> list[Family]:
    """The finished runs, those of the same network on the same data together."""
    members: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if run.kind != "compare" and run.results is not None:
            network = _network(run)
            keys = ("model", "model_options", "data", "image_size")
            values = [network.get(key) for key in keys]
            members[json.dumps(values if any(values) else run.name, sort_keys=True)].append(run)
    return [Family(_family_name(same[0]), _rows(same)) for same in members.values()]


def network_name(run: Run) -> str:
    """The network of a run with its options: ``resnet18 (width 0.25)``."""
    network = _network(run)
    options = [f"{name} {value}" for name, value in (network.get("model_options") or {}).items()]
    return str(network.get("model", "network")) + (f" ({', '.join(options)})" if options else "")


def bound_of(run: Run) -> str:
    """The budget of a run in words: ``50% MACs``."""
    budget = (run.config or {}).get("budget") or {}
    labels = {metric.bound: f"{metric.unit} {metric.label}".strip() for metric in METRICS.values()}
    return ", ".join(
        f"{bound if isinstance(bound, str) else f'{bound:,.6g}'} {labels.get(name, name)}"
        for name, bound in budget.items()
        if isinstance(bound, str | int | float)
    )


def _network(run: Run) -> Mapping[str, Any]:
    return (run.config or {}).get("network") or {}


def _family_name(run: Run) -> str:
    data = _network(run).get("data")
    return network_name(run) + (f" on {data}" if data else "")


def _rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The networks of runs; where runs differ in more than seed and budget, methods say which."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(_setting(run), run)
    settings = {setting: run.name for setting, run in first.items()}
    if len(set(settings.values())) < len(settings):
        settings = {setting: str(run.path) for setting, run in first.items()}
    rows = []
    for run in runs:
        setting = _setting(run)
        own = f" · {settings[setting]}" if len(settings) > 1 else ""
        bound = bound_of(run)
        config = run.config or {}
        for row in run.results["networks"] if run.results else []:
            dense = row["network"] == DENSE
            of_run = {
                "method": row["network"] + ("" if dense else own),
                "network": _network(run).get("model"),
                "budget": json.dumps([setting, None if dense else bound]),
                "bound": _NONE if dense or not bound else bound,
                "distilled": config.get("retrain") == "distil" and not dense,
            }
            rows.append({**row, **of_run})
    return sorted(rows, key=lambda row: (row["method"] != DENSE, row["method"], -row["macs"]))


def _setting(run: Run) -> str:
    """Everything a run depends on but its seed and its budget."""
    config = {key: value for key, value in (run.config or {}).items() if key != "budget"}
    config["network"] = {key: value for key, value in _network(run).items() if key != "seed"}
    return json.dumps(config, sort_keys=True)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _percent(shares: Sequence[float | None]) -> str:
    """Mean and standard deviation of shares, in %."""
    known = [100 * share for share in shares if share is not None]
    if not known:
        return _NONE
    return _mean(mean(known), stdev(known) if len(known) > 1 else 0.0, len(known))


def _mean(value: float, deviation: float, count: int) -> str:
    return f"{value:.2f}" + (f" ± {deviation:.2f}" if count > 1 else "")
