"""A training run to be killed: ``python killable_run.py <folder> <pause in s after each step>``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dmcp.train import Recorder, Schedule, Training, TrainOptions, run

STEPS = 40


def stream_from(start: int) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(start, STEPS):
        generator = torch.Generator().manual_seed(step)
        yield (
            torch.randn(8, 3, 8, 8, generator=generator),
            torch.randint(0, 4, (8,), generator=generator),
        )


def main(folder: Path, pause: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # dropout draws from torch's global generator, which the loop has to keep
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(128, 4),
    )
    stage = Training(model, TrainOptions(Schedule(0.05, warmup=0.2, start=0.0)), STEPS)
    with Recorder(folder) as recorder:
        run(
            stage,
            stream_from,
            phase="train",
            checkpoint=folder / "last.pt",
            checkpoint_every=4,
            log_every=3,
            recorder=recorder,
            on_step=lambda step: time.sleep(pause),
        )
    torch.save(model.state_dict(), folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
