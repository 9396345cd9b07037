import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from dmcp.backends import backends, native_cuda, triton_installed
from dmcp.ops import CostTable, expected_cost, expected_cost_reference, retain
from dmcp.ops.expected_cost import (
    _backward_eager,
    _empty_outputs,
    _forward_eager,
    _native_kernels,
)

OUTPUTS = ("q", "scale", "moments", "cost", "variance")
CASES = {  # chain lengths and number of costs
    "nothing": ([], 1),
    "one empty": ([0], 2),
    "one": ([1], 1),
    "small": ([2, 0, 20], 2),
    "mobilenet": ([14] * 25 + [0], 1),
    "mixed": ([0, 1, 2, 9, 14, 97, 0, 0, 3, 32, 33, 15, 16, 64, 0], 2),
    "no costs": ([0, 3, 14, 0, 40], 0),
    "long": ([1000, 31], 1),
    "many": ([9, 0, 14] * 40, 3),
}
DTYPES = [torch.float32, torch.float64]
ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"


@dataclass
class Problem:
    """Chains, costs and the gradient of every output (None: none comes in)."""

    choices: list
    coefficients: list
    alpha: torch.Tensor
    grads: list

    def table(self, device="cpu"):
        return CostTable.of(self.choices, self.coefficients, device)


def random_choices(lengths, generator):
    steps = [torch.randint(1, 9, (length + 1,), generator=generator) for length in lengths]
    return [tuple(own.cumsum(0).tolist()) for own in steps]


def random_coefficients(units, generator):
    """Counts as those of layers are; one in four is zero."""
    entries = torch.randint(0, 1000, (1 + units, 1 + units), generator=generator)
    entries[torch.rand(entries.shape, generator=generator) < 0.25] = 0
    return (entries.triu() + entries.triu(1).T).double()


def problem(lengths, metrics, dtype, seed=0, only=None):
    """``only``: the one output whose gradient comes in."""
    generator = torch.Generator().manual_seed(seed)
    choices = random_choices(lengths, generator)
    coefficients = [random_coefficients(len(lengths), generator) for _ in range(metrics)]
    alpha = torch.randn(sum(lengths), generator=generator, dtype=torch.float64) * 3 + 1
    alpha[::7] = 80.0
    alpha[5::11] = -80.0
    channels = sum(grid[-1] for grid in choices)
    shapes = [(len(alpha),), (channels,), (4, len(lengths)), (metrics,), (metrics,)]
    kinds = [dtype, dtype, torch.float64, torch.float64, torch.float64]
    grads = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    if only is not None:
        grads = [grad if name == only else None for name, grad in zip(OUTPUTS, grads, strict=True)]
    return Problem(choices, coefficients, alpha.to(dtype), grads)


def exact(numbers):
    """The same numbers as decimals."""
    tensor = torch.as_tensor(numbers)
    return np.array([Decimal(x) for x in tensor.flatten().tolist()], object).reshape(tensor.shape)


def rounded(values):
    return torch.from_numpy(np.array(values, dtype=np.float64))


