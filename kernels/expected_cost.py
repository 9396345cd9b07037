"""Retain probabilities and expected costs of all chains of a network: Triton kernels.

The formulas are those of csrc/common/expected_cost.h, which also says what ``saved`` holds. Loops
are ``while``, not ``range()``: the interpreter of Triton 3.6 cannot run it with numpy 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

UNITS = 32  # units that a program takes at once
CHOICES = 16  # choices of each of them that it takes at once; chains have about ten groups
CHANNELS = 64  # channels of each choice that it takes at once
WARPS = 4


@triton.jit
def _unit(offsets, ends, u, inside):
    """Where a unit's groups begin and how many there are, its first choice, its first channel."""
    begin = tl.load(offsets + u, mask=inside, other=0)
    groups = tl.load(offsets + u + 1, mask=inside, other=0) - begin
    choice = begin + u
    first = tl.load(ends + choice - 1, mask=inside & (u > 0), other=0)
    return begin, groups, choice, first


@triton.jit
def _transition(alpha, k, mask):
    """p and 1 - p; 1 and 0 where there is no group."""
    a = tl.load(alpha + k, mask=mask, other=0.0).to(tl.float64)
    e = tl.exp(-a)
    keep = 1.0 / (1.0 + e)
    stop = tl.where(a > 0.0, e * keep, 1.0 - keep)
    return tl.where(mask, keep, 1.0), tl.where(mask, stop, 0.0)


@triton.jit
def _multiply(x, y):
    return x * y


@triton.jit
def _write_scale(alpha, offsets, ends, q, scale, u, choices: tl.constexpr, channels: tl.constexpr):
    """q and scale of one unit."""
    begin, groups, choice, first = _unit(offsets, ends, u, u >= 0)
    lane = tl.arange(0, choices)
    column = tl.arange(0, channels)[None, :]
    before = tl.full([], 1.0, tl.float64)  # the product of all earlier tiles
    tile = groups * 0
    while tile <= groups:
        j = tile + lane
        inside = j <= groups
        is_group = inside & (j > 0)  # choice 0 is the base
        keep, _ = _transition(alpha, begin + j - 1, is_group)
        reached = (before * tl.cumprod(keep, axis=0)).to(q.dtype.element_ty)
        before *= tl.reduce(keep, 0, _multiply)
        tl.store(q + begin + j - 1, reached, mask=is_group)
        low = tl.load(ends + choice + j - 1, mask=is_group, other=first)
        high = tl.load(ends + choice + j, mask=inside, other=0)
        widest = tl.max(high - low, axis=0)
        c = widest * 0
        while c < widest:
            channel = low[:, None] + c + column
            values = tl.broadcast_to(reached[:, None], [choices, channels])
            tl.store(scale + channel, values, mask=channel < high[:, None])
            c += channels
        tile += choices


@triton.jit
def _width(ends, choice, first, j, mask):
    return (tl.load(ends + choice + j, mask=mask, other=0) - first).to(tl.float64)


@triton.jit
def _probability(saved, pitch, begin, groups, j, mask):
    """The probability of choice j: it is reached, and the group behind it is not retained."""
    reached = tl.load(saved + begin + j - 1, mask=mask & (j > 0), other=1.0)
    stop = tl.load(saved + pitch + begin + j, mask=mask & (j < groups), other=1.0)
    return tl.where(mask, reached * stop, 0.0)


