"""The Triton kernels of pointwise convolutions against float64, run by Triton's interpreter, and
those of all convolutions as machine code.

``TRITON_INTERPRET=1 pytest tests/ops/test_pointwise_triton.py`` interprets them in this process.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from dmcp.kernels.pointwise import (
    Prologue,
    pointwise,
    pointwise_grad_input,
    pointwise_grad_weight,
)
from dmcp.ops.norm_act_eager import activation

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


# --- Values ---------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One convolution; `behind` channels of the buffers are not part of the tensors."""

    inputs: int
    outputs: int
    size: tuple[int, int]
    act: str | None = None
    dtype: torch.dtype = torch.float32
    behind: int = 0


CASES = (
    Case(1, 3, (5, 4)),
    Case(3, 1, (4, 5), "relu", behind=2),
    Case(9, 40, (7, 3), "relu6", torch.bfloat16, behind=7),
    Case(40, 97, (13, 13), "hardswish", torch.float16),
    Case(97, 9, (17, 9), "silu", behind=3),
    Case(64, 8, (3, 3), "identity", torch.bfloat16, behind=8),
    Case(9, 97, (13, 13), dtype=torch.float16, behind=7),
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

    i, o = case.inputs, case.outputs
    x = prefix(draw(images, i, *case.size), case.dtype, case.behind)
    wide = torch.full((o + 1, i + case.behind), torch.nan)
    weight = wide[:o, :i].copy_(draw(o, i).to(case.dtype))
    prologue = case.act and Prologue(draw(i), draw(i), draw(i), case.act)
    return x, weight, prologue, prefix(draw(images, o, *case.size), case.dtype, case.behind)


def rows(x):
    return x.double().movedim(1, -1).flatten(0, -2)


def seen(x, prologue):
    """What the product sees, in float64."""
    if prologue is None:
        return rows(x)
    gain, shift, scale = (vector.double() for vector in prologue[:3])
    return scale * activation(gain * rows(x) + shift, prologue.act)


def results(case):
    x, weight, prologue, grad = problem(case)
    y, moments = pointwise(x, weight, prologue, sums=True)
    wide = torch.ones(case.outputs + 1, case.inputs + 2)
    pointwise_grad_weight(grad, x, wide[:-1, :-2], prologue)
    return {
        "y": y,
        "moments": moments,
        "input": pointwise_grad_input(grad, weight),
        "weight": wide,
    }


@pytest.fixture
def few_programs(monkeypatch):
    """So that one program takes several blocks of rows."""
    monkeypatch.setattr("dmcp.kernels.norm_act.PROGRAMS_INTERPRETED", 1)


@interpreted
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case):
    x, weight, prologue, grad = problem(case)
    found = results(case)
    # The interpreter cuts digits off; what the product sees is rounded, too.
    rounding = 1e-6 if case.dtype == torch.float32 else 2 * torch.finfo(case.dtype).eps
    weight, matrix = weight.double(), seen(x, prologue)
    assert error(rows(found["y"]), matrix @ weight.T) <= rounding
    assert error(rows(found["input"]), rows(grad) @ weight) <= rounding
    assert error(found["weight"][:-1, :-2] - 1, rows(grad).T @ matrix) <= rounding
    assert found["weight"][-1].eq(1).all()
    assert found["weight"][:, -2:].eq(1).all()
    var, mean = torch.var_mean(rows(found["y"]), 0, correction=0)
    assert error(found["moments"][0], mean) <= 1e-6
    assert error(found["moments"][1], var) <= 1e-6


@interpreted
def test_same_bits_twice():
    first, again = results(CASES[3]), results(CASES[3])
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


@interpreted
@pytest.mark.usefixtures("few_programs")
def test_a_large_mean_costs_the_moments_no_digits():
    x, weight, prologue, _ = problem(CASES[4])
    gain, shift, scale, _ = prologue
    y, moments = pointwise(x, weight, Prologue(gain, shift + 1e3, scale, "identity"), sums=True)
    assert rows(y).mean().abs() > 100
    assert error(moments[1], rows(y).var(0, correction=0)) <= 1e-6