def by_hand(case):
    """From moments about zero, with 60 digits, then rounded to float64.

    Returns the five outputs, the gradient of alpha, and the size of that gradient: what it would be
    if all of its terms had the same sign.
    """
    with localcontext() as context:
        context.prec = 60
        alpha = exact(case.alpha)
        keep, stop = (np.array([1 / (1 + (s * a).exp()) for a in alpha]) for s in (-1, 1))
        ends = np.cumsum([len(grid) - 1 for grid in case.choices]).tolist()
        chains = [slice(begin, end) for begin, end in pairwise([0, *ends])]
        q = np.concatenate([[], *(keep[own].cumprod() for own in chains)])
        unit = [u for u, own in enumerate(chains) for _ in keep[own]]
        low = exact([width for grid in case.choices for width in grid[:-1]])
        high = exact([width for grid in case.choices for width in grid[1:]])
        steps = [high**j - low**j for j in range(1, 5)]
        base = exact([grid[0] for grid in case.choices])
        moments = [
            base**j + np.array([(q * step)[own].sum() for own in chains], object)
            for j, step in zip(range(1, 5), steps, strict=True)
        ]
        costs = [cost_by_hand(exact(matrix), moments) for matrix in case.coefficients]

        scale, spans = [], []  # spans: the channels of each group
        for grid, own in zip(case.choices, chains, strict=True):
            first = len(scale)
            scale += [Decimal(1)] * grid[0]
            for (begin, end), value in zip(pairwise(grid), q[own], strict=True):
                scale += [value] * (end - begin)
                spans.append(slice(first + begin, first + end))

        grad_q, grad_scale, grad_moments, grad_cost, grad_variance = (
            None if grad is None else exact(grad) for grad in case.grads
        )
        terms = [] if grad_q is None else [grad_q]
        sizes = [abs(term) for term in terms]
        if grad_scale is not None:
            terms.append(np.array([grad_scale[span].sum() for span in spans]))
            sizes.append(np.array([abs(grad_scale[span]).sum() for span in spans]))
        slopes = [] if grad_moments is None else list(zip(grad_moments, steps, strict=True))
        slopes = [(grad[unit] * step) for grad, step in slopes]
        for number, (_, _, of_mean, of_variance) in enumerate(costs):
            for grad, derivative in ((grad_cost, of_mean), (grad_variance, of_variance)):
                if grad is not None:
                    by_order = [part[unit] * s for part, s in zip(derivative, steps, strict=True)]
                    slopes.append(grad[number] * sum(by_order))
        terms += slopes
        sizes += [abs(slope) for slope in slopes]
        gradient, size = (
            np.concatenate(
                [[], *(stop[own] * (q * sum(parts))[own][::-1].cumsum()[::-1] for own in chains)]
            )
            for parts in (terms, sizes)
        )
        means, variances = ([cost[i] for cost in costs] for i in (0, 1))
        outputs = [rounded(values) for values in (q, scale, moments, means, variances)]
        return outputs, rounded(gradient), rounded(size)


def cost_by_hand(matrix, moments):
    """Mean and variance of one cost, and their derivatives with respect to the four moments."""
    m1, m2, m3, m4 = moments
    constant, linear, pairs = matrix[0, 0], matrix[0, 1:], matrix[1:, 1:].copy()
    square = pairs.diagonal().copy()
    np.fill_diagonal(pairs, Decimal(0))
    slope, two = linear + (pairs * m1).sum(1), Decimal(2)
    mean = constant + (linear * m1 + square * m2).sum() + (pairs * m1 * m1[:, None]).sum() / two
    spread, mixed = m2 - m1**2, m3 - m1 * m2
    variance = slope**2 * spread + 2 * slope * square * mixed + square**2 * (m4 - m2**2)
    both = (pairs**2 * spread).sum(1)
    of_slope, of_spread = 2 * slope * spread + 2 * square * mixed, slope**2 + both
    of_mean = [slope, square, 0 * m1, 0 * m1]
    of_variance = [
        (pairs * of_slope).sum(1) - 2 * of_spread * m1 - 2 * slope * square * m2,
        of_spread - 2 * slope * square * m1 - 2 * square**2 * m2,
        2 * slope * square,
        square**2,
    ]
    return mean, variance.sum() + (spread * both).sum() / two, of_mean, of_variance


@cache
def solved(name, dtype, only=None):
    case = problem(*CASES[name], dtype, only=only)
    return case, *by_hand(case)


def assert_close(actual, expected, size=None, factor=32):
    """Within ``factor`` units of rounding of the expected value (or of ``size``), or denormal."""
    assert actual.shape == expected.shape
    info = torch.finfo(actual.dtype)
    bound = factor * info.eps * (expected.abs() if size is None else size) + info.tiny
    error = (actual.detach().double().cpu() - expected).abs()
    assert (error <= bound).all(), f"worst error over bound: {(error / bound).max().item():.3g}"


