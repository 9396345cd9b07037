"""Greedy slimming of a slimmable network ("AutoSlim: Towards One-Shot Architecture Search for
Channel Numbers", Yu and Huang, 2019).

One supernet learns to work at any width: sandwich steps with a random width for every unit of its
own, the others taught by the widest network. Then groups go one at a time, always the one without
which the network errs least; where a budget is crossed the structure is noted, so that one pass
serves all budgets.

The paper has 12 groups for each unit of a MobileNetV2 of 1.5 times the width (``groups=12`` in a
recipe) and about 50 epochs of the supernet. Where this departs from it:

- The structure that first meets a budget lies up to a group below it. Groups come back while there
  is room, by the most even shares, so that all methods use the same budget.
- Only batch norms work as in training when errors are measured, on the statistics of each batch of
  held-out images. Dropout does not: the error of a structure is one number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmcp.errors import CheckpointError
from dmcp.methods.dmcp import WarmUp
from dmcp.methods.growth import even_worth
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import MarkovNet, Search
from dmcp.search.growth import grow
from dmcp.train.evaluate import modes_kept


@dataclass(frozen=True)
class AutoSlim:
    """A slimmable supernet for all of the recipe's search epochs, then greedy slimming."""

    uses_pretrained: ClassVar[bool] = False

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        net = lab.net(lab.fresh())
        supernet = sandwich_training(lab, net)
        lab.train(supernet, "supernet", passes=supernet.search.options.sandwich)
        slimming = Slimming(lab, net)
        lab.run(slimming, "slimming")
        even = even_worth(lab.graph)
        found = {}
        for label, targets in lab.targets.items():
            slimmed = slimming.found[label]
            widths = grow(lab.graph, targets, even, slimmed)
            network = lab.extract(net.graph.model, widths)
            found[label] = Pruned(widths, network, details={"slimmed": slimmed})
        return found


def sandwich_training(lab: Lab, net: MarkovNet) -> WarmUp:
    """A search that is all warm-up: its schedule spans the search epochs, no chain learns."""
    steps = lab.steps(lab.recipe.search_epochs)
    # One step more, as the last step of a search always trains α: it is never taken.
    options = replace(lab.recipe.search, warmup=steps / (steps + 1))
    budget = next(iter(lab.budgets.values()))
    return WarmUp(Search(net, budget, steps + 1, options, seed=lab.seed))


class Slimming:
    """Greedy slimming as a stage: a step removes one group.

    Args:
        lab: its grid, budgets and held-out images.
        net: the trained supernet.

    Attributes:
        place: of every unit the number of its present choice.
        found: label -> the first structure that met the budget.
    """

    def __init__(self, lab: Lab, net: MarkovNet) -> None:
        self.lab, self.net = lab, net
        self.place = [len(unit.choices) - 1 for unit in lab.graph.units]
        self.found: dict[str, dict[str, int]] = {}
        self.step_index = 0
        self._note_budgets()

    @property
    def steps(self) -> int:
        """Those done once every budget is met; until then at most one for every group."""
        if len(self.found) == len(self.lab.targets):
            return self.step_index
        return sum(len(unit.choices) - 1 for unit in self.lab.graph.units)

    def step(self) -> dict[str, Tensor]:
        """Remove the group without which the fewest held-out images are misclassified; the first
        unit's, if several are as good."""
        candidates = [self._without(unit) for unit, k in enumerate(self.place) if k > 0]
        with torch.no_grad(), _normalising_by_batch(self.net):
            wrong = torch.stack([self._wrong(place) for place in candidates]).tolist()
        best = min(range(len(wrong)), key=wrong.__getitem__)
        self.place = candidates[best]
        self.step_index += 1
        self._note_budgets()
        return {"error": torch.tensor(wrong[best] / len(self.lab.data.holdout))}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "found": self.found, "step_index": self.step_index}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["place"]) != len(self.place) or not state["found"].keys() <= (
            self.lab.targets.keys()
        ):
            raise CheckpointError("the checkpoint is of another network or other budgets")
        self.place, self.found = state["place"], state["found"]
        self.step_index = state["step_index"]

    def _without(self, unit: int) -> list[int]:
        return [k - (number == unit) for number, k in enumerate(self.place)]

    def _widths(self, place: list[int]) -> dict[str, int]:
        units = zip(self.lab.graph.units, place, strict=True)
        return {unit.name: unit.choices[k] for unit, k in units}

    def _wrong(self, place: list[int]) -> Tensor:
        self.lab.charge(len(self.lab.data.holdout))
        with self.net.at(self._widths(place)):
            wrong = [
                (self.net(images).argmax(1) != labels).sum()
                for images, labels in self.lab.holdout()
            ]
        return torch.stack(wrong).sum()

    def _note_budgets(self) -> None:
        widths = self._widths(self.place)
        row = torch.tensor([list(widths.values())], device="cpu")
        for label, targets in self.lab.targets.items():
            if label not in self.found and targets.met(row):
                self.found[label] = widths


@contextmanager
def _normalising_by_batch(net: nn.Module) -> Iterator[None]:
    """Evaluation, but for batch norms, which use the statistics of the batch, while the context is
    open. A narrowed `MarkovNet` updates no running ones."""
    with modes_kept(net):
        for module in net.modules():
            module.training = isinstance(module, _BatchNorm)
        yield
