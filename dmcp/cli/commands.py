"""The commands."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from dmcp import models, recipes
from dmcp.cli.display import ProgressDisplay, show_graph, show_rows
from dmcp.cost import cost
from dmcp.data import open_data
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.recipes import Recipe
from dmcp.runs import (
    Machine,
    NetworkConfig,
    RunFolder,
    SearchConfig,
    TrainConfig,
    run_eval,
    run_search,
    run_train,
)
from dmcp.runs.config import ARCH_DATA, RETRAIN
from dmcp.runs.pipeline import build_network
from dmcp.search import Budget, MarkovNet
from dmcp.train import World, init_from_env, shutdown

Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="dmcp")
def commands() -> None:
    """Search how many channels each layer of a CNN keeps, and train the result.

    Under torchrun (torchrun --nproc-per-node=N -m dmcp …) search and train run in N processes.
    """


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_network_options = _options(
    click.option("--model", help=f"One of {', '.join(models.names())}."),
    click.option("--width", type=float, help="Width multiplier of the whole network."),
    click.option("--data", default="digits", help="'digits', or a folder with train/ and test/."),
    click.option("--image-size", type=int, help="Side of the images in pixels.  [the data's own]"),
    click.option("--holdout", type=float, default=0.0, help="Share of training images kept aside."),
    click.option("--recipe", help=f"One of {', '.join(recipes.names())}.  [by the data]"),
    click.option("--batch-size", type=int, help="Images per step over all processes.  [recipe]"),
    click.option("--seed", type=int, default=0),
)
_machine_options = _options(
    click.option("--output", type=click.Path(path_type=Path), required=True, help="Run folder."),
    click.option("--device", help="cpu or cuda.  [cuda where there is one]"),
    click.option("--workers", type=int, default=0, help="Processes that decode images."),
    click.option("--sync-bn", is_flag=True, help="Batch norm over all processes' images."),
    click.option("--checkpoint-every", type=int, default=100, help="Steps between checkpoints."),
    click.option("--log-every", type=int, default=10, help="Steps between records."),
)
_output_options = _options(
    click.option("--quiet", is_flag=True, help="Print nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, nothing else."),
)


@commands.command()
@_network_options
@click.option("--budget", help="MACs of the structure: '210M', '50%' or a number.  [recipe]")
@click.option("--budget-params", help="Bound on its parameters as well.")
@click.option("--groups", type=int, help="Channel groups per unit.  [recipe]")
@click.option("--divisor", type=int, help="Widths are multiples of it; 1: the paper's.  [recipe]")
@click.option("--min-width", type=int, default=1, help="Smallest width.")
@click.option("--search-epochs", type=int, help="[recipe]")
@click.option("--retrain-epochs", type=int, help="[recipe]")
@click.option(
    "--retrain", type=click.Choice(RETRAIN), default="scratch", help="Weights to start from."
)
@click.option(
    "--arch-data", type=click.Choice(ARCH_DATA), default="train", help="What α is trained on."
)
@click.option("--baselines/--no-baselines", default=True, help="Train dense and uniform as well.")
@_machine_options
@_output_options
def search(
    budget: str | None,
    budget_params: str | None,
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
    recipe = _recipe(options)
    network = _network(recipe, options)
    bound = budget or recipe.budget
    if bound is None and budget_params is None:
        raise ConfigError("search needs --budget, --budget-params, or a recipe with a budget")
    config = SearchConfig(
        network=network,
        budget=Budget(macs=_number(bound), params=_number(budget_params)),
        search_epochs=_or(search_epochs, recipe.search_epochs),
        retrain_epochs=_or(retrain_epochs, recipe.retrain_epochs),
        search=recipe.search,
        train=recipe.retrain,
        groups=_or(groups, recipe.groups),
        divisor=_or(divisor, recipe.divisor),
        min_width=options["min_width"],
        retrain=options["retrain"],
        arch_data=options["arch_data"],
        baselines=options["baselines"],
    )
    with _machine(options, quiet=quiet or as_json) as machine:
        rows = run_search(config, RunFolder(output), machine)
    if machine.world.is_main:
        show_rows(rows, as_json=as_json, quiet=quiet)


@commands.command()
@_network_options
@click.option("--epochs", type=int, help="[recipe]")
@click.option(
    "--widths",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="widths.json of a search: train this structure instead of the whole network.",
)
@_machine_options
@_output_options
def train(
    epochs: int | None,
    widths: Path | None,
    output: Path,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a network, whole or pruned, from fresh weights.

    Run the same command again to continue a run that was stopped.
    """
    recipe = _recipe(options)
    config = TrainConfig(
        network=_network(recipe, options),
        epochs=_or(epochs, recipe.retrain_epochs),
        options=recipe.retrain,
        widths=_read_widths(widths) if widths else None,
    )
    with _machine(options, quiet=quiet or as_json) as machine:
        rows = run_train(config, RunFolder(output), machine)
    if machine.world.is_main:
        show_rows(rows, as_json=as_json, quiet=quiet)


