"""What a comparison found, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dmcp.compare.run import Comparison
from dmcp.report import DENSE, draw_front, draw_widths, save


def draw_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw accuracy against MACs, and for every budget the widths that the methods found for the
    first seed.

    Args:
        comparison: without the dense network among its records there is nothing to hold widths
            against.
        folder: where the pictures go, each as PNG and SVG.

    Returns:
        The files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if not comparison.records:
        return []
    files = save(draw_front(asdict(record) for record in comparison.records), folder / "front")
    dense = [record.widths for record in comparison.records if record.method == DENSE]
    if not dense:
        return files
    structures: dict[str, dict[str, Mapping[str, int]]] = {}
    for record in comparison.records:
        if record.budget is not None:
            structures.setdefault(record.budget, {}).setdefault(record.method, record.widths)
    for budget, found in structures.items():
        files += save(draw_widths(found, dense[0], f"budget {budget}"), folder / f"widths-{budget}")
    return files
