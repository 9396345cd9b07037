"""Costs that were measured: tables of them at some widths, kept as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmcp.cost.cost import Cost
from dmcp.cost.expectation import Expectation
from dmcp.cost.interpolation import Interpolation
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph, ChannelUnit

FORMAT = 1
MEASURE = "dmcp bench latency"
"""The command that writes a table."""


@dataclass(frozen=True)
class TableAxis:
    """The widths of one unit, or of several that are concatenated.

    Attributes:
        weights: unit name -> how much each of its channels adds to the position on the axis.
        nodes: the positions at which was measured, ascending.
    """

    weights: Mapping[str, float]
    nodes: tuple[float, ...]


@dataclass(frozen=True)
class TableTerm:
    """A part of the network that was measured by itself.

    Attributes:
        name: of the module that does most of it.
        operators: what it computes.
        axes: the axes that it depends on, by number: none, one or two.
        ms, low, high: milliseconds at the nodes of these axes, [], [K] or [K, K'], with the bounds
            of `dmcp.latency.Timing`.
    """

    name: str
    operators: tuple[str, ...]
    axes: tuple[int, ...]
    ms: Any
    low: Any
    high: Any


@dataclass(frozen=True)
class LatencyTable:
    """The latency of a network as a sum over its parts, fitted to that of the whole.

    Attributes:
        setting: what it was measured on and with: device, runtime, versions, threads, the shape
            of the batch (``"input"``).
        units: unit name -> full width, of the network that was measured.
        searchable: those units whose width was varied.
        macs: of the full network, per image.
        operators: see `dmcp.graph.ChannelGraph`: another network may have the same units and MACs.
        axes, terms: what was measured.
        scale, offset: the whole network takes scale * Σ terms + offset milliseconds.
        checks: whole networks that this was fitted to: milliseconds measured and predicted.
    """

    setting: Mapping[str, Any]
    units: Mapping[str, int]
    searchable: tuple[str, ...]
    macs: int
    operators: tuple[str, ...]
    axes: tuple[TableAxis, ...]
    terms: tuple[TableTerm, ...]
    scale: float
    offset: float
    checks: tuple[Mapping[str, float], ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> LatencyTable:
        """The table in a file.

        Raises:
            ConfigError: the file is missing or holds something else.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise ConfigError(
                f"latency needs a measured table, and there is no {str(path)!r}: measure one with "
                f"`{MEASURE} --model … --output {path}`"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise ConfigError(
                f"{str(path)!r} is not a table of `{MEASURE}` of format {FORMAT}: {error}"
            ) from None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyTable:
        """What `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}")
        setting = dict(data["setting"])
        _check_input(setting.get("input"))
        axes = tuple(TableAxis(axis["weights"], tuple(axis["nodes"])) for axis in data["axes"])
        terms = tuple(
            TableTerm(
                term["name"],
                tuple(term["operators"]),
                tuple(term["axes"]),
                term["ms"],
                term["low"],
                term["high"],
            )
            for term in data["terms"]
        )
        table = cls(
            setting=setting,
            units=data["units"],
            searchable=tuple(data["searchable"]),
            macs=data["macs"],
            operators=tuple(data["operators"]),
            axes=axes,
            terms=terms,
            scale=float(data["scale"]),
            offset=float(data["offset"]),
            checks=tuple(data["checks"]),
        )
        table.function()  # refuses tables that do not fit their axes
        return table

    def to_json(self) -> dict[str, Any]:
        """The table as plain JSON data."""
        return {"format": FORMAT, **asdict(self)}

    @cached_property
    def digest(self) -> str:
        """A hash of everything in it."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def function(self) -> Interpolation:
        """The latency of the whole network in milliseconds as a function of the widths, in the
        order of ``units``."""
        constant = self.offset
        floats = partial(torch.tensor, dtype=torch.float64, device="cpu")
        single = [floats([0.0] * len(axis.nodes)) for axis in self.axes]
        pairs: dict[tuple[int, ...], Tensor] = {}
        for term in self.terms:
            values = self.scale * floats(term.ms)
            shape = [len(self.axes[axis].nodes) for axis in term.axes]
            if list(values.shape) != shape:
                raise ValueError(f"{term.name}: {list(values.shape)} values for {shape}")
            if not shape:
                constant += values.item()
            elif len(shape) == 1:
                single[term.axes[0]] += values
            else:
                places = tuple(sorted(term.axes))
                values = values if places == term.axes else values.T
                pairs[places] = pairs.get(places, 0.0) + values
        weights = [[axis.weights.get(unit, 0.0) for unit in self.units] for axis in self.axes]
        return Interpolation.from_json(
            {
                "constant": constant,
                "weights": weights,
                "nodes": [list(axis.nodes) for axis in self.axes],
                "single": [values.tolist() for values in single],
                "places": [*pairs],
                "pairs": [values.tolist() for values in pairs.values()],
            }
        )


def _check_input(shape: object) -> None:
    """Refuse what is no shape of a batch; a table may have none."""
    if shape is None:
        return
    is_shape = isinstance(shape, list | tuple) and all(type(n) is int and n > 0 for n in shape)
    if not (is_shape and shape):
        raise ValueError(f"setting['input'] must be the shape of a batch, got {shape!r}")


@dataclass(frozen=True, eq=False)
class TableCost(Cost):
    """A measured cost: between the measured widths it is linear in each axis of a table, beyond
    them constant, so that it is monotone where the measurement is.

    Attributes:
        metric: ``"latency"``, in milliseconds.
        units: the units whose widths are the variables, in order (U of them).
        function: of the widths.
    """

    metric: str
    units: tuple[ChannelUnit, ...]
    function: Interpolation

    def of_many(self, widths: Tensor) -> Tensor:
        """The costs of many structures: int64 [n, U] -> float64 [n], in milliseconds."""
        self._check_many(widths)
        # To the picosecond, so that a structure costs the same in whatever company it is asked for.
        return self.function.of_many(widths.cpu()).round(decimals=9).to(widths.device)

    def expectation(
        self,
        choices: Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> Expectation:
        """What computes mean and variance under chains of these widths, by default those that the
        units may take."""
        return Expectation.of(self.function, choices or [u.choices for u in self.units], device)

    def mean(self, q: Tensor) -> Tensor:
        """The expected cost, exactly, from the retain probabilities of the chains of ``units``:
        [T] -> 0-d, differentiable."""
        return self.expectation(device=q.device)(q)[0]

    def variance(self, q: Tensor) -> Tensor:
        """The variance of the cost, exactly where no axis is of several units, see
        `dmcp.cost.expectation`: [T] -> 0-d, differentiable."""
        return self.expectation(device=q.device)(q)[1]

    def describe(self) -> dict[str, Any]:
        """``interpolation``: see `Interpolation.to_json`."""
        return {"interpolation": self.function.to_json()}

    def __repr__(self) -> str:
        return f"TableCost({self.metric!r}, {len(self.units)} units, full {self.of({}):.4g} ms)"


def latency(graph: ChannelGraph, table: LatencyTable, macs: int) -> TableCost:
    """The latency of a network by a table that was measured for it.

    Raises:
        ConfigError: the table is of another network, image size or of fewer searchable units.
    """
    units = {unit.name: unit.channels for unit in graph.units}
    if list(units.items()) != list(table.units.items()) or macs != table.macs:
        raise ConfigError(
            f"the latency table is of another network or image size: it has {len(table.units)} "
            f"units and {table.macs:,} MACs, this network {len(units)} and {macs:,}; measure this "
            f"one with `{MEASURE}`"
        )
    # Of the measured batch only its size may be another: it is that of what will be served.
    images = table.setting.get("input")
    if images is not None and graph.inputs and [tuple(images[1:])] != [*graph.inputs]:
        raise ConfigError(
            f"the latency table is of images {images[1:]}, this network was traced with "
            f"{', '.join(str([*shape]) for shape in graph.inputs)}; measure it with images of "
            f"that shape by `{MEASURE}`"
        )
    for measured, own in zip_longest(_computing(table.operators), _computing(graph.operators)):
        if measured != own:
            raise ConfigError(
                f"the latency table is of another network: where it has {measured}, this network "
                f"has {own}; measure this one with `{MEASURE}`"
            )
    missed = [u.name for u in graph.searchable if u.name not in table.searchable]
    if missed:
        raise ConfigError(
            f"the latency table holds one width of {missed[0]!r} only, which is to be searched: "
            f"measure with `{MEASURE}` and without excluding it"
        )
    return TableCost("latency", graph.units, table.function())


def _computing(operators: Sequence[str]) -> list[str]:
    """Without the inputs, which are plain names: in a compiled model they are others."""
    return [operator for operator in operators if not operator.isidentifier()]
