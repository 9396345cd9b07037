"""One iteration of a search: the sandwich step alone, and with the architecture step.

``DMCP_BACKEND=eager pytest bench/test_search_step.py`` measures it over plain PyTorch.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import timing
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dmcp
from dmcp import models
from dmcp.backends import accelerated

BATCH, SIZE, STEPS = 16, 64, 1000


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_iteration(benchmark: BenchmarkFixture, name: str, stage: int, settings: Any) -> None:
    torch.manual_seed(0)
    batch, size, device = settings.batch or BATCH, settings.size or SIZE, settings.device
    model = models.build(name).to(device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)
    warmup = 0.0 if stage == 2 else 0.9
    options = dmcp.SearchOptions(warmup=warmup)
    net = dmcp.MarkovNet(model, images[:2])
    search = dmcp.Search(net, dmcp.Budget(macs="50%"), STEPS, options)
    benchmark.extra_info.update(
        op="search step",
        case=f"{name} stage {stage}, batch {batch}, {size}x{size}",
        rival="ours" if accelerated() else "eager",
    )
    assert bool(search.step(images, labels)["loss"].isfinite())
    batches = itertools.repeat((images, labels))
    timing.measure(benchmark, lambda pair: search.step(*pair), batches, device)
