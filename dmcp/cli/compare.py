"""What a person sees of a comparison: progress and tables."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.box import MARKDOWN
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dmcp.cli.display import short
from dmcp.compare import DENSE, TRACKS, Comparison, Row

_COLUMNS: dict[str, JustifyMethod] = {
    "budget": "right",
    "method": "left",
    "top-1 %": "right",
    "seeds": "right",
    "MACs": "right",
    "params": "right",
    "ms": "right",
    "searched: forward": "right",
    "backward": "right",
    "s": "right",
}

_WIDTH = 120
"""Columns of the terminal that a table needs; where there are fewer its lines wrap as they are."""


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


class CompareDisplay:
    """A progress bar of tasks; nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self.progress.add_task("", total=None)

    def __enter__(self) -> CompareDisplay:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        self.progress.update(self._task, completed=done, total=total, description=name)


def show_comparison(comparison: Comparison) -> None:
    """Print the tables on stdout, one for each track, and what is missing on stderr."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _WIDTH)
    tracks = dict.fromkeys(row.track for row in comparison.rows if row.track)
    dense = [row for row in comparison.rows if row.method == DENSE]
    for track in tracks or [None]:
        rows = [row for row in comparison.rows if track and row.track == track]
        if track:
            console.print(f"Track {track}: {TRACKS[track]}")
        console.print(_table([*dense, *rows]))
    for task, reason in comparison.failed.items():
        click.echo(f"dmcp: {task}: {reason}", err=True)
    if comparison.left:
        click.echo(f"dmcp: {comparison.left} tasks are left; the same command continues", err=True)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=MARKDOWN)
    for name, justify in _COLUMNS.items():
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        top1 = f"{100 * row.top1:.2f}"
        deviation = f" ± {100 * row.top1_deviation:.2f}" if row.seeds > 1 else ""
        spent = [short(row.forward), short(row.backward), f"{row.search_seconds:.0f}"]
        table.add_row(
            row.budget or "–",
            row.method,
            top1 + deviation,
            str(row.seeds),
            short(row.macs),
            short(row.params),
            f"{row.latency_ms:.2f}",
            *(spent if row.budget else ["–"] * 3),
        )
    return table
