"""3,000 structures of MobileNetV2 with their MACs, expected sampling, and exact moments."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dmcp
from dmcp.models import mobilenet_v2

STRUCTURES = 3000


@pytest.fixture(scope="module")
def search() -> dmcp.Search:
    model = mobilenet_v2(width=1.5)
    net = dmcp.MarkovNet(model, torch.zeros(1, 3, 224, 224), groups=15, divisor=1)
    return dmcp.Search(net, dmcp.Budget(macs="210M"), steps=1)


def test_sample_structures_and_count_their_macs(
    benchmark: BenchmarkFixture, search: dmcp.Search
) -> None:
    macs = search.targets.costs[0]
    generator = torch.Generator().manual_seed(0)
    drawn = benchmark(lambda: macs.of_many(search.sample_widths(STRUCTURES, generator).widths))
    assert len(drawn) == STRUCTURES


def test_expected_sampling(benchmark: BenchmarkFixture, search: dmcp.Search) -> None:
    widths = benchmark(search.expected_widths)
    assert search.targets.costs[0].of(widths) <= search.targets.bounds[0]


def test_mean_and_variance(benchmark: BenchmarkFixture, search: dmcp.Search) -> None:
    macs, net = search.targets.costs[0], search.net

    def moments() -> float:
        with torch.no_grad():
            return float(macs.variance(net.width_moments(4)))

    assert benchmark(moments) > 0
