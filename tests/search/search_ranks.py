"""A few steps of a search on one of two processes:
``python search_ranks.py <folder> <rank> <port>``.

Saves what it ended with to ``<folder>/<rank>.pt``, for test_distributed.py to compare.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmcp.models import build
from dmcp.search import Budget, MarkovNet, Search, SearchOptions
from dmcp.train import (
    Schedule,
    World,
    init_from_env,
    restore_batch_norm,
    shutdown,
    synchronise_batch_norm,
)

STEPS, IMAGES = 5, 16
OPTIONS = {
    "paper": SearchOptions(
        warmup=0.2,
        lr=Schedule(peak=0.02),
        uniform_share=0.01,
        start=0.5,
        label_smoothing=0.1,
        arch_optimizer="sgd",
        arch_lr=Schedule(peak=0.5, final=0.1),
        budget_loss="log_l1",
        budget_weight=0.1,
    ),
    "own": SearchOptions(warmup=0.2, lr=Schedule(peak=0.02), uniform_share=1e-3),
}


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(IMAGES, 3, 16, 16, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 5, (IMAGES,), generator=generator)


def search(world: World, options: str) -> dict[str, Any]:
    """All steps, each rank on its share of every batch. Ranks start from other weights."""
    torch.set_num_threads(1)
    torch.manual_seed(world.rank)
    model = build("resnet18", num_classes=5, width=0.125, small_images=True).double()
    example = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    net = MarkovNet(model, example, divisor=1).double()
    budget = Budget(macs="50%", params="60%")
    stage = Search(net, budget, STEPS, OPTIONS[options], seed=3, world=world)
    synchronise_batch_norm(net.model, world)
    metrics = []
    for step in range(STEPS):
        images, labels = (part.chunk(world.size)[world.rank] for part in global_batch(step))
        metrics.append(stage.step(images, labels))
    restore_batch_norm(net.model)
    return {
        "net": net.state_dict(),
        "generator": stage.generator.get_state(),
        "metrics": [{name: float(value) for name, value in step.items()} for step in metrics],
        "expected": stage.expected_widths(),
        "classes": sorted({type(module).__name__ for module in net.modules()}),
    }


def main(folder: Path) -> None:
    world = init_from_env("cpu")
    torch.save({name: search(world, name) for name in OPTIONS}, folder / f"{world.rank}.pt")
    shutdown()


if __name__ == "__main__":
    place, rank, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    main(Path(place))
