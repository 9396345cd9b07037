"""What TensorBoard shows of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_BINS = np.linspace(0, 1, 21)
"""Of the histograms: the default ones reach to 1e20, and take most of the time."""

_QUEUE = 1000
"""Events on their way to a file before anybody waits: those of all units at once."""

_HEIGHT, _BAR, _GAP = 64, 6, 2
"""Of the bars and the space between them, in pixels."""

_KEPT, _DROPPED = (31, 119, 180), (222, 222, 222)


class Events:
    """TensorBoard's files, one folder a phase, each made by the first record of the phase."""

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None) -> None:
        self._folder = folder
        self._config = config
        self._writer_class = _writer_class()
        self._done: dict[str, int] = {}
        self._writers: dict[str, SummaryWriter | None] = {}

    def begin(self, phase: str, step: int) -> None:
        self._close(phase)
        self._done[phase] = step

    def scalars(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        if writer := self._writer(phase):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def chains(
        self,
        phase: str,
        step: int,
        choices: Mapping[str, Sequence[int]],
        retain: Mapping[str, Sequence[float]],
    ) -> None:
        if writer := self._writer(phase):
            for unit, q in retain.items():
                writer.add_histogram(f"q/{unit}", np.array(q), step, bins=_BINS)
            shares = [_expected_share(choices[unit], q) for unit, q in retain.items()]
            writer.add_image("expected_widths", _bars(shares), step)

    def close(self) -> None:
        for phase in list(self._writers):
            self._close(phase)

    def _writer(self, phase: str) -> SummaryWriter | None:
        if phase not in self._writers:
            self._writers[phase] = self._open(phase)
        return self._writers[phase]

    def _open(self, phase: str) -> SummaryWriter | None:
        if self._writer_class is None:
            return None
        done = self._done.get(phase, 0)
        folder = str(self._folder / phase)
        writer = self._writer_class(folder, purge_step=done + 1, max_queue=_QUEUE)
        if self._config is not None and not done:
            # Four spaces before each line are Markdown's code block.
            text = json.dumps(self._config, indent=2).replace("\n", "\n    ")
            writer.add_text("config", f"    {text}")
        return writer

    def _close(self, phase: str) -> None:
        if writer := self._writers.pop(phase, None):
            writer.close()


def _writer_class() -> type[SummaryWriter] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def _expected_share(choices: Sequence[int], q: Sequence[float]) -> float:
    """E[c] of a unit over its full width."""
    sizes = [wide - narrow for narrow, wide in pairwise(choices)]
    expected = choices[0] + sum(size * p for size, p in zip(sizes, q, strict=True))
    return expected / choices[-1]


def _bars(shares: Sequence[float]) -> Tensor:
    """A picture of a bar per unit, filled up to its share: uint8 [3, height, width]."""
    height = torch.arange(_HEIGHT, 0, -1, device="cpu")[:, None] - 0.5
    filled = height < torch.tensor(shares, device="cpu") * _HEIGHT
    bars = torch.where(
        filled[..., None],
        torch.tensor(_KEPT, dtype=torch.uint8, device="cpu"),
        torch.tensor(_DROPPED, dtype=torch.uint8, device="cpu"),
    )
    picture = torch.full(
        (3, _HEIGHT, len(shares), _BAR + _GAP), 255, dtype=torch.uint8, device="cpu"
    )
    picture[..., :_BAR] = bars.permute(2, 0, 1)[..., None]
    return picture.flatten(2)
