"""A drop-in linear layer whose output features follow a Markov chain."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.nn.axis import Axis, cut, may_accumulate, prefix_lengths, scale_channels
from dmcp.nn.chain import MarkovChain, PassState
from dmcp.ops.autocast import as_autocast
from dmcp.ops.linear import accumulating_linear


class MarkovLinear(nn.Linear):
    """``nn.Linear`` whose output features are retained by a Markov chain.

    Narrowing and masking as in `MarkovConv2d`; with ``chain=None`` (a classifier) only the inputs
    may narrow.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``.
        chain: ``"own"``, another module's chain, or None for a fixed number of outputs.
        chain_groups, divisor, min_width, start: of its own chain, see `MarkovChain`.

    Attributes:
        state: of the pass, e.g. whether gradients accumulate; see `MarkovNet.accumulating`.

    Shape: [..., in_features or fewer] -> [..., ``chain.width``].

    Raises:
        ConfigError: a shared chain of another size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        chain: MarkovChain | Literal["own"] | None = "own",
        chain_groups: int = 10,
        divisor: int = 8,
        min_width: int = 1,
        start: float = 0.9,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if chain == "own":
            self.chain: MarkovChain | None = MarkovChain(
                out_features, chain_groups, divisor, min_width, start=start, device=device
            )
            chain = self.chain
        if chain is not None and chain.channels != out_features:
            raise ConfigError(
                f"chain has {chain.channels} channels, out_features is {out_features}"
            )
        # In a tuple, so that a shared chain is not registered as a submodule of each follower.
        self._axes: tuple[Axis | None, Axis | None] = (None, chain)
        self.masks = True
        self.state = PassState()

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self._axes
        keep = outputs.keep() if outputs is not None else None
        if inputs is not None:
            taken = inputs.keep()
        else:
            taken = None if x.shape[-1] == self.in_features else slice(0, x.shape[-1])
        y = self._accumulating(x, keep, taken) if self.state.accumulates else None
        if y is None:
            weight = cut(self.weight, keep, taken, accumulates=self.state.accumulates)
            bias = cut(self.bias, keep, accumulates=self.state.accumulates)
            y = F.linear(x, weight, bias)
        mask = outputs.mask if outputs is not None and self.masks else None
        return scale_channels(y, mask, keep, x.ndim - 1)

    def _accumulating(
        self, x: Tensor, outputs: slice | Tensor | None, inputs: slice | Tensor | None
    ) -> Tensor | None:
        """By one operation, if there is one for it."""
        widths = prefix_lengths(self.weight, (outputs, inputs))
        if widths is None or not may_accumulate(self.weight, self.bias):
            return None
        return accumulating_linear(as_autocast(x), self.weight, self.bias, widths)