@commands.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--network", help="dmcp, uniform, dense or pruned.  [all of the run]")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--workers", type=int, default=0, help="Processes that decode images.")
@_output_options
def evaluate(
    run: Path, network: str | None, device: str | None, workers: int, quiet: bool, as_json: bool
) -> None:
    """Evaluate the trained networks of a finished run on its test images."""
    machine = Machine(World.single(_device(device)), workers)
    show_rows(run_eval(RunFolder(run), machine, network), as_json=as_json, quiet=quiet)


@commands.command()
@_network_options
@click.option("--groups", type=int, help="Channel groups per unit.  [recipe]")
@click.option("--divisor", type=int, help="Widths are multiples of it; 1: the paper's.  [recipe]")
@click.option("--min-width", type=int, default=1, help="Smallest width.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(groups: int | None, divisor: int | None, as_json: bool, **options: Any) -> None:
    """List the channel units of a network, the widths a search may give them, and their costs."""
    recipe = _recipe(options)
    network = _network(recipe, options)
    data = open_data(network.data, network.image_size, network.holdout, network.seed)
    model = build_network(
        network.model, network.model_options, data.channels, data.image_size, data.num_classes
    )
    example = torch.zeros(2, data.channels, data.image_size, data.image_size)
    grid = (_or(groups, recipe.groups), _or(divisor, recipe.divisor), options["min_width"])
    graph = MarkovNet(model, example, *grid).graph
    totals = {metric: cost(graph, metric).of({}) for metric in ("macs", "params", "memory")}
    show_graph(graph, _shares(graph), totals, as_json=as_json)


def _recipe(options: dict[str, Any]) -> Recipe:
    """The recipe asked for, or the one that suits the data."""
    if options["recipe"]:
        return recipes.get(options["recipe"])
    return recipes.get("digits" if options["data"] == "digits" else "cifar")


def _network(recipe: Recipe, options: dict[str, Any]) -> NetworkConfig:
    model = options["model"] or recipe.model
    if model is None:
        raise ConfigError(f"--model is missing: one of {', '.join(models.names())}")
    width = {} if options["width"] is None else {"width": options["width"]}
    return NetworkConfig(
        model=model,
        model_options={**(recipe.model_options if model == recipe.model else {}), **width},
        data=options["data"],
        image_size=options["image_size"],
        holdout=options["holdout"],
        batch_size=_or(options["batch_size"], recipe.batch_size),
        crop_scale=recipe.crop_scale,
        seed=options["seed"],
        sync_bn=options.get("sync_bn", False),
    )


@contextlib.contextmanager
def _machine(options: dict[str, Any], *, quiet: bool) -> Iterator[Machine]:
    world = init_from_env(_device(options["device"]))
    try:
        machine = Machine(
            world, options["workers"], options["checkpoint_every"], options["log_every"]
        )
        if quiet or not world.is_main:
            yield machine
        else:
            with ProgressDisplay() as display:
                yield replace(machine, watcher=display)
    finally:
        shutdown()


def _device(name: str | None) -> str:
    """The device asked for, or CUDA where there is a GPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device must be cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, but torch finds no CUDA GPU")
    return name


def _number(bound: str | None) -> str | float | None:
    """A bound as the budget takes it: a bare number is one, the rest are strings with a suffix."""
    try:
        return None if bound is None else float(bound)
    except ValueError:
        return bound


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _read_widths(path: Path) -> dict[str, int]:
    try:
        widths = json.loads(path.read_text())["widths"]
        return {str(name): width for name, width in widths.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a widths.json") from None


def _shares(graph: ChannelGraph) -> dict[str, float]:
    """Share of the MACs that vanish with each unit: those of the layers at its ends."""
    macs = cost(graph, "macs")
    total = macs.of({})
    products = macs.quadratic + macs.quadratic.T - macs.quadratic.diag().diag()
    full = torch.tensor([unit.channels for unit in graph.units])
    touched = full * macs.linear + full * (products @ full)
    return {unit.name: int(t) / total for unit, t in zip(graph.units, touched, strict=True)}
