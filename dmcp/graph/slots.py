"""Labels for single channels, and which of them are the same channel.

While a model is traced, every position of every channel axis carries a *slot*, an integer. An
operator that joins two axes elementwise declares their slots equal. Afterwards equal slots form a
*class*, and classes that appear the same number of times on the same module axes form a unit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class SlotTable:
    """Creates slots and records which ones are equal."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Slots, Slots]] = []

    def new(self, size: int) -> Slots:
        """``size`` fresh slots."""
        first, self.count = self.count, self.count + size
        return np.arange(first, self.count, dtype=np.int64)

    def equate(self, left: Slots, right: Slots) -> None:
        """Declare two equally long slot arrays equal, position by position."""
        if left is not right:
            self._pairs.append((left, right))

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
