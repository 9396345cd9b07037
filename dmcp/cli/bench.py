"""``dmcp bench``: measuring on the machine at hand."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from dmcp.cli.options import (
    device_of,
    example_of,
    exclude_option,
    given,
    grid_options,
    image_size_option,
    model_options,
    output_options,
    recipe_of,
)
from dmcp.cost import TABLE, LatencyTable, cost
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph, trace
from dmcp.latency import RUNTIMES, Runtime, measure_latency
from dmcp.search import MarkovNet
from dmcp.train.checkpoint import write_atomically


@click.group()
def bench() -> None:
    """Measure how fast networks are on this machine."""


@bench.command()
@model_options
@click.option("--data", help="As for search.  [none: RGB images, 224 pixels wide; 1000 classes]")
@image_size_option
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Images at a time.")
@grid_options
@click.option("--min-width", type=int, default=1, help="Smallest width.")
@exclude_option
@click.option("--runtime", type=click.Choice(RUNTIMES), default="eager", help="What runs it.")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [PyTorch's]")
@click.option("--points", type=click.IntRange(min=2), default=5, help="Widths per unit.")
@click.option("--rounds", type=click.IntRange(min=2), default=15, help="Repeats of everything.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder of timings.  [~/.cache/dmcp/latency]"
)
@click.option("--output", type=click.Path(path_type=Path), default=TABLE, help="File to write.")
@output_options
def latency(
    batch: int,
    groups: int | None,
    divisor: int | None,
    min_width: int,
    runtime: Any,
    device: str | None,
    threads: int | None,
    points: int,
    rounds: int,
    cache: Path | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure every layer of a network at some widths, for budgets of latency.

    What was measured before on this machine is not measured again: an interrupted command
    continues, and a second network costs what is new in it.
    """
    if not output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {str(output.parent)!r}")
    recipe = recipe_of(options)
    place = Runtime(runtime, device_of(device), given(threads, torch.get_num_threads()))
    model, example = example_of(recipe, {**options, "batch": batch})
    # As networks are searched and trained.
    model = model.eval().to(place.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    example = example.to(place.device).to(memory_format=torch.channels_last)
    graph = trace(model, example, exclude=options["exclude"])
    grid = (given(groups, recipe.groups), given(divisor, recipe.divisor), min_width)
    graph = MarkovNet(model, None, *grid, graph=graph).graph
    with Progress(console=Console(stderr=True), disable=quiet or as_json) as progress:
        task = progress.add_task("structures", total=None)
        table = measure_latency(
            graph,
            example,
            place,
            points=points,
            rounds=rounds,
            cache=cache,
            on_step=lambda done, total, _: progress.update(task, completed=done, total=total),
        )
    write_atomically(output, (json.dumps(table.to_json()) + "\n").encode())
    shown = _summary(graph, table)
    if as_json:
        print(json.dumps({"table": str(output), "setting": table.setting, **shown}))
    elif not quiet:
        console = Console(markup=False, highlight=False, soft_wrap=True)
        console.print(", ".join(f"{key} {value}" for key, value in table.setting.items()))
        console.print(
            f"full network {shown['full_ms']:.3g} ms, narrowest {shown['narrowest_ms']:.3g} ms; "
            f"{shown['terms']} parts, together within {shown['median_error']:.1%} (median) of "
            f"{len(table.checks)} whole networks\nwritten to {output}"
        )


def _summary(graph: ChannelGraph, table: LatencyTable) -> dict[str, float]:
    function = cost(graph, "latency", table)
    errors = [abs(check["predicted"] / check["measured"] - 1) for check in table.checks]
    return {
        "terms": len(table.terms),
        "full_ms": function.of({}),
        "narrowest_ms": function.of({unit.name: unit.choices[0] for unit in graph.units}),
        "median_error": median(errors),
    }
