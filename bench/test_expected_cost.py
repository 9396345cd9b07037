"""All chains of MobileNetV2 (1.5 wide, the paper's grid) and their expected MACs.

From alpha to the scale of every channel and the expected cost, and back. The rivals: our op through
autograd; its two kernels alone, called as autograd calls them; the same in vectorised PyTorch; and,
as published code has it, chain by chain, without variances.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timing
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import dmcp
from dmcp.ops import CostTable, expected_cost, expected_cost_reference

Results = tuple[Tensor, Tensor, Tensor]
"""Scales of all channels [ΣC], expected cost and the gradient of alpha."""


class Problem:
    """The network's chains, its MACs and the gradients that come in."""

    def __init__(self, device: torch.device) -> None:
        with torch.device("meta"):  # traced without data, which is quick
            traced = dmcp.trace(dmcp.models.mobilenet_v2(width=1.5), torch.zeros(1, 3, 224, 224))
        model = dmcp.models.mobilenet_v2(width=1.5)
        graph = replace(traced, model=model)
        net = dmcp.MarkovNet(model, groups=15, divisor=1, graph=graph)
        self.cost = dmcp.cost(net.graph)
        self.table: CostTable = net.cost_table([self.cost]).to(device)
        self.choices = [unit.choices for unit in net.graph.units]
        generator = torch.Generator().manual_seed(0)
        groups = sum(map(len, self.choices)) - len(self.choices)
        self.alpha = torch.randn(groups, generator=generator).to(device)
        self.grad_scale = torch.randn(self.table.channels, generator=generator).to(device)
        self.grad_cost = torch.tensor([1 / self.cost.of({})], dtype=torch.float64, device=device)
        self.lengths = [len(grid) - 1 for grid in self.choices]
        self.sizes = [torch.tensor(grid).diff().to(device) for grid in self.choices]
        self.linear = self.cost.linear.to(device, torch.float32)
        self.quadratic = self.cost.quadratic.to(device, torch.float32)


@functools.cache
def problem(device: torch.device) -> Problem:
    return Problem(device)


def through_autograd(function: Callable[..., Any], case: Problem) -> Results:
    alpha = case.alpha.detach().requires_grad_()
    found = function(alpha, case.table)
    gradient = torch.autograd.grad(
        (found.scale, found.cost), alpha, (case.grad_scale, case.grad_cost)
    )
    return found.scale, found.cost, gradient[0]


def kernels_alone(case: Problem) -> Results:
    table = case.table
    arrays = (table.offsets, table.ends)
    forward, backward = torch.ops.dmcp.expected_cost, torch.ops.dmcp.expected_cost_backward
    found = forward.default(case.alpha, *arrays, table.coefficients, table.channels)
    _, scale, _, cost, _, saved = found
    grads = (None, case.grad_scale, None, case.grad_cost, None)
    gradient = backward.default(*grads, case.alpha, saved, *arrays, table.channels)
    return scale, cost, gradient


def chain_by_chain(case: Problem) -> Results:
    alpha = case.alpha.detach().requires_grad_()
    masks, widths = [], []
    for own, grid, sizes in zip(alpha.split(case.lengths), case.choices, case.sizes, strict=True):
        q = own.sigmoid().cumprod(0)
        mask = torch.cat([q.new_ones(grid[0]), q.repeat_interleave(sizes)])
        masks.append(mask)
        widths.append(mask.sum())
    c = torch.stack(widths)
    cost = case.cost.constant + case.linear @ c + c @ case.quadratic @ c
    grads = (*case.grad_scale.split([grid[-1] for grid in case.choices]), case.grad_cost[0].float())
    (gradient,) = torch.autograd.grad((*masks, cost), alpha, grads)
    return torch.cat(masks), cost[None], gradient


RIVALS: dict[str, Callable[[Problem], Results]] = {
    "ours": functools.partial(through_autograd, expected_cost),
    "ours without autograd": kernels_alone,
    "eager": functools.partial(through_autograd, expected_cost_reference),
    "published": chain_by_chain,
}


@pytest.mark.parametrize("rival", RIVALS)
def test_forward_and_backward(benchmark: BenchmarkFixture, rival: str, settings: Any) -> None:
    case = problem(settings.device)
    # No unit stands at both ends of a layer here: the published formula is exact.
    assert not case.cost.quadratic.diagonal().any()
    for actual, wanted in zip(RIVALS[rival](case), chain_by_chain(case), strict=True):
        torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=1e-4, atol=1e-5)
    chains = f"{sum(map(bool, case.lengths))} chains, {len(case.alpha)} groups"
    benchmark.extra_info.update(
        op="expected_cost", network="mobilenet_v2 x1.5", case=chains, rival=rival
    )
    timing.measure(benchmark, RIVALS[rival], itertools.repeat(case), settings.device)