@interpreted
def test_pixels_begin_at_whole_accesses():
    x, weight, _, _ = problem(CASES[1])
    y, moments = pointwise(x, weight)
    assert y.stride() == (80, 1, 20, 4)
    assert moments is None


# --- Machine code ---------------------------------------------------------------------------------

COMPILED = """
import json
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmcp.kernels import depthwise, pointwise

cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
launches = []


class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda **arguments: launches.append((self.kernel, arguments))


for module in (depthwise, pointwise):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        setattr(module, name, Recorder(getattr(module, name)))


def resources(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: value for key, _, value in (word.partition(":") for word in usage.split())}


def report(kernel, arguments, architecture):
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                aligned[index,] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            assert parameter.do_not_specialize, f"{parameter.name} of {kernel.__name__}"
            signature[parameter.name] = "i32"
    options = ("num_warps", "num_stages", "maxnreg")
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={name: arguments[name] for name in options if name in arguments},
    )
    used = resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "kernel": " ".join(map(str, (kernel.__name__, architecture, *constants.values()))),
        "registers": int(used["REG"]),
        "bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "matrix": "y" in signature or "grad" in signature,
        # Vectors of a prologue are read 4 bytes at a time where a thread needs no more of them.
        "narrow": sum(map(ptx.count, ("ld.global.b16", "ld.global.v2.b32", "cp.async.ca"))),
        "wide": ptx.count("ld.global.v4.b32") + ptx.count("cp.async.cg"),
    }))


def last(*shape):
    n, c, h, w = shape
    return torch.empty(n, h, w, c, dtype=torch.bfloat16, device="meta").movedim(-1, 1)


def weights(*shape):
    return torch.empty(shape, device="meta")


def prologue(channels, act):
    return pointwise.Prologue(*weights(3, channels), act)


x, half = last(8, 144, 28, 28), last(8, 144, 14, 14)
wide = last(8, 256, 28, 28)
depthwise.depthwise(x, weights(144, 1, 3, 3), 1, prologue(144, "relu6"), sums=True)
depthwise.depthwise_grad_input(half, weights(144, 1, 3, 3), 28, 28, 2)
depthwise.depthwise_grad_weight(x, x, 3, 1, prologue(144, "silu"))
pointwise.pointwise(x, weights(256, 144), prologue(144, "relu6"), sums=True)
pointwise.pointwise_grad_input(wide, weights(256, 144))
pointwise.pointwise_grad_weight(wide, x, weights(256, 144), prologue(144, "hardswish"))
for kernel, arguments in launches:
    for architecture in (80, 90):
        report(kernel, arguments, architecture)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What became of every kernel as it is launched for widths that are multiples of 8."""
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=folder,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(INTERPRETED, reason="interprets")
def test_no_kernel_spills(compiled):
    assert len(compiled) == 20
    assert [each["kernel"] for each in compiled if each["bytes"]] == []


@pytest.mark.skipif(INTERPRETED, reason="interprets")
def test_tensors_are_read_16_bytes_at_a_time(compiled):
    matrices = [each for each in compiled if each["matrix"]]
    assert len(matrices) == 12
    for each in matrices:
        assert each["wide"] > 0, each["kernel"]
        assert each["narrow"] == 0, each["kernel"]


# --- Benchmark ------------------------------------------------------------------------------------


SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_convolutions.py"


@pytest.mark.skipif(INTERPRETED, reason="interprets")
def test_benchmark_runs_dry():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--dry-run"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for kind in ("pointwise /1", "depthwise 3x3 /1", "depthwise 3x3 /2"):
        assert kind in done.stdout
    assert "the better" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_benchmark_needs_a_device(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "there is no CUDA device" in capsys.readouterr().err
