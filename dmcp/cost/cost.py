"""What every cost of a network answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import ConfigError
from dmcp.graph import ChannelUnit, check_widths


class Cost(ABC):
    """A cost of a network as a function of its unit widths.

    Attributes:
        metric: what it counts, one of `dmcp.cost.METRICS`.
        units: the units whose widths are the variables, in order (U of them).
    """

    metric: str
    units: tuple[ChannelUnit, ...]

    def of(self, widths: Mapping[str, int]) -> float:
        """The cost of a structure; units left out of ``widths`` stay whole.

        Raises:
            ConfigError: see `dmcp.graph.check_widths`.
        """
        full = check_widths(self.units, widths)
        row = [full[unit.name] for unit in self.units]
        return self.of_many(torch.tensor([row], dtype=torch.int64, device="cpu")).item()

    @abstractmethod
    def of_many(self, widths: Tensor) -> Tensor:
        """The costs of many structures: int64 [n, U] -> [n], on the device of the widths."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The function of the widths as plain JSON data, to compute costs without the network."""

    def _check_many(self, widths: Tensor) -> None:
        if widths.dtype != torch.int64 or widths.ndim != 2 or widths.shape[1] != len(self.units):
            raise ConfigError(
                f"widths must be int64 [n, {len(self.units)}], got {widths.dtype} "
                f"{list(widths.shape)}"
            )
