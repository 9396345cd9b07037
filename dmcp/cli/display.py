"""What a person sees of a run: progress and tables."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from itertools import pairwise
from math import prod
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from dmcp.cost import METRICS, cost
from dmcp.errors import SearchWarning
from dmcp.graph import ChannelGraph
from dmcp.runs import Row
from dmcp.search.watch import decided_share

_LABELS = {
    "dense": "dense",
    "dmcp": "DMCP (expected sampling)",
    "uniform": "uniform width",
    "pruned": "pruned",
}


_METRICS = [metric.name for metric in METRICS.values() if not metric.measured]

_LOG_WIDTH = 160
"""Characters of a line where there is no terminal to fit into."""


class ProgressDisplay:
    """A progress bar per phase with images per second, the live loss and accuracy and, in a search,
    E[cost] against its bound and the share of groups that are decided. Where stderr is no terminal,
    the lines at the end.

    While it is open, a `dmcp.SearchWarning` is one line above the bars.
    """

    def __init__(self) -> None:
        whole = Column(no_wrap=True)
        self.progress = Progress(
            TextColumn("{task.description:>8}", table_column=whole),
            BarColumn(bar_width=12, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(table_column=whole),
            _ImagesPerSecond(table_column=whole),
            _Metrics(),
            console=Console(stderr=True, width=None if sys.stderr.isatty() else _LOG_WIDTH),
        )
        self._task: TaskID | None = None
        self._begun = False
        self._bounds: Mapping[str, float] = {}
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> ProgressDisplay:
        self._warnings.__enter__()
        warnings.simplefilter("always", SearchWarning)
        show_others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, SearchWarning):
                self.progress.console.print(f"warning: {message}", markup=False, soft_wrap=True)
            else:
                show_others(message, category, *where, **more)

        warnings.showwarning = show
        return self

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        if self._task is not None:
            self.progress.stop()

    def begin(self, phase: str, steps: int, batch_size: int, bounds: Mapping[str, float]) -> None:
        self.progress.start()
        self._bounds, self._begun = bounds, False
        self._task = self.progress.add_task(
            phase, total=steps, batch_size=batch_size, metrics="", decided=""
        )

    def step(self, done: int) -> None:
        if self._task is None:
            return
        if self._begun:
            self.progress.update(self._task, completed=done)
        else:  # steps of before a restart tell nothing of the speed
            self.progress.reset(self._task, completed=done)
        self._begun = True

    def record(self, record: Mapping[str, Any]) -> None:
        if self._task is None:
            return
        if "retain" in record:
            decided = f"  decided {decided_share(record['retain']):.0%}"
            self.progress.update(self._task, decided=decided)
            return
        costs = [
            f"E[{metric}] {short(record[f'expected_{metric}'])} / {short(bound)}"
            for metric, bound in self._bounds.items()
        ]
        parts = [*costs, f"loss {record['loss']:.3f}", f"acc {record['accuracy']:.1%}"]
        self.progress.update(self._task, metrics="  ".join(parts))


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        images = "" if speed is None else f"{short(speed * task.fields['batch_size'])} img/s"
        return Text(images)


class _Metrics(ProgressColumn):
    """What a narrow terminal has room for."""

    def render(self, task: Task) -> Text:
        text = task.fields["metrics"] + task.fields["decided"]
        return Text(text, no_wrap=True, overflow="ellipsis")


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
    graph: ChannelGraph,
    widths: Mapping[str, int] | None = None,
    *,
    groups: bool = False,
    as_json: bool = False,
) -> None:
    """Print the units of a network on stdout.

    Args:
        graph: whose units.
        widths: the structure whose costs are shown, None for the whole network.
        groups: whether the choices are a grid of channel groups.
        as_json: JSON instead of a table.
    """
    totals = {metric: cost(graph, metric).of(widths or {}) for metric in _METRICS}
    shares = unit_shares(graph)
    searched, proof = searchable_share(graph), graph.proof
    if as_json:
        units = [
            {
                "name": unit.name,
                "channels": unit.channels,
                "choices": unit.choices,
                "searchable": unit.searchable,
                "reason": unit.reason,
                "members": [f"{m.module}:{m.role}" for m in unit.members],
                "share_of_macs": shares[unit.name],
                **({} if widths is None else {"width": widths.get(unit.name, unit.channels)}),
            }
            for unit in graph.units
        ]
        shown = {"costs": totals, "searchable_share_of_macs": searched, "units": units}
        print(json.dumps({**shown, "proof": None if proof is None else asdict(proof)}))
        return
    table = Table()
    table.add_column("unit", no_wrap=True, overflow="fold")
    for name in ["channels", *([] if widths is None else ["kept"])]:
        table.add_column(name, justify="right")
    table.add_column("widths")
    for name in [*(["groups"] if groups else []), "members", "share of MACs"]:
        table.add_column(name, justify="right")
    for unit in graph.units:
        table.add_row(
            unit.name,
            str(unit.channels),
            *([] if widths is None else [str(widths.get(unit.name, unit.channels))]),
            short_choices(unit.choices) if unit.searchable else unit.reason,
            *([str(len(unit.choices))] if groups else []),
            str(len(unit.members)),
            f"{shares[unit.name]:.1%}",
        )
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    console.print("  ".join(f"{name} {value:,}" for name, value in totals.items()))
    console.print(
        f"{len(graph.units)} units, {len(graph.searchable)} searchable; "
        f"{searched:.1%} of the MACs in layers with a searchable unit"
    )
    if proof is not None:
        console.print(
            f"proof: {proof.structures} structures against zeroed channels in {proof.dtype}: "
            f"outputs within {proof.forward_error:.1e}, gradients within "
            f"{proof.gradient_error:.1e}, {len(proof.refuted)} units refuted"
        )


def short_choices(choices: Sequence[int]) -> str:
    """Widths in few words: ``32…256 by 32``."""
    steps = {b - a for a, b in pairwise(choices)}
    if len(choices) < 4 or len(steps) > 1:
        return " ".join(map(str, choices))
    return f"{choices[0]}…{choices[-1]}" + (f" by {min(steps)}" if min(steps) > 1 else "")


def unit_shares(graph: ChannelGraph) -> dict[str, float]:
    """Unit name -> share of the MACs that vanish with it: those of the layers at its ends."""
    return {unit.name: _share(graph, {number}) for number, unit in enumerate(graph.units)}


def searchable_share(graph: ChannelGraph) -> float:
    """Share of the MACs that depend on the width of any searchable unit."""
    return _share(graph, {number for number, unit in enumerate(graph.units) if unit.searchable})


def _share(graph: ChannelGraph, units: Set[int]) -> float:
    total = _macs_without(graph, set())
    return (total - _macs_without(graph, units)) / total if total else 0.0


def _macs_without(graph: ChannelGraph, units: Set[int]) -> int:
    """MACs of the whole network without all channels of these units, by number."""
    gone = torch.tensor(sorted(units), dtype=torch.int64)
    return sum(
        layer.factor * prod(int((~torch.isin(a.unit, gone)).sum()) for a in layer.axes)
        for layer in graph.layers
    )
