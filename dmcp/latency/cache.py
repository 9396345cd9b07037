"""What was measured already, on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmcp.latency.timing import Timing


class TimingCache:
    """Timings by signature, in one file for each setting: device, runtime, versions, threads.

    A line is added for each as it comes, so that whatever was measured before an interruption is
    there after it.

    Args:
        folder: of the files.
        setting: what the timings depend on beside the signature, plain JSON data.
        rounds: of the timings that are added; those of fewer rounds do not count.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any], rounds: int) -> None:
        text = json.dumps(setting, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = folder / f"{name}.jsonl"
        self._rounds = rounds
        self._held: dict[str, Timing] = {}
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        if not lines:
            with self.path.open("a") as file:  # others may begin it at the same time
                file.write(text + "\n")
        for line in lines[1:]:
            self._read(line)

    def __contains__(self, signature: str) -> bool:
        return signature in self._held

    def __getitem__(self, signature: str) -> Timing:
        return self._held[signature]

    def __len__(self) -> int:
        return len(self._held)

    def add(self, timings: Mapping[str, Timing]) -> None:
        """Keep what was measured."""
        lines = [
            json.dumps({"signature": signature, "rounds": self._rounds, **asdict(timing)})
            for signature, timing in timings.items()
        ]
        with self.path.open("a") as file:
            # Behind a line that was cut short, if there is one.
            file.write("\n" + "".join(f"{line}\n" for line in lines))
        self._held.update(timings)

    def _read(self, line: str) -> None:
        try:
            data = json.loads(line)
            signature, rounds = data["signature"], data["rounds"]
            timing = Timing(data["median"], data["low"], data["high"])
        except (ValueError, KeyError, TypeError):
            return  # the line that an interruption cut short
        if rounds >= self._rounds:
            self._held[signature] = timing


def cache_folder() -> Path:
    """Where timings are kept by default: below ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dmcp" / "latency"
