"""Every cost there is, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from dmcp.cost.cost import Cost
from dmcp.cost.count import count
from dmcp.cost.polynomial import PolynomialCost
from dmcp.cost.table import LatencyTable, TableCost, latency
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph

TABLE = "latency.json"
"""Where a table is written and looked for if nobody says otherwise."""

Table = LatencyTable | str | Path
"""A table, or the file that holds it."""


@dataclass(frozen=True)
class Metric:
    """A kind of cost.

    Attributes:
        name: as `cost` takes it.
        bound: as `dmcp.Budget` takes a bound on it.
        label: its name in tables and pictures.
        unit: what its numbers are; empty for counts, which are integers.
        of: a traced network and, if ``measured``, a table -> the cost.
        measured: whether it needs a table.
    """

    name: str
    bound: str
    label: str
    of: Callable[[ChannelGraph, Table], Cost]
    unit: str = ""
    measured: bool = False


def _counted(name: str, label: str) -> Metric:
    return Metric(name, name, label, lambda graph, _: count(graph, name))


def _latency(graph: ChannelGraph, table: Table) -> TableCost:
    held = table if isinstance(table, LatencyTable) else LatencyTable.read(table)
    return latency(graph, held, count(graph, "macs").of({}))


METRICS = {
    metric.name: metric
    for metric in (
        _counted("macs", "MACs"),
        _counted("params", "parameters"),
        _counted("memory", "activation memory"),
        Metric("latency", "latency_ms", "latency", _latency, unit="ms", measured=True),
    )
}


# A str that is not known is no "latency" to a type checker: what is measured has to be spelt out.
@overload
def cost(  # type: ignore[overload-overlap]
    graph: ChannelGraph, metric: Literal["latency"], table: Table = ...
) -> TableCost: ...
@overload
def cost(graph: ChannelGraph, metric: str = ..., table: Table = ...) -> PolynomialCost: ...
def cost(graph: ChannelGraph, metric: str = "macs", table: Table = TABLE) -> Cost:
    """A cost of the traced network as a function of its unit widths.

    Args:
        graph: what `dmcp.trace` returned.
        metric: ``"macs"``, multiply–accumulates of convolutions, linear layers and matrix products
            per image, without bias, norms, activations and pooling, at the image size of the trace;
            ``"params"``, numbers in the model's parameters, tied ones once; ``"memory"``, numbers
            written by convolutions, linear layers and matrix products per image (the activations
            that training keeps); ``"latency"``, milliseconds of a forward pass as measured by
            ``dmcp bench latency``.
        table: what was measured, for ``"latency"``: a `LatencyTable`, or the file that holds it.

    Returns:
        An exact polynomial, or an interpolated table.

    Raises:
        ConfigError: an unknown metric; a table that is missing or of another network.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    return METRICS[metric].of(graph, table)
