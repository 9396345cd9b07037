import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dmcp.backends import backends, native_cuda
from dmcp.ops import retain, retain_reference

LENGTHS = {
    "none": [],
    "one empty": [0],
    "one": [1],
    "mobilenet": [9] * 18,
    "mixed": [0, 1, 2, 9, 14, 97, 0, 0, 3, 32, 33, 64, 0],
    "long": [1000, 31],
    "many": [9, 0, 14] * 1500,
}
DTYPES = [torch.float32, torch.float64]
ROOT = Path(__file__).parents[2]


def offsets_of(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def problem(lengths, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    alpha = torch.randn(total, generator=generator, dtype=torch.float64) * 3 + 1
    alpha[::7] = 80.0
    alpha[5::11] = -80.0
    grad = torch.randn(total, generator=generator, dtype=torch.float64)
    return alpha.to(dtype), offsets_of(lengths), grad.to(dtype)


def by_hand(alpha, offsets, grad):
    """Chain by chain in float64: q, the gradient of alpha, and the sizes its terms add up to."""
    alpha, grad = alpha.double(), grad.double()
    q, grad_alpha, scale = (torch.zeros_like(alpha) for _ in range(3))
    bounds = offsets.tolist()
    for begin, end in pairwise(bounds):
        chain = slice(begin, end)
        q[chain] = alpha[chain].sigmoid().cumprod(0)
        stop, terms = alpha[chain].neg().sigmoid(), q[chain] * grad[chain]
        grad_alpha[chain] = stop * terms.flip(0).cumsum(0).flip(0)
        scale[chain] = stop * terms.abs().flip(0).cumsum(0).flip(0)
    return q, grad_alpha, scale


def assert_close(actual, expected, dtype, scale=None):
    """Within 32 units of rounding of the expected value (or of `scale`), or both denormal."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    info = torch.finfo(dtype)
    bound = 32 * info.eps * (expected.abs() if scale is None else scale) + info.tiny
    error = (actual.detach().double().cpu() - expected).abs()
    assert (error <= bound).all(), f"worst error over bound: {(error / bound).max().item():.3g}"


def check_against_float64(function, lengths, dtype, device="cpu"):
    alpha, offsets, grad = problem(lengths, dtype)
    expected_q, expected_grad, scale = by_hand(alpha, offsets, grad)
    if function is retain_reference:  # torch's derivative of sigmoid cancels in 1 - p
        scale = scale / alpha.double().neg().sigmoid()
    results = []
    for _ in range(2):
        leaf = alpha.to(device, copy=True).requires_grad_()
        q = function(leaf, offsets.to(device))
        q.backward(grad.to(device))
        results.append((q.detach(), leaf.grad))
    (q, grad_alpha), again = results
    assert_close(q, expected_q, dtype)
    assert_close(grad_alpha, expected_grad, dtype, scale)
    assert torch.equal(q, again[0])
    assert torch.equal(grad_alpha, again[1])


def run_python(code, folder, *arguments, **environment):
    """Runs the code in a process of its own, outside the checkout; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def poisoned():
    """Fills every torch.empty with NaN, so that a position left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("function", [retain, retain_reference])
@pytest.mark.usefixtures("poisoned")
def test_equals_float64(function, lengths, dtype):
    check_against_float64(function, lengths, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("function", [retain, retain_reference])
@pytest.mark.usefixtures("poisoned")
def test_equals_float64_on_cuda(function, lengths, dtype):
    check_against_float64(function, lengths, dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not backends()["triton"].available, reason="no Triton or no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.usefixtures("poisoned")
def test_triton_equals_float64_on_cuda(lengths, dtype):
    # Called past the dispatcher, which prefers the CUDA kernels where they were built.
    from dmcp.kernels.retain import retain as forward
    from dmcp.kernels.retain import retain_backward as backward

    alpha, offsets, grad = problem(lengths, dtype)
    expected_q, expected_grad, scale = by_hand(alpha, offsets, grad)
    alpha, offsets, grad = alpha.cuda(), offsets.cuda(), grad.cuda()
    q = forward(alpha, offsets)
    grad_alpha = backward(grad, alpha, q, offsets)
    assert_close(q, expected_q, dtype)
    assert_close(grad_alpha, expected_grad, dtype, scale)
    assert torch.equal(q, forward(alpha, offsets))
    assert torch.equal(grad_alpha, backward(grad, alpha, q, offsets))


def test_poison_reaches_the_outputs(poisoned):
    assert torch.empty_like(torch.zeros(3)).isnan().all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(0, 2**31))
def test_native_and_eager_agree(lengths, seed):
    alpha, offsets, grad = problem(lengths, torch.float64, seed)
    q = torch.ops.dmcp.retain(alpha, offsets)
    assert_close(q, retain_reference(alpha, offsets), torch.float64)
    leaf = alpha.clone().requires_grad_()
    retain_reference(leaf, offsets).backward(grad)
    grad_alpha = torch.ops.dmcp.retain_backward(grad, alpha, q, offsets)
    torch.testing.assert_close(grad_alpha, leaf.grad, rtol=0, atol=1e-13)


def test_eager_backward_kernel_equals_float64():
    # The kernels of a device without a backend of its own, called past the dispatcher.
    from dmcp.ops.retain import _backward_reference

    alpha, offsets, grad = problem(LENGTHS["mixed"], torch.float64)
    q, expected, scale = by_hand(alpha, offsets, grad)
    assert_close(_backward_reference(grad, alpha, q, offsets), expected, torch.float64, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_alpha(dtype):
    alpha = torch.tensor([80.0] * 4 + [-80.0] * 4, dtype=dtype, requires_grad=True)
    q = retain(alpha, offsets_of([4, 4]))
    assert (q[:4] == 1).all()
    assert q[4] > 0
    q.sum().backward()
    assert alpha.grad.isfinite().all()
    # 1 - p would be 0. Group k moves its own q, which is 1, and those of the groups after it.
    stop = torch.tensor([-80.0], dtype=torch.float64).sigmoid()
    assert_close(alpha.grad[:4], stop * torch.arange(4, 0, -1), dtype)


@pytest.mark.parametrize("function", [retain, retain_reference])
def test_gradcheck(function):
    alpha, offsets, _ = problem([0, 1, 2, 9, 14], torch.float64)
    alpha = alpha.clamp(-4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: function(a, offsets), alpha)


def test_double_backward_is_refused():
    alpha, offsets, _ = problem([3], torch.float64)
    alpha.requires_grad_()
    (grad,) = torch.autograd.grad(retain(alpha, offsets).square().sum(), alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[], [0, 1, 2, 9, 14]], ids=str)
def test_opcheck(lengths, dtype):
    alpha, offsets, grad = problem(lengths, dtype)
    opcheck(torch.ops.dmcp.retain.default, (alpha, offsets))
    q = retain(alpha, offsets)
    opcheck(torch.ops.dmcp.retain_backward.default, (grad, alpha, q, offsets))


def test_compiles_without_a_graph_break():
    alpha, offsets, grad = problem([9, 14, 0, 3], torch.float32)

    def loss(a):
        return (retain(a * 2, offsets) * grad).sum()

    expected = torch.autograd.grad(loss(leaf := alpha.clone().requires_grad_()), leaf)[0]
    # aot_eager traces forward and backward like inductor, without a C++ compiler's minute.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(leaf := alpha.clone().requires_grad_()), leaf)[0]
    assert torch.equal(actual, expected)


def test_strided_inputs():
    alpha, offsets, grad = problem([9, 14, 3], torch.float32)
    wide = torch.stack([alpha, alpha - 100], dim=1)[:, 0].requires_grad_()
    wide_offsets = torch.stack([offsets, -offsets], dim=1)[:, 0]
    plain = alpha.clone().requires_grad_()
    q, expected = retain(wide, wide_offsets), retain(plain, offsets)
    assert torch.equal(q, expected)
    wide_grad = torch.stack([grad, grad + 1], dim=1)[:, 0]
    (actual,) = torch.autograd.grad(q, wide, wide_grad)
    (wanted,) = torch.autograd.grad(expected, plain, grad)
    assert torch.equal(actual, wanted)


GOOD = torch.zeros(5)
OFFSETS = offsets_of([2, 3])


@pytest.mark.parametrize(
    ("alpha", "offsets", "error", "message"),
    [
        (GOOD.half(), OFFSETS, TypeError, "alpha must be float32 or float64, got torch.float16"),
        (GOOD, OFFSETS.long(), TypeError, "offsets must be int32, got torch.int64"),
        (GOOD[None], OFFSETS, ValueError, r"alpha must have one dimension, .* \[1, 5\]"),
        (GOOD, OFFSETS[:0], ValueError, r"offsets must be \[chains \+ 1\], .* \[0\]"),
        (GOOD, OFFSETS.to("meta"), ValueError, "offsets must be on cpu like alpha, got meta"),
        (GOOD, OFFSETS + 1, ValueError, "offsets must ascend from 0 to the length of alpha, 5"),
        (GOOD, offsets_of([2, 4]), ValueError, "offsets must ascend"),
        (GOOD, offsets_of([9, -4]), ValueError, "offsets must ascend"),
    ],
)
def test_bad_input(alpha, offsets, error, message):
    with pytest.raises(error, match=message):
        retain(alpha, offsets)


@pytest.mark.parametrize("offsets", [OFFSETS + 1, offsets_of([2, 4]), offsets_of([9, -4])])
def test_reference_refuses_bad_offsets(offsets):
    with pytest.raises(ValueError, match="offsets must ascend from 0 to the length of alpha, 5"):
        retain_reference(GOOD, offsets)


INTERPRETED = """
import sys
import torch
from dmcp.kernels.retain import retain, retain_backward

torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
results = []
for alpha, offsets, grad in torch.load(sys.argv[1]):
    q = retain(alpha, offsets)
    results.append((q, retain_backward(grad, alpha, q, offsets)))
torch.save(results, sys.argv[1])
"""


def test_triton_interpreted(tmp_path):
    pytest.importorskip("triton")
    cases = [problem(LENGTHS[name], t) for name in ("none", "one", "mixed") for t in DTYPES]
    path = tmp_path / "tensors.pt"
    torch.save([*cases, *cases], path)
    run_python(INTERPRETED, tmp_path, path, TRITON_INTERPRET="1")
    results = torch.load(path)
    for (alpha, offsets, grad), (q, grad_alpha), again in zip(
        cases, results[: len(cases)], results[len(cases) :], strict=True
    ):
        expected_q, expected_grad, scale = by_hand(alpha, offsets, grad)
        assert_close(q, expected_q, alpha.dtype)
        assert_close(grad_alpha, expected_grad, alpha.dtype, scale)
        assert torch.equal(q, again[0])
        assert torch.equal(grad_alpha, again[1])


TRITON_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dmcp.kernels import retain

fixed = {"offsets": "*i32", "total": "i32", "block": "constexpr"}
for kernel in (retain.retain_kernel, retain.retain_backward_kernel):
    for real in ("*fp32", "*fp64"):
        signature = {argument: fixed.get(argument, real) for argument in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={"block": retain.BLOCK})
        for architecture in (80, 90):
            compiled = triton.compile(
                source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 1}
            )
            print(len(compiled.asm["cubin"]))
"""


def test_triton_compiles_ahead_of_time(tmp_path):
    pytest.importorskip("triton")
    # A process of its own: Triton's cache folder and its choice of interpreter are process-wide.
    printed = run_python(TRITON_COMPILED, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    sizes = [int(line) for line in printed.split()]
    assert len(sizes) == 8
    assert min(sizes) > 0


@pytest.mark.skipif(not native_cuda(), reason="dmcp._native was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_entry_without_a_device_raises():
    from dmcp import _native

    with pytest.raises(RuntimeError, match="CUDA kernel retain: "):
        _native.retain_cuda(0, 0, 0, 1, 1, 4, 0)


@pytest.mark.skipif(not backends()["native"].available, reason="no dmcp._native")
def test_native_refuses_an_unknown_item_size():
    from dmcp import _native

    with pytest.raises(ValueError, match="itemsize must be 4 or 8, got 2"):
        _native.retain_cpu(0, 0, 0, 0, 0, 2)
