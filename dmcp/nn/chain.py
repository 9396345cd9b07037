"""The Markov chain over one unit's channel groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.nn.grid import width_choices
from dmcp.ops import CostTable, expected_cost, retain


@dataclass
class PassState:
    """What the modules of one network share about the pass that they compute now.

    Attributes:
        tracks: whether it is the whole, unmasked network's, whose statistics are the running ones.
        accumulates: whether its backward adds the gradients of weights straight to ``.grad``, see
            `dmcp.nn.axis.cut`.
    """

    tracks: bool = True
    accumulates: bool = False


class MarkovChain(nn.Module):
    """How many channels a unit keeps, as a Markov process over its channel groups.

    Group k is retained with transition probability p_k = sigmoid(alpha_k) if group k - 1 is, so
    its retain probability is q_k = p_1 ⋯ p_k (DMCP, section 3.1); the base is always retained.

    A chain also says what the modules that follow it do in a forward pass: they cut their channels
    to `width`, and scale them by `mask` where it is set (see `masked`).

    Args:
        channels: full width C.
        groups: channel groups, base included; see `width_choices`.
        divisor: every width is a multiple of it, or the full width.
        min_width: smallest width.
        choices: the widths themselves, ascending, the last one ``channels``; overrides the three
            arguments before.
        start: transition probability of every group at the start; 0.5 is the paper's alpha = 0.

    Attributes:
        alpha: Parameter [G], G = number of choices - 1.
        choices: the widths, ascending; choices[0] is the base.
        mask: [C] retain probability of each channel while the soft mask is on, else None.

    Raises:
        ConfigError: an argument out of range.
    """

    group_of: Tensor
    offsets: Tensor

    def __init__(
        self,
        channels: int,
        groups: int = 10,
        divisor: int = 8,
        min_width: int = 1,
        *,
        choices: Sequence[int] | None = None,
        start: float = 0.9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        grid = tuple(choices or width_choices(channels, groups, divisor, min_width))
        if list(grid) != sorted(set(grid)) or grid[0] < 1 or grid[-1] != channels:
            raise ConfigError(f"choices must ascend from at least 1 to {channels}, got {grid}")
        self.channels = channels
        self.choices = grid
        self._width = channels
        self.mask: Tensor | None = None
        self.alpha = nn.Parameter(torch.empty(len(grid) - 1, device=device, dtype=dtype))
        sizes = [grid[0], *(b - a for a, b in pairwise(grid))]
        groups_of = [group for group, size in enumerate(sizes) for _ in range(size)]
        group_of = torch.tensor(groups_of, device=device)
        self.register_buffer("group_of", group_of, persistent=False)
        offsets = torch.tensor([0, len(grid) - 1], dtype=torch.int32, device=device)
        self.register_buffer("offsets", offsets, persistent=False)
        self.reset(start)

    def reset(self, start: float) -> None:
        """Set every transition probability to ``start``, in (0, 1)."""
        if not 0 < start < 1:
            raise ConfigError(f"start must lie strictly between 0 and 1, got {start!r}")
        nn.init.constant_(self.alpha, math.log(start / (1 - start)))

    @property
    def width(self) -> int:
        """Channels that the modules of this unit compute now; the full width unless set."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= self.channels:
            raise ConfigError(f"width must be an int in 1..{self.channels}, got {width!r}")
        self._width = width

    def keep(self) -> slice | Tensor | None:
        """The channels computed now, None for all."""
        return None if self._width == self.channels else slice(0, self._width)

    def transition(self) -> Tensor:
        """p [G]: probability that a group is retained if the one before it is."""
        return self.alpha.sigmoid()

    def retain(self) -> Tensor:
        """q [G]: probability that a group is retained."""
        return retain(self.alpha, self.offsets)

    def channel_retain(self) -> Tensor:
        """q over channels [C], 1 in the base."""
        q = self.retain()
        return torch.cat([q.new_ones(1), q])[self.group_of]

    def expected_width(self) -> Tensor:
        """E[c] = b + Σ s_k q_k: 0-d, differentiable."""
        return self.channel_retain().sum()

    @staticmethod
    def walk(passed: Tensor) -> Tensor:
        """Which groups are retained if these pass, each by its own transition: those before the
        first that does not. [..., G] -> [..., G]; other processes walk otherwise."""
        return passed.cumprod(-1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw widths by Markov sampling: from the base up, stop at the first group that is not
        retained. Returns int64 [count]."""
        p = self.transition()
        drawn = torch.rand(count, len(p), generator=generator, device=p.device, dtype=p.dtype)
        kept = self.walk(drawn < p).sum(1)
        return torch.tensor(self.choices, device=p.device)[kept]

    def extra_repr(self) -> str:
        return f"{self.channels}, choices={self.choices}"


@contextmanager
def masked(module: nn.Module) -> Iterator[None]:
    """While this context is open, every chain in ``module`` scales its channels by their retain
    probabilities. The probabilities of all chains are computed once, at its start, by one operator.
    """
    chains = [chain for chain in module.modules() if isinstance(chain, MarkovChain)]
    if not chains:
        yield
        return
    alpha = torch.cat([chain.alpha for chain in chains])
    table = CostTable.of([chain.choices for chain in chains], device=alpha.device)
    masks = expected_cost(alpha, table).scale.split([chain.channels for chain in chains])
    with scaled(list(zip(chains, masks, strict=True))):
        yield


@contextmanager
def scaled(masks: Sequence[tuple[MarkovChain, Tensor]]) -> Iterator[None]:
    """While this context is open, every one of these chains has its mask."""
    try:
        for chain, mask in masks:
            chain.mask = mask
        yield
    finally:
        for chain, _ in masks:
            chain.mask = None
