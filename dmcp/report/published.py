"""What was measured, next to what the paper printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dmcp.recipes import PUBLISHED, PublishedResult

_TOLERANCE = 0.03
"""How far apart MACs may be to stand in one row, as a share of the published ones."""


@dataclass(frozen=True)
class Beside:
    """One row of the table.

    Attributes:
        network, method, macs: of what was measured.
        top1: measured accuracy in %.
        published: a row of the paper for the same network at about the same MACs, None if there is
            none.
    """

    network: str
    method: str
    macs: int
    top1: float
    published: PublishedResult | None


def beside_published(records: Iterable[Mapping[str, Any]]) -> list[Beside]:
    """Every record beside the paper's rows of the same network that are nearest in MACs.

    Args:
        records: ``network``, ``method``, ``macs`` and ``top1``, a share.

    Returns:
        For each record one row for each method of the paper, distilled or not, that has a network
        within 3 % of its MACs, the record's own method first; one row if no method has.
    """
    rows: list[Beside] = []
    for record in records:
        measured = Beside(
            record["network"], record["method"], record["macs"], 100 * record["top1"], None
        )
        near = _near(measured.network, measured.method, measured.macs)
        rows += [replace(measured, published=published) for published in near] or [measured]
    return rows


def _near(network: str, method: str, macs: int) -> list[PublishedResult]:
    nearest: dict[tuple[str, bool], PublishedResult] = {}
    for result in PUBLISHED:
        if result.network != network or abs(macs / result.macs - 1) > _TOLERANCE:
            continue
        kind = (result.method, result.distilled)
        if kind not in nearest or abs(macs - result.macs) < abs(macs - nearest[kind].macs):
            nearest[kind] = result
    return sorted(nearest.values(), key=lambda result: result.method != method)
