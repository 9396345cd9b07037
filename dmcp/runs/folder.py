"""A run folder: what is in it, and how it is written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from torch import nn

from dmcp.errors import CheckpointError, require
from dmcp.train.checkpoint import write_atomically

FORMAT = 1
"""Version of the layout, kept in ``config.json``."""


class RunFolder:
    """The files of one run.

    ``config.json``
        what was asked for; a folder takes up only the very run it was made by. Of a model in a
        file it holds the name, and nothing runs that file because the name is there.
    ``metrics.jsonl``, ``chains.jsonl``, ``tensorboard/``
        what was measured on the way; the retain probabilities of a search, up to 200 times.
    ``latency.json``
        the table that a budget of latency goes by, see `dmcp.cost.LatencyTable`.
    ``search.json``
        its retain probabilities at the end and the expected costs with their deviations.
    ``ledger.json``
        what the phases have cost, on what, and how to repeat the run, see `dmcp.runs.ledger`.
    ``checkpoint/<phase>.pt``
        to resume from; torch files that hold tensors and plain data only.
    ``widths.json``
        the structure that was found, see `dmcp.Structure`.
    ``weights/<network>.safetensors``
        trained networks.
    ``results.json``
        the table at the end.

    Every file but the records is replaced at once, so a kill leaves the old one or the new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(
        self,
        config: dict[str, Any],
        needed: Mapping[str, dict[str, Any]] | None = None,
        *,
        write: bool = True,
    ) -> None:
        """Take up the run of this configuration, or begin it if the folder is new.

        Args:
            config: plain JSON data.
            needed: JSON files without which the run could not be taken up, by name; they are there
                before ``config.json`` is.
            write: write the files that are missing or differ (the main process does).

        Raises:
            CheckpointError: the folder holds something else, or a run of another configuration.
            MissingDependencyError: safetensors, which the run will need, is not installed.
        """
        require("safetensors.torch", "cli", "saving weights")
        stale = {n: data for n, data in (needed or {}).items() if not self._holds(n, data)}
        wanted = _plain({"format": FORMAT, **config})
        is_new = self._holds_only((needed or {}).keys() - stale.keys())
        if not is_new and (held := self.config()) != wanted:
            raise CheckpointError(
                f"{self.path} holds a run of another configuration: {_difference(held, wanted)}"
            )
        if not write:
            return
        for name, data in stale.items():
            self.write_json(name, data)
        if is_new:
            self.write_json("config.json", wanted)

    def config(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            CheckpointError: this is no run folder, or one of an unknown format.
        """
        config = self.read_json("config.json")
        held = config.get("format")
        if held != FORMAT:
            raise CheckpointError(
                f"{self.path / 'config.json'} has format {held!r}, expected {FORMAT}"
            )
        return config

    def checkpoint(self, phase: str) -> Path:
        """Where a phase keeps its checkpoint."""
        return self.path / "checkpoint" / f"{phase}.pt"

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replace a JSON file of the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, (json.dumps(data, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the run.

        Raises:
            CheckpointError: it is missing or not a JSON object.
        """
        path = self.path / name
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} is not a finished run: it has no {name}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is not a readable JSON file: {error}") from None
        if not isinstance(data, dict):
            raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object")
        return data

    def write_weights(self, network: str, model: nn.Module) -> None:
        """Save a network's parameters and buffers as safetensors."""
        safetensors = require("safetensors.torch", "cli", "saving weights")
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        path = self.path / "weights" / f"{network}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.save(tensors))

    def read_weights(self, network: str, model: nn.Module) -> None:
        """Load what `write_weights` saved into a network of the same structure.

        Raises:
            CheckpointError: the file is missing, corrupt, or of another structure.
        """
        safetensors = require("safetensors.torch", "cli", "loading weights")
        path = self.path / "weights" / f"{network}.safetensors"
        if not path.is_file():
            raise CheckpointError(f"{self.path} holds no trained network {network!r}")
        try:
            model.load_state_dict(safetensors.load(path.read_bytes()))
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} does not fit the network: {reason}") from None

    def _holds_only(self, written: Set[str]) -> bool:
        """Whether there is nothing but these files, which are written before ``config.json``.

        Raises:
            CheckpointError: there are others, but no ``config.json``.
        """
        if self.path.is_file():
            raise CheckpointError(f"{self.path} is a file, not a run folder")
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        # Hidden files do not count: a kill may have left a part of the very first file.
        if all(name[0] == "." for name in names - written):
            return True
        if not (self.path / "config.json").exists():
            raise CheckpointError(f"{self.path} is not empty and not a run folder")
        return False

    def _holds(self, name: str, data: dict[str, Any]) -> bool:
        """Whether a JSON file of the run holds this."""
        return (self.path / name).exists() and self.read_json(name) == _plain(data)


def _plain(data: dict[str, Any]) -> Any:
    """What is read of it once it is written."""
    return json.loads(json.dumps(data))


def _difference(held: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first entry that differs, as ``name: held, not wanted``."""
    for key in sorted(held.keys() | wanted.keys(), key=lambda key: (key != "kind", key)):
        old, new = held.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            return _difference(old, new, f"{prefix}{key}.")
        return f"{prefix}{key} is {old!r}, not {new!r}"
    return "nothing"
