"""Every backend of the depthwise ops against PyTorch's convolutions in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dmcp.backends import native_module
from dmcp.ops import depthwise

OPS = torch.ops.dmcp
EXACT = {torch.float32: 1e-6, torch.float64: 1e-14}
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = (*EXACT, *ROUNDING)


# --- Backends -------------------------------------------------------------------------------------


def isas():
    native = native_module()
    return [] if native is None else native.cpu_isas()


def kernels_of(backend):
    if backend == "eager":
        return depthwise.EagerKernels
    return depthwise.CpuKernels(native_module(), backend)


NATIVE = [pytest.param(isa, id=isa) for isa in isas()]
over_native = pytest.mark.parametrize("backend", NATIVE)
over_kernels = pytest.mark.parametrize("backend", ["eager", *NATIVE])
over_strides = pytest.mark.parametrize("stride", [1, 2])
over_sizes = pytest.mark.parametrize("kernel", [3, 5])


# --- Problems -------------------------------------------------------------------------------------


def activations(generator, shape, dtype, wider=0):
    """Random values with channels last; the first channels of a buffer that is NaN elsewhere."""
    batch, channels, height, width = shape
    buffer = torch.full((batch, height, width, channels + wider), torch.nan, dtype=dtype)
    values = torch.randn(batch, height, width, channels, generator=generator).to(dtype)
    buffer[..., :channels] = values
    return buffer.permute(0, 3, 1, 2)[:, :channels]


def problem(shape, kernel, stride, dtype, wider=0):
    """x, weight and the gradient of y."""
    generator = torch.Generator().manual_seed(sum(shape) + kernel + stride)
    batch, channels, height, width = shape
    x = activations(generator, shape, dtype, wider)
    parameter = torch.randn(channels + wider, 1, kernel, kernel, generator=generator)
    weight = parameter.to(depthwise.stats_dtype(x))[:channels]
    out = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    return x, weight, activations(generator, (batch, channels, *out), dtype, wider)


def exact(x, weight, grad, stride):
    """y and the gradients of x and of the weight."""
    x, weight = (one.detach().double().contiguous().requires_grad_() for one in (x, weight))
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.double().contiguous())


def results(kernels, x, weight, grad, stride):
    return (
        kernels.depthwise(x, weight, stride),
        kernels.depthwise_grad_input(grad, weight, *x.shape[2:], stride),
        kernels.depthwise_grad_weight(grad, x, weight.shape[-1], stride),
    )


def check(kernels, shape, kernel, stride, dtype, wider=0):
    x, weight, grad = problem(shape, kernel, stride, dtype, wider)
    found = results(kernels, x, weight, grad, stride)
    expected = exact(x, weight, grad, stride)
    slack = 4 if kernels is depthwise.EagerKernels else 1  # PyTorch's own sums in float32
    sums = slack * EXACT.get(dtype, EXACT[torch.float32])
    for name, one, other, dtype_, accepted in zip(
        ("y", "grad_x", "grad_weight"),
        found,
        expected,
        (dtype, dtype, weight.dtype),
        (*(ROUNDING.get(dtype, sums),) * 2, sums),
        strict=True,
    ):
        assert (one.dtype, one.shape) == (dtype_, other.shape), name
        error = (one.double() - other).norm() / other.norm().clamp(min=1e-3)
        assert error <= accepted, f"{name} of {shape}, {kernel}, {stride}, {dtype}: {error:.1e}"
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in found[:2])


# --- Values ---------------------------------------------------------------------------------------

SIZES = (1, 2, 3, 7, 8)
SHAPES = [
    *((3, 9, height, width) for height, width in itertools.product(SIZES, SIZES)),
    *((1, channels, *size) for channels in (1, 3, 40, 97) for size in ((7, 8), (8, 3), (1, 2))),
]
LARGE = [(3, 40, 33, 30), (2, 600, 4, 4), (5, 1003, 2, 2), (1, 16, 90, 95)]


@over_strides
@over_sizes
@over_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype, backend, kernel, stride):
    kernels = kernels_of(backend)
    for number, shape in enumerate(SHAPES):
        check(kernels, shape, kernel, stride, dtype, wider=number % 3)


@over_strides
@over_kernels
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_values_of_several_blocks(shape, backend, stride):
    for kernel, dtype in ((3, torch.float32), (3, torch.bfloat16), (5, torch.float32)):
        check(kernels_of(backend), shape, kernel, stride, dtype)


@over_strides
@over_native
def test_values_past_the_caches(backend, stride):
    """Large enough to be stored past them, with whole vectors and without."""
    for channels in (64, 65):
        check(kernels_of(backend), (2, channels, 130, 129), 3, stride, torch.float32)


@over_strides
@over_kernels
def test_any_layout(backend, stride):
    kernels = kernels_of(backend)
    x, weight, grad = problem((3, 9, 7, 8), 3, stride, torch.float32)
    expected = results(kernels, x, weight, grad, stride)
    layouts = (
        torch.Tensor.contiguous,
        lambda one: torch.stack([one, one], -1)[..., 0],
        lambda one: F.pad(one, (1, 2, 0, 1))[:, :, : one.shape[2], 1 : one.shape[3] + 1],
    )
    for change in layouts:
        found = results(kernels, change(x), weight, change(grad), stride)
        assert all(map(torch.equal, found, expected))
    for change in (
        lambda one: one.contiguous(memory_format=torch.channels_last),
        lambda one: one.transpose(2, 3).contiguous().transpose(2, 3),
        lambda one: torch.stack([one, one])[1],
    ):
        found = results(kernels, x, change(weight), grad, stride)
        assert all(map(torch.equal, found, expected))
    one = grad[:1, :1, :1, :1].expand(grad.shape)
    found = results(kernels, x, weight, one, stride)
    dense = results(kernels, x, weight, one.contiguous(), stride)
    assert all(map(torch.equal, found, dense))


@over_kernels
def test_an_infinite_weight_meets_no_padding(backend):
    """Padding is not read: 0 times infinity would be NaN."""
    x = torch.ones(1, 2, 4, 4)
    weight = torch.ones(2, 1, 3, 3)
    weight[0, 0, 0] = torch.inf
    y = kernels_of(backend).depthwise(x, weight, 1)
    assert y[0, 0].isinf().tolist() == [[False] * 4, *[[True] * 4] * 3]
    assert y[0, 1, 1:3, 1:3].eq(9).all()


@over_kernels
def test_a_nan_stays_where_it_is_read(backend):
    x = torch.zeros(1, 20, 6, 6)
    x[0, 17, 5, 5] = torch.nan
    grad = torch.ones(1, 20, 6, 6)
    found = kernels_of(backend).depthwise_grad_weight(grad, x, 3, 1).isnan()
    assert found[17, 0].tolist() == [[False] * 3, *[[False, True, True]] * 2]
    assert found.sum() == 4


@over_strides
@over_native
def test_same_bits_for_any_number_of_threads(backend, stride):
    kernels, before = kernels_of(backend), torch.get_num_threads()
    for shape in LARGE:
        arguments = (*problem(shape, 3, stride, torch.float32), stride)
        found = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(results(kernels, *arguments))
        finally:
            torch.set_num_threads(before)
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))


@over_kernels
def test_a_batch_may_be_empty(backend):
    x, weight, grad = problem((0, 9, 4, 4), 3, 2, torch.float32)
    y, grad_x, grad_weight = results(kernels_of(backend), x, weight, grad, 2)
    assert (y.shape, grad_x.shape) == ((0, 9, 2, 2), (0, 9, 4, 4))
    assert torch.equal(grad_weight, torch.zeros(9, 1, 3, 3))


# --- The ops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "stride"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=str)
def test_opcheck(dtype, stride):
    x, weight, grad = problem((3, 6, 5, 4), 3, stride, dtype, wider=2)
    opcheck(OPS.depthwise.default, (x, weight, stride))
    opcheck(OPS.depthwise_grad_input.default, (grad, weight, 5, 4, stride))
    opcheck(OPS.depthwise_grad_weight.default, (grad, x, 3, stride))


def test_the_ops_have_kernels():
    x, weight, grad = problem((3, 40, 7, 7), 3, 2, torch.bfloat16)
    best = kernels_of(isas()[-1] if isas() else "eager")
    found = results(OPS, x, weight, grad, 2)
    assert all(map(torch.equal, found, results(best, x, weight, grad, 2)))


X, WEIGHT, GRAD = torch.ones(2, 6, 5, 5), torch.ones(6, 1, 3, 3), torch.ones(2, 6, 3, 3)


@over_kernels
@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        ("depthwise", (X.long(), WEIGHT, 1), TypeError, "x must be float32"),
        ("depthwise", (X[0], WEIGHT, 1), ValueError, r"x must be \[N, C"),
        ("depthwise", (X[..., :0], WEIGHT, 1), ValueError, r"x must be \[N, C"),
        ("depthwise", (X, WEIGHT[:5], 1), ValueError, r"weight must be \[6, 1, k, k\]"),
        ("depthwise", (X, WEIGHT[..., :2, :2], 1), ValueError, "with k 3 or 5"),
        ("depthwise", (X, WEIGHT[..., 0], 1), ValueError, "with k 3 or 5"),
        ("depthwise", (X, WEIGHT.double(), 1), TypeError, "weight must be torch.float32"),
        ("depthwise", (X.bfloat16(), WEIGHT.bfloat16(), 1), TypeError, "for torch.bfloat16"),
        ("depthwise", (X, WEIGHT, 3), ValueError, "stride must be 1 or 2, got 3"),
        ("depthwise", (X, WEIGHT.to("meta"), 1), ValueError, "weight must be on cpu like x"),
        ("depthwise_grad_input", (GRAD, WEIGHT, 4, 5, 2), ValueError, r"grad must be .* 2, 3\]"),
        ("depthwise_grad_input", (GRAD, WEIGHT, 3, 0, 1), ValueError, "grad must be"),
        ("depthwise_grad_input", (GRAD.half(), WEIGHT.half(), 5, 5, 2), TypeError, "weight must"),
        ("depthwise_grad_weight", (GRAD, X, 4, 2), ValueError, "kernel must be 3 or 5, got 4"),
        ("depthwise_grad_weight", (GRAD, X, 3, 1), ValueError, r"grad must be \[2, 6, 5, 5\]"),
        ("depthwise_grad_weight", (GRAD.double(), X, 3, 2), TypeError, "torch.float32 like x"),
        ("depthwise_grad_weight", (GRAD.to("meta"), X, 3, 2), ValueError, "on cpu like x"),
    ],
)
def test_what_is_not_accepted(backend, op, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(kernels_of(backend), op)(*arguments)
