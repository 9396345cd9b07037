"""Every backend of `norm_act` against plain float64 formulas.

``TRITON_INTERPRET=1 pytest tests/ops/test_norm_act.py`` runs the Triton kernels on CPU tensors in
place of the other backends.
"""

import importlib
import itertools
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.library import opcheck

from dmcp.backends import native_cuda, native_module, native_nodes, triton_installed
from dmcp.ops.layout import Placed
from dmcp.ops.library import replaced
from dmcp.ops.norm_act_eager import ACTIVATIONS, EagerKernels, activation, norm_act_reference
from dmcp.ops.norm_act_native import CpuKernels, CudaKernels

# By its name: dmcp.ops.norm_act is the function once dmcp.ops exports it.
MODULE = importlib.import_module("dmcp.ops.norm_act")
norm_act, TritonKernels = MODULE.norm_act, MODULE.TritonKernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EPS, MOMENTUM = 1e-3, 0.3

pytestmark = pytest.mark.filterwarnings("ignore:.*\n.*previously registered kernel")


# --- Backends -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One implementation of the four ops, and where it runs; without kernels the reference, or
    whatever serves users, the C++ nodes."""

    name: str
    kernels: Callable[[], Any] | None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"

    @contextmanager
    def installed(self):
        """The dispatcher picks these kernels, and afterwards those it had."""
        if self.kernels is None:
            yield norm_act if self.name == "nodes" else norm_act_reference
            return
        kernels = self.kernels()
        ops = {op: MODULE._kernel(kernels, op) for op in MODULE._SCHEMAS}
        with replaced(ops, self.device.upper()):
            yield norm_act


def cpu_backends():
    if INTERPRETED:
        return [Backend("triton", lambda: importlib.import_module("dmcp.kernels.norm_act"))]
    native = native_module()
    isas = [] if native is None else native.cpu_isas()
    return [
        Backend("eager", lambda: EagerKernels),
        *(Backend(isa, lambda isa=isa: CpuKernels(native, isa)) for isa in isas),
        *([Backend("nodes", None)] if native_nodes() else []),
    ]


def gpu_backends():
    found = [Backend("eager", lambda: EagerKernels, "cuda")]
    if native_cuda():
        found.append(Backend("native", lambda: CudaKernels(native_module()), "cuda"))
    if triton_installed():
        found.append(Backend("triton", TritonKernels, "cuda"))
    return found


def over(cpu, gpu):
    """Runs a test over these backends, those on the GPU where there is one."""
    no_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    gpu = [] if INTERPRETED else gpu
    on_gpu = [pytest.param(backend, marks=[pytest.mark.gpu, no_device]) for backend in gpu]
    return pytest.mark.parametrize("backend", [*cpu, *on_gpu], ids=str)


CPU, GPU = cpu_backends(), gpu_backends()
REFERENCES = [] if INTERPRETED else [Backend("reference", None)]
over_kernels = over(CPU, GPU)
# Those that allocate their outputs in Python.
over_python = over([backend for backend in CPU if backend.kernels], GPU)
# To the dispatcher and the compiler all instruction sets are one.
over_devices = over([CPU[0], *CPU[1:][-2:]], GPU)
over_backends = over([*REFERENCES, *CPU], [Backend("reference", None, "cuda"), *GPU])


@pytest.fixture
def function(backend):
    """`norm_act` over the backend of the test, or `norm_act_reference`."""
    with backend.installed() as function:
        yield function


@contextmanager
def poisoned():
    """Fills every torch.empty with NaN, so that a position left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# --- Problems -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RESIDUALS = (None, "after", "before")

# whether channels come last, channels of the buffer before, after and between those of the view
LAYOUTS = {
    "contiguous": (False, 0, 0, 1),
    "channels_last": (True, 0, 0, 1),
    "prefix_last": (True, 0, 5, 1),
    "prefix": (False, 0, 3, 1),
    "middle_last": (True, 3, 1, 1),
    "every_second_last": (True, 0, 0, 2),
    "every_second": (False, 1, 0, 2),
}

PIXELS = {1: (1, 1), 7: (7, 1), 49: (7, 7)}
SHAPES = (
    *(
        (batch, channels, *pixels)
        for channels in (1, 3, 6, 9, 40, 97)
        for batch, pixels in zip((7, 3, 2), PIXELS.values(), strict=True)
    ),
    (1, 9, 7, 7),
    (9, 6),
    (5, 97),
    (4, 9, 7),
    (2, 6, 2, 3, 4),
)
LARGE = (
    (2, 97, 37, 29),
    (4, 40, 56, 56),
    (3, 640, 7, 7),
    (30000, 3),
    (1, 1, 300, 301),
    (1, 2, 300, 301),
    (70, 1003),
)


