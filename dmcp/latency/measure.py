"""Measuring how the latency of a network depends on its widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn

from dmcp.cost import LatencyTable, TableAxis, TableTerm, cost
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph, extract
from dmcp.graph.capture import capture
from dmcp.latency.cache import TimingCache, cache_folder
from dmcp.latency.runtime import Runtime
from dmcp.latency.segments import (
    Axis,
    Piece,
    Segment,
    name_of,
    operators_of,
    outline,
    segments,
    signature_of,
)
from dmcp.latency.timing import side_by_side

Levels = dict[int, int]
"""Unit number -> place of its width among those that are measured."""

WARMUP = 3
"""Rounds that do not count, in which libraries choose their kernels."""

_MIXED_CHECKS = 6
"""Whole networks of mixed widths that the sum is fitted to, beside those of even widths."""


@dataclass(frozen=True)
class _Grids:
    """The widths of every unit that are measured, by its number."""

    widths: Sequence[Sequence[int]]

    def length(self, axis: Axis) -> int:
        """Nodes of an axis: as many as its unit of most widths has."""
        return max(len(self.widths[unit]) for unit, _ in axis)

    def levels(self, axis: Axis, node: int) -> Levels:
        """The levels of the units on an axis at a node: all narrow, …, all wide."""
        last = self.length(axis) - 1
        return {unit: round(node * (len(self.widths[unit]) - 1) / last) for unit, _ in axis}

    def position(self, axis: Axis, node: int) -> float:
        levels = self.levels(axis, node)
        return sum(weight * self.widths[unit][levels[unit]] for unit, weight in axis)

    def even(self, node: int, length: int) -> Levels:
        """A structure in which all units are about as narrow."""
        lasts = [len(grid) - 1 for grid in self.widths]
        return {unit: round(node * last / (length - 1)) for unit, last in enumerate(lasts)}

    def nodes_of(self, axes: Sequence[Axis]) -> Iterable[tuple[int, ...]]:
        return product(*(range(self.length(axis)) for axis in axes))

    def shown(self, axes: Sequence[Axis], levels: Levels) -> list[tuple[int, ...]]:
        """The nodes of some axes at which a structure of these levels is."""
        of_axes = [
            [n for n in range(self.length(axis)) if self.levels(axis, n).items() <= levels.items()]
            for axis in axes
        ]
        return list(product(*of_axes))

    def joint(self, axes: Sequence[Axis], nodes: Sequence[int]) -> Levels:
        """The levels of all units on some axes that share none."""
        found: Levels = {}
        for axis, node in zip(axes, nodes, strict=True):
            found |= self.levels(axis, node)
        return found


def cover(wanted: Iterable[Levels], begun: Iterable[Levels] = ()) -> list[Levels]:
    """Few structures in which all of the wanted levels occur: each joins the first structure that
    says nothing else about its units.

    Args:
        wanted: levels of some units at a time.
        begun: structures to begin with.
    """
    plan = [dict(levels) for levels in begun]
    for levels in wanted:
        fitting = (
            each for each in plan if all(each.get(unit, at) == at for unit, at in levels.items())
        )
        structure = next(fitting, None)
        if structure is None:
            plan.append(dict(levels))
        else:
            structure.update(levels)
    return plan


def measure_latency(
    graph: ChannelGraph,
    example: Tensor,
    runtime: Runtime | None = None,
    *,
    points: int = 5,
    rounds: int = 15,
    cache: Path | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
) -> LatencyTable:
    """Measure every layer of a network at a grid of widths.

    The network is extracted at some structures, and each is cut into segments: an operator that
    multiplies and sums, and what follows it. Segments run alone, in turns; together the structures
    show each segment at every combination of ``points`` widths of the one or two axes that it
    depends on. At last the sum of the segments is fitted to whole networks.

    Args:
        graph: of a network on the runtime's device; what is measured are some of its units'
            choices.
        example: the batch, [N, …], as the network will see it.
        runtime: where and by what it is run; PyTorch as it is on one thread of the CPU by default.
        points: widths of each unit that are measured, evenly spread over its choices.
        rounds: times that everything is measured; the median counts.
        cache: the folder of what was measured before, see `cache_folder`.
        on_step: called with the structures that are done, how many there are, and how many timings
            were measured now.

    Raises:
        ConfigError: points or rounds below 2; a network without searchable units, of which a part
            depends on too many widths, or which computes something else at other widths.
        TraceError: the network cannot be captured at some widths.
    """
    runtime = runtime or Runtime()
    if points < 2 or rounds < 2:
        raise ConfigError(f"points and rounds must be at least 2, got {points} and {rounds}")
    if not graph.searchable:
        raise ConfigError("latency: the network has no unit whose width can vary")
    timings = TimingCache(cache or cache_folder(), runtime.describe(), rounds)
    bench = _Bench(graph, example, runtime, rounds, timings)
    grids = _Grids([_spread(unit.choices, points) for unit in graph.units])
    parts = segments(graph, bench.program)
    longest = max(map(len, grids.widths), default=1)
    even = [grids.even(node, longest) for node in range(longest if longest > 1 else 0)]
    wanted = dict.fromkeys(segment.axes for segment in parts)
    plan = cover((grids.joint(w, n) for w in wanted for n in grids.nodes_of(w)), even)

    found: list[dict[tuple[int, ...], str]] = [{} for _ in parts]
    checks: list[_Structure] = []
    mixed = range(len(even), len(plan), max(1, (len(plan) - len(even)) // _MIXED_CHECKS))
    for number, levels in enumerate(plan):
        if on_step is not None:
            on_step(number, len(plan), bench.measured)
        structure = bench.structure(
            [grid[levels.get(unit, len(grid) - 1)] for unit, grid in enumerate(grids.widths)]
        )
        shown = [
            (part, seen, nodes)
            for part, seen in zip(parts, found, strict=True)
            if (nodes := grids.shown(part.axes, levels))
        ]
        pieces = [structure.piece(part) for part, _, _ in shown]
        bench.time({piece.signature: (piece.body, piece.inputs) for piece in pieces})
        for (part, seen, nodes), piece in zip(shown, pieces, strict=True):
            if any(seen.setdefault(each, piece.signature) != piece.signature for each in nodes):
                raise ConfigError(
                    f"latency: {structure.name(part)} depends on other widths than those of its "
                    "units: exclude them"
                )
        if number < len(even) or number in mixed:
            checks.append(structure)
    # All at once, as they are compared with each other.
    bench.time({each.signature: (each.network, (example,)) for each in checks})
    if on_step is not None:
        on_step(len(plan), len(plan), bench.measured)
    return _fitted(bench, grids, parts, found, checks)


class _Structure:
    """A network of particular widths, captured."""

    def __init__(self, network: nn.Module, example: Tensor, widths: Sequence[int]) -> None:
        self.network, self.widths = network, list(widths)
        self.program = capture(network, (example,), {}, training=False)
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)
        self.signature = signature_of(self.program)

    def piece(self, part: Segment) -> Piece:
        return Piece(self.program, [self.nodes[call] for call in part.calls])

    def name(self, part: Segment) -> str:
        return name_of(self.nodes[call] for call in part.calls)

    def operators(self, part: Segment) -> tuple[str, ...]:
        return operators_of(self.nodes[call] for call in part.calls)


class _Bench:
    """Captures structures of a network, and times what was not timed before."""

    def __init__(
        self,
        graph: ChannelGraph,
        example: Tensor,
        runtime: Runtime,
        rounds: int,
        timings: TimingCache,
    ) -> None:
        self.graph, self.example, self.runtime = graph, example, runtime
        self.rounds, self.timings = rounds, timings
        self.measured = 0
        self.full = _Structure(graph.model, example, [u.channels for u in graph.units])
        self.program = self.full.program

    def structure(self, widths: Sequence[int]) -> _Structure:
        names = (unit.name for unit in self.graph.units)
        small = extract(self.graph, dict(zip(names, widths, strict=True)))
        structure = _Structure(small.eval(), self.example, widths)
        if outline(structure.program) != outline(self.program):
            raise ConfigError("latency: the network computes other operators at other widths")
        return structure

    def time(self, networks: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
        """Time networks on their inputs, by signature, as far as they were not timed before."""
        new = {name: each for name, each in networks.items() if name not in self.timings}
        if not new:
            return
        with self.runtime.running():
            calls = [self.runtime.prepare(module, inputs) for module, inputs in new.values()]
            found = side_by_side(
                calls, rounds=self.rounds, warmup=WARMUP, device=self.runtime.device
            )
        self.timings.add(dict(zip(new, found, strict=True)))
        self.measured += len(new)


def _spread(choices: Sequence[int], points: int) -> list[int]:
    """The smallest, the largest, and others evenly between them."""
    if len(choices) <= points:
        return list(choices)
    return [choices[round(k * (len(choices) - 1) / (points - 1))] for k in range(points)]


def _fitted(
    bench: _Bench,
    grids: _Grids,
    parts: Sequence[Segment],
    found: Sequence[dict[tuple[int, ...], str]],
    checks: Sequence[_Structure],
) -> LatencyTable:
    numbers = {axis: n for n, axis in enumerate(dict.fromkeys(a for p in parts for a in p.axes))}
    units = bench.graph.units
    table = LatencyTable(
        setting={
            **bench.runtime.describe(),
            "input": list(bench.example.shape),
            "dtype": str(bench.example.dtype).removeprefix("torch."),
        },
        units=bench.graph.widths(),
        searchable=tuple(unit.name for unit in bench.graph.searchable),
        macs=cost(bench.graph, "macs").of({}),
        operators=bench.graph.operators,
        axes=tuple(
            TableAxis(
                {units[unit].name: weight for unit, weight in axis},
                tuple(grids.position(axis, node) for node in range(grids.length(axis))),
            )
            for axis in numbers
        ),
        terms=tuple(
            TableTerm(
                bench.full.name(part),
                bench.full.operators(part),
                tuple(numbers[axis] for axis in part.axes),
                *(
                    _nested(
                        [getattr(bench.timings[seen[n]], bound) for n in grids.nodes_of(part.axes)],
                        [grids.length(axis) for axis in part.axes],
                    )
                    for bound in ("median", "low", "high")
                ),
            )
            for part, seen in zip(parts, found, strict=True)
        ),
        scale=1.0,
        offset=0.0,
    )
    sums = (
        table.function()
        .of_many(torch.tensor([each.widths for each in checks], device="cpu"))
        .tolist()
    )
    times = [bench.timings[each.signature].median for each in checks]
    scale, offset = _fit(sums, times, _least(table))
    fits = [
        {"measured": time, "predicted": scale * total + offset}
        for time, total in zip(times, sums, strict=True)
    ]
    return replace(table, scale=scale, offset=offset, checks=tuple(fits))


def _fit(sums: Sequence[float], measured: Sequence[float], least: float) -> tuple[float, float]:
    """Scale and offset by medians (Theil and Sen), as some networks may have met a busy machine; a
    scale alone where these would make a latency negative.

    Args:
        sums: of the segments of some structures.
        measured: latencies of the whole networks.
        least: no sum is smaller.
    """
    points = [*zip(sums, measured, strict=True)]
    slopes = [(n - m) / (t - s) for (s, m), (t, n) in combinations(points, 2) if s != t]
    if slopes:
        scale = median(slopes)
        offset = median(m - scale * s for s, m in points)
        if scale > 0 and scale * least + offset >= 0:
            return scale, offset
    return median(m / s for s, m in points), 0.0


def _least(table: LatencyTable) -> float:
    """A bound below all sums of the terms."""
    return sum(
        float(torch.tensor(term.ms, dtype=torch.float64, device="cpu").min())
        for term in table.terms
    )


def _nested(values: Sequence[float], shape: Sequence[int]) -> Any:
    return torch.tensor(values, dtype=torch.float64, device="cpu").reshape(tuple(shape)).tolist()
