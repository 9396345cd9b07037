"""A comparison from its configuration to its table."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dmcp.compare.config import CompareConfig
from dmcp.compare.schedule import Progress, carry_out, name_of
from dmcp.compare.table import Record, Row, measure, records_of, rows_of
from dmcp.compare.tasks import Place, bench_of
from dmcp.errors import CheckpointError, ConfigError
from dmcp.runs import RunFolder


@dataclass(frozen=True)
class Comparison:
    """What a comparison has come to.

    Attributes:
        rows: the table, one line for each method, budget and track of which a network is trained.
        records: its networks, one for each seed.
        failed: task -> the reason; a later call tries again.
        left: how many tasks there are still to do.
        device, threads: where latency was measured, and with how many of PyTorch's threads.
    """

    rows: list[Row]
    records: list[Record]
    failed: Mapping[str, str]
    left: int
    device: str
    threads: int


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
        CheckpointError: the folder is of another comparison, or in use.
        DmcpError: the network or the data are not fit for it. What goes wrong in a single task is
            in the result instead.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if seconds is not None and not seconds > 0:
        raise ConfigError(f"seconds must be positive, got {seconds}")
    bench = bench_of(config, place, config.seeds[0])
    bench.lab(place.folder)  # refuses budgets out of reach
    bench.job.check_parts(config.recipe.search, config.recipe.retrain)
    folder = RunFolder(place.folder)
    folder.open(config.identity())
    with _alone(place.folder):
        failed, left = carry_out(config, place, jobs, seconds, progress)
        records = records_of(config, place.folder)
        threads = place.threads * jobs
        rows = rows_of(records, measure(config, place, threads, records) if records else {})
        reasons = {name_of(task): str(error) for task, error in failed.items()}
        comparison = Comparison(rows, records, reasons, len(left), place.device, threads)
        folder.write_json("results.json", asdict(comparison))
    return comparison


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from working in the same folder."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError(f"{folder} is in use by another process") from None
        yield
