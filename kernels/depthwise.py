"""Triton kernels of depthwise convolutions, channels last, over a prefix of the channels.

No operation calls them yet: `dmcp.ops.convolution` is to choose them only for shapes for which
``bench/gpu_convolutions.py`` has measured that they win.

A program owns a block of channels, a block of image columns (those of all images in one row) and a
strip of image rows. It walks down the strip, takes every row once, with its horizontal neighbours,
and keeps what is not complete yet in registers: the sums of the outputs that a row takes part in,
or for the gradient of the weight the few rows of ``grad`` that meet it. Arithmetic is float32.

Padded image row R is row R - kernel // 2. Output row o meets the padded rows stride o + t, where t
is the row of the weight. See `dmcp.kernels.pointwise` for the prologue, the moments, and how
outputs lie in memory.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmcp.kernels.norm_act import _cdiv, _resident_programs, _total
from dmcp.kernels.pointwise import (
    ACCESS_BITS,
    REGISTERS,
    TOTAL_CHANNELS,
    VECTOR_ACCESS,
    Prologue,
    columns_of,
    empty_last,
    moments_of,
    new_partials,
    place_last,
    prologue_arguments,
    seen,
    store_moments,
    vec_of,
    vector,
)
from dmcp.ops.layout import Placed

WARPS = 4
ROWS = 4  # of a strip, at least

_jit = functools.partial(
    triton.jit,
    do_not_specialize=[
        *("channels", "height", "width", "out_height", "out_width", "columns", "strip"),
        *("pitch", "y_pitch", "grad_pitch", "groups", "values"),
    ],
    do_not_specialize_on_alignment=["partials", "total"],
)


class Images(NamedTuple):
    """Those of a batch, as they lie in memory."""

    height: Any
    width: Any
    channels: Any
    pitch: Any


class Window(NamedTuple):
    """What is compiled in.

    Attributes:
        kernel: its height and width; half of it, rounded down, is the padding.
        columns, channels: of the tile that a program takes at a time, powers of two.
    """

    kernel: int
    stride: int
    columns: int
    channels: int


# --- Parts of kernels -----------------------------------------------------------------------------


@_jit
def _share(channels, columns, strip, height, window: tl.constexpr):
    """The channels and the columns of this program, its first row and the one after its last, and
    its number among the programs of its channels."""
    across = tl.cdiv(channels, window.channels)
    blocks = tl.cdiv(columns, window.columns)
    group = tl.program_id(0) // across
    channel = tl.program_id(0) % across * window.channels + tl.arange(0, window.channels)
    column = group % blocks * window.columns + tl.arange(0, window.columns)
    first = group // blocks * strip
    return channel[None, :], column[:, None], first, tl.minimum(first + strip, height), group


@_jit
def _load(tensor, images, image, row, column, channel, inside, vec: tl.constexpr):
    """A row of every column, zero outside of the images; and what lies inside."""
    inside = inside & (row >= 0) & (row < images.height) & (column >= 0) & (column < images.width)
    pixel = (image * images.height + row).to(tl.int64) * images.width + column
    # The compiler sees that vec divides the pitch; what lies behind the channels stays there.
    pointers = tensor + pixel * (images.pitch // vec * vec) + channel
    mask = inside & (channel < tl.cdiv(images.channels, vec) * vec)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32), inside


@_jit
def _store(tensor, images, value, image, row, column, channel, inside):
    stored: tl.constexpr = tensor.dtype.element_ty
    access: tl.constexpr = ACCESS_BITS // stored.primitive_bitwidth
    pixel = (image * images.height + row).to(tl.int64) * images.width + column
    pointers = tensor + pixel * (images.pitch // access * access) + channel
    # To the end of the last access: nobody reads the rest of it.
    mask = inside & (channel < tl.cdiv(images.channels, access) * access)
    tl.store(pointers, value, mask=mask)


@_jit
def _tap(weight, tap: tl.constexpr, channel, channels):
    """The weight of one tap, from the cache: there are no registers for all of them."""
    pitch = tl.cdiv(channels, VECTOR_ACCESS) * VECTOR_ACCESS
    return tl.load(weight + tap * pitch + channel, mask=channel < pitch, other=0.0)


@_jit
def _zeros(count: tl.constexpr, window: tl.constexpr):
    values: tl.tuple = ()
    for _ in tl.static_range(count):
        values += (tl.full([window.columns, window.channels], 0.0, tl.float32),)
    return values


# --- Kernels --------------------------------------------------------------------------------------


@_jit
def depthwise_kernel(
    x,
    weight,
    y,
    gain,
    shift,
    scale,
    partials,
    pitch,
    y_pitch,
    channels,
    height,
    width,
    out_height,
    out_width,
    columns,
    strip,
    act: tl.constexpr,
    vec: tl.constexpr,
    window: tl.constexpr,
):
    k: tl.constexpr = window.kernel
    s: tl.constexpr = window.stride
    pad: tl.constexpr = k // 2
    later: tl.constexpr = (k - 1) // s
    stored: tl.constexpr = y.dtype.element_ty
    channel, column, first, last, group = _share(channels, columns, strip, out_height, window)
    valid = channel < channels
    source = Images(height, width, channels, pitch)
    target = Images(out_height, out_width, channels, y_pitch)
    inside = column < columns
    image = column // out_width
    to = column % out_width
    gains = vector(gain, channel, channels)
    shifts = vector(shift, channel, channels)
    scales = vector(scale, channel, channels)
    sums = _zeros(later + 1, window)  # of output row o, o - 1, ..., o - later
    origin = tl.full([window.columns, window.channels], 0.0, tl.float32)
    s1 = origin
    s2 = origin
    o = first
    while o < last + later:
        for j in tl.static_range(s):
            row = s * o + j - pad
            for across in tl.static_range(k):
                near = s * to + across - pad
                value, real = _load(x, source, image, row, near, channel, inside, vec)
                if gain is not None:
                    value = tl.where(real, seen(value, gains, shifts, scales, act), 0.0)
                added: tl.tuple = ()
                for m in tl.static_range(later + 1):
                    if s * m + j < k:
                        w = _tap(weight, (s * m + j) * k + across, channel, channels)
                        added += (sums[m] + value * w,)
                    else:
                        added += (sums[m],)
                sums = added
        done = sums[later].to(stored)
        emitted = inside & (o - later >= first)
        _store(y, target, done, image, o - later, to, channel, emitted)
        if partials is not None:
            # Around an origin for each column and channel: its first value.
            done = done.to(tl.float32)
            origin = tl.where(o - later == first, done, origin)
            d = tl.where(emitted, done - origin, 0.0)
            s1 += d
            s2 += d * d
        sums = _zeros(1, window) + sums[:later]
        o += 1
    if partials is not None:
        present = tl.sum(inside.to(tl.float32), 0, keep_dims=True)
        joint = tl.sum(tl.where(inside, origin, 0.0), 0, keep_dims=True) / present
        rows = (last - first).to(tl.float32)
        d = tl.where(inside, origin - joint, 0.0)
        s2 = tl.sum(s2 + d * (2.0 * s1 + rows * d), 0, keep_dims=True)
        s1 = tl.sum(s1 + rows * d, 0, keep_dims=True)
        store_moments(partials, group, present * rows, joint, s1, s2, channel, valid, channels)


@_jit
def depthwise_grad_input_kernel(
    grad,
    weight,
    y,
    grad_pitch,
    y_pitch,
    channels,
    height,
    width,
    out_height,
    out_width,
    columns,
    strip,
    vec: tl.constexpr,
    window: tl.constexpr,
):
    """Of the image, which is `y` here."""
    k: tl.constexpr = window.kernel
    s: tl.constexpr = window.stride
    pad: tl.constexpr = k // 2
    channel, column, first, last, _ = _share(channels, columns, strip, height, window)
    source = Images(out_height, out_width, channels, grad_pitch)
    target = Images(height, width, channels, y_pitch)
    inside = column < columns
    image = column // width
    to = column % width
    sums = _zeros(k, window)  # of the padded rows s o, s o + 1, ..., s o + k - 1
    # From the first output row that meets the strip to the last one.
    o = tl.cdiv(tl.maximum(first + pad - (k - 1), 0), s)
    end = (last - 1 + pad) // s
    while o <= end:
        for across in tl.static_range(k):
            ahead = to + pad - across
            near = ahead // s
            met = inside & (ahead % s == 0)
            value, _real = _load(grad, source, image, o, near, channel, met, vec)
            added: tl.tuple = ()
            for t in tl.static_range(k):
                w = _tap(weight, t * k + across, channel, channels)
                added += (sums[t] + value * w,)
            sums = added
        for j in tl.static_range(s):
            row = s * o + j - pad
            emitted = inside & (row >= first) & (row < last)
            done = sums[j].to(y.dtype.element_ty)
            _store(y, target, done, image, row, to, channel, emitted)
        sums = sums[s:] + _zeros(s, window)
        o += 1


@_jit
def depthwise_grad_weight_kernel(
    grad,
    x,
    gain,
    shift,
    scale,
    partials,
    grad_pitch,
    pitch,
    channels,
    height,
    width,
    out_height,
    out_width,
    columns,
    strip,
    act: tl.constexpr,
    grad_vec: tl.constexpr,
    vec: tl.constexpr,
    abreast: tl.constexpr,
    window: tl.constexpr,
):
    """`abreast` columns of the weight; partial sums [groups, taps, channels]."""
    k: tl.constexpr = window.kernel
    s: tl.constexpr = window.stride
    pad: tl.constexpr = k // 2
    later: tl.constexpr = (k - 1) // s
    channel, column, first, last, group = _share(channels, columns, strip, out_height, window)
    valid = channel < channels
    source = Images(height, width, channels, pitch)
    met = Images(out_height, out_width, channels, grad_pitch)
    inside = column < columns
    image = column // out_width
    to = column % out_width
    gains = vector(gain, channel, channels)
    shifts = vector(shift, channel, channels)
    scales = vector(scale, channel, channels)
    leftmost = tl.program_id(1) * abreast
    sums = _zeros(k * abreast, window)
    grads = _zeros(later + 1, window)  # rows o, o - 1, ..., o - later
    o = first
    while o < last + later:
        mine = inside & (o < last)
        new, _real = _load(grad, met, image, o, to, channel, mine, grad_vec)
        grads = (new,) + grads[:later]  # noqa: RUF005  (Triton's Python has no stars here)
        for j in tl.static_range(s):
            row = s * o + j - pad
            for across in tl.static_range(abreast):
                near = s * to + leftmost + across - pad
                value, real = _load(x, source, image, row, near, channel, inside, vec)
                if gain is not None:
                    value = tl.where(real, seen(value, gains, shifts, scales, act), 0.0)
                added: tl.tuple = ()
                for index in tl.static_range(k * abreast):
                    if index % abreast == across and (index // abreast) % s == j:
                        part = value * grads[index // abreast // s]
                        added += (sums[index] + part,)
                    else:
                        added += (sums[index],)
                sums = added
        o += 1
    for index in tl.static_range(k * abreast):
        tap = index // abreast * k + leftmost + index % abreast
        part = tl.sum(sums[index], 0, keep_dims=True)
        tl.store(partials + (group * k * k + tap) * channels + channel, part, mask=valid)


@_jit
def depthwise_grad_weight_total_kernel(
    partials, total, groups, channels, values, taps: tl.constexpr
):
    """[channels, taps] from partial sums; `values` is the size of that."""
    value = tl.program_id(0) * TOTAL_CHANNELS + tl.arange(0, TOTAL_CHANNELS)[None, :]
    valid = value < values
    part = _total(partials, 0, 1, groups, value, valid, values)
    tl.store(total + value % channels * taps + value // channels, part.to(tl.float32), mask=valid)


# --- Launchers ------------------------------------------------------------------------------------


def depthwise(
    x: Tensor, weight: Tensor, stride: int, prologue: Prologue | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Convolve a channels-last tensor, with half the kernel's size as padding.

    Args:
        x: [N, C, H, W] in float32, bfloat16 or float16.
        weight: float32 [C, 1, k, k], k 3 or 5.
        stride: 1 or 2.
        prologue: what is done to x before.
        sums: whether to return the moments of y as well.

    Returns:
        y [N, C, H', W'] of the dtype of x, and mean and biased variance of its channels [2, C].
    """
    placed = place_last(x)
    batch, channels, height, width = x.shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    kernel = weight.shape[-1]
    y, _, y_pitch = empty_last(x, channels, out_height, out_width)
    vec = _vec(placed, kernel)
    walk = _walk(x, vec, batch * out_width, out_height, kernel, stride)
    partials = new_partials(x, walk.groups, channels) if sums else None
    depthwise_kernel[(walk.programs,)](
        x=placed.tensor,
        weight=_by_tap(weight),
        y=y,
        **prologue_arguments(prologue),
        partials=partials,
        pitch=placed.pitch,
        y_pitch=y_pitch,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        vec=vec,
        **walk.arguments,
    )
    return y, moments_of(partials)


