"""The commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn

from dmcp import methods, models, recipes
from dmcp.cli.compare import CompareDisplay, parts, show_comparison
from dmcp.cli.display import ProgressDisplay, show_graph, show_rows
from dmcp.cli.picture import check_picture, write_picture
from dmcp.cli.report import report
from dmcp.compare import CompareConfig, Place, run_compare
from dmcp.data import open_data
from dmcp.errors import ConfigError, DmcpError
from dmcp.graph import trace
from dmcp.models.load import FORMS
from dmcp.models.structures import structures
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
from dmcp.runs.job import build_network
from dmcp.search import Budget, MarkovNet, SearchOptions
from dmcp.train import TrainOptions, World, init_from_env, shutdown
from dmcp.train.precision import PRECISIONS

Command = Callable[..., None]
_StageOptions = TypeVar("_StageOptions", SearchOptions, TrainOptions)


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


_model_options = _options(
    click.option("--model", help=f"One of {', '.join(models.names())}, {FORMS}."),
    click.option("--width", type=float, help="Width multiplier of the whole network."),
    click.option("--recipe", help=f"One of {', '.join(recipes.names())}.  [by the data]"),
)
_image_size_option = click.option(
    "--image-size",
    "--size",
    "image_size",
    type=click.IntRange(min=1),
    help="Side of the images in pixels.  [the data's own]",
)
_network_options = _options(
    _model_options,
    click.option("--data", default="digits", help="'digits', or a folder with train/ and test/."),
    _image_size_option,
    click.option("--holdout", type=float, default=0.0, help="Share of training images kept aside."),
    click.option("--batch-size", type=int, help="Images per step over all processes.  [recipe]"),
    click.option("--seed", type=int, default=0),
)
_grid_options = _options(
    click.option("--groups", type=int, help="Channel groups per unit.  [recipe]"),
    click.option(
        "--divisor", type=int, help="Widths are multiples of it; 1: the paper's.  [recipe]"
    ),
)
_machine_options = _options(
    click.option("--output", type=click.Path(path_type=Path), required=True, help="Run folder."),
    click.option("--device", help="cpu or cuda.  [cuda where there is one]"),
    click.option("--workers", type=int, default=0, help="Processes that decode images."),
    click.option("--sync-bn", is_flag=True, help="Batch norm over all processes' images."),
    click.option("--checkpoint-every", type=int, default=100, help="Steps between checkpoints."),
    click.option("--log-every", type=int, default=10, help="Steps between records."),
)
_compute_options = _options(
    click.option(
        "--precision", type=click.Choice(PRECISIONS), help="Precision of activations.  [recipe]"
    ),
    click.option(
        "--micro-batches",
        type=int,
        help="Parts a batch is computed in, to save memory.  [recipe]",
    ),
)
_exclude_option = click.option(
    "--exclude", multiple=True, help="Leave the units of these modules alone: 'head.*', say."
)
_output_options = _options(
    click.option("--quiet", is_flag=True, help="Print nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, nothing else."),
)


@commands.command()
@_network_options
@click.option("--budget", help="MACs of the structure: '210M', '50%' or a number.  [recipe]")
@click.option("--budget-params", help="Bound on its parameters as well.")
@_grid_options
@click.option("--min-width", type=int, default=1, help="Smallest width.")
@_exclude_option
@click.option("--search-epochs", type=int, help="[recipe]")
@click.option("--retrain-epochs", type=int, help="[recipe]")
@click.option(
    "--retrain", type=click.Choice(RETRAIN), default="scratch", help="Weights to start from."
)
@click.option(
    "--arch-data", type=click.Choice(ARCH_DATA), default="train", help="What α is trained on."
)
@click.option("--baselines/--no-baselines", default=True, help="Train dense and uniform as well.")
@_compute_options
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
        search=_computed(recipe.search, options),
        train=_computed(recipe.retrain, options),
        groups=_or(groups, recipe.groups),
        divisor=_or(divisor, recipe.divisor),
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
@_network_options
@click.option("--epochs", type=int, help="[recipe]")
@click.option(
    "--widths",
    help="Train this structure: widths.json of a search, or the name of a published one.",
)
@_compute_options
@_machine_options
@_output_options
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
    recipe = _recipe(options)
    structure, options = _structure(widths, options)
    config = TrainConfig(
        network=_network(recipe, options),
        epochs=_or(epochs, recipe.retrain_epochs),
        options=_computed(recipe.retrain, options),
        widths=structure,
    )
    with _machine(options, quiet=quiet or as_json) as machine:
        rows = run_train(config, RunFolder(output), machine)
    if machine.world.is_main:
        show_rows(rows, as_json=as_json, quiet=quiet)


@commands.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--network", help="dmcp, uniform, dense or pruned.  [all of the run]")
@click.option("--model", help="Of the run, if it is <file>.py:<function>: no run folder runs code.")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--workers", type=int, default=0, help="Processes that decode images.")
@_output_options
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
    machine = Machine(World.single(_device(device)), workers)
    show_rows(run_eval(RunFolder(run), machine, network, model), as_json=as_json, quiet=quiet)


@commands.command()
@_model_options
@click.option("--data", help="As for search.  [none: RGB images, 224 pixels wide; 1000 classes]")
@_image_size_option
@click.option("--batch", type=click.IntRange(min=1), default=2, help="Images to trace with.")
@_grid_options
@click.option("--min-width", type=int, help="Smallest width.")
@_exclude_option
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
    recipe = _recipe(options)
    structure, options = _structure(widths, options)
    model, example = _example(recipe, options)
    asked = bool(options["recipe"]) or (groups, divisor, min_width) != (None, None, None)
    graph = trace(model, example, exclude=options["exclude"])
    if asked:
        grid = (_or(groups, recipe.groups), _or(divisor, recipe.divisor), _or(min_width, 1))
        graph = MarkovNet(model, None, *grid, graph=graph).graph
    show_graph(graph, structure, groups=asked, as_json=as_json)
    if picture is not None:
        write_picture(graph, picture)


def _recipe(options: dict[str, Any]) -> Recipe:
    """The recipe asked for, or the one that suits the data."""
    if options["recipe"]:
        return recipes.get(options["recipe"])
    return recipes.get("digits" if options["data"] == "digits" else "cifar")


def _model(recipe: Recipe, options: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Name and keyword arguments of the network asked for, or of the recipe's."""
    model = options["model"] or recipe.model
    if model is None:
        raise ConfigError(f"--model is missing: one of {', '.join(models.names())}, {FORMS}")
    width = {} if options["width"] is None else {"width": options["width"]}
    return model, {**(recipe.model_options if model == recipe.model else {}), **width}


