"""The command that compares methods, and what a person sees of it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import MARKDOWN
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dmcp import methods
from dmcp.cli.display import short
from dmcp.cli.options import (
    compute_options,
    computed,
    device_of,
    exclude_option,
    given,
    grid_options,
    image_size_option,
    model_options,
    network_of,
    output_options,
    recipe_of,
)
from dmcp.compare import (
    TRACKS,
    CompareConfig,
    Comparison,
    Place,
    Row,
    draw_comparison,
    run_compare,
)
from dmcp.errors import ConfigError, DmcpError, MissingDependencyError
from dmcp.report import DENSE, beside_published

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


def _parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


@click.command()
@model_options
@click.option("--data", default="digits", help="'digits', or a folder with train/ and test/.")
@image_size_option
@click.option("--holdout", type=float, default=0.1, help="Share of images that judge structures.")
@click.option("--batch-size", type=int, help="Images per step.  [recipe]")
@click.option(
    "--methods",
    "names",
    default="all",
    help=f"all, or of {', '.join(methods.names(variants=True))}.",
)
@click.option("--comparison", help=f"Named methods instead: {', '.join(methods.COMPARISONS)}.")
@click.option("--budgets", default="50%,25%", help="MACs of the structures.")
@click.option("--seeds", default="0,1,2", help="Repetitions of everything.")
@click.option("--track", "tracks", default="A", help="Of A (scratch), B (inherit), C (distil).")
@click.option(
    "--preset", type=click.Choice(methods.PRESETS), help="Hyper-parameters.  [by the recipe]"
)
@grid_options
@exclude_option
@click.option("--search-epochs", type=int, help="[recipe]")
@click.option("--retrain-epochs", type=int, help="[recipe]")
@compute_options
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Processes side by side.")
@click.option("--minutes", type=float, help="Stop after so many; the same command continues.")
@click.option("--workers", type=int, default=0, help="Processes that decode images, for each job.")
@click.option("--checkpoint-every", type=int, default=100, help="Steps between checkpoints.")
@output_options
def compare(
    names: str,
    comparison: str | None,
    minutes: float | None,
    output: Path,
    jobs: int,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare pruning methods under one protocol: searches, trainings, a table and pictures.

    Lists are separated by commas. Run the same command again to continue; methods, seeds and tracks
    may be added to it. The tables hold what the command names.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare begins its own processes: use --jobs instead of torchrun")
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes must be positive, got {minutes:g}")
    if comparison is not None and names != "all":
        raise ConfigError("--methods and --comparison exclude each other")
    if comparison is not None:
        chosen = list(methods.comparison(comparison))
    else:
        chosen = list(methods.names()) if names == "all" else _parts(names)
    config = _compare_config(chosen, options)
    device = device_of(options["device"])
    threads = max(1, torch.get_num_threads() // jobs)
    place = Place(output, device, threads, options["workers"], options["checkpoint_every"])
    seconds = None if minutes is None else 60 * minutes
    with CompareDisplay(quiet=quiet or as_json) as display:
        result = run_compare(config, place, jobs=jobs, seconds=seconds, progress=display)
    if as_json:
        print(json.dumps(asdict(result)))
    elif not quiet:
        show_comparison(result)
        show_published(result.rows, config.network.model)
    try:
        draw_comparison(result, output / "report")
    except MissingDependencyError as error:
        click.echo(f"dmcp: {error}", err=True)
    if result.failed:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in result.failed.items())
        raise DmcpError(f"{len(result.failed)} tasks failed: {reasons}")


def _compare_config(chosen: list[str], options: dict[str, Any]) -> CompareConfig:
    recipe = recipe_of(options)
    network = network_of(recipe, options | {"seed": 0})
    recipe = replace(
        recipe,
        search=computed(recipe.search, options),
        retrain=computed(recipe.retrain, options),
        search_epochs=given(options["search_epochs"], recipe.search_epochs),
        retrain_epochs=given(options["retrain_epochs"], recipe.retrain_epochs),
        groups=given(options["groups"], recipe.groups),
        divisor=given(options["divisor"], recipe.divisor),
    )
    try:
        seeds = [int(seed) for seed in _parts(options["seeds"])]
    except ValueError:
        raise ConfigError(f"--seeds must be numbers, got {options['seeds']!r}") from None
    return CompareConfig(
        network=network,
        recipe=recipe,
        methods=chosen,
        budgets=_parts(options["budgets"]),
        seeds=seeds,
        tracks=_parts(options["tracks"]),  # type: ignore[arg-type]
        preset=options["preset"] or ("paper" if recipe.budget else "short"),
        exclude=list(options["exclude"]),
    )


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
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        self.progress.start()  # not before there is something to show: bad input is one line
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
    if comparison.left:
        click.echo(f"dmcp: {comparison.left} tasks are left; the same command continues", err=True)


def show_published(rows: Sequence[Row], network: str) -> None:
    """Print the rows that the paper has something to hold against: the same network at nearly the
    same MACs, distilled if the track is; nothing where there are none."""
    measured = [{"network": network, **asdict(row)} for row in rows]
    pairs = [
        (row, published)
        for row, record in zip(rows, measured, strict=True)
        for beside in beside_published([record])
        if (published := beside.published) and published.distilled == (row.track == "C")
    ]
    if not pairs:
        return
    table = Table(box=MARKDOWN)
    for name in ("method", "track", "MACs", "top-1 %", "published", "MACs", "top-1 %"):
        table.add_column(name, no_wrap=True)
    for row, published in pairs:
        cells = [row.method, row.track or "–", short(row.macs), f"{100 * row.top1:.2f}"]
        of_paper = [published.method, short(published.macs), f"{published.top1:.1f}"]
        table.add_row(*cells, *of_paper)
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, _WIDTH)
    console.print("Beside the paper's results on ImageNet")
    console.print(table)


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
