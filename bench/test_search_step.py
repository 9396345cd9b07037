"""One iteration of a search: the sandwich step alone, and with the architecture step."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dmcp
from dmcp import models

BATCH, SIZE, STEPS = 16, 64, 1000


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_iteration(benchmark: BenchmarkFixture, name: str, stage: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (BATCH,))
    net = dmcp.MarkovNet(models.build(name).to(memory_format=torch.channels_last), images[:2])
    warmup = 0.0 if stage == 2 else 0.9
    options = dmcp.SearchOptions(warmup=warmup)
    search = dmcp.Search(net, dmcp.Budget(macs="50%"), STEPS, options)
    metrics = benchmark.pedantic(search.step, (images, labels), rounds=7, warmup_rounds=2)
    assert bool(metrics["loss"].isfinite())
