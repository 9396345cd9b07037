"""What a comparison is asked to do: everything its results depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dmcp import methods
from dmcp.errors import ConfigError
from dmcp.recipes import Recipe
from dmcp.runs import NetworkConfig
from dmcp.runs.config import check_epochs
from dmcp.search import Budget

Track = Literal["A", "B", "C"]
TRACKS: Mapping[str, str] = {
    "A": "trained from scratch",
    "B": "inherited weights, fine-tuned",
    "C": "trained inside the whole network, taught by it",
}


@dataclass(frozen=True)
class CompareConfig:
    """What a comparison compares, and how.

    Attributes:
        network: what is pruned, on what; ``seeds`` take the place of its own. Methods judge
            structures by its held-out images.
        recipe: lengths and options of searches and trainings, the same for every method; the grid.
        methods: names, see `dmcp.methods.get`.
        budgets: MACs of the structures, as `Budget` takes them.
        seeds: each repeats everything with other weights, held-out images and draws.
        tracks: ``"A"``, structures are trained from scratch; ``"B"``, with inherited weights;
            ``"C"``, in place, distilled from the whole network. Never mixed in one row.
        preset: of the methods' hyper-parameters, see `dmcp.methods.get`.
        exclude: units that are left alone, see `dmcp.trace`.

    Raises:
        ConfigError: an unknown method or track, something twice or not at all, or no held-out
            images.
        BudgetError: a malformed budget.
    """

    network: NetworkConfig
    recipe: Recipe
    methods: Sequence[str]
    budgets: Sequence[str]
    seeds: Sequence[int]
    tracks: Sequence[Track]
    preset: str = "short"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("methods", "budgets", "seeds", "tracks"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} must be some, each once, got {list(values)}")
        for method in self.methods:
            methods.get(method, self.preset)
        for budget in self.budgets:
            Budget(macs=budget)
        for track in self.tracks:
            if track not in TRACKS:
                raise ConfigError(f"tracks must be among {', '.join(TRACKS)}, got {track!r}")
        if min(self.seeds) < 0:
            raise ConfigError(f"seeds must not be negative, got {min(self.seeds)}")
        check_epochs(
            search_epochs=self.recipe.search_epochs, retrain_epochs=self.recipe.retrain_epochs
        )
        if not self.network.holdout:
            raise ConfigError(
                "methods judge structures by held-out images: holdout must be above 0"
            )

    def identity(self) -> dict[str, Any]:
        """What every result in a folder depends on, as plain JSON data. Methods, seeds and tracks
        may be added later."""
        parts = asdict(self)
        for name in ("methods", "seeds", "tracks"):
            del parts[name]
        del parts["network"]["seed"]
        parts["budgets"] = sorted(self.budgets)
        return {"kind": "compare", **parts}
