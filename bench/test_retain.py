"""Retain probabilities of all chains of MobileNetV2, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timing
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dmcp.ops import retain, retain_reference

CHAINS, GROUPS = 25, 14


def chain_by_chain(alpha: Tensor, offsets: Tensor) -> Tensor:
    """As the published code does it: every chain on its own."""
    return torch.cat([part.sigmoid().cumprod(0) for part in alpha.split(GROUPS)])


RIVALS = {"ours": retain, "eager": retain_reference, "published": chain_by_chain}


@pytest.mark.parametrize("rival", RIVALS)
def test_forward_and_backward(benchmark: BenchmarkFixture, rival: str, settings: Any) -> None:
    device = settings.device
    alpha = torch.randn(CHAINS * GROUPS, device=device, requires_grad=True)
    offsets = torch.arange(0, CHAINS * GROUPS + 1, GROUPS, dtype=torch.int32, device=device)
    weights = torch.rand(CHAINS * GROUPS, device=device)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        (gradient,) = torch.autograd.grad(function(alpha, offsets), alpha, weights)
        return gradient

    torch.testing.assert_close(step(RIVALS[rival]), step(chain_by_chain), rtol=1e-4, atol=1e-6)
    case = f"{CHAINS} chains of {GROUPS} groups"
    benchmark.extra_info.update(op="retain", case=case, rival=rival)
    timing.measure(benchmark, step, itertools.repeat(RIVALS[rival]), device)