# Every way to run the op: alpha, table and gradients -> five outputs and the gradient of alpha.


def through_autograd(function):
    def run(alpha, table, grads):
        leaf = alpha.clone().requires_grad_()
        outputs = function(leaf, table)
        pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return [output.detach() for output in outputs], leaf.grad

    return run


def through_kernels(forward, backward):
    def run(alpha, table, grads):
        arrays = table.offsets, table.ends
        *outputs, saved = forward(alpha, *arrays, table.coefficients, table.channels)
        assert not saved.isnan().any()
        return outputs, backward(*grads, alpha, saved, *arrays, table.channels)

    return run


def through_triton(alpha, table, grads):
    # Called past the dispatcher, which prefers the CUDA kernels where they were built.
    from dmcp.ops.expected_cost import _triton_backward, _triton_forward

    return through_kernels(_triton_forward, _triton_backward)(alpha, table, grads)


op = through_autograd(expected_cost)
reference = through_autograd(expected_cost_reference)
eager = through_kernels(_forward_eager, _backward_eager)
on_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WAYS = [
    pytest.param(op, "cpu", id="op"),
    pytest.param(eager, "cpu", id="eager"),
    pytest.param(reference, "cpu", id="reference"),
    pytest.param(op, "cuda", id="op-cuda", marks=on_cuda),
    pytest.param(eager, "cuda", id="eager-cuda", marks=on_cuda),
    pytest.param(
        through_triton,
        "cuda",
        id="triton-cuda",
        marks=[*on_cuda, pytest.mark.skipif(not triton_installed(), reason="no Triton")],
    ),
]


def check(way, device, name, dtype, only=None):
    case, outputs, gradient, size = solved(name, dtype, only)
    grads = [None if grad is None else grad.to(device) for grad in case.grads]
    first, again = (way(case.alpha.to(device), case.table(device), grads) for _ in range(2))
    check_results(way, case, first, outputs, gradient, size)
    for one, other in zip([*first[0], first[1]], [*again[0], again[1]], strict=True):
        assert torch.equal(one, other)


def check_results(way, case, found, outputs, gradient, size):
    for name, actual, expected in zip(OUTPUTS, found[0], outputs, strict=True):
        assert actual.dtype == (case.alpha.dtype if name in ("q", "scale") else torch.float64)
        # the widths of a variance are differences of widths and means
        assert_close(actual, expected, factor=4096 if name == "variance" else 64)
    if way is reference and len(size):  # autograd adds up terms that cancel, 1 - p among them
        size = (size / case.alpha.double().neg().sigmoid()).max()
    assert found[1].dtype == case.alpha.dtype
    assert_close(found[1], gradient, size, factor=64 if case.alpha.dtype == torch.float32 else 4096)


