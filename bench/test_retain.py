"""Retain probabilities of all chains of MobileNetV2, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from dmcp.ops import retain
from dmcp.ops.retain import retain_reference

CHAINS, GROUPS = 25, 14


def chain_by_chain(alpha: Tensor, offsets: Tensor) -> Tensor:
    """As the published code does it: every chain on its own."""
    return torch.cat([part.sigmoid().cumprod(0) for part in alpha.split(GROUPS)])


@pytest.mark.parametrize("function", [retain, retain_reference, chain_by_chain])
def test_forward_and_backward(
    benchmark: BenchmarkFixture, function: Callable[[Tensor, Tensor], Tensor]
) -> None:
    alpha = torch.randn(CHAINS * GROUPS, requires_grad=True)
    offsets = torch.arange(0, CHAINS * GROUPS + 1, GROUPS, dtype=torch.int32)
    weights = torch.rand(CHAINS * GROUPS)

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad((function(alpha, offsets) * weights).sum(), alpha)
        return gradient

    reference = torch.autograd.grad((chain_by_chain(alpha, offsets) * weights).sum(), alpha)[0]
    torch.testing.assert_close(benchmark(step), reference, rtol=1e-4, atol=1e-6)