class Case(NamedTuple):
    """What a problem is made from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    act: str = "identity"
    residual_place: str | None = None
    scaled: bool = False
    affine: bool = True
    training: bool = True
    layouts: tuple[str, str, str] = ("contiguous",) * 3  # of x, of dy, of the residual
    seed: int = 0


class Problem(NamedTuple):
    """The arguments of one call, and the gradient of its output."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: torch.Tensor | None
    residual: torch.Tensor | None
    running_mean: torch.Tensor
    running_var: torch.Tensor
    grad: torch.Tensor

    def map(self, change):
        return Problem(*(one if one is None else change(one) for one in self))


DIFFERENTIABLE = Problem._fields[:5]


def lay(values, dtype, layout):
    """The values in that layout; NaN where the buffer holds others."""
    channels_last, before, after, step = LAYOUTS[layout]
    batch, channels, *pixels = values.shape
    wide = before + channels * step + after
    if channels_last:
        buffer = torch.full((batch, *pixels, wide), math.nan, dtype=dtype).movedim(-1, 1)
    else:
        buffer = torch.full((batch, wide, *pixels), math.nan, dtype=dtype)
    return buffer[:, before : before + channels * step : step].copy_(values)


def over(x):
    return [axis for axis in range(x.ndim) if axis != 1]


def per_channel(vector, x):
    """A value per channel, or already one per element, in the shape of x."""
    if vector.shape == x.shape:
        return vector
    return vector.double().view(-1, *[1] * (x.ndim - 2)).expand(x.shape)


def saw(p, act, before, training):
    """Normalised x, v, and what the activation sees: float64, like all formulas of the tests."""
    x = p.x.double()
    mean, var = per_channel(p.running_mean, x), per_channel(p.running_var, x)
    if training:
        mean = x.mean(over(x), keepdim=True)
        var = ((x - mean) ** 2).mean(over(x), keepdim=True)
    v = (x - mean) / (var + EPS).sqrt()
    if p.weight is not None:
        v = v * per_channel(p.weight, x) + per_channel(p.bias, x)
    if before and p.scale is not None:
        v = v * per_channel(p.scale, x)
    return v + p.residual.double() if before else v


