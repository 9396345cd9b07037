"""The command that writes the report of runs."""

from __future__ import annotations

from pathlib import Path

import click

from dmcp.errors import ConfigError
from dmcp.report import write_page


@click.command()
@click.argument("runs", metavar="RUN...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the page, with a folder for the figures of each run.  [report/ in each run]",
)
@click.option("--every-unit", is_flag=True, help="Show the channels of all units, not of twelve.")
def report(runs: tuple[Path, ...], output: Path | None, every_unit: bool) -> None:
    """Write a page about runs, and its figures as PNG and SVG.

    Losses, costs against their budgets, the chains over time, the widths that were found, the
    distribution of sampled structures, accuracy against cost with the spread over seeds, what it
    all cost, and the command to repeat it. Runs may still be going; a folder of compare is welcome.
    """
    names = {run.resolve().name for run in runs}
    if output is not None and len(names) < len(runs):
        raise ConfigError("--output needs runs of different names: each gets a folder of its name")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("the same run is named twice")
    for path in write_page(runs, output, every_unit=every_unit):
        print(path)
