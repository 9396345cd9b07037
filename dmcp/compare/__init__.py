"""All pruning methods under one protocol: same network, units, costs, images, recipe and training;
only the method differs."""

from dmcp.compare.config import TRACKS, CompareConfig, Track
from dmcp.compare.pictures import draw_comparison
from dmcp.compare.run import Comparison, run_compare
from dmcp.compare.table import Record, Row
from dmcp.compare.tasks import Place

__all__ = [
    "TRACKS",
    "CompareConfig",
    "Comparison",
    "Place",
    "Record",
    "Row",
    "Track",
    "draw_comparison",
    "run_compare",
]
