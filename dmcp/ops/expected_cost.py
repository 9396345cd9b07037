"""All Markov chains of a network and what its structures cost on average, in one call each way.

The cost of a structure is a polynomial of the widths with products of at most two of them (see
`dmcp.cost.Cost`), and the widths of units are independent, so mean and variance of the cost follow
in closed form from the retain probabilities q (DMCP, Guo et al., CVPR 2020, sections 3.1 to 3.3,
has the mean for layers between two different units). With m = E[c], d = c - m, v = E[d²], the
coefficients K and s the gradient of the cost at m:

    E[cost]   = cost(m) + Σ_u K_uu v_u
    Var[cost] = Σ_u E[f_u(d_u)²] + Σ_{u<j} K_uj² v_u v_j,    f_u(d) = s_u d + K_uu (d² - v_u)

A unit at both ends of a layer enters through K_uu. The expectations run over the probabilities
q_k - q_{k+1} = q_k sigmoid(-alpha_{k+1}), and no term of the variance is negative: nothing cancels
where chains are almost certain. In the backward, d alpha_k = (1 - p_k) Σ_{j>=k} q_j g_j, where g_j
is the gradient with respect to q_j alone; the forward keeps the part of it that does not depend on
the incoming gradients.

Everything is computed in float64, whatever the dtype of alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.backends import native_cuda, native_module, triton_installed
from dmcp.ops.library import Kernel, register
from dmcp.ops.retain import chain_bounds, retain_reference, suffix_sum


@dataclass(frozen=True, eq=False)
class CostTable:
    """The widths that the units of a network may take, and its costs as polynomials of them.

    Built once by `of`, with U units, T groups and B costs. A cost is a quadratic form in the widths
    behind a leading 1: with c_0 = 1, cost b is Σ_{i<=j} coefficients[b, i, j] c_i c_j.

    Attributes:
        offsets: int32 [U + 1], the chain of unit u is the groups offsets[u] … offsets[u + 1] - 1.
        ends: int32 [T + U], where the channels of each choice end when the channels of all units
            stand one after the other; the choices of unit u begin at offsets[u] + u.
        coefficients: float64 [B, 1 + U, 1 + U], symmetric.
        channels: of all units together.
    """

    offsets: Tensor
    ends: Tensor
    coefficients: Tensor
    channels: int

    @staticmethod
    def of(
        choices: Sequence[Sequence[int]],
        coefficients: Sequence[Tensor] = (),
        device: torch.device | str = "cpu",
    ) -> CostTable:
        """The table of these units and costs.

        Args:
            choices: of every unit the widths it may take, ascending, its base first and its full
                width last. A unit with one choice has an empty chain.
            coefficients: of every cost its symmetric matrix [1 + U, 1 + U]
                (`dmcp.cost.PolynomialCost.coefficients`).
            device: of the tensors.

        Raises:
            ValueError: widths that do not ascend from at least 1, or a matrix of another shape or
                without symmetry.
        """
        for grid in choices:
            if not grid or grid[0] < 1 or list(grid) != sorted(set(grid)):
                raise ValueError(f"choices must ascend from at least 1, got {tuple(grid)}")
        order = 1 + len(choices)
        for matrix in coefficients:
            if matrix.shape != (order, order) or not torch.equal(matrix, matrix.T):
                raise ValueError(
                    f"coefficients must be symmetric [{order}, {order}] matrices, got "
                    f"{list(matrix.shape)}:\n{matrix}"
                )
        offsets, ends, channels = [0], [], 0
        for grid in choices:
            offsets.append(offsets[-1] + len(grid) - 1)
            ends += [channels + width for width in grid]
            channels += grid[-1]
        none = torch.zeros(0, order, order, dtype=torch.float64, device="cpu")
        table = CostTable(
            offsets=torch.tensor(offsets, dtype=torch.int32, device="cpu"),
            ends=torch.tensor(ends, dtype=torch.int32, device="cpu"),
            coefficients=torch.cat([none, *(matrix[None].double() for matrix in coefficients)]),
            channels=channels,
        )
        # A copy from memory that is not pinned has read it when it returns.
        return table.to(device, non_blocking=True)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CostTable:
        """The same table on another device."""
        return replace(
            self,
            offsets=self.offsets.to(device, non_blocking=non_blocking),
            ends=self.ends.to(device, non_blocking=non_blocking),
            coefficients=self.coefficients.to(device, non_blocking=non_blocking),
        )


class ExpectedCost(NamedTuple):
    """What `expected_cost` returns, for U units, T groups, ΣC channels and B costs.

    Attributes:
        q: retain probability of every group, [T].
        scale: retain probability of every channel of every unit, [ΣC]: 1 in the base.
        moments: E[c], E[c²], E[c³], E[c⁴] of the width of every unit, float64 [4, U].
        cost: expected costs, float64 [B].
        variance: of the costs, float64 [B], never negative.
    """

    q: Tensor
    scale: Tensor
    moments: Tensor
    cost: Tensor
    variance: Tensor

    @property
    def widths(self) -> Tensor:
        """Expected width of every unit, b + Σ s_k q_k: float64 [U]."""
        return self.moments[0]


def expected_cost(alpha: Tensor, table: CostTable) -> ExpectedCost:
    """Retain probabilities, channel scales, expected widths and expected costs of a network.

    All outputs are differentiable in ``alpha``, once. Deterministic. One kernel launch forward and
    one backward.

    Args:
        alpha: architecture parameters of all chains, concatenated in the order of the units: [T],
            float32 or float64.
        table: of the same chains, on the device of ``alpha``.

    Returns:
        See `ExpectedCost`. ``q`` and ``scale`` have the dtype of ``alpha``; widths and costs are
        float64, in channels and in the unit of the cost.

    Raises:
        TypeError: the dtype of ``alpha`` is another one.
        ValueError: the shape or the device of ``alpha`` does not fit the table.
    """
    _check(alpha, table)
    outputs = _ExpectedCost.apply(
        alpha, table.offsets, table.ends, table.coefficients, table.channels
    )
    return ExpectedCost(*outputs[:-1])


def expected_cost_reference(alpha: Tensor, table: CostTable) -> ExpectedCost:
    """What `expected_cost` computes, in plain PyTorch that autograd can differentiate."""
    _check(alpha, table)
    layout = _Layout.of(table.offsets, table.ends, table.channels)
    return _evaluate(alpha, table.offsets, table.coefficients, layout)[0]


def _check(alpha: Tensor, table: CostTable) -> None:
    if alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"alpha must be float32 or float64, got {alpha.dtype}")
    groups = table.ends.numel() - table.offsets.numel() + 1
    if alpha.shape != (groups,):
        raise ValueError(f"alpha must be [{groups}] for this table, got {list(alpha.shape)}")
    if alpha.device != table.offsets.device:
        raise ValueError(
            f"alpha must be on {table.offsets.device} like the table, got {alpha.device}"
        )


class _Layout(NamedTuple):
    """Where the choices of all units are, for the plain PyTorch kernels.

    Attributes:
        first: [U], the first choice of each unit.
        position, end: [T + U], every choice, and where those of its unit end.
        unit: [T + U], the unit of each choice.
        width, below: float64 [T + U], the choice itself and the one before, 0 before a base.
        above: [T], the choice that each group leads to.
        choice: [ΣC], the choice that each channel comes with.
    """

    first: Tensor
    position: Tensor
    end: Tensor
    unit: Tensor
    width: Tensor
    below: Tensor
    above: Tensor
    choice: Tensor

    @staticmethod
    def of(offsets: Tensor, ends: Tensor, channels: int) -> _Layout:
        firsts = offsets + torch.arange(offsets.numel(), device=ends.device, dtype=torch.int32)
        position, begin, end = chain_bounds(ends, firsts)
        before = torch.cat([ends.new_zeros(1), ends])
        group = position[: ends.numel() - offsets.numel() + 1]
        channel = torch.arange(channels, device=ends.device, dtype=torch.int32)
        return _Layout(
            first=firsts[:-1],
            position=position,
            end=end,
            unit=torch.searchsorted(firsts, position, right=True) - 1,
            width=(ends - before[begin]).double(),
            below=(before[position] - before[begin]).double(),
            above=group + torch.searchsorted(offsets, group, right=True),
            choice=torch.searchsorted(ends, channel, right=True),
        )

    def per_unit(self, terms: Tensor) -> Tensor:
        """Sums over the choices of each unit: [..., T + U] -> [..., U]."""
        return suffix_sum(terms, self.position, self.end)[..., self.first]

    def power_steps(self) -> Tensor:
        """width^j - below^j, j = 1 … 4: [4, T + U]."""
        power = torch.arange(1, 5, device=self.width.device)[:, None]
        return self.width**power - self.below**power


class _Terms(NamedTuple):
    """What the derivatives need of an evaluation, see the top of this file.

    Attributes:
        q, stop: float64 [T].
        v, third: E[d²] and E[d³], [U].
        slope: s, [B, U].
        square, pairs: K_uu, [B, U], and the coefficients without them, [B, U, U].
        d, deviation: d [T + U] and f [B, T + U] of every choice.
    """

    q: Tensor
    stop: Tensor
    v: Tensor
    third: Tensor
    slope: Tensor
    square: Tensor
    pairs: Tensor
    d: Tensor
    deviation: Tensor


def _evaluate(
    alpha: Tensor, offsets: Tensor, coefficients: Tensor, layout: _Layout
) -> tuple[ExpectedCost, _Terms]:
    q = retain_reference(alpha.double(), offsets)
    stop = torch.sigmoid(-alpha.double())
    ones = torch.ones_like(layout.width)
    reached = ones.scatter(0, layout.above, q)
    probability = reached * ones.scatter(0, layout.above - 1, stop)

    moments = layout.per_unit(reached * layout.power_steps())
    mean = moments[0]
    d = layout.width - mean[layout.unit]
    v, third = layout.per_unit(probability * torch.stack([d**2, d**3]))

    leading = torch.cat([mean.new_ones(1), mean])
    diagonal = coefficients.diagonal(dim1=1, dim2=2)
    gradient = (coefficients * leading).sum(2) + diagonal * leading
    slope, square = gradient[:, 1:], diagonal[:, 1:]
    pairs = (coefficients - torch.diag_embed(diagonal))[:, 1:, 1:]
    deviation = slope[:, layout.unit] * d + square[:, layout.unit] * (d**2 - v[layout.unit])

    outputs = ExpectedCost(
        q=q.to(alpha.dtype),
        scale=reached[layout.choice].to(alpha.dtype),
        moments=moments,
        cost=0.5 * (gradient * leading).sum(1) + (square * v).sum(1),
        variance=(deviation**2 * probability).sum(1)
        + 0.5 * (pairs**2 * v * v[:, None]).sum((1, 2)),
    )
    return outputs, _Terms(q, stop, v, third, slope, square, pairs, d, deviation)


def _forward_eager(
    alpha: Tensor, offsets: Tensor, ends: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, ...]:
    layout = _Layout.of(offsets, ends, channels)
    outputs, terms = _evaluate(alpha, offsets, coefficients, layout)
    q, stop, v, third, slope, square, pairs, d, deviation = terms
    r = (pairs**2 * v).sum(2)
    h = 2 * (slope * v + square * third)
    t = (pairs * h[:, None]).sum(2)

    above, unit = layout.above, layout.unit[layout.above]
    lower, upper = d[above - 1], d[above]
    step, total = upper - lower, upper + lower
    mean_slopes = step * (slope[:, unit] + square[:, unit] * total)
    variance_slopes = mean_slopes * (deviation[:, above - 1] + deviation[:, above])
    variance_slopes = variance_slopes + step * (r[:, unit] * total + t[:, unit])
    of_groups = torch.cat([q[None], stop[None], mean_slopes, variance_slopes])
    of_units = torch.cat([v[None], third[None], slope, h])
    return *outputs, torch.cat([of_groups, of_units], dim=1)


def _backward_eager(
    grad_q: Tensor | None,
    grad_scale: Tensor | None,
    grad_moments: Tensor | None,
    grad_cost: Tensor | None,
    grad_variance: Tensor | None,
    alpha: Tensor,
    saved: Tensor,
    offsets: Tensor,
    ends: Tensor,
    channels: int,
) -> Tensor:
    layout = _Layout.of(offsets, ends, channels)
    above = layout.above
    metrics = len(saved) // 2 - 1
    rows = saved[:, : above.numel()].split([1, 1, metrics, metrics])
    q, stop, mean_slopes, variance_slopes = rows[0][0], rows[1][0], rows[2], rows[3]
    g = torch.zeros_like(q)
    if grad_q is not None:
        g = g + grad_q
    if grad_scale is not None:
        channel = torch.arange(channels, device=ends.device, dtype=torch.int32)
        sums = suffix_sum(grad_scale.double(), channel, ends[layout.choice])
        g = g + sums[ends[above - 1]]
    if grad_moments is not None:
        steps = layout.power_steps()[:, above]
        g = g + (grad_moments[:, layout.unit[above]] * steps).sum(0)
    if grad_cost is not None:
        g = g + (grad_cost[:, None] * mean_slopes).sum(0)
    if grad_variance is not None:
        g = g + (grad_variance[:, None] * variance_slopes).sum(0)
    position, _, end = chain_bounds(g, offsets)
    return (stop * suffix_sum(q * g, position, end)).to(alpha.dtype)


class _ExpectedCost(torch.autograd.Function):
    @staticmethod
    def forward(
        alpha: Tensor, offsets: Tensor, ends: Tensor, coefficients: Tensor, channels: int
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = torch.ops.dmcp.expected_cost.default(
            alpha, offsets, ends, coefficients, channels
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        alpha, offsets, ends, _, ctx.channels = inputs
        saved = output[-1]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(alpha, saved, offsets, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_alpha = torch.ops.dmcp.expected_cost_backward.default(
            *grads[:-1], *ctx.saved_tensors, ctx.channels
        )
        return grad_alpha, None, None, None, None


# Function.apply asks for it at every call; finding it takes as long as the op.
_ExpectedCost.forward.__signature__ = signature(_ExpectedCost.forward)  # type: ignore[attr-defined]


def _empty_outputs(
    alpha: Tensor, offsets: Tensor, ends: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, ...]:
    units, metrics = offsets.numel() - 1, coefficients.size(0)
    return (
        torch.empty_like(alpha),
        alpha.new_empty(channels),
        coefficients.new_empty((4, units)),
        coefficients.new_empty(metrics),
        coefficients.new_empty(metrics),
        coefficients.new_empty((2 + 2 * metrics, ends.numel())),
    )


Kernels = tuple[Kernel, Kernel] | tuple[None, None]
"""A forward and a backward."""


def _native_kernels(forward_kernel: Kernel, backward_kernel: Kernel) -> tuple[Kernel, Kernel]:
    def forward(
        alpha: Tensor, offsets: Tensor, ends: Tensor, coefficients: Tensor, channels: int
    ) -> tuple[Tensor, ...]:
        alpha, offsets = alpha.contiguous(), offsets.contiguous()
        ends, coefficients = ends.contiguous(), coefficients.contiguous()
        outputs = _empty_outputs(alpha, offsets, ends, coefficients, channels)
        q, scale, moments, cost, variance, saved = outputs
        forward_kernel(
            alpha.data_ptr(),
            offsets.data_ptr(),
            ends.data_ptr(),
            coefficients.data_ptr(),
            q.data_ptr(),
            scale.data_ptr(),
            moments.data_ptr(),
            cost.data_ptr(),
            variance.data_ptr(),
            saved.data_ptr(),
            moments.size(1),
            alpha.numel(),
            channels,
            cost.numel(),
            alpha.element_size(),
        )
        return outputs

    def backward(*arguments: Any) -> Tensor:
        *grads, alpha, saved, offsets, ends, channels = arguments
        # Kept in a list: a copy must live as long as its address is in use.
        grads = [None if grad is None else grad.contiguous() for grad in grads]
        saved, offsets, ends = saved.contiguous(), offsets.contiguous(), ends.contiguous()
        grad_alpha = torch.empty_like(alpha)
        backward_kernel(
            *[0 if grad is None else grad.data_ptr() for grad in grads],
            saved.data_ptr(),
            offsets.data_ptr(),
            ends.data_ptr(),
            grad_alpha.data_ptr(),
            offsets.numel() - 1,
            alpha.numel(),
            channels,
            saved.size(0) // 2 - 1,
            alpha.element_size(),
        )
        return grad_alpha

    return forward, backward


def _cpu_kernels() -> Kernels:
    native = native_module()
    if native is None:
        return None, None
    return _native_kernels(native.expected_cost_cpu, native.expected_cost_backward_cpu)


def _cuda_kernels() -> Kernels:
    native = native_module()
    if native is not None and native_cuda():
        kernels = (native.expected_cost_cuda, native.expected_cost_backward_cuda)
        forward, backward = _native_kernels(*map(_on_current_stream, kernels))
    elif triton_installed():
        forward, backward = _triton_forward, _triton_backward
    else:
        return None, None
    return _on_its_device(forward), _on_its_device(backward)


def _on_current_stream(kernel: Kernel) -> Kernel:
    return lambda *arguments: kernel(*arguments, torch.cuda.current_stream().cuda_stream)


def _on_its_device(kernel: Kernel) -> Kernel:
    def run(*arguments: Any) -> Any:
        first = next(argument for argument in arguments if argument is not None)
        with torch.cuda.device(first.device):
            return kernel(*arguments)

    return run


def _triton_forward(
    alpha: Tensor, offsets: Tensor, ends: Tensor, coefficients: Tensor, channels: int
) -> tuple[Tensor, ...]:
    from dmcp.kernels.expected_cost import expected_cost as launch

    outputs = _empty_outputs(alpha, offsets, ends, coefficients, channels)
    launch(alpha, offsets, ends, coefficients, *outputs)
    return outputs


def _triton_backward(*arguments: Any) -> Tensor:
    from dmcp.kernels.expected_cost import expected_cost_backward as launch

    *grads, alpha, saved, offsets, ends, _ = arguments
    grad_alpha = torch.empty_like(alpha)
    launch(grads, saved, offsets, ends, grad_alpha)
    return grad_alpha


def _register() -> None:
    cpu_forward, cpu_backward = _cpu_kernels()
    cuda_forward, cuda_backward = _cuda_kernels()
    register(
        "expected_cost(Tensor alpha, Tensor offsets, Tensor ends, Tensor coefficients, "
        "SymInt channels) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        eager=_forward_eager,
        fake=_empty_outputs,
        cpu=cpu_forward,
        cuda=cuda_forward,
    )
    register(
        "expected_cost_backward(Tensor? grad_q, Tensor? grad_scale, Tensor? grad_moments, "
        "Tensor? grad_cost, Tensor? grad_variance, Tensor alpha, Tensor saved, Tensor offsets, "
        "Tensor ends, SymInt channels) -> Tensor",
        eager=_backward_eager,
        fake=lambda *arguments: torch.empty_like(arguments[5]),
        cpu=cpu_backward,
        cuda=cuda_backward,
    )


_register()
