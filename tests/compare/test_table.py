from __future__ import annotations

import pytest
import torch
from torch import nn

from dmcp.compare.latency import latencies
from dmcp.compare.table import Record, rows_of, structure_key


def record(seed, top1, macs, budget="50%"):
    widths = {"a": macs}
    return Record("dmcp", "A", budget, seed, top1, macs, 10, 100, 50, 2.0, 3.0, widths)


def test_rows_are_means_over_seeds_with_their_deviation():
    records = [record(0, 0.90, 10), record(1, 0.94, 12), record(0, 0.5, 4, budget="25%")]
    milliseconds = {structure_key({"a": 10}): 1.5, structure_key({"a": 4}): 0.5}
    half, quarter = rows_of(records, milliseconds)
    assert (half.method, half.track, half.budget, half.seeds) == ("dmcp", "A", "50%", 2)
    assert half.top1 == pytest.approx(0.92)
    assert half.top1_deviation == pytest.approx(0.02 * 2**0.5)  # of a sample of two
    assert (half.macs, half.latency_ms) == (11, 1.5)  # the first seed's latency
    assert (quarter.budget, quarter.top1_deviation, quarter.latency_ms) == ("25%", 0.0, 0.5)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return x


def test_networks_take_turns_in_evaluation_mode():
    networks = [Counted(), Counted()]
    first, second = latencies(networks, torch.zeros(1, 1, 2, 2))
    assert min(first, second) >= 0
    assert len(networks[0].calls) == len(networks[1].calls) > 1
    for network in networks:
        assert set(network.calls) == {(False, False)}