@triton.jit
def _write_moments(
    alpha, offsets, ends, moments, saved, units, pitch, tile, unit: tl.constexpr, wide: tl.constexpr
):
    """q, stop and the moments of the widths of one tile of units."""
    u = tile + tl.arange(0, unit)
    valid = u < units
    begin, groups, choice, first = _unit(offsets, ends, u, valid)
    longest = tl.max(groups, axis=0)
    begin, groups, choice, first = begin[:, None], groups[:, None], choice[:, None], first[:, None]
    lane = tl.arange(0, wide)[None, :]
    before = tl.full([unit], 1.0, tl.float64)
    m1 = tl.zeros([unit], tl.float64)
    m2, m3, m4 = m1, m1, m1
    at = longest * 0
    while at <= longest:
        j = at + lane
        inside = valid[:, None] & (j <= groups)
        is_group = inside & (j > 0)
        keep, stop = _transition(alpha, begin + j - 1, is_group)
        reached = before[:, None] * tl.cumprod(keep, axis=1)
        before *= tl.reduce(keep, 1, _multiply)
        tl.store(saved + begin + j - 1, reached, mask=is_group)
        tl.store(saved + pitch + begin + j - 1, stop, mask=is_group)
        low = tl.where(is_group, _width(ends, choice, first, j - 1, is_group), 0.0)
        high = _width(ends, choice, first, j, inside)
        weight = tl.where(inside, reached, 0.0)
        m1 += tl.sum(weight * (high - low), axis=1)
        low2, high2 = low * low, high * high
        m2 += tl.sum(weight * (high2 - low2), axis=1)
        m3 += tl.sum(weight * (high2 * high - low2 * low), axis=1)
        m4 += tl.sum(weight * (high2 * high2 - low2 * low2), axis=1)
        at += wide
    tl.store(moments + u, m1, mask=valid)
    tl.store(moments + units + u, m2, mask=valid)
    tl.store(moments + 2 * units + u, m3, mask=valid)
    tl.store(moments + 3 * units + u, m4, mask=valid)

    tl.debug_barrier()  # q and stop
    v = tl.zeros([unit], tl.float64)
    third = v
    at = longest * 0
    while at <= longest:
        j = at + lane
        inside = valid[:, None] & (j <= groups)
        d = _width(ends, choice, first, j, inside) - m1[:, None]
        square = _probability(saved, pitch, begin, groups, j, inside) * d * d
        v += tl.sum(square, axis=1)
        third += tl.sum(square * d, axis=1)
        at += wide
    units_at = saved + pitch - units
    tl.store(units_at + u, v, mask=valid)
    tl.store(units_at + pitch + u, third, mask=valid)


@triton.jit
def _mean(row0, moments, saved, units, pitch, s_at, h_at, tile, unit: tl.constexpr):
    """Writes s and h of one tile of units; returns their parts of the mean. ``row0`` is the row of
    the coefficients of the leading 1."""
    order = (units + 1).to(tl.int64)
    u = tile + tl.arange(0, unit)
    valid = u < units
    row = row0 + (u + 1) * order
    linear = tl.load(row, mask=valid, other=0.0)
    square = tl.load(row + 1 + u, mask=valid, other=0.0)
    m = tl.load(moments + u, mask=valid, other=0.0)
    v = tl.load(saved + pitch - units + u, mask=valid, other=0.0)
    third = tl.load(saved + 2 * pitch - units + u, mask=valid, other=0.0)
    slope = linear + square * m
    begin = tile * 0
    while begin < units:
        j = begin + tl.arange(0, unit)
        both = valid[:, None] & (j < units)[None, :]
        k = tl.load(row[:, None] + 1 + j[None, :], mask=both, other=0.0)
        slope += tl.sum(k * tl.load(moments + j, mask=j < units, other=0.0)[None, :], axis=1)
        begin += unit
    tl.store(s_at + u, slope, mask=valid)
    tl.store(h_at + u, 2.0 * (slope * v + square * third), mask=valid)
    return tl.sum(0.5 * m * (linear + slope) + square * v, axis=0)


