"""Early warnings of a search that goes wrong."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dmcp.errors import SearchWarning
from dmcp.search.search import Search

_DECIDED = 0.9
"""A group whose retain probability is above this, or below one minus it, is decided: expected
sampling will hardly turn on it."""

_PATIENCE = 5
"""Records in a row that must say the same: a single batch says little."""

_NEAR = 1.02
"""Expected cost over bound that counts as reached: what is above goes with a group or two."""

_FLAT = 1e-4
"""Largest ∂q / ∂α of a unit that learns nothing any more: every |α| that still matters is above 9.
Searches begin above 0.01, and it grows while chains are undecided."""

_LATE = 0.9
"""The share of a search after which chains may stand still: they are to be read soon."""

_GONE = 0.01
"""Retain probability of the first group below which a unit has collapsed to its base."""

_RISE = 3.0
"""Mean loss over the lowest one so far that is no longer noise."""

_LEARNED = 0.1
"""Share of the first loss below which a lowest loss does not count: of two tiny losses one is
easily a multiple of the other."""

_SMOOTHING = 0.2
"""Weight of a record in the mean loss."""


class SearchWatch:
    """Warns of a search that goes wrong while it can still be stopped, of each thing once:

    - at its present speed the expected cost will not come down to the budget; or it has not, and
      expected sampling has to cut what the chains would keep;
    - all α of a unit are so large that they learn nothing any more, before the last tenth;
    - all chains have collapsed to their bases, below the budget;
    - the loss keeps rising.

    It reads the records of a run, see `dmcp.train.Recorder`, or of your own loop::

        watch = SearchWatch(search)
        for images, labels in loader:
            metrics = search.step(images, labels)
            if search.step_index % 10 == 0:
                watch.record({"step": search.step_index, **metrics})
                watch.record({"step": search.step_index, "retain": search.snapshot().retain()})

    Args:
        search: what is watched; of it only the length, the options and the bounds are read.

    Attributes:
        warned: what it has warned of so far, ``"cost"``, ``"end"``, ``"loss"``, ``"collapse"`` or
            ``"saturation"`` -> the text of the `dmcp.SearchWarning`.
    """

    def __init__(self, search: Search) -> None:
        self.warned: dict[str, str] = {}
        self._steps = search.steps
        self._bounds = search.targets.by_metric()
        learning = search.steps - search.warmup_steps
        self._settled = search.warmup_steps + search.options.anneal * learning
        self._ratio = 1.0
        self._path: deque[tuple[int, float]] = deque()
        self._first_loss = self._lowest_loss = self._loss = math.nan
        self._streaks: dict[str, int] = {}

    def record(self, record: Mapping[str, Any]) -> None:
        """Take in a record: ``step`` with ``expected_<metric>`` and, where there is one, ``loss``,
        as `Search.step` returns them; or with ``retain``, unit -> q of every group but the base.
        Metrics on a device are read back.

        Warns:
            SearchWarning: see above.
        """
        step = int(record["step"])
        if "retain" in record:
            self._watch_chains(step, record["retain"])
            return
        ratios = {
            metric: float(record[f"expected_{metric}"]) / bound
            for metric, bound in self._bounds.items()
        }
        tightest = max(ratios, key=lambda metric: ratios[metric])
        self._ratio = ratios[tightest]
        self._watch_cost(step, tightest)
        if "loss" in record:
            self._watch_loss(step, float(record["loss"]))

    def _watch_cost(self, step: int, metric: str) -> None:
        above = f"E[{metric}] is {self._ratio - 1:.0%} above the budget"
        if step >= self._steps:
            if self._ratio > _NEAR:
                self._warn(
                    "end",
                    f"{above} at the end of the search: expected sampling cuts groups that the "
                    "chains would keep; a longer search or a larger arch_lr may reach it",
                )
            return
        if step < self._settled:
            return
        self._path.append((step, self._ratio))
        # Far enough apart to tell a direction from noise.
        begin = step - (self._steps - self._settled) / 4
        while len(self._path) > 1 and self._path[1][0] <= begin:
            self._path.popleft()
        then, ratio = self._path[0]
        if then > begin:
            return
        end = self._ratio + (self._ratio - ratio) / (step - then) * (self._steps - step)
        if self._persists("cost", min(self._ratio, end) > _NEAR):
            self._warn(
                "cost",
                f"{above} at step {step} of {self._steps}, and at its present speed will not come "
                "down to it; a longer search or a larger arch_lr may help",
            )

    def _watch_loss(self, step: int, loss: float) -> None:
        if math.isnan(self._loss):
            self._first_loss = self._lowest_loss = self._loss = loss
        self._loss += _SMOOTHING * (loss - self._loss)
        self._lowest_loss = min(self._lowest_loss, self._loss)
        lowest = max(self._lowest_loss, _LEARNED * self._first_loss)
        if self._persists("loss", self._loss > _RISE * lowest):
            self._warn(
                "loss",
                f"the loss is rising: {self._loss:.3g} on average at step {step}, after "
                f"{self._lowest_loss:.3g}; a lower learning rate may help",
            )

    def _watch_chains(self, step: int, retain: Mapping[str, Sequence[float]]) -> None:
        collapsed = self._ratio < 1 and all(q[0] < _GONE for q in retain.values())
        if self._persists("collapse", collapsed):
            self._warn(
                "collapse",
                f"all chains have collapsed to their bases at step {step}, below the budget; a "
                "lower arch_lr or budget_weight, or a start nearer to 1 may help",
            )
        flat = [unit for unit, q in retain.items() if _slope(q) < _FLAT]
        if self._persists("saturation", bool(flat) and step < _LATE * self._steps):
            self._warn(
                "saturation",
                f"{len(flat)} of {len(retain)} units are saturated at step {step} of "
                f"{self._steps}, {flat[0]} the first of them: their α are so large that they "
                "hardly learn any more; a lower arch_lr may help",
            )

    def _persists(self, name: str, seen: bool) -> bool:
        """Whether something has been seen so many times in a row."""
        self._streaks[name] = self._streaks.get(name, 0) + 1 if seen else 0
        return self._streaks[name] >= _PATIENCE

    def _warn(self, name: str, message: str) -> None:
        if name not in self.warned:
            self.warned[name] = message
            warnings.warn(message, SearchWarning, stacklevel=4)


def decided_share(retain: Mapping[str, Sequence[float]]) -> float:
    """The share of all groups but the bases that are decided."""
    groups = [q for unit in retain.values() for q in unit]
    return sum(not 1 - _DECIDED < q < _DECIDED for q in groups) / len(groups)


def _slope(retain: Sequence[float]) -> float:
    """How much the retain probabilities of a unit move with its α: the largest ∂q_k / ∂α_k, which
    is q_k (1 - p_k)."""
    return max(q * (1 - q / before) if before else 0.0 for before, q in pairwise([1.0, *retain]))
