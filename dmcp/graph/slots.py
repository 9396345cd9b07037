"""Labels for single channels, and which of them live and die together.

While a model is traced, every position of every dimension that may shrink carries a *slot*, an
integer. Operators declare slots equal (both ends of a sum), *blocked* (this channel can never go,
and why) or *produced* (here is a layer that decides how many there are). Afterwards equal slots
form a *class*, which is kept or dropped as a whole, and similar classes form a unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class SlotTable:
    """Creates slots and records what is declared about them."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Slots, Slots]] = []
        self._blocked: list[tuple[Slots, str]] = []
        self._produced: list[tuple[Slots, str]] = []

    def new(self, size: int) -> Slots:
        """``size`` fresh slots."""
        first, self.count = self.count, self.count + size
        return np.arange(first, self.count, dtype=np.int64)

    def equate(self, left: Slots, right: Slots) -> None:
        """Declare two equally long slot arrays equal, position by position."""
        if left is not right:
            self._pairs.append((left, right))

    def tie_rows(self, rows: Slots) -> Slots:
        """Declare all rows of a matrix [n, size] equal; returns the first one."""
        first: Slots = rows[0]
        if len(rows) > 1:
            self.equate(np.broadcast_to(first, rows[1:].shape).reshape(-1), rows[1:].reshape(-1))
        return first

    def block(self, slots: Slots, reason: str) -> None:
        """Declare that these channels are never dropped."""
        self._blocked.append((slots, reason))

    def produce(self, slots: Slots, module: str) -> None:
        """Declare that ``module`` decides how many of these channels there are."""
        self._produced.append((slots, module))

    def reasons(self, classes: Slots) -> dict[int, str]:
        """Why a class is never dropped, the first reason given: {class: reason}."""
        found: dict[int, str] = {}
        for slots, reason in self._blocked:
            for label in np.unique(classes[slots]).tolist():
                found.setdefault(label, reason)
        return found

    def producers(self) -> Sequence[tuple[Slots, str]]:
        """(slots, module) of every declaration, in the order they were made."""
        return self._produced

    def classes(self) -> Slots:
        """The smallest equal slot of every slot: [count]. Connected components by label
        propagation with pointer jumping, vectorised over all slots."""
        label = np.arange(self.count, dtype=np.int64)
        if not self._pairs:
            return label
        left = np.concatenate([pair[0] for pair in self._pairs])
        right = np.concatenate([pair[1] for pair in self._pairs])
        while True:
            low = np.minimum(label[left], label[right])
            settled = np.array_equal(low, label[left]) and np.array_equal(low, label[right])
            if settled:
                return label
            # Hook the roots of both sides, not only the slots, so that whole trees move at once.
            for side in (left, right):
                np.minimum.at(label, label[side], low)
                np.minimum.at(label, side, low)
            while not np.array_equal(label, label[label]):
                label = label[label]
