"""Losses that hold the expected cost at its budget.

All of them read r = E[cost] / budget, one number per bound, so they do not depend on units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import ConfigError

_MULTIPLIER_RATE, _LARGEST_EXCESS = 0.02, 0.1
"""Multipliers move per step by this share of ρ (r - 1), which counts no further than ±0.1: what
they gathered on a long way to the budget would carry the chains past it."""

_NEAREST = 1e-3
"""Distance |r - 1| below which ``log_l1`` stops falling, so that it is finite at the budget."""


class BudgetLoss:
    """A budget loss by name.

    ``"log_l1"``
        weight · log|r - 1|, the paper's λ log|E - T| up to a constant. With ``tolerance`` > 0 as in
        the published code: zero for 1 - tolerance <= r < 1, and from above measured against
        1 - tolerance.
    ``"l1"``, ``"l2"``
        weight · |r - 1|, weight · (r - 1)².
    ``"augmented_lagrangian"``
        of the constraint r <= 1: (max(0, μ + ρ (r - 1))² - μ²) / 2ρ with ρ = ``weight``, and after
        every step μ <- max(0, μ + 0.02 ρ clamp(r - 1, ±0.1)). The tightest bound is an equality: it
        is held from both sides, without the two max, so that it is met exactly. Of several bounds
        the others may end slack.

    Args:
        name: one of the above.
        weight: λ or ρ.
        tolerance: width of the dead zone of ``log_l1``.
        bounds: number of bounds.
        device: where the ratios live.

    Raises:
        ConfigError: an unknown name, a weight that is not positive, a tolerance outside [0, 1).
    """

    def __init__(
        self,
        name: str,
        weight: float,
        tolerance: float = 0.0,
        bounds: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if name not in _LOSSES:
            raise ConfigError(f"budget_loss must be one of {list(_LOSSES)}, got {name!r}")
        if not weight > 0:
            raise ConfigError(f"budget_weight must be positive, got {weight!r}")
        if not 0 <= tolerance < 1:
            raise ConfigError(f"tolerance must lie in [0, 1), got {tolerance!r}")
        self.name = name
        self.weight = weight
        self.tolerance = tolerance
        self.multipliers = torch.zeros(bounds, dtype=torch.float64, device=device)

    def __call__(self, ratios: Tensor) -> Tensor:
        """The loss of expected cost over budget: float64 [B] -> 0-d."""
        return _LOSSES[self.name](self, ratios)

    def update(self, ratios: Tensor) -> None:
        """Move the multipliers of the augmented Lagrangian, in place; nothing for other losses."""
        if self.name == "augmented_lagrangian":
            ratios = ratios.detach()
            excess = (ratios - 1).clamp(-_LARGEST_EXCESS, _LARGEST_EXCESS)
            moved = self.multipliers + _MULTIPLIER_RATE * self.weight * excess
            self.multipliers.copy_(_one_sided(moved, ratios))

    def state_dict(self) -> dict[str, Any]:
        return {"multipliers": self.multipliers.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["multipliers"].shape != self.multipliers.shape:
            raise ValueError(
                f"multipliers: {len(state['multipliers'])}, for {len(self.multipliers)} bounds"
            )
        self.multipliers.copy_(state["multipliers"])


def _log_l1(loss: BudgetLoss, ratios: Tensor) -> Tensor:
    floor = 1 - loss.tolerance
    below, above = 1 - ratios, ratios - floor
    distance = torch.where(ratios < floor, below, above).clamp(min=_NEAREST)
    value = loss.weight * distance.log()
    in_zone = (ratios >= floor) & (ratios < 1)
    return value.masked_fill(in_zone, 0.0).sum()


def _l1(loss: BudgetLoss, ratios: Tensor) -> Tensor:
    return loss.weight * (ratios - 1).abs().sum()


def _l2(loss: BudgetLoss, ratios: Tensor) -> Tensor:
    return loss.weight * ((ratios - 1) ** 2).sum()


def _augmented_lagrangian(loss: BudgetLoss, ratios: Tensor) -> Tensor:
    force = _one_sided(loss.multipliers + loss.weight * (ratios - 1), ratios)
    return ((force**2 - loss.multipliers**2) / (2 * loss.weight)).sum()


def _one_sided(force: Tensor, ratios: Tensor) -> Tensor:
    """Bounds push down only, but for the tightest one."""
    return torch.where(ratios == ratios.max(), force, force.clamp(min=0))


_LOSSES: dict[str, Callable[[BudgetLoss, Tensor], Tensor]] = {
    "augmented_lagrangian": _augmented_lagrangian,
    "log_l1": _log_l1,
    "l1": _l1,
    "l2": _l2,
}
