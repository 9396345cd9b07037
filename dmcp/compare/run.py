"""A comparison from its configuration to its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from dmcp.compare.config import CompareConfig
from dmcp.compare.schedule import Progress, carry_out, name_of
from dmcp.compare.table import Record, Row, measure, records_of, rows_of
from dmcp.compare.tasks import Place, bench_of
from dmcp.errors import ConfigError
from dmcp.runs import RunFolder


@dataclass(frozen=True)
class Comparison:
    """What a comparison has come to.

    Attributes:
        rows: the table, one line for each method, budget and track of which a network is trained.
        records: its networks, one for each seed.
        failed: task -> the reason; a later call tries again.
        left: how many tasks there are still to do.
    """

    rows: list[Row]
    records: list[Record]
    failed: Mapping[str, str]
    left: int


def run_compare(
    config: CompareConfig,
    place: Place,
    *,
    jobs: int = 1,
    seconds: float | None = None,
    progress: Progress = lambda done, total, name: None,
) -> Comparison:
    """Do a comparison, or go on with it, and write its table to ``results.json``.

    Every task leaves a file; what is there is not done again, and what was stopped continues from
    its checkpoint. Methods, seeds and tracks may be added to a folder.

    Args:
        config: what is compared.
        place: where.
        jobs: processes side by side.
        seconds: stop after so many.
        progress: told after every task.

    Raises:
        BudgetError: the network cannot meet a budget.
        CheckpointError: the folder is of another comparison.
        DmcpError: the network or the data are not fit for it. What goes wrong in a single task is
            in the result instead.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds must be positive, got {seconds}")
    bench_of(config, place, config.seeds[0]).lab(place.folder)  # refuses budgets out of reach
    folder = RunFolder(place.folder)
    folder.open(config.identity())
    failed, left = carry_out(config, place, jobs, seconds, progress)
    torch.set_num_threads(place.threads * jobs)
    records = records_of(config, place.folder)
    rows = rows_of(records, measure(config, place, records) if records else {})
    reasons = {name_of(task): str(error) for task, error in failed.items()}
    comparison = Comparison(rows, records, reasons, len(left))
    folder.write_json("results.json", asdict(comparison))
    return comparison
