"""The command that draws what searches found."""

from __future__ import annotations

from pathlib import Path

import click

from dmcp.errors import ConfigError
from dmcp.report import draw_search, find_searches


@click.command()
@click.argument("runs", metavar="RUN...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the figures of all runs, a folder for each.  [report/ in each run]",
)
@click.option("--every-unit", is_flag=True, help="Show the channels of all units, not of twelve.")
def report(runs: tuple[Path, ...], output: Path | None, every_unit: bool) -> None:
    """Draw the searches of finished runs, as PNG and SVG.

    The costs of structures drawn from the chains, the channels of those that meet the budget, and
    the widths of the structures that were found.
    """
    targets = {run: output / run.resolve().name if output else run / "report" for run in runs}
    if len(set(targets.values())) < len(targets):
        raise ConfigError("--output needs runs of different names: each gets a folder of its name")
    searches = {run: find_searches(run) for run in runs}
    for run, found in searches.items():
        for name, search in found.items():
            for path in draw_search(search, targets[run] / name, every_unit=every_unit):
                print(path)
