"""Runs: a folder, a configuration, and the pipeline from a search to a table."""

from dmcp.runs.config import NetworkConfig, SearchConfig, TrainConfig
from dmcp.runs.folder import RunFolder
from dmcp.runs.job import Machine, Row, Watcher
from dmcp.runs.pipeline import run_eval, run_search, run_train

__all__ = [
    "Machine",
    "NetworkConfig",
    "Row",
    "RunFolder",
    "SearchConfig",
    "TrainConfig",
    "Watcher",
    "run_eval",
    "run_search",
    "run_train",
]
