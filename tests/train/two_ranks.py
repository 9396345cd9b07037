"""What one of the processes of a run measures: ``python two_ranks.py <folder> <rank> <port>``.

Saves its findings to ``<folder>/<rank>.pt``; test_distributed.py compares them with one process.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmcp.errors import DmcpError
from dmcp.train import (
    Recorder,
    Schedule,
    Training,
    TrainOptions,
    World,
    init_from_env,
    recalibrate_batch_norm,
    restore_batch_norm,
    run,
    shutdown,
    synchronise_batch_norm,
    synchronised_batch_norm,
)
from dmcp.train.distributed import (
    all_gather,
    all_reduce_sum,
    average_gradients,
    broadcast_parameters,
)

OPTIONS = TrainOptions(Schedule(0.1, warmup=0.2, start=0.02), weight_decay=1e-3)
STEPS = 6


def make_net(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.BatchNorm1d(12, affine=False),
        nn.Dropout(dropout),
        nn.Linear(12, 4),
    ).double()


def global_batch(step: int, images: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(images, 3, 8, 8, dtype=torch.float64, generator=generator) * 2 + 1
    return pixels, torch.randint(0, 4, (images,), generator=generator)


def shard(tensor: Tensor, world: World) -> Tensor:
    return tensor.chunk(world.size)[world.rank]


def stream_of(world: World, end: int = STEPS) -> Callable[[int], Iterable[tuple[Tensor, Tensor]]]:
    def stream_from(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        for step in range(start, end):
            images, labels = global_batch(step)
            yield shard(images, world), shard(labels, world)

    return stream_from


def training(world: World) -> dict[str, Any]:
    """Ranks that start apart, and end as one process would."""
    model = make_net(seed=world.rank)
    synchronise_batch_norm(model, world)
    stage = Training(model, OPTIONS, STEPS, world)
    losses = [stage.step(*batch)["loss"] for batch in stream_of(world)(0)]
    restore_batch_norm(model)
    return {
        "model": model.state_dict(),
        "classes": [type(module).__name__ for module in model],
        "attributes": sorted(name for module in model for name in vars(module) if "world" in name),
        "losses": torch.stack(losses),
    }


def batch_norm(world: World, split: list[int], dtype: torch.dtype, affine: bool) -> dict[str, Any]:
    # far from zero, where a one-pass variance loses its digits
    images = global_batch(0, sum(split))[0] + 1000
    generator = torch.Generator().manual_seed(9)
    outward = torch.randn(images.shape, dtype=torch.float64, generator=generator)
    x = images.split(split)[world.rank].to(dtype).requires_grad_()
    affine_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=affine_dtype, requires_grad=True)
    bias = torch.tensor([0.1, 0.2, 0.3], dtype=affine_dtype, requires_grad=True)
    mean, variance = torch.zeros(3, dtype=affine_dtype), torch.ones(3, dtype=affine_dtype)
    w, b = (weight, bias) if affine else (None, None)
    y = synchronised_batch_norm(x, w, b, mean, variance, True, 0.1, 1e-5, world)
    (y * outward.split(split)[world.rank].to(dtype)).sum().backward()
    return {
        "y": y.detach(),
        "grad_x": x.grad,
        "grad_weight": weight.grad,
        "grad_bias": bias.grad,
        "running_mean": mean,
        "running_var": variance,
    }


def recalibration(world: World) -> dict[str, Any]:
    model = make_net()
    synchronise_batch_norm(model, world)
    recalibrate_batch_norm(model, stream_of(world, 3)(0))
    return {"model": model.state_dict()}


def collectives(world: World) -> dict[str, Any]:
    x = torch.tensor([1.0 + world.rank, 2.0], dtype=torch.float64, requires_grad=True)
    total = all_reduce_sum(x, world)
    (total**2).sum().mul(1 + world.rank).backward()

    parameters = [nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(3)]
    parameters.append(nn.Parameter(torch.zeros(4, 2, 3, 3).to(memory_format=torch.channels_last)))
    parameters.append(nn.Parameter(torch.zeros(())))
    for index in (0, 2, 3, 4):
        values = torch.arange(parameters[index].numel(), dtype=parameters[index].dtype)
        own = (values * (1 + world.rank) + index).view(parameters[index].shape)
        parameters[index].grad = torch.empty_like(parameters[index]).copy_(own)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args: (calls.append(args[0].dtype), all_reduce(*args))
    average_gradients(parameters, world)
    dist.all_reduce = all_reduce

    model = make_net(seed=world.rank)
    model[1].num_batches_tracked.fill_(5 + world.rank)
    broadcast_parameters(model, world)
    return {
        "total": total.detach(),
        "grad": x.grad,
        "averaged": [parameter.grad for parameter in parameters],
        "calls": [str(dtype) for dtype in calls],
        "broadcast": model.state_dict(),
        "gathered": all_gather(torch.tensor(world.rank * 2), world),
    }


def loop(world: World, folder: Path) -> dict[str, Any]:
    """A run that stops in the middle and continues, in processes that draw different dropouts."""

    def run_in(name: str, end: int = STEPS) -> Training:
        stage = Training(make_net(dropout=0.5), OPTIONS, STEPS, world)
        torch.manual_seed(100 + world.rank)
        recorder = Recorder(folder / name) if world.is_main else None
        run(
            stage,
            stream_of(world, end),
            phase="train",
            checkpoint=folder / name / "last.pt",
            checkpoint_every=2,
            log_every=2,
            recorder=recorder,
            world=world,
        )
        return stage

    whole = run_in("whole")
    interrupted = failure(lambda: run_in("broken", 3))
    dist.barrier()
    continued = run_in("broken")
    return {
        "whole": dict(whole.model.named_parameters()),
        "continued": dict(continued.model.named_parameters()),
        "interrupted": interrupted,
    }


def disagreement(world: World, folder: Path) -> str:
    """The ranks resume from different files: one of them is not there."""
    stage = Training(make_net(), OPTIONS, STEPS, world)
    path = folder / ("whole" if world.is_main else "nowhere") / "last.pt"
    return failure(
        lambda: run(stage, stream_of(world), phase="train", checkpoint=path, world=world)
    )


def divergence(world: World) -> str:
    """Only the last rank's loss is not finite; every rank has to stop."""
    stage = Training(make_net(), OPTIONS, STEPS, World.single())

    def stream_from(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        for images, labels in stream_of(world)(start):
            yield images * (float("nan") if world.rank else 1), labels

    return failure(lambda: run(stage, stream_from, phase="train", log_every=1, world=world))


def failure(call: Callable[[], object]) -> str:
    try:
        call()
    except DmcpError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = init_from_env("cpu")
    findings = {
        "rank": world.rank,
        "training": training(world),
        "equal": batch_norm(world, [6, 6], torch.float64, affine=True),
        "unequal": batch_norm(world, [1, 11], torch.float64, affine=True),
        "plain": batch_norm(world, [6, 6], torch.float64, affine=False),
        "half": batch_norm(world, [6, 6], torch.bfloat16, affine=True),
        "recalibration": recalibration(world),
        "collectives": collectives(world),
        "loop": loop(world, folder),
        "disagreement": disagreement(world, folder),
        "divergence": divergence(world),
    }
    torch.save(copy.deepcopy(findings), folder / f"{world.rank}.pt")
    shutdown()


if __name__ == "__main__":
    place, rank, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    main(Path(place))
