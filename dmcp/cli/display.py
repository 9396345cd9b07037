"""What a person sees of a run: progress and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dmcp.graph import ChannelGraph
from dmcp.runs import Row

_LABELS = {
    "dense": "dense",
    "dmcp": "DMCP (expected sampling)",
    "uniform": "uniform width",
    "pruned": "pruned",
}


class ProgressDisplay:
    """A progress bar per phase with the live loss and, in a search, E[cost] against its bound."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._bounds: Mapping[str, int] = {}

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self.progress.stop()

    def begin(self, phase: str, steps: int, bounds: Mapping[str, int]) -> None:
        self.progress.start()
        self._bounds = bounds
        self._task = self.progress.add_task(phase, total=steps, metrics="")

    def step(self, done: int) -> None:
        if self._task is not None:
            self.progress.update(self._task, completed=done)

    def record(self, record: Mapping[str, Any]) -> None:
        parts = [f"loss {record['loss']:.3f}"]
        for metric, bound in self._bounds.items():
            if f"expected_{metric}" in record:
                parts.append(f"E[{metric}] {short(record[f'expected_{metric}'])} / {short(bound)}")
        if self._task is not None:
            self.progress.update(self._task, metrics="  ".join(parts))


def short(value: float) -> str:
    """A count with a suffix: 2.74M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def show_rows(rows: Sequence[Row], *, as_json: bool, quiet: bool) -> None:
    """Print the table at the end of a run on stdout: for people, as JSON, or not at all."""
    if as_json:
        print(json.dumps({"networks": [asdict(row) for row in rows]}))
    elif not quiet:
        table = Table()
        table.add_column("network")
        for name in ("MACs", "params", "top-1", "top-5", "seconds"):
            table.add_column(name, justify="right")
        for row in rows:
            top5 = "–" if row.top5 is None else f"{row.top5:.2%}"
            table.add_row(
                _LABELS.get(row.network, row.network),
                f"{row.macs:,}",
                f"{row.params:,}",
                f"{row.top1:.2%}",
                top5,
                f"{row.seconds:.0f}",
            )
        Console(markup=False).print(table)


def show_graph(
    graph: ChannelGraph, macs: Mapping[str, float], totals: Mapping[str, int], *, as_json: bool
) -> None:
    """Print the units of a network on stdout.

    Args:
        graph: whose units.
        macs: unit name -> share of the MACs in layers whose width it decides.
        totals: metric -> cost of the whole network.
        as_json: JSON instead of a table.
    """
    if as_json:
        units = [
            {
                "name": unit.name,
                "channels": unit.channels,
                "choices": unit.choices,
                "searchable": unit.searchable,
                "reason": unit.reason,
                "members": [f"{m.module}:{m.role}" for m in unit.members],
                "share_of_macs": macs[unit.name],
            }
            for unit in graph.units
        ]
        print(json.dumps({"costs": totals, "units": units}))
        return
    table = Table(caption="  ".join(f"{name} {value:,}" for name, value in totals.items()))
    table.add_column("unit")
    table.add_column("channels", justify="right")
    table.add_column("widths")
    table.add_column("members", justify="right")
    table.add_column("share of MACs", justify="right")
    for unit in graph.units:
        widths = " ".join(map(str, unit.choices)) if unit.searchable else unit.reason
        share = f"{macs[unit.name]:.1%}"
        table.add_row(unit.name, str(unit.channels), widths, str(len(unit.members)), share)
    Console(markup=False).print(table)
