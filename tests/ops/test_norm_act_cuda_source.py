"""The CUDA kernels of `norm_act` where there is no CUDA device: what nvcc makes of them, and what
they compute when a host compiler builds the same source (see ``cuda_emulation/cuda/launch.h``).
"""

import ctypes
import importlib
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

MODULE = importlib.import_module("dmcp.ops.norm_act")
ACTIVATIONS, OPS, EagerKernels, NativeKernels, activation = (
    MODULE.ACTIVATIONS,
    MODULE.OPS,
    MODULE.EagerKernels,
    MODULE.NativeKernels,
    MODULE.activation,
)

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "norm_act.cu"
EMULATION = Path(__file__).parent / "cuda_emulation"
EPS, MOMENTUM = 1e-3, 0.3

# --- The kernels on the CPU -----------------------------------------------------------------------


def cuda_headers():
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    found = subprocess.run([nvcc, "-dryrun", "-E", "x.cu"], capture_output=True, text=True)
    include = re.search(r'INCLUDES="-I([^"]*?)"', found.stderr)
    return None if include is None else Path(include[1])


class Emulation:
    """The four ops on CPU tensors, through the CUDA kernels."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.norm_workspace.restype = ctypes.c_int64
        entries = {f"{name}_cpu": self._entry(name) for name in OPS}
        self.kernels = NativeKernels(SimpleNamespace(**entries), "emulated")

    def device(self, multiprocessors=2, backwards=False):
        """What runs from here on; `backwards`: the order of blocks and threads."""
        self._call("set_emulation", multiprocessors, backwards)

    def _entry(self, name):
        def call(*arguments):
            arguments = arguments[:-1]
            if name in ("norm_stats", "norm_act_sums"):
                size = self._call("norm_workspace", *arguments[:5])
                workspace = torch.full((size // 8 + 1,), math.nan, dtype=torch.float64)
                arguments = (*arguments, workspace.data_ptr())
            self._call(name, *arguments)

        return call

    def _call(self, name, *arguments):
        real, whole = ctypes.c_double, ctypes.c_int64
        typed = [real(a) if isinstance(a, float) else whole(a) for a in arguments]
        return getattr(self._library, name)(*typed)


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    import os
    if os.environ.get("EMU"):
        return Emulation(os.environ["EMU"])
    headers = cuda_headers()
    if headers is None or shutil.which("g++") is None:
        pytest.skip("no g++ or no CUDA headers")
    path = tmp_path_factory.mktemp("emulation") / "norm_act.so"
    folders = ("-I", EMULATION, "-I", ROOT / "csrc", "-isystem", headers)
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *folders, "-o", path]
        + [EMULATION / "norm_act.cpp"],
        check=True,
    )
    return Emulation(path)


MARGIN = 64


def nan_like(other):
    """In place of `empty_like`: NaN, also around and between the elements, so that those left
    unwritten show, and those written that are not the kernel's (`others_are_nan`)."""
    x = other.tensor
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    buffer = x.new_full((span + 2 * MARGIN,), math.nan)
    return other._replace(tensor=buffer.as_strided(x.shape, x.stride(), MARGIN))


def others_are_nan(x):
    buffer = x.new_empty(0).set_(x.untyped_storage()).clone()
    buffer.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(math.nan)
    return bool(buffer.isnan().all())


@pytest.fixture(autouse=True)
def _outputs(monkeypatch):
    monkeypatch.setattr(MODULE, "empty_like", nan_like)


# --- Problems -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# channels last, channels of the buffer, first channel of the view: of 0 channels, as many as needed
LAYOUTS = {
    "contiguous": (False, 0, 0),
    "channels_last": (True, 0, 0),
    "prefix": (False, 1, 0),
    "prefix_last": (True, 16, 0),  # whose rows begin at multiples of 16 bytes
    "odd_prefix_last": (True, 1, 0),
    "middle_last": (True, 5, 3),
}
SHAPES = (
    *((3, channels, 7, 7) for channels in (1, 3, 6, 9, 40, 97, 200)),
    *((5, channels, 1, 1) for channels in (1, 9, 64)),
    *((4, channels, 7, 1) for channels in (6, 40)),
    (1, 2, 49, 47),  # a plane of several chunks
    (3, 520, 3, 2),  # several tiles of columns
    (70, 3, 4, 5),
)


