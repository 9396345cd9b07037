"""The Triton kernels of depthwise convolutions against float64, run by Triton's interpreter.

``TRITON_INTERPRET=1 pytest tests/ops/test_depthwise_triton.py`` runs them in this process.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from dmcp.kernels.depthwise import depthwise, depthwise_grad_input, depthwise_grad_weight
from dmcp.kernels.pointwise import Prologue
from dmcp.ops.norm_act_eager import activation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


class Case(NamedTuple):
    """One convolution; `behind` channels of the buffers are not part of the tensors."""

    channels: int
    size: tuple[int, int]
    kernel: int
    stride: int
    act: str | None = None
    dtype: torch.dtype = torch.float32
    behind: int = 0


CASES = (
    Case(1, (2, 4), 3, 1),
    Case(3, (2, 5), 3, 2, "relu", behind=2),
    Case(9, (5, 3), 3, 1, "relu6", torch.bfloat16, behind=7),  # two strips
    Case(40, (3, 2), 3, 2, "hardswish", torch.float16),
    Case(97, (1, 2), 3, 1, "silu", behind=3),
    Case(8, (4, 3), 3, 2, dtype=torch.bfloat16, behind=8),
    Case(9, (2, 3), 5, 1, "identity"),
    Case(8, (3, 2), 5, 2, "silu", torch.bfloat16),
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_interpreted():
    # Whether Triton interprets is decided when it is imported.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def prefix(values, dtype, behind):
    """The values channels last, in front of channels that are NaN."""
    n, c, h, w = values.shape
    buffer = torch.full((n, h, w, c + behind), torch.nan, dtype=dtype).movedim(-1, 1)
    return buffer[:, :c].copy_(values)


def error(found, wanted):
    assert found.shape == wanted.shape
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def problem(case, images=2):
    generator = torch.Generator().manual_seed(CASES.index(case))

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    c, k = case.channels, case.kernel
    x = prefix(draw(images, c, *case.size), case.dtype, case.behind)
    weight = draw(c, 1, k, k)
    prologue = case.act and Prologue(draw(c), draw(c), draw(c), case.act)
    out = [-(-size // case.stride) for size in case.size]
    return x, weight, prologue, prefix(draw(images, c, *out), case.dtype, case.behind)


def seen(x, prologue):
    """What the convolution sees, in float64."""
    x = x.double()
    if prologue is None:
        return x
    gain, shift, scale = (vector.double().view(1, -1, 1, 1) for vector in prologue[:3])
    return scale * activation(gain * x + shift, prologue.act)


def results(case):
    x, weight, prologue, grad = problem(case)
    y, moments = depthwise(x, weight, case.stride, prologue, sums=True)
    return {
        "y": y,
        "moments": moments,
        "input": depthwise_grad_input(grad, weight, *case.size, case.stride),
        "weight": depthwise_grad_weight(grad, x, case.kernel, case.stride, prologue),
    }


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case):
    x, weight, prologue, grad = problem(case)
    inputs = seen(x, prologue).requires_grad_(), weight.double().requires_grad_()
    wanted = F.conv2d(*inputs, None, case.stride, case.kernel // 2, 1, case.channels)
    grad_input, grad_weight = torch.autograd.grad(wanted, inputs, grad.double())
    found = results(case)
    # The interpreter cuts digits off.
    rounding = 1e-6 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps
    assert error(found["y"], wanted.detach()) <= rounding
    assert error(found["input"], grad_input) <= rounding
    assert error(found["weight"], grad_weight) <= 1e-6
    var, mean = torch.var_mean(found["y"].double(), (0, 2, 3), correction=0)
    assert error(found["moments"][0], mean) <= 1e-6
    assert error(found["moments"][1], var) <= 1e-6


@interpreted
def test_same_bits_twice():
    first, again = results(CASES[1]), results(CASES[1])
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@interpreted
def test_a_large_mean_costs_the_moments_no_digits():
    x = prefix(
        1e3 + torch.rand(2, 9, 6, 1, generator=torch.Generator().manual_seed(1)), torch.float32, 0
    )
    weight = torch.zeros(9, 1, 3, 3)
    weight[:, 0, 1, 1] = 1  # without neighbours, borders have the same mean
    y, moments = depthwise(x, weight, 1, sums=True)
    assert torch.equal(y, x)
    assert error(moments[1], y.double().var((0, 2, 3), correction=0)) <= 1e-6


@interpreted
def test_pixels_begin_at_whole_accesses():
    x, weight, _, _ = problem(CASES[2])
    y, moments = depthwise(x, weight, 1)
    assert y.stride(1) == 1
    assert y.stride(3) == 16
    assert moments is None
