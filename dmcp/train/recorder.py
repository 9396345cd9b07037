"""What a run reports: ``metrics.jsonl``, TensorBoard, and whoever watches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmcp.errors import CheckpointError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Recorder:
    """Appends records to ``<folder>/metrics.jsonl``, one JSON object a line, and to TensorBoard.

    A record is ``{"phase": ..., "step": ..., <metric>: <number>, ...}``. It holds no times, so that
    a resumed run writes the file an undisturbed one would have written. TensorBoard events go to
    ``<folder>/tensorboard/<phase>``, or nowhere if the package is not installed.

    Args:
        folder: the run's folder; made if it is missing. A last line of ``metrics.jsonl`` that a
            kill left unfinished is dropped.
        on_record: called with every record, e.g. by a progress display.

    Raises:
        CheckpointError: a line of ``metrics.jsonl`` before the last is not a record.
    """

    def __init__(
        self, folder: Path, on_record: Callable[[Mapping[str, Any]], None] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._events = folder / "tensorboard"
        self._writers: dict[str, SummaryWriter | None] = {}
        self._on_record = on_record
        self._keep(lambda record: True)

    def begin(self, phase: str, step: int) -> None:
        """Forget what was recorded of ``phase`` after ``step``: it is about to run again."""
        self._keep(lambda record: record["phase"] != phase or record["step"] <= step)
        self._close_writer(phase)
        self._writers[phase] = _open_writer(self._events / phase, purge_step=step + 1)

    def record(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append one record, and hand it to the watcher."""
        record = {"phase": phase, "step": step, **metrics}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if writer := self._writers.get(phase):
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)
            writer.flush()
        if self._on_record is not None:
            self._on_record(record)

    def close(self) -> None:
        """Close the TensorBoard files."""
        for phase in list(self._writers):
            self._close_writer(phase)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Cut the file to its whole lines whose record is ``wanted``, at once or not at all."""
        old = self.path.read_text(errors="replace") if self.path.exists() else ""
        *lines, _torn = old.split("\n")
        kept = ""
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None:
                raise CheckpointError(f"line {number} of {self.path} is not a record")
            if wanted(record):
                kept += line + "\n"
        if kept == old:
            return
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(kept)
        partial.replace(self.path)

    def _close_writer(self, phase: str) -> None:
        if writer := self._writers.pop(phase, None):
            writer.close()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"phase", "step"} <= record.keys() else None


def _open_writer(folder: Path, purge_step: int) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