@triton.jit
def _variance(
    row0,
    offsets,
    ends,
    moments,
    saved,
    units,
    pitch,
    mean_slopes,
    variance_slopes,
    tile,
    unit: tl.constexpr,
    wide: tl.constexpr,
):
    """Writes the derivatives with respect to q of one tile of units; returns their parts of the
    variance."""
    order = (units + 1).to(tl.int64)
    of_units = pitch - units
    u = tile + tl.arange(0, unit)
    valid = u < units
    row = row0 + (u + 1) * order + 1
    square = tl.load(row + u, mask=valid, other=0.0)[:, None]
    m = tl.load(moments + u, mask=valid, other=0.0)[:, None]
    v = tl.load(saved + of_units + u, mask=valid, other=0.0)
    slope = tl.load(mean_slopes + of_units + u, mask=valid, other=0.0)[:, None]
    r = tl.zeros([unit], tl.float64)
    t = r
    other = tile * 0
    while other < units:
        j = other + tl.arange(0, unit)
        pair = valid[:, None] & (j < units)[None, :] & (j[None, :] != u[:, None])
        k = tl.load(row[:, None] + j[None, :], mask=pair, other=0.0)
        r += tl.sum(k * k * tl.load(saved + of_units + j, mask=j < units, other=0.0), axis=1)
        t += tl.sum(k * tl.load(variance_slopes + of_units + j, mask=j < units, other=0.0), axis=1)
        other += unit

    begin, groups, choice, first = _unit(offsets, ends, u, valid)
    longest = tl.max(groups, axis=0)
    begin, groups, choice, first = begin[:, None], groups[:, None], choice[:, None], first[:, None]
    total = 0.5 * v * r
    v = v[:, None]
    at = longest * 0
    while at <= longest:
        j = at + tl.arange(0, wide)[None, :]
        inside = valid[:, None] & (j <= groups)
        is_group = inside & (j > 0)
        high = _width(ends, choice, first, j, inside) - m
        low = _width(ends, choice, first, j - 1, is_group) - m
        above = slope * high + square * (high * high - v)
        below = slope * low + square * (low * low - v)
        probability = _probability(saved, pitch, begin, groups, j, inside)
        total += tl.sum(probability * above * above, axis=1)
        step = high - low
        of_mean = step * (slope + square * (high + low))
        of_variance = of_mean * (above + below) + step * (r[:, None] * (high + low) + t[:, None])
        tl.store(mean_slopes + begin + j - 1, of_mean, mask=is_group)
        tl.store(variance_slopes + begin + j - 1, of_variance, mask=is_group)
        at += wide
    return tl.sum(total, axis=0)


@triton.jit
def _write_costs(
    alpha,
    offsets,
    ends,
    coefficients,
    moments,
    cost,
    variance,
    saved,
    units,
    groups,
    metrics,
    unit: tl.constexpr,
    wide: tl.constexpr,
):
    """Everything but q and scale. One program, because every cost needs every unit."""
    order = (units + 1).to(tl.int64)
    pitch = (groups + units).to(tl.int64)
    tile = units * 0
    while tile < units:
        _write_moments(alpha, offsets, ends, moments, saved, units, pitch, tile, unit, wide)
        tile += unit
    b = metrics * 0
    while b < metrics:
        row0 = coefficients + b * order * order
        mean_slopes = saved + (2 + b) * pitch
        variance_slopes = mean_slopes + metrics * pitch
        of_units = pitch - units
        tl.debug_barrier()  # m and v of every unit
        mean = tl.load(row0)
        tile = units * 0
        while tile < units:
            s_at, h_at = mean_slopes + of_units, variance_slopes + of_units
            mean += _mean(row0, moments, saved, units, pitch, s_at, h_at, tile, unit)
            tile += unit
        tl.store(cost + b, mean)
        tl.debug_barrier()  # h of every unit
        spread = tl.full([], 0.0, tl.float64)
        tile = units * 0
        while tile < units:
            spread += _variance(
                row0,
                offsets,
                ends,
                moments,
                saved,
                units,
                pitch,
                mean_slopes,
                variance_slopes,
                tile,
                unit,
                wide,
            )
            tile += unit
        tl.store(variance + b, spread)
        b += 1


@triton.jit(do_not_specialize=["units", "groups", "metrics"])
def expected_cost_kernel(
    alpha,
    offsets,
    ends,
    coefficients,
    q,
    scale,
    moments,
    cost,
    variance,
    saved,
    units,
    groups,
    metrics,
    unit: tl.constexpr,
    wide: tl.constexpr,
    channels: tl.constexpr,
):
    # Nothing in this launch waits for q and scale, so other programs than the first write them.
    program = tl.program_id(0)
    if program == 0:
        _write_costs(
            alpha,
            offsets,
            ends,
            coefficients,
            moments,
            cost,
            variance,
            saved,
            units,
            groups,
            metrics,
            unit,
            wide,
        )
    else:
        _write_scale(alpha, offsets, ends, q, scale, program - 1, wide, channels)


