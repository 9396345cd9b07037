"""Structures judged by held-out images, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.errors import CheckpointError
from dmcp.methods.lab import Lab


class Contest:
    """Judges structures as a stage: a step is one of them.

    Args:
        lab: its images.
        structures: what to judge.
        network: a structure's network with inherited weights, whose batch norms are calibrated
            before it is judged.

    Attributes:
        accuracies: of those judged so far.
    """

    def __init__(
        self,
        lab: Lab,
        structures: Sequence[Mapping[str, int]],
        network: Callable[[Mapping[str, int]], nn.Module],
    ) -> None:
        self.lab, self.structures, self.network = lab, list(structures), network
        self.accuracies: list[float] = []

    @property
    def best(self) -> Mapping[str, int]:
        """The structure that classifies best; the first, if several are as good."""
        return self.structures[max(range(self.steps), key=self.accuracies.__getitem__)]

    @property
    def steps(self) -> int:
        return len(self.structures)

    @property
    def step_index(self) -> int:
        return len(self.accuracies)

    def step(self) -> dict[str, Tensor]:
        """Judge the next structure."""
        small = self.network(self.structures[self.step_index])
        self.lab.calibrate(small)
        self.accuracies.append(self.lab.accuracy(small))
        return {"accuracy": torch.tensor(self.accuracies[-1])}

    def state_dict(self) -> dict[str, Any]:
        return {"structures": self.structures, "accuracies": self.accuracies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["structures"] != self.structures:
            raise CheckpointError("the checkpoint is of other structures")
        self.accuracies = list(state["accuracies"])
