"""Every backend of the pointwise convolutions against float64."""

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from dmcp.backends import native_module
from dmcp.ops.library import replaced
from dmcp.ops.pointwise import SCHEMAS, WEIGHTS, CpuKernels, EagerKernels

pytestmark = pytest.mark.filterwarnings("ignore:.*\n.*previously registered kernel")


# --- Backends -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    name: str
    kernels: Callable[[], Any]
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @contextmanager
    def installed(self):
        """The dispatcher picks these kernels, and afterwards those it had."""
        kernels = self.kernels()
        with replaced({op: getattr(kernels, op) for op in SCHEMAS}, self.device.upper()):
            yield torch.ops.dmcp


NATIVE = native_module()
ISAS = [] if NATIVE is None else NATIVE.cpu_isas()
EAGER = Backend("eager", lambda: EagerKernels)
CPU = [EAGER, *(Backend(isa, lambda isa=isa: CpuKernels(NATIVE, isa)) for isa in ISAS)]
GPU = pytest.param(
    Backend("eager", lambda: EagerKernels, "cuda"),
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)
over_backends = pytest.mark.parametrize("backend", [*CPU, GPU], ids=str)
# To the dispatcher, to the compiler and in other dtypes all instruction sets are one.
over_devices = pytest.mark.parametrize("backend", [EAGER, *CPU[1:][-1:], GPU], ids=str)
needs_native = pytest.mark.skipif(NATIVE is None, reason="dmcp._native is not built")


@pytest.fixture
def ops(backend):
    with backend.installed() as ops:
        yield ops


# --- Problems -------------------------------------------------------------------------------------

# Of the result; sums in float32 of few thousand products, rounded once.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
SUM_TOLERANCE = {**TOLERANCE, torch.bfloat16: 2e-6, torch.float16: 2e-6}
over_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])

# Kernels of an instruction set are for bfloat16.
over_kernels = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        *itertools.product([EAGER, *CPU[1:][-1:]], TOLERANCE),
        *((backend, torch.bfloat16) for backend in CPU[1:-1]),
        *(pytest.param(*GPU.values, dtype, marks=GPU.marks) for dtype in TOLERANCE),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)

# batch, height, width, inputs, outputs: every remainder of rows, columns and vectors somewhere,
# blocks of rows and of columns as jobs, gradients of weights in slabs and at once
SHAPES = (
    (1, 1, 1, 1, 1),
    (1, 1, 3, 9, 97),
    (3, 3, 1, 97, 9),
    (1, 7, 7, 3, 1),
    (2, 5, 13, 33, 65),
    (2, 8, 8, 48, 24),
    (1, 8, 8, 100, 331),
    (5, 7, 11, 70, 130),
    (9, 22, 21, 17, 31),
)
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@dataclass
class Problem:
    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    into: torch.Tensor

    @staticmethod
    def of(shape, dtype, device="cpu", extra=0, channels_last=True):
        """`extra`: channels of the wider buffers behind those of every tensor, NaN."""
        batch, height, width, inputs, outputs = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def image(channels):
            buffer = torch.full((batch, channels + extra, height, width), torch.nan, dtype=dtype)
            values = torch.randn(batch, channels, height, width, generator=generator)
            if channels_last:
                buffer = buffer.contiguous(memory_format=torch.channels_last)
            buffer[:, :channels] = values
            return buffer.to(device)[:, :channels]

        def matrix():
            buffer = torch.full((outputs + extra, inputs + extra), torch.nan, dtype=WEIGHTS[dtype])
            buffer[:outputs, :inputs] = torch.randn(outputs, inputs, generator=generator)
            return buffer.to(device)[:outputs, :inputs]

        return Problem(image(inputs), matrix(), image(outputs), matrix())

    def expected(self):
        """y, and the gradients of x and of the weight, in float64."""
        weight = self.weight.to(self.x.dtype).double()
        x, grad = self.x.double(), self.grad.double()
        return (
            torch.einsum("nihw,oi->nohw", x, weight),
            torch.einsum("nohw,oi->nihw", grad, weight),
            torch.einsum("nohw,nihw->oi", grad, x),
        )


def results(ops, problem):
    """What `Problem.expected` tells; checks that nothing else was written."""
    y = ops.pointwise(problem.x, problem.weight)
    grad_x = ops.pointwise_grad_input(problem.grad, problem.weight)
    buffer = problem.into._base if problem.into._base is not None else problem.into
    before, added_to = buffer.clone(), problem.into.clone()
    ops.pointwise_grad_weight(problem.grad, problem.x, problem.into)
    grad_weight = problem.into - added_to
    problem.into.copy_(added_to)
    assert torch.equal(buffer.nan_to_num(), before.nan_to_num())
    return y, grad_x, grad_weight


def error(result, expected):
    """Relative, over the whole tensor."""
    return (result.double() - expected).norm().item() / max(expected.norm().item(), 1e-30)


def check(ops, problem):
    dtype = problem.x.dtype
    y, grad_x, grad_weight = results(ops, problem)
    expected = problem.expected()
    for image, wanted in zip((y, grad_x), expected, strict=False):
        assert image.dtype == dtype
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert error(image, wanted) <= TOLERANCE[dtype]
    assert error(grad_weight, expected[2]) <= SUM_TOLERANCE[dtype]


# --- Results --------------------------------------------------------------------------------------


@over_kernels
@over_shapes
def test_agrees_with_float64(ops, backend, dtype, shape):
    check(ops, Problem.of(shape, dtype, backend.device))


@over_kernels
@pytest.mark.parametrize("channels_last", [True, False])
def test_prefixes_of_wider_buffers(ops, backend, dtype, channels_last):
    check(ops, Problem.of((2, 5, 13, 33, 65), dtype, backend.device, 5, channels_last))


