"""The ledger of a run: what it has cost, on what, and how to run it again."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dmcp
from dmcp.methods import Spent
from dmcp.runs.folder import RunFolder
from dmcp.train import World


class Ledger:
    """``ledger.json``, written when the run begins and after each of its phases.

    ``phases``
        name -> ``steps``, ``images_forward``, ``images_backward`` and ``seconds``. An image counts
        once for every network, of whatever width, that it goes through in all processes: several
        times in a step of a search. The final evaluations are not counted. What a kill destroyed
        and the run did again counts once, in images as in seconds.
    ``warnings``
        what the search was warned of, see `dmcp.search.SearchWatch`.
    ``device``, ``versions``
        of the process that ran last.
    ``command``
        the shell line that repeats the run, None if it was called from Python.
    ``commit``
        of the checkout that the package ran from, with ``-dirty`` if files differ from it; absent
        where it runs from none.

    Args:
        folder: of the run.
        world: its processes; the first one writes.
        command: see above.
    """

    def __init__(self, folder: RunFolder, world: World, command: str | None = None) -> None:
        self._folder = folder
        self._writes = world.is_main
        self._phases: dict[str, dict[str, float]] = {}
        self._warnings: list[str] = []
        self._of: dict[str, Any] = {
            "device": _device(world),
            "versions": {
                "dmcp": dmcp.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "command": command,
        }
        if found := commit():
            self._of["commit"] = found

    def begin(self) -> None:
        """Write the file, or take up the phases of an earlier process of the run."""
        if (self._folder.path / "ledger.json").exists():
            self._phases = self._folder.read_json("ledger.json").get("phases", {})
        else:
            self._write()

    def record(self, phase: str, steps: int, spent: Spent, warned: Iterable[str] = ()) -> None:
        """What a phase has cost, and what was warned of meanwhile."""
        self._phases[phase] = {
            "steps": steps,
            "images_forward": spent.forward,
            "images_backward": spent.backward,
            "seconds": spent.seconds,
        }
        self._warnings += warned
        self._write()

    def charge(self, phase: str, forward: int) -> None:
        """Images that went through a network after a phase that is recorded, for it."""
        self._phases[phase]["images_forward"] += forward
        self._write()

    def _write(self) -> None:
        if self._writes:
            spent = {"phases": self._phases, "warnings": self._warnings}
            self._folder.write_json("ledger.json", {**spent, **self._of})


@cache
def commit() -> str | None:
    """The commit of the checkout that the package runs from; None where it runs from none."""
    root = Path(dmcp.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _device(world: World) -> str:
    on_gpu = world.device.type == "cuda"
    name = torch.cuda.get_device_name(world.device) if on_gpu else _cpu()
    return name if world.size == 1 else f"{world.size} × {name}"


def _cpu() -> str:
    """What the system calls it, with the number of threads that compute."""
    names = []
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    name = next(iter(names), "") or platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