def depthwise_grad_input(
    grad: Tensor, weight: Tensor, height: int, width: int, stride: int
) -> Tensor:
    """The gradient of what was convolved, [N, C, height, width], from that of y."""
    placed = place_last(grad)
    batch, channels, out_height, out_width = grad.shape
    kernel = weight.shape[-1]
    y, _, y_pitch = empty_last(grad, channels, height, width)
    vec = _vec(placed, kernel)
    walk = _walk(grad, vec, batch * width, height, kernel, stride)
    depthwise_grad_input_kernel[(walk.programs,)](
        grad=placed.tensor,
        weight=_by_tap(weight),
        y=y,
        grad_pitch=placed.pitch,
        y_pitch=y_pitch,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        vec=vec,
        **walk.arguments,
    )
    return y


def depthwise_grad_weight(
    grad: Tensor, x: Tensor, kernel: int, stride: int, prologue: Prologue | None = None
) -> Tensor:
    """The gradient of the weight, float32 [C, 1, kernel, kernel]."""
    incoming, placed = place_last(grad), place_last(x)
    batch, channels, height, width = x.shape
    out_height, out_width = grad.shape[2:]
    vec = min(vec_of(incoming), vec_of(placed))
    walk = _walk(x, vec, batch * out_width, out_height, kernel, stride)
    taps = kernel * kernel
    partials = x.new_empty(walk.groups, taps, channels, dtype=torch.float32)
    abreast = 3 if kernel == 3 else 1  # as many sums as there are registers for
    depthwise_grad_weight_kernel[(walk.programs, kernel // abreast)](
        grad=incoming.tensor,
        x=placed.tensor,
        **prologue_arguments(prologue),
        partials=partials,
        grad_pitch=incoming.pitch,
        pitch=placed.pitch,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        grad_vec=vec_of(incoming),
        vec=vec_of(placed),
        abreast=abreast,
        **walk.arguments,
    )
    total = partials.new_empty(channels, 1, kernel, kernel)
    depthwise_grad_weight_total_kernel[(_cdiv(total.numel(), TOTAL_CHANNELS.value),)](
        partials=partials,
        total=total,
        groups=walk.groups,
        channels=channels,
        values=total.numel(),
        taps=taps,
    )
    return total


def _vec(placed: Placed, kernel: int) -> int:
    """The values of an access: for a large kernel, whole accesses would need too many registers."""
    return vec_of(placed) if kernel == 3 else min(vec_of(placed), 4)


def _by_tap(weight: Tensor) -> Tensor:
    """[taps, C], of which every row can be loaded in whole accesses."""
    channels, _, kernel, _ = weight.shape
    vec = VECTOR_ACCESS.value
    rows = weight.new_empty(kernel * kernel, _cdiv(channels, vec) * vec)
    rows[:, :channels] = weight.flatten(1).t()
    return rows


class _Walk(NamedTuple):
    """How an operation walks over the images.

    Attributes:
        arguments: what every kernel takes.
        groups: how many programs share a channel.
        programs: how many there are in all.
    """

    arguments: dict[str, Any]
    groups: int
    programs: int


def _walk(x: Tensor, vec: int, columns: int, height: int, kernel: int, stride: int) -> _Walk:
    """Over so many columns of that height, by accesses of at least ``vec`` values."""
    channels = x.shape[1]
    block = columns_of(channels)
    # Single elements take half of what whole accesses would: the address of each needs registers.
    values = 32 * WARPS * max(vec, 4)
    window = Window(kernel, stride, values // block, block)
    across, blocks = _cdiv(channels, block), _cdiv(columns, window.columns)
    # Strips only where there would be few programs: each reads some rows of the next one too.
    wanted = _cdiv(4 * _resident_programs(x.device), across * blocks)
    strip = max(_cdiv(height, wanted), ROWS)
    groups = blocks * _cdiv(height, strip)
    arguments = {
        "channels": channels,
        "columns": columns,
        "strip": strip,
        "window": window,
        "num_warps": WARPS,
        "maxnreg": REGISTERS,
    }
    return _Walk(arguments, groups, groups * across)
