"""What a run is asked to do: everything its result depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dmcp import models
from dmcp.errors import ConfigError
from dmcp.search import Budget, SearchOptions
from dmcp.train import TrainOptions

RETRAIN = ("scratch", "inherit", "distil")
ARCH_DATA = ("train", "holdout")


@dataclass(frozen=True)
class NetworkConfig:
    """A network and the data it is for.

    Attributes:
        model: name of a network, see `dmcp.models.build`; a path in it is made absolute.
        model_options: its keyword arguments beside those the data decide.
        data: ``"digits"`` or a folder, see `dmcp.data.open_data`.
        image_size: side of the images in pixels, None for the data's own.
        holdout: share of the training images kept aside.
        batch_size: images per step, over all processes.
        seed: of weights, data order, augmentation and sub-networks.
        crop_scale: smallest share of an image's area that a random crop keeps (above 64 pixels).
        sync_bn: whether batch norms see the batches of all processes.
    """

    model: str
    data: str
    batch_size: int
    model_options: Mapping[str, float] = field(default_factory=dict)
    image_size: int | None = None
    holdout: float = 0.0
    crop_scale: float = 0.25
    seed: int = 0
    sync_bn: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"batch_size must be at least 2, got {self.batch_size}")
        if self.seed < 0:
            raise ConfigError(f"seed must not be negative, got {self.seed}")
        # So that the run is the same one from any working directory.
        object.__setattr__(self, "model", models.resolve(self.model))


@dataclass(frozen=True)
class TrainConfig:
    """A run of ``dmcp train``.

    Attributes:
        network: what is trained, on what.
        epochs: length in epochs of the training set.
        options: of the training.
        widths: the structure to train, None for the whole network.
    """

    network: NetworkConfig
    epochs: int
    options: TrainOptions
    widths: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        check_epochs(epochs=self.epochs)


@dataclass(frozen=True)
class SearchConfig:
    """A run of ``dmcp search``.

    Attributes:
        network: what is searched, on what.
        budget: what the structure may cost.
        search_epochs, retrain_epochs: lengths in epochs of the training set.
        search: options of the search.
        train: options of the retraining.
        groups, divisor, min_width: the width grid, see `dmcp.nn.width_choices`.
        exclude: units that are left alone, see `dmcp.trace`.
        retrain: ``"scratch"``, fresh weights; ``"inherit"``, the searched weights; ``"distil"``,
            in-place distillation from the full network (the paper's starred rows).
        arch_data: what the architecture steps see: the ``"train"`` batch, as in the paper, or
            batches of the ``"holdout"``.
        baselines: also train the whole network and the uniform structure of the same budget.
    """

    network: NetworkConfig
    budget: Budget
    search_epochs: int
    retrain_epochs: int
    search: SearchOptions
    train: TrainOptions
    groups: int = 10
    divisor: int = 8
    min_width: int = 1
    exclude: Sequence[str] = ()
    retrain: Literal["scratch", "inherit", "distil"] = "scratch"
    arch_data: Literal["train", "holdout"] = "train"
    baselines: bool = True

    def __post_init__(self) -> None:
        check_epochs(search_epochs=self.search_epochs, retrain_epochs=self.retrain_epochs)
        if self.retrain not in RETRAIN:
            raise ConfigError(f"retrain must be one of {RETRAIN}, got {self.retrain!r}")
        if self.arch_data not in ARCH_DATA:
            raise ConfigError(f"arch_data must be one of {ARCH_DATA}, got {self.arch_data!r}")
        if self.arch_data == "holdout" and not self.network.holdout:
            raise ConfigError("arch_data='holdout' needs a holdout above 0")


def to_json(config: TrainConfig | SearchConfig) -> dict[str, Any]:
    """The configuration as plain JSON data."""
    if isinstance(config, TrainConfig):
        return {"kind": "train", **asdict(config)}
    search = asdict(config.search)
    del search["cuda_graphs"]  # how steps are computed, not what
    return {"kind": "search", **asdict(config), "search": search, "budget": config.budget.to_json()}


def check_epochs(**epochs: int) -> None:
    """Refuse lengths below one epoch."""
    for name, value in epochs.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
