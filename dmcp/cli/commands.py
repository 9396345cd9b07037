"""The commands."""

from __future__ import annotations

import contextlib
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from dmcp.cli.bench import bench
from dmcp.cli.compare import compare
from dmcp.cli.display import ProgressDisplay, show_graph, show_rows
from dmcp.cli.export import export
from dmcp.cli.options import (
    compute_options,
    computed,
    device_of,
    example_of,
    exclude_option,
    given,
    grid_options,
    image_size_option,
    machine_options,
    model_options,
    network_of,
    network_options,
    output_options,
    recipe_of,
)
from dmcp.cli.picture import check_picture, write_picture
from dmcp.cli.report import report
from dmcp.cli.structure import FORMS, structure_of
from dmcp.cost import TABLE
from dmcp.errors import ConfigError, SearchWarning
from dmcp.graph import trace
from dmcp.runs import (
    Machine,
    RunFolder,
    SearchConfig,
    TrainConfig,
    run_eval,
    run_search,
    run_train,
)
from dmcp.runs.config import ARCH_DATA, RETRAIN
from dmcp.search import Budget, MarkovNet, SearchOptions
from dmcp.train import TrainOptions, World, init_from_env, shutdown

Command = Callable[..., None]
_StageOptions = TypeVar("_StageOptions", SearchOptions, TrainOptions)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="dmcp")
def commands() -> None:
    """Search how many channels each layer of a CNN keeps, and train the result.

    Under torchrun (torchrun --nproc-per-node=N -m dmcp …) search and train run in N processes.
    """