def lay(values, dtype, layout):
    """The values in that layout; NaN where the buffer holds others."""
    last, extra, first = LAYOUTS[layout]
    batch, channels, *pixels = values.shape
    wide = -(-(first + channels) // extra) * extra if extra > 1 else first + channels + extra
    shape = (batch, *pixels, wide) if last else (batch, wide, *pixels)
    buffer = torch.full(shape, math.nan, dtype=dtype)
    view = buffer.movedim(-1, 1) if last else buffer
    return view[:, first : first + channels].copy_(values)


class Problem:
    def __init__(self, shape, dtype, layout="contiguous", seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        vectors = torch.float64 if dtype == torch.float64 else torch.float32
        channels = shape[1]
        centre = normal(1, channels, 1, 1)
        self.x = lay(normal(*shape) * 2 + centre, dtype, layout)
        self.grad = lay(normal(*shape), dtype, layout)
        self.residual = lay(normal(*shape), dtype, layout)
        self.mean = (centre.flatten() + 0.1 * normal(channels)).to(vectors)
        self.var = (normal(channels) ** 2 + 0.5).to(vectors)
        self.weight = (normal(channels) + 1).to(vectors)
        self.bias = normal(channels).to(vectors)
        self.scale = (normal(channels) ** 2).to(vectors)
        self.scale[::3] = 0


def double(*tensors):
    return [tensor.double() if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors]


def assert_close(actual, expected, size, units=16):
    """Within some units of rounding of `size`, which is what the terms of `expected` add up to."""
    precision = torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs() / (size + expected.abs() + 1e-3)
    assert error.max() <= units * precision, f"{(error.max() / precision).item():.1f} units"


def run(emulation, function, *arguments):
    """What the kernels compute: the same bits in whatever order blocks and threads run."""
    results = []
    for backwards in (False, True):
        emulation.device(backwards=backwards)
        copies = [a.clone() if isinstance(a, torch.Tensor) and a.ndim == 1 else a for a in arguments]
        out = getattr(emulation.kernels, function)(*copies)
        out = (out,) if isinstance(out, torch.Tensor) else out
        results.append([*out, *(a for a in copies if isinstance(a, torch.Tensor) and a.ndim == 1)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))
    return results[0]


def check_stats(emulation, p):
    running = [torch.zeros_like(p.mean), torch.ones_like(p.var)]
    mean, var, *running = run(emulation, "norm_stats", p.x, *running, MOMENTUM)
    expected = [torch.zeros(p.mean.shape).double(), torch.ones(p.mean.shape).double()]
    means, variances = EagerKernels.norm_stats(p.x.double(), *expected, MOMENTUM)
    for got, wanted in zip((mean, var, *running), (means, variances, *expected), strict=True):
        assert_close(got, wanted, variances + means.abs())


def check_forward(emulation, p, act, kind, scaled):
    scale = p.scale if scaled else None
    residual = None if kind is None else p.residual
    arguments = (p.x, p.mean, p.var, p.weight, p.bias, scale, residual, EPS, act, kind == "before")
    y = run(emulation, "norm_act", *arguments)[0]
    expected = EagerKernels.norm_act(*double(*arguments))
    _, v = MODULE._affine(*double(p.x, p.mean, p.var, p.weight, p.bias), EPS)
    size = v.abs() + (0 if residual is None else residual.double().abs()) + p.bias.abs().max()
    factor = 1 if scale is None else 1 + MODULE.per_channel(scale.double(), p.x)
    assert_close(y, expected, size * factor, 4)
    assert y.stride() == p.x.stride()
    assert others_are_nan(y)


def check_backward(emulation, p, act, before, scaled, batch_stats):
    scale = p.scale if scaled else None
    residual = p.residual if before else None
    affine = (p.mean, p.var, p.weight, p.bias, scale)
    arguments = (p.grad, p.x, *affine, residual, EPS, act)
    sums, grad_residual = run(emulation, "norm_act_sums", *arguments)[:2]
    exact = double(*arguments)
    expected, expected_residual = EagerKernels.norm_act_sums(*exact)
    sizes = [one.abs() if isinstance(one, torch.Tensor) else one for one in exact[:1]]
    normal, v = MODULE._affine(*double(p.x, p.mean, p.var, p.weight, p.bias), EPS)
    q = 1 if scale is None else MODULE.per_channel(scale.double(), p.x)
    terms = torch.stack([q + 0 * v, q * normal, v]).abs() + 1
    size = (terms * sizes[0]).sum((1, 3, 4) if p.x.ndim == 4 else 1)
    assert_close(sums, expected, size, 64)
    if before:
        assert_close(grad_residual, expected_residual, sizes[0], 4)
        assert grad_residual.stride() == p.x.stride()
        assert others_are_nan(grad_residual)
        return
    totals = sums if batch_stats else None
    arguments = (p.grad, p.x, *affine, totals, p.x.numel() / p.x.shape[1], EPS, act)
    grad_x = run(emulation, "norm_act_grad", *arguments)[0]
    gain = MODULE.per_channel((p.weight / (p.var + EPS).sqrt()).double(), p.x).abs()
    count = p.x.numel() / p.x.shape[1]
    mass = q * sizes[0] * (1 + v.abs())
    if batch_stats:
        rows = MODULE.per_channel(sums[:2].double().abs().T.flatten()[::2], p.x) / count
        slopes = MODULE.per_channel(sums[1].double().abs(), p.x) / count
        mass = mass + rows + slopes * normal.abs()
    assert_close(grad_x, EagerKernels.norm_act_grad(*double(*arguments)), gain * (mass + 1), 8)
    assert grad_x.stride() == p.x.stride()
    assert others_are_nan(grad_x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(emulation, layout, dtype):
    for shape in SHAPES:
        p = Problem(shape, dtype, layout)
        check_stats(emulation, p)
        check_forward(emulation, p, "relu6", None, scaled=True)
        check_forward(emulation, p, "relu", "after", scaled=True)
        check_backward(emulation, p, "relu6", before=False, scaled=True, batch_stats=True)
        check_backward(emulation, p, "relu", before=True, scaled=True, batch_stats=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd_prefix_last"])
def test_activations_and_residuals(emulation, layout, dtype, act):
    p = Problem((5, 9, 7, 7), dtype, layout)
    for kind in (None, "before", "after"):
        for scaled in (False, True):
            check_forward(emulation, p, act, kind, scaled)
    for before in (False, True):
        for scaled in (False, True):
            check_backward(emulation, p, act, before, scaled, batch_stats=False)
