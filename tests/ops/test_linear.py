"""A linear layer that adds to gradients, against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmcp.backends import native_nodes
from dmcp.nn import MarkovLinear
from dmcp.ops.linear import accumulating_linear

pytestmark = pytest.mark.skipif(not native_nodes(), reason="the C++ nodes are not built")

ROWS, INPUTS, OUTPUTS = 5, 11, 13
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer(dtype, *, bias=True):
    torch.manual_seed(0)
    module = nn.Linear(INPUTS, OUTPUTS, bias, dtype=dtype)
    for parameter in module.parameters():
        parameter.grad = torch.rand_like(parameter)
    return module


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("widths", [(OUTPUTS, INPUTS), (4, INPUTS), (OUTPUTS, 7), (1, 1)])
def test_it_is_pytorch(widths, bias, dtype):
    outputs, inputs = widths
    module = layer(torch.float64 if dtype == torch.float64 else torch.float32, bias=bias)
    x = torch.randn(ROWS, inputs, dtype=dtype, requires_grad=True)
    grad = torch.randn(ROWS, outputs).to(dtype)
    before = [parameter.grad.clone() for parameter in module.parameters()]

    y = accumulating_linear(x, module.weight, module.bias, widths)
    y.backward(grad)

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *module.parameters())]
    offset = wide[2][:outputs] if bias else None
    wanted = F.linear(wide[0], wide[1][:outputs, :inputs], offset)
    assert y.dtype == dtype
    found = [y, x.grad, *(p.grad - b for p, b in zip(module.parameters(), before, strict=True))]
    for one, other in zip(found, [wanted, *torch.autograd.grad(wanted, wide, grad)], strict=True):
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_may_lie_as_it_likes(dtype):
    found = []
    for dense in (True, False):
        module = layer(torch.float32)
        if not dense:
            module.weight.grad = module.weight.grad.t().contiguous().t()
        torch.manual_seed(1)
        x = torch.randn(ROWS, INPUTS).to(dtype)
        y = accumulating_linear(x, module.weight, module.bias, (OUTPUTS, INPUTS))
        y.square().sum().backward()
        found.append(module.weight.grad)
    torch.testing.assert_close(*found)


def test_frozen_parameters_get_no_gradient():
    module = layer(torch.float32).requires_grad_(False)
    before = [parameter.grad.clone() for parameter in module.parameters()]
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    accumulating_linear(x, module.weight, module.bias, (OUTPUTS, INPUTS)).sum().backward()
    assert x.grad is not None
    for parameter, grad in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_gradients_that_are_gone_are_an_error():
    module = layer(torch.float32)
    y = accumulating_linear(
        torch.randn(ROWS, INPUTS), module.weight, module.bias, (OUTPUTS, INPUTS)
    )
    module.zero_grad()
    with pytest.raises(RuntimeError, match="set to None after the forward"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.zeros(ROWS, 2, INPUTS), torch.float32),
        (torch.zeros(ROWS, INPUTS).half(), torch.float32),
        (torch.zeros(ROWS, INPUTS), torch.float64),
        (torch.zeros(INPUTS, ROWS).T, torch.float32),
        (torch.zeros(0, INPUTS), torch.float32),
    ],
    ids=["three dimensions", "half", "another dtype", "transposed", "empty"],
)
def test_what_it_does_not_take(x, dtype):
    module = layer(dtype)
    assert accumulating_linear(x, module.weight, module.bias, (OUTPUTS, INPUTS)) is None


def test_the_module_does_without_it():
    torch.manual_seed(0)
    module = MarkovLinear(INPUTS, OUTPUTS, chain=None)
    x = torch.randn(ROWS, 2, INPUTS)
    found = []
    for module.state.accumulates in (False, True):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        module(x).square().sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    torch.testing.assert_close(*found)
