"""Options that commands share, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from torch import Tensor, nn

from dmcp import models, recipes
from dmcp.data import open_data
from dmcp.errors import ConfigError
from dmcp.models.load import FORMS
from dmcp.recipes import Recipe
from dmcp.runs import NetworkConfig
from dmcp.runs.job import build_network
from dmcp.search import SearchOptions
from dmcp.train import TrainOptions
from dmcp.train.precision import PRECISIONS

Command = Callable[..., None]
_StageOptions = TypeVar("_StageOptions", SearchOptions, TrainOptions)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_options = _options(
    click.option("--model", help=f"One of {', '.join(models.names())}, {FORMS}."),
    click.option("--width", type=float, help="Width multiplier of the whole network."),
    click.option("--recipe", help=f"One of {', '.join(recipes.names())}.  [by the data]"),
)
image_size_option = click.option(
    "--image-size",
    "--size",
    "image_size",
    type=click.IntRange(min=1),
    help="Side of the images in pixels.  [the data's own]",
)
network_options = _options(
    model_options,
    click.option("--data", default="digits", help="'digits', or a folder with train/ and test/."),
    image_size_option,
    click.option("--holdout", type=float, default=0.0, help="Share of training images kept aside."),
    click.option("--batch-size", type=int, help="Images per step over all processes.  [recipe]"),
    click.option("--seed", type=int, default=0),
)
grid_options = _options(
    click.option("--groups", type=int, help="Channel groups per unit.  [recipe]"),
    click.option(
        "--divisor", type=int, help="Widths are multiples of it; 1: the paper's.  [recipe]"
    ),
)
machine_options = _options(
    click.option("--output", type=click.Path(path_type=Path), required=True, help="Run folder."),
    click.option("--device", help="cpu or cuda.  [cuda where there is one]"),
    click.option("--workers", type=int, default=0, help="Processes that decode images."),
    click.option("--sync-bn", is_flag=True, help="Batch norm over all processes' images."),
    click.option("--checkpoint-every", type=int, default=100, help="Steps between checkpoints."),
    click.option("--log-every", type=int, default=10, help="Steps between records."),
)
compute_options = _options(
    click.option(
        "--precision", type=click.Choice(PRECISIONS), help="Precision of activations.  [recipe]"
    ),
    click.option(
        "--micro-batches",
        type=int,
        help="Parts a batch is computed in, to save memory.  [recipe]",
    ),
)
exclude_option = click.option(
    "--exclude", multiple=True, help="Leave the units of these modules alone: 'head.*', say."
)
output_options = _options(
    click.option("--quiet", is_flag=True, help="Print nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, nothing else."),
)


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe asked for, or the one that suits the data."""
    if options["recipe"]:
        return recipes.get(options["recipe"])
    return recipes.get("digits" if options["data"] == "digits" else "cifar")


def model_of(recipe: Recipe, options: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Name and keyword arguments of the network asked for, or of the recipe's."""
    model = options["model"] or recipe.model
    if model is None:
        raise ConfigError(f"--model is missing: one of {', '.join(models.names())}, {FORMS}")
    width = {} if options["width"] is None else {"width": options["width"]}
    return model, {**(recipe.model_options if model == recipe.model else {}), **width}


def network_of(recipe: Recipe, options: dict[str, Any]) -> NetworkConfig:
    model, model_options = model_of(recipe, options)
    return NetworkConfig(
        model=model,
        model_options=model_options,
        data=options["data"],
        image_size=options["image_size"],
        holdout=options["holdout"],
        batch_size=given(options["batch_size"], recipe.batch_size),
        crop_scale=recipe.crop_scale,
        seed=options["seed"],
        sync_bn=options.get("sync_bn", False),
    )


def computed(recipe: _StageOptions, options: dict[str, Any]) -> _StageOptions:
    """The recipe's options of a stage, computed in the way asked for."""
    asked = {name: options[name] for name in ("precision", "micro_batches")}
    return replace(recipe, **{name: value for name, value in asked.items() if value is not None})


def device_of(name: str | None) -> str:
    """The device asked for, or CUDA where there is a GPU."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device must be cpu, cuda or cuda:<number>, got {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device is {name!r}, but torch finds no CUDA GPU")
    return name


def given(value: int | None, default: int) -> int:
    return default if value is None else value


def example_of(recipe: Recipe, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The network that model options ask for, and a batch of images for it."""
    channels, *sides = options.get("image") or (3, 224, 224)
    classes = options.get("classes") or 1000
    if options["image_size"]:
        sides = 2 * [options["image_size"]]
    if options["data"] is not None:
        data = open_data(options["data"], options["image_size"], holdout=0.0)
        channels, sides, classes = data.channels, 2 * [data.image_size], data.num_classes
    model = build_network(*model_of(recipe, options), channels, max(sides), classes)
    return model, torch.zeros(options["batch"], channels, *sides)
