"""What a pruning method is given, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dmcp.methods.lab import Lab


@dataclass(frozen=True)
class Pruned:
    """What a method found for one budget.

    Attributes:
        widths: unit name -> width, every unit of the graph.
        network: the pruned network with weights from the method's own training, whose batch norms
            are yet to be calibrated (`Lab.calibrate`); None where the method finds widths only, and
            the pretrained network's filters are to be inherited (`Lab.inherit`).
        kept: unit name -> the channels kept, int64 [width], where the method picks channels.
        details: what else the search found, plain JSON data.
        chains: what Markov chains say at the end, see `Search.describe`.
    """

    widths: Mapping[str, int]
    network: nn.Module | None = None
    kept: Mapping[str, Tensor] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    chains: Mapping[str, Any] | None = None


class Method(Protocol):
    """A way to prune; its fields are its hyper-parameters."""

    @property
    def uses_pretrained(self) -> bool:
        """Whether `find` asks for `Lab.pretrained`, which is best made once, before."""

    def find(self, lab: Lab) -> Mapping[str, Pruned]:
        """A structure for every budget of the lab, by the budget's label."""