FORMULAS = {
    "identity": lambda u: u,
    "relu": lambda u: u.clamp(min=0),
    "relu6": lambda u: u.clamp(0, 6),
    "hardswish": lambda u: u * (u + 3).clamp(0, 6) / 6,
    "silu": lambda u: u / (1 + torch.exp(-u)),
}
KINKS = {"identity": (), "relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "silu": ()}


def problem(case):
    """A problem on the CPU, and float64 y, gradients and running statistics."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high):
        values = torch.rand(channels, generator=generator, dtype=torch.float64)
        return (values * (high - low) + low).to(vectors)

    channels, (first, second, third) = case.shape[1], case.layouts
    vectors = torch.float64 if case.dtype == torch.float64 else torch.float32
    before, x = case.residual_place == "before", normal(*case.shape)
    p = Problem(
        x=lay(
            x * per_channel(uniform(0.5, 2), x) + per_channel(uniform(-2, 2), x), case.dtype, first
        ),
        weight=uniform(1, 3) * normal(channels).sign().to(vectors) if case.affine else None,
        bias=uniform(-2, 2) if case.affine else None,
        scale=uniform(0, 1) if case.scaled else None,
        residual=lay(normal(*case.shape), case.dtype, third) if case.residual_place else None,
        running_mean=uniform(-2, 2),
        running_var=uniform(0.5, 2),
        grad=normal(*case.shape),
    )
    if p.scale is not None:
        p.scale[1::4] = 0
    seen = saw(p, case.act, before, case.training)
    # Where rounding could choose the side of a kink, the gradient is nobody's to judge.
    reach = 1e-3 if vectors == torch.float64 or case.dtype == torch.float32 else 0.1
    for kink in KINKS[case.act]:
        p.grad[(seen - kink).abs() < reach] = 0
    p = p._replace(grad=lay(p.grad, case.dtype, second))
    return p, expected(p, case)


def expected(p, case):
    """float64 y, gradients and running statistics, each with the size that its error is judged by.

    That of a vector's gradient is at least the size of the terms it is the sum of: they may cancel.
    """
    leaves = {
        name: getattr(p, name) if name in ("x", "residual") else per_channel(getattr(p, name), p.x)
        for name in DIFFERENTIABLE
        if getattr(p, name) is not None
    }
    leaves = {name: leaf.double().clone().requires_grad_() for name, leaf in leaves.items()}
    before = case.residual_place == "before"
    y = FORMULAS[case.act](saw(p._replace(**leaves), case.act, before, case.training))
    if "scale" in leaves and not before:
        y = y * leaves["scale"]
    if "residual" in leaves and not before:
        y = y + leaves["residual"]
    terms = torch.autograd.grad(y, list(leaves.values()), p.grad.double())
    results = {name: (term, term.norm()) for name, term in zip(leaves, terms, strict=True)}
    for name in {"weight", "bias", "scale"} & results.keys():
        term, size = results[name]
        total = term.sum(over(p.x))
        results[name] = (total, max(size, total.norm()))
    mean, var = p.running_mean.double(), p.running_var.double()
    if case.training:
        x = p.x.double().transpose(0, 1).flatten(1)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * x.mean(1)
        var = (1 - MOMENTUM) * var + MOMENTUM * x.var(1)
    running = {"running_mean": (mean, mean.norm()), "running_var": (var, var.norm())}
    return {"y": (y.detach(), y.detach().norm()), **results, **running}


def call(function, p, case, **options):
    return function(
        p.x,
        p.weight,
        p.bias,
        scale=p.scale,
        residual=p.residual,
        residual_place=case.residual_place or "after",
        act=case.act,
        running_mean=p.running_mean,
        running_var=p.running_var,
        training=case.training,
        momentum=MOMENTUM,
        eps=EPS,
        **options,
    )


def results_of(function, p, case, needed=DIFFERENTIABLE):
    """y, the gradients of the needed arguments, and the running statistics after the call."""
    p = p.map(torch.Tensor.detach)
    p = p._replace(running_mean=p.running_mean.clone(), running_var=p.running_var.clone())
    leaves = {name: getattr(p, name) for name in needed if getattr(p, name) is not None}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with poisoned():
        y = call(function, p, case)
        found = torch.autograd.grad(y, list(leaves.values()), p.grad) if leaves else ()
    running = {"running_mean": p.running_mean, "running_var": p.running_var}
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True)), **running}


# --- Errors ---------------------------------------------------------------------------------------


def error(actual, wanted, size):
    """The L2 error relative to a size, the absolute one for 0; NaN where a value is missing."""
    distance = (actual.double().cpu() - wanted).norm().item()
    return distance / size.item() if size else distance


def bounds(backend, case):
    """The largest error of each result."""
    vectors = values = 2e-6
    y = 1e-6
    if case.dtype == torch.float64:  # the formulas of this file err as much
        y = values = vectors = 1e-13
    if case.dtype in (torch.bfloat16, torch.float16):
        y = values = torch.finfo(case.dtype).eps / 2  # rounded once
        if INTERPRETED:  # the interpreter cuts digits off
            y = values = 2 * y
        if backend.kernels is None:  # PyTorch's operations round one after another
            y = values = vectors = 4 * y
        elif case.residual_place == "before":  # the residual's gradient is on the way to dx
            values *= 2
    by_name = dict.fromkeys((*DIFFERENTIABLE, "running_mean", "running_var"), vectors)
    return {**by_name, "y": y, "x": values, "residual": values}


def check(backend, function, case, slack=1):
    original, wanted = problem(case)
    p = original.map(lambda tensor: on_device(tensor, backend.device))
    found = results_of(function, p, case)
    again = found if INTERPRETED else results_of(function, p, case)
    limit = bounds(backend, case)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        like = p.x if name == "y" else getattr(p, name)
        assert value.dtype == like.dtype, name
        assert value.shape == like.shape, name
        assert torch.equal(value, again[name]), f"{name} differs in a second run of {case}"
        off = error(value, *wanted[name])
        assert off <= slack * limit[name], f"{name} is off by {off:.2e} in {case}"
    for name, argument in original._asdict().items():
        if argument is not None:
            assert torch.equal(getattr(p, name).cpu(), argument), f"{name} was written to"


def on_device(tensor, device):
    """A copy there, in a buffer of its own with the same strides and NaN in between."""
    stops = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.storage_offset()
    memory = torch.full((begin + sum(stops) + 1,), math.nan, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride(), begin).copy_(tensor)


# --- Values ---------------------------------------------------------------------------------------


def grid(dtype, act):
    """All options of an activation, over shapes and layouts in turn."""
    which = 4 * ACTIVATIONS.index(act) + DTYPES.index(dtype)
    options = [*itertools.product(RESIDUALS, (False, True), (True, False), (True, False))]
    for option, (residual_place, scaled, affine, training) in enumerate(options):
        if INTERPRETED and option != 7 * which % len(options):  # a second each
            continue
        index = 17 * which + option
        shape = SHAPES[index % len(SHAPES)]
        layouts = tuple(list(LAYOUTS)[(index * step + step) % len(LAYOUTS)] for step in (1, 3, 2))
        yield Case(shape, dtype, act, residual_place, scaled, affine, training, layouts, index)


def test_poison_reaches_the_outputs():
    zeros = torch.zeros(2, 3)
    with poisoned():
        assert zeros.new_empty(4).isnan().all()
        assert zeros.new_empty_strided((2, 3), (8, 1)).isnan().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends
def test_equals_float64(backend, function, dtype, act):
    for case in grid(dtype, act):
        check(backend, function, case)


@st.composite
def cases(draw):
    rank = draw(st.integers(0, 3))
    pixels = draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank))
    fewest = math.ceil(8 / math.prod(pixels))  # few values may lie so close that digits are lost
    shape = (draw(st.integers(fewest, fewest + 9)), draw(st.integers(1, 70)), *pixels)
    return Case(
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.sampled_from(RESIDUALS)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        tuple(draw(st.lists(st.sampled_from([*LAYOUTS]), min_size=3, max_size=3))),
        draw(st.integers(0, 2**31)),
    )


@over_kernels
@settings(max_examples=8 if INTERPRETED else 100, deadline=None)
@given(cases())
def test_any_case_equals_float64(backend, case):
    with backend.installed() as function:
        check(backend, function, case, slack=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
@over_backends
def test_large_tensors_equal_float64(backend, function, shape, dtype):
    slack = 4 if backend.kernels is None else 1  # PyTorch's own sums in float32
    check(backend, function, Case(shape, dtype, "relu6", None, True), slack)
    layouts = ("prefix_last", "channels_last", "channels_last")
    check(backend, function, Case(shape, dtype, "silu", "before", True, layouts=layouts), slack)


@pytest.mark.skipif(INTERPRETED, reason="has one thread")
@pytest.mark.parametrize("layout", ["contiguous", "prefix_last"])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("backend", CPU[1:], ids=str)
def test_same_bits_for_any_number_of_threads(backend, function, shape, layout):
    case = Case(shape, torch.float32, "hardswish", "after", True, layouts=(layout,) * 3)
    p, _ = problem(case)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results_of(function, p, case))
    finally:
        torch.set_num_threads(before)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        assert torch.equal(value, found[2][name]), name


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "prefix_last"])
@over_kernels
def test_a_large_mean_costs_no_digits(backend, function, layout, offset):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4, 9, 40, 41, generator=generator, dtype=torch.float64)
    x = on_device(lay(values + offset, torch.float32, layout), backend.device)
    exact = x.double().transpose(0, 1).flatten(1).cpu()
    mean, var = torch.ops.dmcp.norm_stats(x, None, None, 0.0)
    unit = offset * torch.finfo(torch.float32).eps  # mean is a float32: no better than half of it
    assert (mean.double().cpu() - exact.mean(1)).abs().max() <= 0.6 * unit
    assert (var.double().cpu() / exact.var(1, correction=0) - 1).abs().max() <= 2e-6
    y = function(x, training=True, eps=0.0).double().cpu().transpose(0, 1).flatten(1)
    wanted = (exact - exact.mean(1, keepdim=True)) / exact.std(1, correction=0, keepdim=True)
    assert (y - wanted).abs().max() <= 0.6 * unit + 1e-5


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@over_kernels
def test_a_constant_channel_is_its_bias(backend, function, layout, value):
    case = Case((3, 6, 7, 7), torch.float32, layouts=(layout,) * 3)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    p.x[:, 2] = value
    found = results_of(function, p, case)
    assert (found["y"][:, 2] - p.bias[2]).abs().max() <= 1e-5
    assert (found["running_var"][2] - (1 - MOMENTUM) * p.running_var[2]).abs() <= 1e-6
    assert found["x"].isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=("training", "eval"))
@pytest.mark.parametrize("act", ACTIVATIONS)
@over_backends
def test_nan_reaches_what_depends_on_it(backend, function, act, training):
    case = Case((3, 6, 7, 7), torch.float32, act, "after", True, training=training)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    whole = torch.zeros(p.x.shape, dtype=torch.bool, device=backend.device)
    one = whole.clone()
    one[1, 2, 3, 4] = whole[:, 2] = True
    spread = whole if training else one
    for name, reached in (("x", spread), ("residual", one)):
        poison = getattr(p, name).masked_fill(one, math.nan)
        found = results_of(function, p._replace(**{name: poison}), case)
        assert torch.equal(found["y"].isnan(), reached), name
    assert torch.equal(found["x"].isnan(), torch.zeros_like(one))
    found = results_of(function, p._replace(grad=p.grad.masked_fill(one, math.nan)), case)
    assert found["x"][one].isnan().all()
    assert found["x"][~spread].isfinite().all()
    for name in ("weight", "bias", "scale"):
        assert found[name].isnan().nonzero().flatten().tolist() == [2], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@over_backends
def test_kinks_and_extremes_are_as_in_pytorch(backend, function, act, dtype):
    values = [-3.0, -0.0, 0.0, 3.0, 6.0, -300.0, 300.0, -2.5, 0.5, 4.0]
    x = torch.tensor(values, dtype=dtype, device=backend.device)[:, None].requires_grad_()
    plain = x.detach().clone().requires_grad_()
    vectors = MODULE.stats_dtype(x)
    zero = torch.zeros(1, dtype=vectors, device=backend.device)
    one = torch.ones_like(zero)
    y = function(x, act=act, running_mean=zero, running_var=one, eps=0.0)
    wanted = activation(plain, act)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    (wanted_grad,) = torch.autograd.grad(wanted, plain, torch.ones_like(y))
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-30}
    torch.testing.assert_close(y, wanted, **tolerance)
    torch.testing.assert_close(grad, wanted_grad, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_backends
def test_running_statistics_are_those_of_batch_norm(backend, function, dtype):
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    norm = nn.BatchNorm2d(9, dtype=torch.float64)
    mean, var = (
        statistic.to(backend.device, vectors, copy=True)
        for statistic in (norm.running_mean, norm.running_var)
    )
    for seed in range(3):
        values = torch.randn(2, 9, 3, 5, generator=torch.Generator().manual_seed(seed)) + 3
        x = values.to(backend.device, dtype)
        norm(x.double().cpu())
        function(x, running_mean=mean, running_var=var, training=True)
        unchanged = mean.clone(), var.clone()
        function(x, running_mean=mean, running_var=var)
        assert torch.equal(mean, unchanged[0])
        assert torch.equal(var, unchanged[1])
    bound = 4 * torch.finfo(vectors).eps
    torch.testing.assert_close(mean.double().cpu(), norm.running_mean, rtol=bound, atol=0)
    torch.testing.assert_close(var.double().cpu(), norm.running_var, rtol=bound, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_batch_norm_and_activation(dtype, act, layout):
    case = Case((3, 6, 7, 7), dtype, act, layouts=(layout,) * 3)
    p, _ = problem(case)

    def composed(x, weight, bias, running_mean, running_var, **_):
        arguments = (running_mean, running_var, weight, bias, True, MOMENTUM, EPS)
        return activation(F.batch_norm(x, *arguments), act)

    wanted = results_of(composed, p, case)
    for name, value in results_of(norm_act_reference, p, case).items():
        assert torch.equal(value, wanted[name]), name


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@over_python
def test_nothing_is_written_beside_an_output(backend, function, monkeypatch, layout, dtype):
    made = []

    def guarded(other):
        x, margin = other.tensor, 64
        stops = ((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        memory = x.new_full((sum(stops) + 1 + 2 * margin,), 77.0)
        view = memory.as_strided(x.shape, x.stride(), margin)
        made.append((memory, view))
        return Placed(view, other.channels_last, other.pitch)

    for name in ("ops.norm_act_eager", "ops.norm_act_native", "kernels.norm_act"):
        if f"dmcp.{name}" in sys.modules:
            monkeypatch.setattr(sys.modules[f"dmcp.{name}"], "empty_like", guarded)
    for shape in ((2, 9, 5, 7), (3, 97, 1, 1), (5, 1, 3, 3), (2, 40, 11)):
        for residual_place in RESIDUALS:
            made.clear()
            case = Case(shape, dtype, "relu6", residual_place, True, layouts=(layout,) * 3)
            p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
            results_of(function, p, case)
            assert len(made) == (3 if residual_place == "before" else 2)  # y, dx, grad_residual
            for memory, view in made:
                inside = torch.zeros_like(memory, dtype=torch.bool)
                inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
                assert (memory[~inside] == 77).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@over_kernels
def test_outputs_have_the_strides_of_the_input(backend, function, layout):
    for shape in ((2, 9, 5, 7), (3, 7), (2, 40, 11), (2, 3, 2, 3, 4)):
        case = Case(
            shape, torch.float32, "relu", "before", layouts=(layout, "contiguous", "every_second")
        )
        p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
        found = results_of(function, p, case)
        strides = p.x.contiguous().stride() if "second" in layout else p.x.stride()
        for name in ("y", "x", "residual"):
            assert found[name].stride() == strides, (name, shape)


@pytest.mark.parametrize("residual_place", RESIDUALS)
@over_kernels
def test_only_the_inputs_are_kept_for_the_backward(backend, function, residual_place):
    case = Case((3, 6, 7, 7), torch.float32, "silu", residual_place, True)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        p.x.requires_grad_()
        call(function, p, case)
    large = {tensor.data_ptr() for tensor in kept if tensor.ndim > 2}
    before = {p.residual.data_ptr()} if residual_place == "before" else set()
    assert large == {p.x.data_ptr()} | before


@over_kernels
def test_strided_vectors(backend, function):
    case = Case((3, 6, 7, 7), torch.float32, "hardswish", "after", True)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    wanted = results_of(function, p, case)

    def spread(tensor):
        return torch.stack([tensor, tensor + 1], dim=1)[:, 0] if tensor.ndim == 1 else tensor

    strided = p.map(spread)
    assert not strided.weight.is_contiguous()
    for name, value in results_of(function, strided, case).items():
        assert torch.equal(value, wanted[name]), name
    mean, var = spread(p.running_mean), spread(p.running_var)
    call(function, p._replace(running_mean=mean, running_var=var), case)
    assert torch.equal(mean, wanted["running_mean"])
    assert torch.equal(var, wanted["running_var"])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("residual_place", RESIDUALS)
@over_backends
def test_empty_batches_in_evaluation(backend, function, residual_place, shape):
    case = Case(shape, torch.float32, "relu6", residual_place, True, training=False)
    p = problem(case)[0].map(lambda tensor: tensor.to(backend.device))
    found = results_of(function, p, case)
    assert found["y"].shape == found["x"].shape == shape
    for name in ("weight", "bias", "scale"):
        assert torch.equal(found[name], torch.zeros_like(found[name])), name


# --- Autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=("training", "eval"))
@pytest.mark.parametrize("act", ACTIVATIONS)
@over_backends
def test_gradcheck(backend, function, act, training):
    for index, residual_place in enumerate(RESIDUALS):
        layout = ("contiguous", "channels_last", "prefix_last")[index]
        layouts = (layout, "contiguous", "channels_last")
        case = Case((3, 3, 2, 2), torch.float64, act, residual_place, True, True, training, layouts)
        p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
        p.scale.clamp_(min=0.1)  # numerical differences cross 0, where q act(v) != act(q v)
        names = [name for name in DIFFERENTIABLE if getattr(p, name) is not None]

        def of(*tensors, p=p, names=names, case=case):
            return call(function, p._replace(**dict(zip(names, tensors, strict=True))), case)

        leaves = [getattr(p, name).requires_grad_() for name in names]
        assert torch.autograd.gradcheck(of, leaves)


@pytest.mark.parametrize("residual_place", RESIDUALS)
@over_kernels
def test_any_choice_of_gradients(backend, function, residual_place):
    for training in (True, False):
        case = Case((3, 6, 2, 2), torch.float32, "relu6", residual_place, True, True, training)
        p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
        wanted = results_of(function, p, case)
        for size in range(len(DIFFERENTIABLE)):
            for needed in itertools.combinations(DIFFERENTIABLE, size):
                for name, value in results_of(function, p, case, needed).items():
                    assert torch.equal(value, wanted[name]), (name, needed)


@over_kernels
def test_double_backward_is_refused(backend, function):
    case = Case((3, 6, 2, 2), torch.float64)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    y = call(function, p._replace(x=p.x.requires_grad_()), case)
    (grad,) = torch.autograd.grad(y.square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@over_kernels
def test_statistics_updated_before_the_backward_are_noticed(backend, function):
    case = Case((3, 6, 2, 2), torch.float32, training=False)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    y = call(function, p._replace(x=p.x.requires_grad_()), case)
    call(function, p, case._replace(training=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@over_backends
def test_autocast_changes_nothing(backend, function, dtype):
    case = Case((3, 6, 2, 2), dtype, "silu", "before", True)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    wanted = results_of(function, p, case)
    with torch.autocast(backend.device, torch.bfloat16):
        found = results_of(function, p, case)
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name


# --- The dispatcher and the compiler --------------------------------------------------------------


def arguments_of(p, case):
    """Of every op, from a forward and backward."""
    before = case.residual_place == "before"
    mean, var = torch.ops.dmcp.norm_stats(p.x, None, None, 0.0)
    affine, running = (p.weight, p.bias, p.scale), (p.running_mean, p.running_var)
    backward = (p.grad, p.x, mean, var, *affine)
    kept = p.residual if before else None
    sums, _ = torch.ops.dmcp.norm_act_sums(*backward, kept, EPS, case.act)
    moments = torch.stack([mean, var])
    return {
        "norm_stats": (p.x, *running, MOMENTUM),
        "norm_act": (p.x, mean, var, *affine, p.residual, EPS, case.act, before),
        "norm_act_sums": (*backward, kept, EPS, case.act),
        "norm_act_grad": (*backward, sums, 12.0, EPS, case.act),
        "norm_act_train": (p.x, *affine, p.residual, *running, MOMENTUM, EPS, case.act, before),
        "norm_act_train_backward": (p.grad, p.x, moments, *affine, EPS, case.act),
    }


@pytest.mark.parametrize("op", MODULE._SCHEMAS)
@over_devices
def test_opcheck(backend, function, op):
    for dtype, layout, residual_place in (
        (torch.float32, "prefix_last", "before"),
        (torch.bfloat16, "every_second", None),
    ):
        layouts = (layout, "contiguous", "channels_last")
        case = Case((3, 6, 2, 2), dtype, "relu6", residual_place, True, layouts=layouts)
        p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
        opcheck(getattr(torch.ops.dmcp, op).default, arguments_of(p, case)[op])


@pytest.mark.parametrize("training", [True, False], ids=("training", "eval"))
@over_kernels
def test_compiles_without_a_graph_break(backend, function, training):
    torch._dynamo.reset()

    def doubled(x, *arguments, **options):
        return 2 * function(x * 1.0, *arguments, **options)

    # aot_eager traces forward and backward like inductor, without a C++ compiler's minute.
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for layout, residual_place in (("channels_last", "before"), ("contiguous", "after")):
        layouts = (layout, "contiguous", "channels_last")
        case = Case(
            (3, 6, 2, 2), torch.float32, "silu", residual_place, True, True, training, layouts
        )
        p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
        wanted = results_of(doubled, p, case)
        for name, value in results_of(compiled, p, case).items():
            torch.testing.assert_close(value, wanted[name])
            assert value.stride() == wanted[name].stride(), name


@over_kernels
def test_another_backend_is_installed_for_a_while(backend):
    kernels = Backend("constant", lambda: Constant, backend.device)
    case = Case((3, 6, 2, 2), torch.float32)
    p = problem(case)[0].map(lambda tensor: on_device(tensor, backend.device))
    with backend.installed() as function:
        wanted = call(function, p, case)
        with kernels.installed() as function:
            assert (call(function, p, case) == 7).all()
        assert torch.equal(call(function, p, case), wanted)


class Constant(EagerKernels):
    @staticmethod
    def norm_act(x, *_):
        return torch.full_like(x, 7)


# --- Arguments ------------------------------------------------------------------------------------

X = torch.zeros(2, 3, 4, 4)
RUNNING = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}


@over_backends
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)], ids=str)
def test_one_value_per_channel_is_refused_in_training(backend, function, shape):
    x = torch.zeros(shape, device=backend.device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm(x, None, None, training=True)
    with pytest.raises(ValueError, match=r"more than 1 value|2 or more values"):
        function(x, training=True)
    running = {name: statistic.to(backend.device) for name, statistic in RUNNING.items()}
    assert torch.equal(function(x, **running), x)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X.int()}, TypeError, "x must be float32, .*, got torch.int32"),
        ({"x": X[0, :, 0, 0]}, ValueError, r"x must be \[N, C, ...\], got the shape \[3\]"),
        ({"act": "gelu"}, ValueError, "act must be one of identity, .* silu, got 'gelu'"),
        ({"residual_place": "above"}, ValueError, "must be 'before' or 'after', got 'above'"),
        ({"residual": X[:1]}, ValueError, r"residual must be .* \[2, 3, 4, 4\] like x, .* \[1, 3"),
        ({"residual": X.double()}, ValueError, "residual must be torch.float32 .*float64"),
        ({"residual": X.to("meta")}, ValueError, "residual must be on cpu like x, got meta"),
        (
            {"weight": torch.ones(3).double()},
            TypeError,
            "weight must be torch.float32 for .*float64",
        ),
        (
            {"x": X.bfloat16(), "bias": torch.ones(3).bfloat16()},
            TypeError,
            "bias must be .*float32",
        ),
        ({"x": X.double()}, TypeError, "running_mean must be torch.float64 for torch.float64"),
        ({"scale": torch.ones(2)}, ValueError, r"scale must be \[3\], got the shape \[2\]"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale must be \[3\], got the shape \[3, 1\]"),
        ({"bias": torch.ones(3).to("meta")}, ValueError, "bias must be on cpu like x, got meta"),
        ({"running_var": None}, ValueError, "running_mean and running_var must be given"),
        ({"running_mean": None, "training": True}, ValueError, "running_mean and running_var must"),
        (
            {"x": X[:1, :, :1, :1], "training": True},
            ValueError,
            "x must hold 2 or more values per channel",
        ),
    ],
)
def test_bad_input(changes, error, message):
    arguments = {"x": X, **RUNNING, **changes}
    with pytest.raises(error, match=message):
        norm_act(**arguments)


# --- Several processes ----------------------------------------------------------------------------

RANK = """
import sys
import torch
import torch.distributed as dist
from dmcp.ops.norm_act import norm_act

path, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo")
torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
results = []
for tensors, grad, options in torch.load(path)[rank]:
    leaves = [t for name, t in tensors.items() if not name.startswith("running")]
    for leaf in leaves:
        leaf.requires_grad_()
    y = norm_act(**tensors, **options, training=True, synchronised=True)
    gradients = torch.autograd.grad(y, leaves, grad)
    found = dict(zip(tensors, gradients))
    running = {name: t for name, t in tensors.items() if name.startswith("running")}
    results.append({"y": y.detach(), **found, **running})
torch.save(results, f"{path}.{rank}")
dist.destroy_process_group()
"""


def shards_of(p, case, split):
    """What each process is given: its part of the batch, and everything else."""
    options = {"act": case.act, "momentum": MOMENTUM, "eps": EPS}
    options["residual_place"] = case.residual_place or "after"
    parts = []
    for begin, end in itertools.pairwise((0, *itertools.accumulate(split))):
        tensors = {name: getattr(p, name) for name in Problem._fields[:-1]}
        tensors = {
            name: tensor[begin:end] if name in ("x", "residual") else tensor
            for name, tensor in tensors.items()
            if tensor is not None
        }
        parts.append((tensors, p.grad[begin:end], options))
    return parts


def test_processes_with_unequal_shards_equal_one_on_the_whole_batch(tmp_path):
    options = itertools.product(ACTIVATIONS, RESIDUALS, (True, False))
    cases = [
        Case((6, 9, 3, 2), torch.float64, act, residual_place, scaled, scaled)
        for act, residual_place, scaled in options
    ]
    problems = [problem(case)[0] for case in cases]
    for p in problems:
        p.x.add_(1000)
    shards = [shards_of(p, case, (1, 5)) for p, case in zip(problems, cases, strict=True)]
    path = tmp_path / "problems.pt"
    torch.save([*zip(*shards, strict=True)], path)
    run_ranks(path, 2)
    ranks = [torch.load(f"{path}.{rank}") for rank in range(2)]
    for p, case, first, second in zip(problems, cases, *ranks, strict=True):
        for name, (value, size) in expected(p, case).items():
            if name in ("y", "x", "residual"):
                found = torch.cat([first[name], second[name]])
            elif name.startswith("running"):
                assert torch.equal(first[name], second[name])
                found = first[name]
            else:  # each process has the gradient of its own loss
                found = first[name] + second[name]
            assert error(found, value, size) <= 1e-10, (name, case)


def run_ranks(path, processes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["WORLD_SIZE"] = str(processes)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, path, str(rank)],
            cwd=path.parent,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0] * processes
    finally:
        for process in ranks:
            process.kill()


# --- Triton without a device ----------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_interpreted():
    pytest.importorskip("triton")
    # A process of its own: whether Triton interprets is decided when it is imported.
    some = "test_equals_float64 or large_mean or constant_channel or (nan and silu)"
    done = subprocess.run(
        # -P: the installed package, not the checkout, which has no dmcp.kernels
        [
            *(sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", some, __file__),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
