"""What an interpolated cost is on average under the chains.

The widths of units are independent, and so are the two axes of a pair, which share no unit. With
h_a = E[shares of the nodes of axis a] the mean is therefore exact:

    E[cost] = constant + Σ_a f_a · h_a + Σ_e h_l(e)ᵀ g_e h_r(e)

The distribution on an axis of one unit is that of its width; on an axis of several it is that of
a sum of independent numbers, a product of Fourier transforms. For the variance the cost is parted
into a function of each single unit, a function of each concatenated axis without its best linear
fit, which goes to its units, and what each pair of axes adds to these. All of them are uncorrelated
if no axis is of several units. Otherwise the functions of concatenated axes, of which only the
linear part is known to share a unit with others, are taken as uncorrelated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial, reduce
from math import gcd, lcm

import torch
from torch import Tensor

from dmcp.cost.interpolation import Interpolation


@dataclass(frozen=True, eq=False)
class Expectation:
    """Mean and variance of an `Interpolation` under the chains of U units with T groups and at most
    C widths each, on A axes with at most N positions. Made by `of`.

    Attributes:
        function: the interpolation.
        reach: int64 [U, C + 1], places in (1, q, 0) of the probabilities to reach each width.
        widths: float64 [U, C].
        unit: int64 [A], the unit that moves along each axis, if only one does.
        positions: float64 [A, N].
        shares: float64 [A, N, K] of the nodes at these positions.
        left, right: int64 [E], the two axes of every pair.
        is_single: float64 [A, 1], 1 for the axes along which at most one unit moves, else 0.
        sums: int64 [S], the axes along which several units move.
        members: int64 [S, M], their parts, filled up with the number of parts; M is a power of two.
        part_unit: int64 [P], the unit of each part.
        part_place: int64 [P, C], how many places along the axis each width of it moves.
    """

    function: Interpolation
    reach: Tensor
    widths: Tensor
    unit: Tensor
    positions: Tensor
    shares: Tensor
    left: Tensor
    right: Tensor
    is_single: Tensor
    sums: Tensor
    members: Tensor
    part_unit: Tensor
    part_place: Tensor

    @staticmethod
    def of(
        function: Interpolation,
        choices: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> Expectation:
        """The expectation over units with these ascending widths, on a device."""
        most = max(map(len, choices))
        groups = sum(len(grid) - 1 for grid in choices)
        integers = partial(torch.tensor, dtype=torch.int64, device="cpu")
        floats = partial(torch.tensor, dtype=torch.float64, device="cpu")
        reach = torch.full((len(choices), most + 1), 1 + groups, device="cpu")
        widths = torch.zeros(len(choices), most, dtype=torch.float64, device="cpu")
        first = 1
        for number, grid in enumerate(choices):
            reach[number, 0] = 0
            reach[number, 1 : len(grid)] = integers(range(first, first + len(grid) - 1))
            widths[number] = floats([*grid] + [grid[-1]] * (most - len(grid)))
            first += len(grid) - 1

        parts: list[tuple[int, list[int]]] = []
        members, sums, units, rows = [], [], [], []
        for number, weights in enumerate(function.weights.tolist()):
            moving = [u for u, w in enumerate(weights) if w and len(choices[u]) > 1]
            base = sum(w * grid[0] for w, grid in zip(weights, choices, strict=True))
            units.append(moving[0] if moving else 0)
            if len(moving) > 1:
                step, places = _lattice([(weights[u], choices[u]) for u in moving])
                length = 1 + sum(place[-1] for place in places)
                members.append(range(len(parts), len(parts) + len(moving)))
                parts += zip(moving, places, strict=True)
                sums.append(number)
                rows.append([base + step * place for place in range(length)])
            elif moving:
                (u,) = moving
                rows.append([base + weights[u] * (width - choices[u][0]) for width in choices[u]])
            else:
                rows.append([base])
        longest = max([most, *map(len, rows)])
        filled = [row + row[-1:] * (longest - len(row)) for row in rows]
        positions = floats(filled).reshape(-1, longest)
        # A power of two, for `_of_positions`.
        widest = 1 << (max(map(len, members), default=1) - 1).bit_length()
        return Expectation(
            function=function,
            reach=reach,
            widths=widths,
            unit=integers(units),
            positions=positions,
            shares=function.shares(positions.T).transpose(0, 1).contiguous(),
            left=function.places[:, 0].contiguous(),
            right=function.places[:, 1].contiguous(),
            is_single=floats([number not in sums for number in range(len(rows))]).reshape(-1, 1),
            sums=integers(sums),
            members=integers([[*row] + [len(parts)] * (widest - len(row)) for row in members]),
            part_unit=integers([u for u, _ in parts]),
            part_place=integers([place + [0] * (most - len(place)) for _, place in parts]).reshape(
                -1, most
            ),
        ).to(device)

    def to(self, device: torch.device | str) -> Expectation:
        """The same on another device."""
        return replace(self, function=_moved(self.function, device), **_tensors(self, device))

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, float64 and 0-d, differentiable.

        Args:
            q: retain probabilities of all groups in the order of the units, [T].
        """
        of_widths = self._of_widths(q.double())
        chances = self._of_positions(of_widths)
        return self._moments(of_widths, chances)

    def _of_widths(self, q: Tensor) -> Tensor:
        """The probability of every width of every unit: [U, C]."""
        reached = torch.cat([q.new_ones(1), q, q.new_zeros(1)])[self.reach]
        return reached[:, :-1] - reached[:, 1:]

    def _of_positions(self, of_widths: Tensor) -> Tensor:
        """The probability of every position on every axis: [A, N]."""
        length = self.positions.shape[1]
        alone = torch.nn.functional.pad(of_widths[self.unit], (0, length - of_widths.shape[1]))
        if not len(self.sums):
            return alone
        parts = of_widths.new_zeros(len(self.part_unit), length)
        parts = parts.scatter_add(1, self.part_place, of_widths[self.part_unit])
        spectra = torch.fft.rfft(parts)
        none = torch.ones_like(spectra[:1])  # the transform of a part that never moves
        factors = torch.cat([spectra, none])[self.members]
        while factors.shape[1] > 1:  # no `prod`: its gradient waits for the device
            factors = factors[:, ::2] * factors[:, 1::2]
        return alone.index_copy(0, self.sums, torch.fft.irfft(factors[:, 0], n=length))

    def _moments(self, of_widths: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        function, left, right = self.function, self.left, self.right
        mean_shares = (chances[:, :, None] * self.shares).sum(1)
        to_left = torch.einsum("eij,ej->ei", function.pairs, mean_shares[right])
        to_right = torch.einsum("eij,ei->ej", function.pairs, mean_shares[left])
        mean = function.constant + (mean_shares * function.single).sum()
        mean = mean + (mean_shares[left] * to_left).sum()

        # What each axis adds alone, at its nodes and then at its positions.
        alone = function.single.index_add(0, left, to_left).index_add(0, right, to_right)
        values = torch.einsum("ank,ak->an", self.shares, alone)
        own = values[:, : of_widths.shape[1]] * self.is_single
        of_unit = torch.zeros_like(of_widths).index_add(0, self.unit, own)
        rest = mean.new_zeros(())
        if len(self.sums):
            slopes, rest = self._linear_parts(values[self.sums], chances[self.sums])
            of_unit = of_unit + (slopes @ function.weights[self.sums])[:, None] * self.widths
        of_unit = of_unit - (of_widths * of_unit).sum(1, keepdim=True)

        centred = self.shares - mean_shares[:, None]
        spread = torch.einsum("ani,an,anj->aij", centred, chances, centred)
        joint = torch.einsum("eij,ejk,ekl->eil", spread[left], function.pairs, spread[right])
        variance = (of_widths * of_unit**2).sum() + rest + (joint * function.pairs).sum()
        return mean, variance.clamp(min=0)

    def _linear_parts(self, values: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """The slope of the best linear fit of values on each concatenated axis, [S], and the
        variance of all that is left, 0-d."""
        values = values - (chances * values).sum(1, keepdim=True)
        positions = self.positions[self.sums]
        positions = positions - (chances * positions).sum(1, keepdim=True)
        spread = (chances * positions**2).sum(1)
        together = (chances * positions * values).sum(1)
        slopes = together / spread.where(spread > 0, 1.0)
        return slopes, (chances * (values - slopes[:, None] * positions) ** 2).sum()


def _lattice(parts: Sequence[tuple[float, Sequence[int]]]) -> tuple[float, list[list[int]]]:
    """The largest step whose multiples are all the moves of these weighted widths from their
    smallest, and the moves in steps."""
    moves = [
        [Fraction(weight).limit_denominator(10_000) * (width - grid[0]) for width in grid]
        for weight, grid in parts
    ]
    below = reduce(lcm, (move.denominator for row in moves for move in row))
    step = Fraction(gcd(*(int(move * below) for row in moves for move in row)), below)
    return float(step), [[int(move / step) for move in row] for row in moves]


def _tensors(holder: object, device: torch.device | str) -> dict[str, Tensor]:
    found = {field.name: getattr(holder, field.name) for field in fields(holder)}  # type: ignore[arg-type]
    return {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}


def _moved(function: Interpolation, device: torch.device | str) -> Interpolation:
    return replace(function, **_tensors(function, device))