@pytest.fixture
def poisoned():
    """Fills every torch.empty with NaN, so that a position left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.usefixtures("poisoned")
def test_equals_the_decimals(way, device, name, dtype):
    check(way, device, name, dtype)


@pytest.mark.parametrize("only", OUTPUTS)
@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.usefixtures("poisoned")
def test_the_gradient_of_every_output_alone(way, device, only):
    check(way, device, "small", torch.float32, only)


def test_poison_reaches_the_outputs(poisoned):
    case = problem([1], 1, torch.float32)
    table = case.table()
    outputs = _empty_outputs(
        case.alpha, table.offsets, table.ends, table.coefficients, table.channels
    )
    assert all(output.isnan().all() for output in outputs)


@pytest.mark.parametrize("function", [expected_cost, expected_cost_reference])
@pytest.mark.parametrize("seed", range(3))
def test_mean_and_variance_are_those_of_all_structures(function, seed):
    generator = torch.Generator().manual_seed(seed)
    choices = random_choices([2, 0, 3, 1], generator)
    matrix = random_coefficients(4, generator)
    assert matrix.diagonal()[1:].any()  # a unit at both ends of a layer
    alpha = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    per_unit = []
    for p in alpha.sigmoid().split([2, 0, 3, 1]):
        q = torch.cat([p.new_ones(1), p.cumprod(0), p.new_zeros(1)])
        per_unit.append(q[:-1] - q[1:])
    probability = torch.stack([torch.stack(pick).prod() for pick in product(*per_unit)])
    widths = torch.tensor(list(product(*choices)), dtype=torch.float64)
    c = torch.nn.functional.pad(widths, (1, 0), value=1.0)
    costs = (c @ matrix.triu() * c).sum(1)
    mean = probability @ costs
    expected = {
        "widths": probability @ widths,
        "moments": torch.stack([probability @ widths**j for j in range(1, 5)]),
        "cost": mean[None],
        "variance": (probability @ (costs - mean) ** 2)[None],
    }
    found = function(alpha, CostTable.of(choices, [matrix]))
    for name, wanted in expected.items():
        actual = getattr(found, name)
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=0)
        weights = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
        gradients = [
            torch.autograd.grad((value * weights).sum(), alpha, retain_graph=True)[0]
            for value in (actual, wanted)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())


def test_a_layer_between_two_ends_of_one_unit_by_hand():
    square = torch.tensor([[5.0, 0.0], [0.0, 3.0]])
    alpha = torch.zeros(1, dtype=torch.float64)
    found = expected_cost(alpha, CostTable.of([(2, 6)], [square]))
    assert found.q.tolist() == [0.5]
    assert found.scale.tolist() == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert found.widths.tolist() == [4]
    assert found.moments[1].tolist() == [(4 + 36) / 2]
    assert found.cost.tolist() == [5 + 3 * (4 + 36) / 2]
    assert found.variance.tolist() == [(3 * (36 - 4) / 2) ** 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_certain_chains_have_the_exact_cost_of_one_structure(dtype):
    generator = torch.Generator().manual_seed(0)
    choices = random_choices([4, 0, 9, 30], generator)
    matrix = random_coefficients(4, generator)
    table = CostTable.of(choices, [matrix])
    for sign, place in ((80.0, -1), (-80.0, 0)):
        alpha = torch.full((43,), sign, dtype=dtype, requires_grad=True)
        found = expected_cost(alpha, table)
        c = torch.tensor([1.0, *(grid[place] for grid in choices)], dtype=torch.float64)
        assert found.cost.item() == c @ matrix.triu() @ c
        assert 0 < found.variance.item() < 1e-30 * found.cost.item() ** 2
        found.cost.sum().backward()
        assert alpha.grad.isfinite().all()
        assert alpha.grad[[0, 4, 13]].min() > 0  # 1 - p would be 0


def test_variances_are_never_negative():
    generator = torch.Generator().manual_seed(0)
    table = CostTable.of(random_choices([9] * 8, generator), [random_coefficients(8, generator)])
    for sharpness in (0, 1, 10, 30, 300):
        alpha = sharpness * torch.randn(72, generator=generator)
        assert expected_cost(alpha, table).variance.item() >= 0


def test_q_is_that_of_retain():
    case = problem(*CASES["mixed"], torch.float32)
    table = case.table()
    assert torch.equal(expected_cost(case.alpha, table).q, retain(case.alpha, table.offsets))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=9), st.integers(0, 3), st.integers(0, 2**31))
def test_native_and_eager_agree(lengths, metrics, seed):
    case = problem(lengths, metrics, torch.float64, seed)
    table = case.table()
    ours = torch.ops.dmcp.expected_cost, torch.ops.dmcp.expected_cost_backward
    found, gradient = through_kernels(*ours)(case.alpha, table, case.grads)
    wanted, expected = eager(case.alpha, table, case.grads)
    for actual, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-300)
    size = expected.abs().max().item() if len(expected) else 0.0
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("function", [expected_cost, expected_cost_reference])
def test_gradcheck(function):
    case = problem([0, 1, 2, 5], 2, torch.float64)
    table = case.table()
    alpha = case.alpha.clamp(-3, 3).requires_grad_()

    # Within reach of finite differences.
    sizes = [1, 1, *(output.detach() for output in function(alpha, table)[2:])]

    def outputs(alpha):
        found = function(alpha, table)
        return tuple(output / size for output, size in zip(found, sizes, strict=True))

    assert torch.autograd.gradcheck(outputs, alpha)


def test_double_backward_is_refused():
    case = problem([3], 1, torch.float64)
    alpha = case.alpha.requires_grad_()
    cost = expected_cost(alpha, case.table()).cost
    (grad,) = torch.autograd.grad(cost.square().sum(), alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lengths", "metrics"), [([], 1), ([0, 1, 2, 9, 14], 2), ([3, 0], 0)])
def test_opcheck(lengths, metrics, dtype):
    case = problem(lengths, metrics, dtype)
    table = case.table()
    arguments = (case.alpha, table.offsets, table.ends, table.coefficients, table.channels)
    opcheck(torch.ops.dmcp.expected_cost.default, arguments)
    saved = torch.ops.dmcp.expected_cost(*arguments)[-1]
    rest = (case.alpha, saved, table.offsets, table.ends, table.channels)
    for grads in (case.grads, [None, *case.grads[1:4], None]):
        opcheck(torch.ops.dmcp.expected_cost_backward.default, (*grads, *rest))


def total(found, grads):
    return sum((output * grad).sum() for output, grad in zip(found, grads, strict=True))


def test_compiles_without_a_graph_break():
    case = problem([9, 14, 0, 3], 2, torch.float32)
    table = case.table()

    def loss(alpha):
        found = expected_cost(alpha * 2, table)
        return total(found, case.grads) + found.widths.sum()

    (expected,) = torch.autograd.grad(loss(leaf := case.alpha.clone().requires_grad_()), leaf)
    # aot_eager traces forward and backward like inductor, without a C++ compiler's minute.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (actual,) = torch.autograd.grad(compiled(leaf := case.alpha.clone().requires_grad_()), leaf)
    assert torch.equal(actual, expected)


def test_functional_gradients():
    case = problem([9, 14, 0, 3], 2, torch.float64)
    table = case.table()
    alpha = case.alpha.requires_grad_()

    def loss(alpha):
        return total(expected_cost(alpha, table), case.grads)

    (expected,) = torch.autograd.grad(loss(alpha), alpha)
    assert torch.equal(torch.func.grad(loss)(alpha.detach()), expected)


def test_strided_and_expanded_inputs():
    case = problem([9, 14, 3], 1, torch.float32)
    table = case.table()
    plain = case.alpha.clone().requires_grad_()
    wide = torch.stack([case.alpha, case.alpha - 100], dim=1)[:, 0].requires_grad_()
    for output, expected in zip(
        expected_cost(wide, table), expected_cost(plain, table), strict=True
    ):
        assert torch.equal(output, expected)
        (actual,) = torch.autograd.grad(output.sum(), wide, retain_graph=True)
        (wanted,) = torch.autograd.grad(
            expected, plain, torch.ones_like(expected), retain_graph=True
        )
        assert torch.equal(actual, wanted)


def test_one_call_each_way():
    """Masks and costs of one evaluation share one backward."""
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "dmcp":
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    case = problem([9, 14, 3], 1, torch.float32)
    alpha = case.alpha.requires_grad_()
    with Count():
        found = expected_cost(alpha, case.table())
        parts = found.scale.split([grid[-1] for grid in case.choices])
        (sum(part.square().sum() for part in parts) + found.cost.sum()).backward()
    assert calls == ["expected_cost.default", "expected_cost_backward.default"]


def test_a_table_by_hand():
    table = CostTable.of([(2, 5), (3,), (1, 2, 4)])
    assert table.offsets.tolist() == [0, 1, 1, 3]
    assert table.ends.tolist() == [2, 5, 8, 9, 10, 12]
    assert table.coefficients.shape == (0, 4, 4)
    assert table.channels == 12
    moved = table.to("meta")
    assert {t.device.type for t in (moved.offsets, moved.ends, moved.coefficients)} == {"meta"}


GOOD = CostTable.of([(1, 3), (2, 4, 6)], [torch.ones(3, 3)])


@pytest.mark.parametrize(
    ("alpha", "error", "message"),
    [
        (torch.zeros(3).half(), TypeError, "float32 or float64, got torch.float16"),
        (torch.zeros(4), ValueError, r"alpha must be \[3\] for this table, got \[4\]"),
        (torch.zeros(1, 3), ValueError, r"got \[1, 3\]"),
        (
            torch.zeros(3, device="meta"),
            ValueError,
            "alpha must be on cpu like the table, got meta",
        ),
    ],
)
@pytest.mark.parametrize("function", [expected_cost, expected_cost_reference])
def test_bad_alpha(function, alpha, error, message):
    with pytest.raises(error, match=message):
        function(alpha, GOOD)


@pytest.mark.parametrize("grid", [(), (0, 3), (2, 2), (3, 1)])
def test_bad_choices(grid):
    with pytest.raises(ValueError, match=re.escape(f"at least 1, got {grid}")):
        CostTable.of([(1, 2), grid])


@pytest.mark.parametrize(
    "matrix", [torch.ones(2, 2), torch.ones(3), torch.arange(9.0).view(3, 3)], ids=len
)
def test_bad_coefficients(matrix):
    with pytest.raises(ValueError, match=r"coefficients must be symmetric \[3, 3\] matrices"):
        CostTable.of([(1, 2), (3,)], [torch.ones(3, 3), matrix])


@pytest.mark.skipif(not backends()["native"].available, reason="no dmcp._native")
@pytest.mark.parametrize(
    ("offsets", "ends", "channels"),
    [
        ([0, 2, 3], [1, 3, 5, 7, 9], 8),
        ([0, 4, 3], [1, 3, 5, 7, 9], 9),
        ([0, 1, 3], [1, 3, 2, 7, 9], 9),
    ],
)
def test_native_refuses_a_table_that_leads_out_of_the_arrays(offsets, ends, channels):
    arrays = [torch.tensor(values, dtype=torch.int32) for values in (offsets, ends)]
    with pytest.raises(ValueError, match="offsets must ascend from 0 to the length of alpha"):
        torch.ops.dmcp.expected_cost(torch.zeros(3), *arrays, GOOD.coefficients, channels)


INTERPRETED = """
import sys
import torch
from dmcp.kernels.expected_cost import expected_cost, expected_cost_backward
from dmcp.ops.expected_cost import _empty_outputs

torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
results = []
for alpha, offsets, ends, coefficients, channels, grads in torch.load(sys.argv[1]):
    outputs = _empty_outputs(alpha, offsets, ends, coefficients, channels)
    expected_cost(alpha, offsets, ends, coefficients, *outputs)
    grad_alpha = torch.empty_like(alpha)
    expected_cost_backward(grads, outputs[-1], offsets, ends, grad_alpha)
    results.append((outputs, grad_alpha))
torch.save(results, sys.argv[1])
"""


def test_triton_interpreted(tmp_path):
    pytest.importorskip("triton")
    names = ("mixed", "nothing", "one empty", "no costs")
    solutions = [solved(name, dtype) for name in names for dtype in DTYPES]
    solutions += [solved("small", torch.float32, only) for only in OUTPUTS]
    cases = []
    for case, *_ in solutions:
        t = case.table()
        cases.append((case.alpha, t.offsets, t.ends, t.coefficients, t.channels, tuple(case.grads)))
    path = tmp_path / "tensors.pt"
    torch.save([*cases, cases[0]], path)
    run_python(INTERPRETED, tmp_path, path, TRITON_INTERPRET="1")
    results = torch.load(path)
    for ((*outputs, saved), gradient), solution in zip(results, solutions, strict=False):
        assert not saved.isnan().any()
        check_results(through_triton, solution[0], (outputs, gradient), *solution[1:])
    (outputs, gradient), (outputs_again, gradient_again) = results[0], results[-1]
    assert torch.equal(gradient, gradient_again)
    assert all(map(torch.equal, outputs, outputs_again))


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


TRITON_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dmcp.kernels import expected_cost as kernels

sizes = {"unit": kernels.UNITS, "wide": kernels.CHOICES, "channels": kernels.CHANNELS}
types = dict.fromkeys(("offsets", "ends"), "*i32") | dict.fromkeys(
    ("units", "groups", "metrics"), "i32"
)
of_alpha = ("alpha", "q", "scale", "grad_q", "grad_scale", "grad_alpha")
unused = dict.fromkeys(("grad_q", "grad_moments", "grad_variance"))

def compiles(kernel, real, absent):
    fixed = {name: value for name, value in (sizes | absent).items() if name in kernel.arg_names}
    signature = {
        name: types.get(name, real if name in of_alpha else "*fp64") for name in kernel.arg_names
    }
    signature |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, signature, constexprs=fixed)
    for architecture in (80, 90):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": kernels.WARPS},
        )
        print(len(compiled.asm["cubin"]))

for real in ("*fp32", "*fp64"):
    compiles(kernels.expected_cost_kernel, real, {})
    absent = unused if real == "*fp32" else {}
    compiles(kernels.expected_cost_backward_kernel, real, absent)
"""