@triton.jit(do_not_specialize=["units", "groups", "metrics"])
def expected_cost_backward_kernel(
    grad_q,
    grad_scale,
    grad_moments,
    grad_cost,
    grad_variance,
    saved,
    offsets,
    ends,
    grad_alpha,
    units,
    groups,
    metrics,
    wide: tl.constexpr,
    channels: tl.constexpr,
):
    u = tl.program_id(0)
    pitch = (groups + units).to(tl.int64)
    begin, count, choice, first = _unit(offsets, ends, u, u >= 0)
    lane = tl.arange(0, wide)
    column = tl.arange(0, channels)[None, :]
    after = tl.full([], 0.0, tl.float64)  # the sum of all later tiles
    tile = count
    while tile > 0:
        tile -= wide
        i = tile + lane
        inside = i >= 0
        k = begin + i
        g = tl.zeros([wide], tl.float64)
        low = tl.load(ends + choice + i, mask=inside, other=0)
        high = tl.load(ends + choice + i + 1, mask=inside, other=0)
        if grad_q is not None:
            g += tl.load(grad_q + k, mask=inside, other=0.0).to(tl.float64)
        if grad_scale is not None:
            widest = tl.max(high - low, axis=0)
            c = widest * 0
            while c < widest:
                channel = low[:, None] + c + column
                values = tl.load(grad_scale + channel, mask=channel < high[:, None], other=0.0)
                g += tl.sum(values.to(tl.float64), axis=1)
                c += channels
        if grad_moments is not None:
            x, y = (low - first).to(tl.float64), (high - first).to(tl.float64)
            x2, y2 = x * x, y * y
            g += tl.load(grad_moments + u) * (y - x)
            g += tl.load(grad_moments + units + u) * (y2 - x2)
            g += tl.load(grad_moments + 2 * units + u) * (y2 * y - x2 * x)
            g += tl.load(grad_moments + 3 * units + u) * (y2 * y2 - x2 * x2)
        b = metrics * 0
        while b < metrics:
            slopes = saved + (2 + b) * pitch + k
            if grad_cost is not None:
                g += tl.load(grad_cost + b) * tl.load(slopes, mask=inside, other=0.0)
            if grad_variance is not None:
                slopes += metrics * pitch
                g += tl.load(grad_variance + b) * tl.load(slopes, mask=inside, other=0.0)
            b += 1
        weight = tl.load(saved + k, mask=inside, other=0.0) * g
        stop = tl.load(saved + pitch + k, mask=inside, other=0.0)
        tail = after + tl.cumsum(tl.where(inside, weight, 0.0), axis=0, reverse=True)
        tl.store(grad_alpha + k, (stop * tail).to(grad_alpha.dtype.element_ty), mask=inside)
        after += tl.sum(tl.where(inside, weight, 0.0), axis=0)


def expected_cost(
    alpha: torch.Tensor,
    offsets: torch.Tensor,
    ends: torch.Tensor,
    coefficients: torch.Tensor,
    *outputs: torch.Tensor,
) -> None:
    """Launches the forward, which fills the outputs: q, scale, moments, cost, variance, saved."""
    inputs = [tensor.contiguous() for tensor in (alpha, offsets, ends, coefficients)]
    units = offsets.numel() - 1
    expected_cost_kernel[(1 + units,)](
        *inputs,
        *outputs,
        units,
        alpha.numel(),
        coefficients.shape[0],
        unit=UNITS,
        wide=CHOICES,
        channels=CHANNELS,
        num_warps=WARPS,
    )


def expected_cost_backward(
    gradients: Sequence[torch.Tensor | None],
    saved: torch.Tensor,
    offsets: torch.Tensor,
    ends: torch.Tensor,
    grad_alpha: torch.Tensor,
) -> None:
    """Launches the backward, which fills ``grad_alpha``. The gradients are those of q, scale,
    moments, cost and variance; None stands for zeros."""
    units = offsets.numel() - 1
    if units == 0:
        return
    expected_cost_backward_kernel[(units,)](
        *[None if gradient is None else gradient.contiguous() for gradient in gradients],
        *[tensor.contiguous() for tensor in (saved, offsets, ends)],
        grad_alpha,
        units,
        grad_alpha.numel(),
        len(saved) // 2 - 1,
        wide=CHOICES,
        channels=CHANNELS,
        num_warps=WARPS,
    )