def _example(recipe: Recipe, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network to inspect, and a batch of images for it."""
    channels, size, classes = 3, options["image_size"] or 224, 1000
    if options["data"] is not None:
        data = open_data(options["data"], options["image_size"], holdout=0.0)
        channels, size, classes = data.channels, data.image_size, data.num_classes
    model = build_network(*_model(recipe, options), channels, size, classes)
    return model, torch.zeros(options["batch"], channels, size, size)


def _network(recipe: Recipe, options: dict[str, Any]) -> NetworkConfig:
    model, model_options = _model(recipe, options)
    return NetworkConfig(
        model=model,
        model_options=model_options,
        data=options["data"],
        image_size=options["image_size"],
        holdout=options["holdout"],
        batch_size=_or(options["batch_size"], recipe.batch_size),
        crop_scale=recipe.crop_scale,
        seed=options["seed"],
        sync_bn=options.get("sync_bn", False),
    )


def _computed(recipe: _StageOptions, options: dict[str, Any]) -> _StageOptions:
    """The recipe's options of a stage, computed in the way asked for."""
    asked = {name: options[name] for name in ("precision", "micro_batches")}
    return replace(recipe, **{name: value for name, value in asked.items() if value is not None})


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


def _structure(
    widths: str | None, options: dict[str, Any]
) -> tuple[dict[str, int] | None, dict[str, Any]]:
    """The widths asked for, and the options with the network that a published structure prunes."""
    if widths is None:
        return None, options
    if widths not in structures:
        return _read_widths(Path(widths)), options
    structure = structures[widths]
    pruned = {"model": structure.model, **structure.model_kwargs}
    for name, value in pruned.items():
        if options[name] not in (None, value):
            raise ConfigError(
                f"--{name} is {options[name]!r}, but structure {widths!r} prunes a network whose "
                f"{name} is {value!r}"
            )
    return dict(structure.widths), {**options, **pruned}


def _read_widths(path: Path) -> dict[str, int]:
    try:
        widths = json.loads(path.read_text())["widths"]
        return {str(name): width for name, width in widths.items()}
    except FileNotFoundError:
        raise ConfigError(
            f"--widths must be a widths.json or one of {', '.join(structures)}, "
            f"got {str(path)!r}: there is no such file"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a widths.json") from None


@commands.command()
@_model_options
@click.option("--data", default="digits", help="'digits', or a folder with train/ and test/.")
@_image_size_option
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
@_grid_options
@_exclude_option
@click.option("--search-epochs", type=int, help="[recipe]")
@click.option("--retrain-epochs", type=int, help="[recipe]")
@_compute_options
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder.")
@click.option("--device", help="cpu or cuda.  [cuda where there is one]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Processes side by side.")
@click.option("--minutes", type=float, help="Stop after so many; the same command continues.")
@click.option("--workers", type=int, default=0, help="Processes that decode images, for each job.")
@click.option("--checkpoint-every", type=int, default=100, help="Steps between checkpoints.")
@_output_options
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
    may be added to it.
    """
    if comparison is not None:
        chosen = list(methods.comparison(comparison))
    else:
        chosen = list(methods.names()) if names == "all" else parts(names)
    config = _compare_config(chosen, options)
    device = _device(options["device"])
    threads = max(1, (os.cpu_count() or 1) // jobs)
    place = Place(output, device, threads, options["workers"], options["checkpoint_every"])
    seconds = None if minutes is None else 60 * minutes
    with CompareDisplay(quiet=quiet or as_json) as display:
        result = run_compare(config, place, jobs=jobs, seconds=seconds, progress=display)
    if as_json:
        print(json.dumps(asdict(result)))
    elif not quiet:
        show_comparison(result)
    if result.failed:
        raise DmcpError(f"{len(result.failed)} tasks failed: {'; '.join(result.failed.values())}")


def _compare_config(chosen: list[str], options: dict[str, Any]) -> CompareConfig:
    recipe = _recipe(options)
    network = _network(recipe, options | {"seed": 0})
    recipe = replace(
        recipe,
        search=_computed(recipe.search, options),
        retrain=_computed(recipe.retrain, options),
        search_epochs=_or(options["search_epochs"], recipe.search_epochs),
        retrain_epochs=_or(options["retrain_epochs"], recipe.retrain_epochs),
        groups=_or(options["groups"], recipe.groups),
        divisor=_or(options["divisor"], recipe.divisor),
    )
    try:
        seeds = [int(seed) for seed in parts(options["seeds"])]
    except ValueError:
        raise ConfigError(f"--seeds must be numbers, got {options['seeds']!r}") from None
    return CompareConfig(
        network=network,
        recipe=recipe,
        methods=chosen,
        budgets=parts(options["budgets"]),
        seeds=seeds,
        tracks=parts(options["tracks"]),  # type: ignore[arg-type]
        preset=options["preset"] or ("paper" if recipe.budget else "short"),
        exclude=list(options["exclude"]),
    )


commands.add_command(report)
