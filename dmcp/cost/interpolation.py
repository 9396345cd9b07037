"""A function of the unit widths that is known at some of them, and linear in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Interpolation:
    """``constant + Σ_a f_a(x_a) + Σ_e g_e(x_l(e), x_r(e))`` of positions x_a = Σ_u weights[a, u]
    c_u on A axes: the widths c of one unit, or of several that are concatenated.

    Every f is piecewise linear and every g bilinear between the nodes of their axes, and constant
    beyond the first and the last. All is float64.

    Attributes:
        constant: 0-d.
        weights: [A, U], none negative.
        nodes: [A, K], ascending; axes with fewer than K end in infinities.
        single: [A, K], f at the nodes, 0 where there is none.
        places: int64 [E, 2], the two axes of every g.
        pairs: [E, K, K], g at the nodes, 0 where there is none.
    """

    constant: Tensor
    weights: Tensor
    nodes: Tensor
    single: Tensor
    places: Tensor
    pairs: Tensor

    def of_many(self, widths: Tensor) -> Tensor:
        """The values at many structures: [n, U] -> float64 [n]."""
        shares = self.shares(widths.double() @ self.weights.T)
        single = (shares * self.single).sum((1, 2))
        left, right = shares[:, self.places[:, 0]], shares[:, self.places[:, 1]]
        pairs = torch.einsum("nei,eij,nej->n", left, self.pairs, right)
        return self.constant + single + pairs

    def shares(self, positions: Tensor, axes: Tensor | None = None) -> Tensor:
        """How much each node counts at these positions: [..., A] -> [..., A, K], sums of 1.

        Args:
            positions: on the axes in the last dimension.
            axes: the numbers of these axes, all of them by default.
        """
        nodes = self.nodes if axes is None else self.nodes[axes]
        last = nodes.isfinite().sum(-1) - 1
        top = nodes.gather(-1, last[:, None]).squeeze(-1)
        positions = torch.minimum(positions.clamp(min=nodes[:, 0]), top)
        below = (positions[..., None] >= nodes).sum(-1) - 1
        below = torch.minimum(below, last - 1)
        expanded = nodes.expand(*positions.shape, -1)
        low = expanded.gather(-1, below[..., None]).squeeze(-1)
        high = expanded.gather(-1, below[..., None] + 1).squeeze(-1)
        share = (positions - low) / (high - low)
        shares = torch.zeros_like(expanded)
        shares.scatter_(-1, below[..., None], (1 - share)[..., None])
        return shares.scatter_(-1, below[..., None] + 1, share[..., None])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, for `from_json`."""
        rows = [[x for x in row if x < float("inf")] for row in self.nodes.tolist()]
        return {
            "constant": self.constant.item(),
            "weights": self.weights.tolist(),
            "nodes": rows,
            "single": [row[: len(n)] for row, n in zip(self.single.tolist(), rows, strict=True)],
            "places": self.places.tolist(),
            "pairs": [
                [row[: len(rows[right])] for row in square[: len(rows[left])]]
                for square, (left, right) in zip(
                    self.pairs.tolist(), self.places.tolist(), strict=True
                )
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Interpolation:
        """What `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: the data are something else.
        """
        nodes, weights = data["nodes"], data["weights"]
        if not nodes or any(len(row) < 2 or row != sorted(set(row)) for row in nodes):
            raise ValueError(f"nodes must ascend, two of them or more on each axis, got {nodes}")
        lengths = [*map(len, nodes)]
        if len(weights) != len(nodes) or [*map(len, data["single"])] != lengths:
            raise ValueError("weights, nodes and single must be of the same axes")
        longest = max(lengths)
        places = torch.tensor(data["places"], dtype=torch.int64, device="cpu").reshape(-1, 2)
        pairs = torch.zeros(len(places), longest, longest, dtype=torch.float64, device="cpu")
        for square, values in zip(pairs, data["pairs"], strict=True):
            _fill(square, values)
        single = torch.zeros(len(nodes), longest, dtype=torch.float64, device="cpu")
        ends = torch.full((len(nodes), longest), float("inf"), dtype=torch.float64, device="cpu")
        for number, (row, values) in enumerate(zip(nodes, data["single"], strict=True)):
            ends[number, : len(row)] = ends.new_tensor(row)
            single[number, : len(row)] = single.new_tensor(values)
        return cls(
            constant=single.new_tensor(data["constant"]),
            weights=single.new_tensor(weights).reshape(len(nodes), -1),
            nodes=ends,
            single=single,
            places=places,
            pairs=pairs,
        )


def _fill(square: Tensor, values: Sequence[Sequence[float]]) -> None:
    matrix = square.new_tensor(values)
    square[: matrix.shape[0], : matrix.shape[1]] = matrix
