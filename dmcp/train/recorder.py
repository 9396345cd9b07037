"""What a run reports: ``metrics.jsonl``, ``chains.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmcp.errors import CheckpointError
from dmcp.train.checkpoint import write_atomically
from dmcp.train.events import Events
from dmcp.train.readback import Snapshot

Record = Mapping[str, Any]


class Recorder:
    """Appends records to ``<folder>/metrics.jsonl``, one JSON object a line, those of chains to
    ``<folder>/chains.jsonl``, and both to TensorBoard.

    A record is ``{"phase": ..., "step": ..., <metric>: <number>, ...}``; of chains,
    ``{"phase": ..., "step": ..., "retain": {<unit>: [q_1, ...], ...}}``. It holds no times, so that
    a resumed run writes the files an undisturbed one would have written.

    TensorBoard events go to ``<folder>/tensorboard/<phase>``, or nowhere if the package is not
    installed: a scalar for every metric; of chains a histogram of q for every unit, and a picture
    of the expected widths. Weights & Biases shows the same after
    ``wandb.init(sync_tensorboard=True)``, called before the run.

    Args:
        folder: the run's folder; made if it is missing. A last line that a kill left unfinished is
            dropped.
        config: what the run was asked for, plain JSON data, which TensorBoard shows as text.

    Raises:
        CheckpointError: a line of either file before the last is not a record.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = _Lines(folder / "metrics.jsonl")
        self._chains = _Lines(folder / "chains.jsonl")
        self._events = Events(folder / "tensorboard", config)

    def begin(self, phase: str, step: int) -> list[Record]:
        """Forget what was recorded of ``phase`` after ``step``: it is about to run again.

        Returns:
            What is left of it, in the order in which it was recorded.
        """
        self._events.begin(phase, step)
        kept: list[Record] = []
        for lines in (self._chains, self._metrics):
            records = lines.keep(lambda r: r["phase"] != phase or r["step"] <= step)
            kept += [record for record in records if record["phase"] == phase]
        return sorted(kept, key=lambda record: record["step"])

    def record(self, phase: str, step: int, metrics: Mapping[str, float]) -> Record:
        """Append one record, and return it."""
        record = {"phase": phase, "step": step, **metrics}
        self._metrics.append(record)
        self._events.scalars(phase, step, metrics)
        return record

    def chains(self, phase: str, step: int, snapshot: Snapshot) -> Record:
        """Append one record of chains, and return it. Waits for the snapshot to arrive."""
        retain = snapshot.retain()
        record = {"phase": phase, "step": step, "retain": retain}
        self._chains.append(record)
        self._events.chains(phase, step, snapshot.choices, retain)
        return record

    def close(self) -> None:
        """Close the TensorBoard files."""
        self._events.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lines:
    """A file of records, one JSON object a line; made by its first record."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.keep(lambda record: True)

    def append(self, record: Record) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def keep(self, wanted: Callable[[Record], bool]) -> list[Record]:
        """Cut the file to its whole lines whose record is ``wanted``, at once or not at all."""
        old = self._path.read_text(errors="replace") if self._path.exists() else ""
        *lines, _torn = old.split("\n")
        records, kept = [], ""
        for number, line in enumerate(lines, start=1):
            record = _parse(line)
            if record is None:
                raise CheckpointError(f"line {number} of {self._path} is not a record")
            if wanted(record):
                records.append(record)
                kept += line + "\n"
        if kept != old:
            write_atomically(self._path, kept.encode())
        return records


def _parse(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"phase", "step"} <= record.keys() else None