def test_triton_compiles_ahead_of_time(tmp_path):
    pytest.importorskip("triton")
    # A process of its own: Triton's cache folder and its choice of interpreter are process-wide.
    printed = run_python(TRITON_COMPILED, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    sizes = [int(line) for line in printed.split()]
    assert len(sizes) == 8
    assert min(sizes) > 0


@pytest.fixture(scope="module")
def cuda_source(tmp_path_factory):
    """The CUDA source, built by a host compiler (see ``cuda_emulation/cuda/launch.h``)."""
    compilers = shutil.which("nvcc"), shutil.which("g++")
    if None in compilers:
        pytest.skip("no g++ or no CUDA headers")
    listing = subprocess.run(
        [compilers[0], "-dryrun", "-E", "x.cu"], capture_output=True, text=True
    )
    headers = re.search(r'INCLUDES="-I([^"]*?)"', listing.stderr)[1]
    path = tmp_path_factory.mktemp("emulation") / "expected_cost.so"
    folders = ("-I", EMULATION, "-I", ROOT / "csrc", "-isystem", headers)
    subprocess.run(
        [
            *(compilers[1], "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *folders, "-o", path),
            EMULATION / "expected_cost.cpp",
        ],
        check=True,
    )
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nothing", "one empty", "small", "mixed", "no costs"])
@pytest.mark.usefixtures("poisoned")
def test_cuda_source_on_the_cpu(cuda_source, name, dtype):
    def launcher(function):
        return lambda *arguments: function(*map(ctypes.c_int64, arguments))

    kernels = (cuda_source.expected_cost, cuda_source.expected_cost_backward)
    way = through_kernels(*_native_kernels(*map(launcher, kernels)))
    for backwards in (False, True):  # the order of blocks and of threads
        cuda_source.set_backwards(ctypes.c_int64(backwards))
        check(way, "cpu", name, dtype)


@pytest.mark.skipif(not native_cuda(), reason="dmcp._native was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_entry_without_a_device_raises():
    from dmcp import _native

    with pytest.raises(RuntimeError, match="CUDA kernel expected_cost: "):
        _native.expected_cost_cuda(*[0] * 14, 4, 0)
