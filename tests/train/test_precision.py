"""Training in half precision: the first steps of an optimiser under a loss scale."""

import pytest
import torch
from torch import nn

from dmcp.train.precision import MixedPrecision


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_that_overflows_leaves_nothing_behind(momentum):
    weights = [nn.Parameter(torch.ones(1000)) for _ in range(8)]
    plain = [nn.Parameter(torch.ones(1000)) for _ in range(8)]
    options = {"lr": 0.1, "momentum": momentum, "nesterov": momentum > 0, "fused": True}
    optimizer, reference = torch.optim.SGD(weights, **options), torch.optim.SGD(plain, **options)
    precision = MixedPrecision("float16", torch.device("cpu"))
    for factor in (float("inf"), 1.0, 2.0):
        optimizer.zero_grad()
        precision.backward(sum(weight.sum() for weight in weights) * factor)
        precision.step(optimizer)
        precision.update()
        for state in optimizer.state.values():
            assert state["momentum_buffer"].isfinite().all()
        if factor < float("inf"):
            for weight in plain:
                weight.grad = torch.full_like(weight, factor)
            reference.step()
        for weight, wanted in zip(weights, plain, strict=True):
            torch.testing.assert_close(weight, wanted)


def test_parameters_without_a_gradient_get_no_state():
    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.SGD([weight, frozen], lr=0.1, momentum=0.9, fused=True)
    precision = MixedPrecision("float16", torch.device("cpu"))
    precision.backward(weight.sum())
    precision.step(optimizer)
    assert list(optimizer.state) == [weight]
