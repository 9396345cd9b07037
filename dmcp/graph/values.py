"""What the tracer knows about a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dmcp.graph.slots import Slots


@dataclass(frozen=True, eq=False)
class Axis:
    """A dimension whose positions are channels that may be dropped.

    Attributes:
        slots: [size], the label of each position.
        taint: why a dropped channel may be other than zero here; empty where it is zero for sure.
        origins: (parameter, dimension) that these positions index, for what is computed from
            parameters alone.
        wild: the tensor is the same at every position (it was expanded), so that its size is
            whatever it meets.
    """

    slots: Slots
    taint: str = ""
    origins: frozenset[tuple[str, int]] = frozenset()
    wild: bool = False

    def tainted(self, reason: str) -> Axis:
        """The same channels, perhaps other than zero for this reason (or an earlier one)."""
        return replace(self, taint=self.taint or reason)

    def carrying(self, slots: Slots) -> Axis:
        """The same kind of axis at other positions."""
        return replace(self, slots=slots)


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the captured program.

    Attributes:
        shape: its sizes.
        axes: for each dimension the channels it holds; None where it never shrinks.
        node: number of the `Node` that produced it; None for what is computed from parameters
            and constants alone.
    """

    shape: tuple[int, ...]
    axes: Axes
    node: int | None = None

    @property
    def constant(self) -> bool:
        """Whether it is computed from parameters and constants alone."""
        return self.node is None

    def dim(self, dim: int) -> int:
        """A dimension as a number from 0."""
        return dim % len(self.shape)


def labelled(values: Iterable[Value]) -> list[Axis]:
    """Every axis of these tensors that may shrink."""
    return [axis for value in values for axis in value.axes if axis is not None]