@over_backends
def test_layouts_may_differ(ops, backend):
    problem = Problem.of((2, 5, 13, 33, 65), torch.bfloat16, backend.device)
    problem.grad = problem.grad.contiguous()
    check(ops, problem)


@over_backends
def test_a_transposed_weight(ops, backend):
    problem = Problem.of((2, 5, 13, 33, 65), torch.bfloat16, backend.device)
    problem.weight = problem.weight.t().contiguous().t()
    check(ops, problem)


@over_devices
@over_dtypes
def test_agrees_with_a_convolution(ops, backend, dtype):
    problem = Problem.of((2, 8, 8, 48, 24), dtype, backend.device)
    weight = problem.weight.to(dtype).double()[:, :, None, None]
    y = ops.pointwise(problem.x, problem.weight)
    assert error(y, F.conv2d(problem.x.double(), weight)) <= TOLERANCE[dtype]


@over_devices
@over_dtypes
@pytest.mark.parametrize("shape", [(0, 4, 4, 3, 5), (2, 4, 4, 0, 5), (2, 4, 4, 3, 0)])
def test_empty_tensors(ops, backend, dtype, shape):
    batch, height, width, inputs, outputs = shape
    y, grad_x, grad_weight = results(ops, Problem.of(shape, dtype, backend.device))
    assert y.shape == (batch, outputs, height, width)
    assert grad_x.shape == (batch, inputs, height, width)
    assert not y.any()
    assert not grad_x.any()
    assert not grad_weight.any()


@over_backends
def test_what_is_not_finite_stays_in_its_rows_and_columns(ops, backend):
    problem = Problem.of((1, 5, 7, 33, 31), torch.bfloat16, backend.device)
    problem.x[0, 3, 2, 1] = torch.nan
    problem.grad[0, 5, 2, 1] = torch.inf
    y, grad_x, grad_weight = results(ops, problem)
    assert y.isfinite().logical_not().sum() == 31
    assert y[0, :, 2, 1].isnan().all()
    assert grad_x.isfinite().logical_not().sum() == 33
    assert grad_weight.isfinite().logical_not().sum() == 31 + 33 - 1


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(4, 32, 32, 17, 31), (1, 8, 8, 100, 331), (1, 32, 32, 70, 48)])
def test_threads_do_not_change_a_bit(isa, shape):
    kernels, problem = CpuKernels(NATIVE, isa), Problem.of(shape, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(kernels, problem)
        torch.set_num_threads(2)
        two = results(kernels, problem)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, two))


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(4, 32, 32, 17, 31), (2, 5, 13, 33, 65)])
def test_the_kernel_may_overwrite(isa, shape):
    problem = Problem.of(shape, torch.bfloat16)
    batch, height, width, inputs, outputs = shape
    into = torch.full((outputs, inputs), torch.nan)
    NATIVE.pointwise_grad_weight_cpu(
        *(batch * height * width, inputs, outputs),
        *(problem.grad.data_ptr(), outputs, problem.x.data_ptr(), inputs),
        *(into.data_ptr(), inputs, False, isa),
    )
    assert error(into, problem.expected()[2]) <= SUM_TOLERANCE[torch.bfloat16]


# --- Ops ------------------------------------------------------------------------------------------


@over_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(ops, backend, dtype):
    problem = Problem.of((2, 3, 5, 7, 9), dtype, backend.device, 3)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        (ops.pointwise, (problem.x, problem.weight)),
        (ops.pointwise_grad_input, (problem.grad, problem.weight)),
        (ops.pointwise_grad_weight, (problem.grad, problem.x, problem.into)),
    ):
        opcheck(op.default, arguments, test_utils=utilities)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"x": torch.ones(2, 3, 4, 4).int()}, TypeError, "x must be float32"),
        ({"x": torch.ones(2, 3, 16)}, ValueError, r"x must be \[N, C, H, W\]"),
        ({"weight": torch.ones(5, 3).double()}, TypeError, "weight must be torch.float32"),
        ({"weight": torch.ones(5, 4)}, ValueError, r"weight must be \[O, 3\]"),
        ({"weight": torch.ones(5, 3, 1, 1)}, ValueError, r"weight must be \[O, 3\]"),
        ({"weight": torch.ones(5, 3, device="meta")}, ValueError, "weight must be on cpu"),
    ],
)
@over_devices
def test_unfit_arguments(ops, backend, changes, exception, message):
    arguments = {"x": torch.ones(2, 3, 4, 4).bfloat16(), "weight": torch.ones(5, 3), **changes}
    kernels = backend.kernels()
    with pytest.raises(exception, match=message):
        kernels.pointwise(**arguments)


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"grad": torch.ones(2, 5, 4, 4)}, TypeError, "grad must be torch.bfloat16"),
        ({"grad": torch.ones(2, 5, 4, 3).bfloat16()}, ValueError, r"grad must be \[2, O, 4, 4\]"),
        ({"into": torch.ones(5, 3).bfloat16()}, TypeError, "into must be torch.float32"),
        ({"into": torch.ones(3, 5)}, ValueError, r"into must be \[5, 3\]"),
        ({"into": torch.ones(3, 5).t()}, ValueError, "into must have dense rows"),
        ({"into": torch.ones(5, 3, device="meta")}, ValueError, "must be on cpu like x"),
    ],
)
@over_devices
def test_unfit_gradients(backend, changes, exception, message):
    ones = {"grad": torch.ones(2, 5, 4, 4).bfloat16(), "x": torch.ones(2, 3, 4, 4).bfloat16()}
    with pytest.raises(exception, match=message):
        backend.kernels().pointwise_grad_weight(**{**ones, "into": torch.ones(5, 3), **changes})
