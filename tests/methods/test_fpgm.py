from __future__ import annotations

import math

import pytest
import torch

from dmcp.errors import ConfigError
from dmcp.methods.fpgm import FPGM, distances
from dmcp.methods.sfp import SFP

# The norms are 5, 10, 15 and 11.2; the second is in the middle of the others, 5 from each.
FILTERS = torch.tensor([[3.0, 4.0], [6.0, 8.0], [9.0, 12.0], [10.0, 5.0]])


def zeroed_in_turn(scores):
    return scores.argsort().tolist()


def test_scores_are_sums_of_distances():
    side = math.sqrt(50)
    wanted = torch.tensor([5 + 10 + side, 15, 10 + 5 + side, 5 + 2 * side])
    torch.testing.assert_close(distances(FILTERS), wanted)
    torch.testing.assert_close(FPGM().score(FILTERS), wanted)


def test_drops_the_filter_in_the_middle_where_norms_drop_the_smallest():
    assert zeroed_in_turn(FPGM().score(FILTERS))[0] == 1
    assert zeroed_in_turn(SFP().score(FILTERS)) == [0, 1, 3, 2]


def test_distances_of_filters_that_are_alike_are_exact():
    close = torch.full((40, 50), 10.0)
    close[0, 0] += 1e-3
    found = distances(close)
    assert found[0].item() == pytest.approx(39e-3, rel=1e-2)
    assert found[1].item() == pytest.approx(1e-3, rel=1e-2)


def test_a_mix_drops_the_smallest_norms_first():
    scores = FPGM(norm_rate=0.75).score(FILTERS)
    side = math.sqrt(50)
    # Distances count among those that are left.
    torch.testing.assert_close(scores[1:], torch.tensor([10, 5 + side, 5 + side]))
    assert zeroed_in_turn(scores)[:2] == [0, 1]
    assert zeroed_in_turn(FPGM(norm_rate=0.5).score(FILTERS))[:2] == [0, 1]
    assert zeroed_in_turn(FPGM(norm_rate=0.9).score(FILTERS)) == zeroed_in_turn(
        FPGM().score(FILTERS)
    )


def test_a_tenth_of_ten_filters_is_one():
    filters = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    scores = FPGM(norm_rate=0.9).score(filters)
    assert (scores < 0).nonzero().flatten().tolist() == [filters.norm(dim=1).argmin().item()]


def test_refuses_rates_out_of_range():
    for rate in (0.0, 1.1):
        with pytest.raises(ConfigError, match=f"norm_rate must be .* got {rate}"):
            FPGM(norm_rate=rate)
    with pytest.raises(ConfigError, match="start"):
        FPGM(start="warm")
