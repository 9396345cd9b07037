"""All pruning methods under one protocol: same network, units, costs, images, recipe and training;
only the method differs."""

from dmcp.compare.config import TRACKS, CompareConfig, Track
from dmcp.compare.run import Comparison, run_compare
from dmcp.compare.table import Record, Row
from dmcp.compare.tasks import DENSE, Place

__all__ = [
    "DENSE",
    "TRACKS",
    "CompareConfig",
    "Comparison",
    "Place",
    "Record",
    "Row",
    "Track",
    "run_compare",
]
