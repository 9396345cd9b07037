"""The CUDA kernels of `norm_act` without a CUDA device: what they compute when a host compiler
builds the same source (see ``cuda_emulation/cuda/launch.h``).
"""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dmcp.backends import native_cuda, native_module
from dmcp.ops import norm_act_native
from dmcp.ops.norm_act_eager import ACTIVATIONS, EagerKernels, _affine, per_channel, stats_dtype

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"
EPS, MOMENTUM = 1e-3, 0.3

# --- Without a device -----------------------------------------------------------------------------


@pytest.mark.skipif(not native_cuda(), reason="dmcp._native was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_entries_without_a_device_raise():
    native = native_module()
    with pytest.raises(RuntimeError, match="CUDA kernel norm_workspace: "):
        native.norm_workspace_cuda(1, 8, 4, True, 0)
    with pytest.raises(RuntimeError, match="CUDA kernel norm_act: "):
        native.norm_act_cuda(1, 8, 4, True, 0, *[0] * 5, EPS, 0, 0, *[0] * 7)


# --- The kernels on the CPU -----------------------------------------------------------------------


def cuda_headers():
    """The folder of the CUDA headers that nvcc uses."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    plan = subprocess.run([nvcc, "-dryrun", "-E", "x.cu"], capture_output=True, text=True).stderr
    include = re.search(r'INCLUDES="-I(.*?)"', plan)
    return None if include is None else include[1]


class Emulation:
    """The kernels, built for the CPU; `kernels` are the four ops through them."""

    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.norm_workspace.restype = ctypes.c_int64
        self._library.take_failure.restype = ctypes.c_char_p
        self.kernels = norm_act_native.NativeKernels(self._launch)

    def device(self, multiprocessors, backwards):
        """What runs from here on; `backwards`: in this order, blocks and threads of a block."""
        self._call("set_emulation", multiprocessors, backwards)

    def _launch(self, name, placed, *arguments):
        shape = norm_act_native.described(placed)
        if name in ("norm_stats", "norm_act_sums"):
            size = self._call("norm_workspace", *shape)
            workspace = torch.full((size // 8 + 1,), math.nan, dtype=torch.float64)
            arguments = (*arguments, workspace.data_ptr())
        self._call(name, *shape, *arguments)

    def _call(self, name, *arguments):
        real, whole = ctypes.c_double, ctypes.c_int64
        typed = [real(a) if isinstance(a, float) else whole(a) for a in arguments]
        result = getattr(self._library, name)(*typed)
        assert self._library.take_failure() is None
        return result


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    headers = cuda_headers()
    if headers is None or shutil.which("g++") is None:
        pytest.skip("no g++ or no CUDA headers")
    path = tmp_path_factory.mktemp("emulation") / "norm_act.so"
    options = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC")
    folders = ("-I", EMULATION, "-I", ROOT / "csrc", "-isystem", headers)
    source = EMULATION / "norm_act.cpp"
    subprocess.run(["g++", *options, *folders, "-o", path, source], check=True)
    return Emulation(path)


MARGIN = 64  # elements, a multiple of 16 bytes


def nan_like(other):
    """In place of `empty_like`: NaN, also around and between the elements."""
    x = other.tensor
    span = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    buffer = x.new_full((max(span, 0) + 2 * MARGIN,), math.nan)
    return other._replace(tensor=buffer.as_strided(x.shape, x.stride(), MARGIN))


def only_own_elements_written(x):
    buffer = x.new_empty(0).set_(x.untyped_storage()).clone()
    own = buffer.as_strided(x.shape, x.stride(), x.storage_offset())
    all_written = not own.isnan().any()
    own.fill_(math.nan)
    return all_written and bool(buffer.isnan().all())


@pytest.fixture(autouse=True)
def _nan_outputs(monkeypatch):
    monkeypatch.setattr(norm_act_native, "empty_like", nan_like)


# --- Problems -------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# whether channels come last; channels of the buffer before and after those of the view, those after
# filling up to a multiple
LAYOUTS = {
    "contiguous": (False, 0, 0),
    "channels_last": (True, 0, 0),
    "prefix": (False, 0, 3),
    "prefix_last": (True, 0, 16),  # every pixel begins at a multiple of 16 bytes
    "middle": (False, 1, 3),
    "middle_last": (True, 3, 5),
}
SHAPES = (
    *((3, channels, 7, 7) for channels in (1, 3, 6, 9, 40, 97, 200)),
    *((5, channels, 1, 1) for channels in (1, 9, 64)),
    *((4, channels, 7, 1) for channels in (6, 40)),
    (2, 2, 49, 47),  # a plane of several chunks
    (3, 520, 3, 2),  # several tiles of columns
    (70, 3, 4, 5),
)


def lay(values, dtype, layout):
    """The values in that layout; NaN where the buffer holds others."""
    last, before, multiple = LAYOUTS[layout]
    batch, channels, *pixels = values.shape
    wide = before + channels
    wide += -wide % multiple if multiple else 0
    shape = (batch, *pixels, wide) if last else (batch, wide, *pixels)
    buffer = torch.full(shape, math.nan, dtype=dtype)
    buffer = buffer.movedim(-1, 1) if last else buffer
    return buffer[:, before : before + channels].copy_(values)


class Problem:
    """The arguments of all ops; dy and the residual may lie otherwise than x."""

    def __init__(self, shape, dtype, layout="contiguous", other_layout=None):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        channels, vectors = shape[1], stats_dtype(torch.empty(0, dtype=dtype))
        centre = normal(channels)
        other_layout = other_layout or layout
        self.x = lay(normal(*shape) * 2 + per_channel(centre, normal(*shape)), dtype, layout)
        self.grad = lay(normal(*shape), dtype, other_layout)
        self.residual = lay(normal(*shape), dtype, other_layout)
        self.mean = (centre + 0.1 * normal(channels)).to(vectors)
        self.var = (normal(channels) ** 2 + 0.5).to(vectors)
        self.weight = (normal(channels) + 1).to(vectors)
        self.bias = normal(channels).to(vectors)
        self.scale = (normal(channels) ** 2).to(vectors)
        self.scale[::3] = 0

    def magnitudes(self, scale):
        """Of x normalised, of v, and of the scale: what errors of rounding are relative to."""
        affine = self.mean, self.var, self.weight, self.bias
        normal, v = _affine(*exact(self.x, *affine), EPS)
        bias = per_channel(self.bias.double(), self.x)
        q = torch.ones_like(v) if scale is None else per_channel(scale.double(), self.x)
        return normal.abs(), v.abs() + bias.abs() + 1, q


def exact(*arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def run(emulation, name, *arguments, multiprocessors=2):
    """All outputs of an op: the same bits in whatever order blocks and threads run."""
    results = []
    for backwards in (False, True):
        emulation.device(multiprocessors, backwards)
        out = getattr(emulation.kernels, name)(*arguments)
        results.append([out] if isinstance(out, torch.Tensor) else list(out))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    return results[0]


def assert_close(actual, expected, size, units):
    """Within some units of rounding of `size`, what the terms of `expected` add up to."""
    error = ((actual.double() - expected).abs() / size).max()
    assert error <= units * torch.finfo(actual.dtype).eps


def check_stats(emulation, p, **device):
    mean, var = run(emulation, "norm_stats", p.x, None, None, 0.0, **device)
    expected_mean, expected_var = EagerKernels.norm_stats(p.x.double(), None, None, 0.0)
    size = expected_mean.abs() + expected_var + 0.1
    assert_close(mean, expected_mean, size, 8)
    assert_close(var, expected_var, size, 8)


def check_forward(emulation, p, act, place, scaled, **device):
    scale = p.scale if scaled else None
    residual = None if place is None else p.residual
    vectors = (p.mean, p.var, p.weight, p.bias, scale)
    arguments = (p.x, *vectors, residual, EPS, act, place == "before")
    (y,) = run(emulation, "norm_act", *arguments, **device)
    _, v, q = p.magnitudes(scale)
    size = q * v + p.residual.double().abs() + 0.1
    assert_close(y, EagerKernels.norm_act(*exact(*arguments)), size, 2)
    assert y.stride() == p.x.stride()
    assert only_own_elements_written(y)


def check_sums(emulation, p, act, before, scaled, **device):
    scale = p.scale if scaled else None
    residual = p.residual if before else None
    vectors = (p.mean, p.var, p.weight, p.bias, scale)
    arguments = (p.grad, p.x, *vectors, residual, EPS, act)
    sums, grad_residual = run(emulation, "norm_act_sums", *arguments, **device)
    expected, expected_residual = EagerKernels.norm_act_sums(*exact(*arguments))
    normal, v, q = p.magnitudes(scale)
    g = p.grad.double().abs() * v
    size = torch.stack([q * g, q * g * normal, g]).sum((1, 3, 4)) + 0.1
    assert_close(sums, expected, size, 2)
    if before:
        assert_close(grad_residual, expected_residual, g + 0.1, 4)
        assert grad_residual.stride() == p.x.stride()
        assert only_own_elements_written(grad_residual)
    return sums


def check_grad(emulation, p, act, scaled, sums, **device):
    scale = p.scale if scaled else None
    count = p.x.numel() / p.x.shape[1]
    vectors = (p.mean, p.var, p.weight, p.bias, scale)
    arguments = (p.grad, p.x, *vectors, sums, count, EPS, act)
    (grad_x,) = run(emulation, "norm_act_grad", *arguments, **device)
    normal, v, q = p.magnitudes(scale)
    size = q * p.grad.double().abs() * v + 0.1
    if sums is not None:
        of_bias, of_weight, _ = (per_channel(row.double().abs(), p.x) / count for row in sums)
        size = size + of_bias + normal * of_weight
    gain = per_channel((p.weight / (p.var + EPS).sqrt()).double().abs(), p.x)
    assert_close(grad_x, EagerKernels.norm_act_grad(*exact(*arguments)), (gain + 0.1) * size, 2)
    assert grad_x.stride() == p.x.stride()
    assert only_own_elements_written(grad_x)


def check(emulation, p, act="relu6", **device):
    check_stats(emulation, p, **device)
    check_forward(emulation, p, act, None, scaled=True, **device)
    check_forward(emulation, p, act, "after", scaled=True, **device)
    check_sums(emulation, p, act, before=True, scaled=True, **device)
    sums = check_sums(emulation, p, act, before=False, scaled=True, **device)
    check_grad(emulation, p, act, scaled=True, sums=sums, **device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(emulation, layout, dtype):
    for shape in SHAPES:
        check(emulation, Problem(shape, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "other"),
    [("prefix_last", "channels_last"), ("channels_last", "middle_last"), ("prefix", "contiguous")],
)
def test_tensors_of_unlike_pitch(emulation, layout, other, dtype):
    for channels in (9, 40):
        check(emulation, Problem((3, channels, 7, 7), dtype, layout, other))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "middle_last"])
def test_activations_and_residuals(emulation, layout, dtype, act):
    p = Problem((5, 9, 7, 7), dtype, layout)
    for scaled in (False, True):
        for place in (None, "before", "after"):
            check_forward(emulation, p, act, place, scaled)
        check_sums(emulation, p, act, before=False, scaled=scaled)
        check_sums(emulation, p, act, before=True, scaled=scaled)
        check_grad(emulation, p, act, scaled, sums=None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "prefix_last"])
def test_more_multiprocessors_than_work(emulation, layout):
    for shape in ((3, 9, 7, 7), (1, 40, 2, 1), (9, 1, 70, 70)):
        check(emulation, Problem(shape, torch.bfloat16, layout), multiprocessors=132)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics(emulation, dtype):
    p = Problem((5, 9, 7, 7), dtype)
    running, expected = [p.mean.clone(), p.var.clone()], exact(p.mean, p.var)
    emulation.kernels.norm_stats(p.x, *running, MOMENTUM)
    EagerKernels.norm_stats(p.x.double(), *expected, MOMENTUM)
    for actual, wanted in zip(running, expected, strict=True):
        assert_close(actual, wanted, wanted.abs() + 1, 8)


def test_constant_channels_far_from_zero(emulation):
    x = torch.full((4, 3, 5, 5), 4096.0) + torch.arange(3.0).view(1, 3, 1, 1)
    mean, var = run(emulation, "norm_stats", x, None, None, 0.0)
    assert torch.equal(mean, x[0, :, 0, 0])
    assert torch.equal(var, torch.zeros(3))


def test_no_values(emulation):
    p = Problem((0, 5, 2, 2), torch.float32)
    vectors = (p.mean, p.var, p.weight, p.bias, p.scale)
    assert emulation.kernels.norm_act(p.x, *vectors, None, EPS, "relu", False).shape == p.x.shape
    sums, _ = emulation.kernels.norm_act_sums(p.grad, p.x, *vectors, None, EPS, "relu")
    assert torch.equal(sums, torch.zeros(3, 5))