@commands.command()
@network_options
@click.option("--budget", help="MACs of the structure: '210M', '50%' or a number.  [recipe]")
@click.option("--budget-params", help="Bound on its parameters as well.")
@click.option("--budget-latency", help="Bound on its milliseconds as well: '5', '60%'.")
@click.option(
    "--latency-table",
    type=click.Path(path_type=Path),
    help="What `dmcp bench latency` measured.  [the run's own, else latency.json]",
)
@grid_options
@click.option("--min-width", type=int, default=1, help="Smallest width.")
@exclude_option
@click.option("--search-epochs", type=int, help="[recipe]")
@click.option("--retrain-epochs", type=int, help="[recipe]")
@click.option(
    "--retrain", type=click.Choice(RETRAIN), default="scratch", help="Weights to start from."
)
@click.option(
    "--arch-data", type=click.Choice(ARCH_DATA), default="train", help="What α is trained on."
)
@click.option("--baselines/--no-baselines", default=True, help="Train dense and uniform as well.")
@compute_options
@machine_options
@output_options
def search(
    budget: str | None,
    budget_params: str | None,
    budget_latency: str | None,
    latency_table: Path | None,
    groups: int | None,
    divisor: int | None,
    search_epochs: int | None,
    retrain_epochs: int | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search a structure, retrain it, and compare it with the dense and the uniform network.

    Run the same command again to continue a run that was stopped.
    """
    recipe = recipe_of(options)
    network = network_of(recipe, options)
    bound = budget or recipe.budget
    if bound is None and budget_params is None and budget_latency is None:
        raise ConfigError(
            "search needs --budget, --budget-params, --budget-latency, or a recipe with a budget"
        )
    config = SearchConfig(
        network=network,
        budget=Budget(
            macs=_number(bound),
            params=_number(budget_params),
            latency_ms=_number(budget_latency),
            latency_table=latency_table or _held_table(output),
        ),
        search_epochs=given(search_epochs, recipe.search_epochs),
        retrain_epochs=given(retrain_epochs, recipe.retrain_epochs),
        search=computed(recipe.search, options),
        train=computed(recipe.retrain, options),
        groups=given(groups, recipe.groups),
        divisor=given(divisor, recipe.divisor),
        min_width=options["min_width"],
        exclude=list(options["exclude"]),
        retrain=options["retrain"],
        arch_data=options["arch_data"],
        baselines=options["baselines"],
    )
    with _machine(options, quiet=quiet or as_json) as machine:
        rows = run_search(config, RunFolder(output), machine)
    if machine.world.is_main:
        show_rows(rows, as_json=as_json, quiet=quiet)


@commands.command()
@network_options
@click.option("--epochs", type=int, help="[recipe]")
@click.option(
    "--widths",
    help=f"Train this structure: {FORMS}.",
)
@compute_options
@machine_options
@output_options
def train(
    epochs: int | None,
    widths: str | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a network, whole or pruned, from fresh weights.

    Run the same command again to continue a run that was stopped.
    """
    recipe = recipe_of(options)
    structure, options = structure_of(widths, options)
    config = TrainConfig(
        network=network_of(recipe, options),
        epochs=given(epochs, recipe.retrain_epochs),
        options=computed(recipe.retrain, options),
    )
    with _machine(options, quiet=quiet or as_json) as machine:
        rows = run_train(config, RunFolder(output), machine, structure)
    if machine.world.is_main:
        show_rows(rows, as_json=as_json, quiet=quiet)


@commands.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--network", help="dmcp, uniform, dense or pruned.  [all of the run]")
@click.option("--model", help="Of the run, if it is <file>.py:<function>: no run folder runs code.")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--workers", type=int, default=0, help="Processes that decode images.")
@output_options
def evaluate(
    run: Path,
    network: str | None,
    model: str | None,
    device: str | None,
    workers: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Evaluate the trained networks of a finished run on its test images."""
    machine = Machine(World.single(device_of(device)), workers)
    show_rows(run_eval(RunFolder(run), machine, network, model), as_json=as_json, quiet=quiet)


@commands.command()
@model_options
@click.option("--data", help="As for search.  [none: RGB images, 224 pixels wide; 1000 classes]")
@image_size_option
@click.option("--batch", type=click.IntRange(min=1), default=2, help="Images to trace with.")
@grid_options
@click.option("--min-width", type=int, help="Smallest width.")
@exclude_option
@click.option("--widths", help="Show this structure's costs: as for train.")
@click.option(
    "--graph", "picture", type=click.Path(path_type=Path), help="Draw it: a file .dot or .svg."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    groups: int | None,
    divisor: int | None,
    min_width: int | None,
    widths: str | None,
    picture: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """List the channel units of a network, the widths they may take, and their costs.

    The widths are those of a search's grid if an option or a recipe gives one, else all.
    """
    if picture is not None:
        check_picture(picture)
    recipe = recipe_of(options)
    structure, options = structure_of(widths, options)
    model, example = example_of(recipe, options)
    asked = bool(options["recipe"]) or (groups, divisor, min_width) != (None, None, None)
    graph = trace(model, example, exclude=options["exclude"])
    kept = None if structure is None else structure(graph).widths
    if asked:
        grid = (given(groups, recipe.groups), given(divisor, recipe.divisor), given(min_width, 1))
        graph = MarkovNet(model, None, *grid, graph=graph).graph
    show_graph(graph, kept, groups=asked, as_json=as_json)
    if picture is not None:
        write_picture(graph, picture)


@contextlib.contextmanager
def _machine(options: dict[str, Any], *, quiet: bool) -> Iterator[Machine]:
    world = init_from_env(device_of(options["device"]))
    try:
        machine = Machine(
            world,
            options["workers"],
            options["checkpoint_every"],
            options["log_every"],
            command=_command(click.get_current_context().obj),
        )
        if quiet or not world.is_main:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SearchWarning)
                yield machine
        else:
            with ProgressDisplay() as display:
                yield replace(machine, watcher=display)
    finally:
        shutdown()


def _command(arguments: Sequence[str]) -> str:
    """The shell line that was given."""
    workers = os.environ.get("LOCAL_WORLD_SIZE")
    if workers is None:
        return shlex.join(["dmcp", *arguments])
    nodes = int(os.environ["WORLD_SIZE"]) // int(workers)
    spread = [f"--nnodes={nodes}"] if nodes > 1 else []
    torchrun = ["torchrun", *spread, f"--nproc-per-node={workers}", "-m", "dmcp"]
    return shlex.join([*torchrun, *arguments])


def _held_table(output: Path) -> Path:
    """The latency table that a run was begun with, else the one that was measured last."""
    held = output / TABLE
    return held if held.exists() else Path(TABLE)


def _number(bound: str | None) -> str | float | None:
    """A bound as the budget takes it: a bare number is one, the rest are strings with a suffix."""
    try:
        return None if bound is None else float(bound)
    except ValueError:
        return bound


commands.add_command(bench)
commands.add_command(compare)
commands.add_command(export)
commands.add_command(report)
