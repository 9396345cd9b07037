"""Triton kernels of ``dmcp.ops.norm_act``. The formulas are those of ``csrc/common/norm_act.h``.

Both memory orders are one matrix to the kernels. Channels last: its rows are the pixels of the
batch, its columns the channels, and a program owns a block of columns. Channels first: its rows are
the samples, and a program owns the columns of one channel. Value (row, column) lies at
``row * pitch + column``. The programs that share channels divide the rows in contiguous ranges; how
many programs there are depends on the shape and the device alone. Each leaves partial sums, which a
second kernel adds in a fixed order. The pass after the sums walks its rows backwards, because the
last ones are still in the L2 cache.

Sizes are not compiled in: a width that changes from call to call compiles a handful of kernels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmcp.ops.layout import Placed, empty_like, place, place_like
from dmcp.ops.norm_act_eager import Activation, stats_dtype

ACCESS = 16  # bytes
WARPS = 8
LOADS = 4  # accesses that a thread waits for at a time
WIDTH = 128  # bytes of a row that a tile takes at least, if the row has them: a cache line
PROGRAMS_PER_SM = 2  # all resident together
REGISTERS = 65536 // (32 * WARPS * PROGRAMS_PER_SM)  # of a thread, at most, for that
PROGRAMS_INTERPRETED = 4
ORIGIN_SAMPLES = tl.constexpr(16)
TOTAL_GROUPS = tl.constexpr(256)  # partial sums added at a time,
TOTAL_CHANNELS = tl.constexpr(8)  # for this many channels
HOMOGENEOUS = ("identity", "relu")  # act(q v) = q act(v) for q >= 0

_jit = functools.partial(
    triton.jit,
    do_not_specialize=[
        *("rows", "channels", "pixels", "steps", "groups"),
        *("pitch", "grad_pitch", "residual_pitch"),
    ],
    do_not_specialize_on_alignment=[
        *("mean", "var", "weight", "bias", "scale", "sums", "running_mean", "running_var"),
        *("partials", "origin"),
    ],
)


class Layout(NamedTuple):
    """What is compiled in about the matrix.

    Attributes:
        channels_last: the order.
        vec: divides the pitches, the addresses and, channels first, the columns of a channel; at
            most the elements of one access.
        loads: how many accesses to one tensor a thread makes for a tile.
        block_rows, block_columns: of the tile a program takes at a time, powers of two.
    """

    channels_last: bool
    vec: int
    loads: int
    block_rows: int
    block_columns: int

    @property
    def accumulator(self) -> list[int]:
        """The shape of the sums of a tile over the loads of each thread."""
        if self.channels_last:
            return [self.block_rows // self.loads, self.block_columns]
        return [self.block_rows * self.block_columns // self.loads]

    @property
    def by_load(self) -> list[int]:
        """The shape of a tile, load by load."""
        return [self.loads, *self.accumulator]


class Tile(NamedTuple):
    """Where a program is.

    Attributes:
        row, column: of the matrix, [block_rows, 1] and [1, block_columns].
        load: the positions to load.
        store: the positions to store in whole accesses.
        rest: the positions to store besides, one by one.
        ragged: whether there are any of those.
    """

    row: Any
    column: Any
    load: Any
    store: Any
    rest: Any
    ragged: Any


# --- Arithmetic: a NaN takes the branch of u itself -----------------------------------------------


@_jit
def _clamp(u, low: tl.constexpr, high: tl.constexpr):
    raised = tl.where(u < low, low, u)
    return tl.where(raised > high, high, raised)


@_jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@_jit
def _activate(u, act: tl.constexpr):
    if act == "relu":
        u = tl.where(u < 0.0, 0.0, u)
    elif act == "relu6":
        u = _clamp(u, 0.0, 6.0)
    elif act == "hardswish":
        u = u * _clamp(u + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif act == "silu":
        u = u * _sigmoid(u)
    return u


@_jit
def _times_slope(g, u, act: tl.constexpr):
    if act == "relu":
        g = tl.where(u <= 0.0, 0.0, g)
    elif act == "relu6":
        g = tl.where(u <= 0.0, 0.0, tl.where(u >= 6.0, 0.0, g))
    elif act == "hardswish":
        below = tl.where(u >= 3.0, g, g * (u * (1.0 / 3.0) + 0.5))
        g = tl.where(u <= -3.0, 0.0, below)
    elif act == "silu":
        s = _sigmoid(u)
        g = g * (s + u * s * (1.0 - s))
    return g


# --- Per-channel vectors --------------------------------------------------------------------------


@_jit
def _value_or(array, channel, valid, otherwise: tl.constexpr):
    if array is None:
        return otherwise
    else:
        return tl.load(array + channel, mask=valid, other=0.0)


@_jit
def _inverse_std(var, eps, channel, valid):
    # Floats come as float64 from whoever launches, and would make one of all that they meet.
    epsilon = tl.full([], eps, var.dtype.element_ty)
    return 1.0 / tl.sqrt(tl.load(var + channel, mask=valid, other=1.0) + epsilon)


@_jit
def _affine(mean, var, weight, bias, eps, channel, valid):
    """v = (x - centre) gain + shift; also 1 / sqrt(var + eps)."""
    centre = tl.load(mean + channel, mask=valid, other=0.0)
    r = _inverse_std(var, eps, channel, valid)
    gain = r * _value_or(weight, channel, valid, 1.0)
    shift = _value_or(bias, channel, valid, 0.0)
    return centre, gain, shift, r


# --- The matrix -----------------------------------------------------------------------------------


@_jit
def _share(channels, layout: tl.constexpr):
    """The channels of this program, [1, columns] or one, and its number among their programs."""
    program = tl.program_id(0)
    if layout.channels_last:
        sharers = tl.cdiv(channels, layout.block_columns)
        first = program % sharers * layout.block_columns
        channel = first + tl.arange(0, layout.block_columns)[None, :]
    else:
        sharers = channels
        channel = program % sharers
    return channel, program // sharers


@_jit
def _tile(step, channel, rows, channels, pixels, layout: tl.constexpr):
    """The tile of a step. Channels first, steps go along a block of rows, then to the next one."""
    if layout.channels_last:
        first_row = step.to(tl.int64) * layout.block_rows
        before = 0
        column = channel
        columns = channels
    else:
        across = tl.cdiv(pixels, layout.block_columns)
        first_row = (step // across).to(tl.int64) * layout.block_rows
        # The compiler sees that vec divides the result, here and below.
        before = channel.to(tl.int64) * (pixels // layout.vec * layout.vec)
        first = step % across * layout.block_columns
        column = first + tl.arange(0, layout.block_columns)[None, :]
        columns = pixels
    row = first_row + tl.arange(0, layout.block_rows)[:, None]
    inside = row < rows
    # Channels are loaded to the end of the last access; what lies there never leaves its column.
    load = inside & (column < tl.cdiv(columns, layout.vec) * layout.vec)
    whole = columns // layout.vec * layout.vec
    store = inside & (column < whole)
    rest = inside & (column >= whole) & (column < columns)
    return Tile(row, before + column, load, store, rest, whole < columns)


@_jit
def _pointers(tensor, tile, pitch, layout: tl.constexpr):
    return tensor + tile.row * (pitch // layout.vec * layout.vec) + tile.column


@_jit
def _load(tensor, tile, pitch, dtype: tl.constexpr, layout: tl.constexpr):
    pointers = _pointers(tensor, tile, pitch, layout)
    return tl.load(pointers, mask=tile.load, other=0.0).to(dtype)


@_jit
def _store(tensor, value, tile, pitch, layout: tl.constexpr):
    pointers = _pointers(tensor, tile, pitch, layout)
    value = value.to(tensor.dtype.element_ty)
    tl.store(pointers, value, mask=tile.store)
    if tile.ragged:
        tl.store(pointers, value, mask=tile.rest)


# --- Sums -----------------------------------------------------------------------------------------


@_jit
def _sum_of_loads(value, layout: tl.constexpr):
    """A tile added up within each thread: a quarter of the registers, and no communication."""
    return tl.sum(tl.reshape(value, layout.by_load), 0)


@_jit
def _store_partial(partials, value, row, channel, valid, channels, layout: tl.constexpr):
    several: tl.constexpr = layout.channels_last
    total = tl.sum(value, 0, keep_dims=several)
    tl.store(partials + row * channels + channel, total, mask=valid)


@_jit
def _total(partials, kind: tl.constexpr, kinds: tl.constexpr, groups, channel, valid, channels):
    """One of the kinds of sums [groups, kinds, channels], added in float64."""
    total = tl.zeros([TOTAL_GROUPS, TOTAL_CHANNELS], tl.float64)
    first = 0
    while first < groups:
        group = first + tl.arange(0, TOTAL_GROUPS)[:, None]
        at = (group * kinds + kind) * channels + channel
        part = tl.load(partials + at, mask=valid & (group < groups), other=0.0)
        total += part.to(tl.float64)
        first += TOTAL_GROUPS
    return tl.sum(total, 0, keep_dims=True)


# --- Kernels --------------------------------------------------------------------------------------


@_jit
def norm_stats_kernel(
    x, pitch, origin, partials, rows, channels, pixels, steps, layout: tl.constexpr
):
    dtype: tl.constexpr = partials.dtype.element_ty
    channel, group = _share(channels, layout)
    valid = channel < channels
    shift = _origin(x, pitch, channel, valid, rows, pixels, dtype, layout)
    s1 = tl.full(layout.accumulator, 0.0, dtype)
    s2 = tl.full(layout.accumulator, 0.0, dtype)
    step = group * steps
    end = step + steps
    while step < end:
        tile = _tile(step, channel, rows, channels, pixels, layout)
        d = tl.where(tile.load, _load(x, tile, pitch, dtype, layout) - shift, 0.0)
        s1 += _sum_of_loads(d, layout)
        s2 += _sum_of_loads(d * d, layout)
        step += 1
    _store_partial(partials, s1, 2 * group, channel, valid, channels, layout)
    _store_partial(partials, s2, 2 * group + 1, channel, valid, channels, layout)
    tl.store(origin + channel, shift, mask=valid & (group == 0))


@_jit
def _origin(x, pitch, channel, valid, rows, pixels, dtype: tl.constexpr, layout: tl.constexpr):
    """The mean of a few values of the channel, evenly spaced; the statistics are of x - origin."""
    several: tl.constexpr = layout.channels_last
    i = tl.arange(0, ORIGIN_SAMPLES)
    if several:
        i = i[:, None]
        count = rows.to(tl.int64)
    else:
        count = rows.to(tl.int64) * pixels
    samples = tl.minimum(count, ORIGIN_SAMPLES)
    value = i * count // samples
    if several:
        at = value * pitch + channel
    else:
        at = value // pixels * pitch + channel * pixels + value % pixels
    some = tl.load(x + at, mask=valid & (i < samples), other=0.0).to(dtype)
    return tl.sum(some, 0, keep_dims=several) / samples.to(dtype)


@_jit
def norm_stats_total_kernel(
    partials,
    groups,
    mean,
    var,
    running_mean,
    running_var,
    momentum: tl.float64,
    count: tl.float64,
    channels,
):
    """Here `mean` comes as the origin."""
    dtype: tl.constexpr = mean.dtype.element_ty
    channel = tl.program_id(0) * TOTAL_CHANNELS + tl.arange(0, TOTAL_CHANNELS)[None, :]
    valid = channel < channels
    values = tl.full([], count, tl.float64)
    off = _total(partials, 0, 2, groups, channel, valid, channels) / values
    square = _total(partials, 1, 2, groups, channel, valid, channels) / values
    origin = tl.load(mean + channel, mask=valid, other=0.0).to(tl.float64)
    batch_mean = (origin + off).to(dtype)
    spread = square - off * off
    batch_var = tl.where(spread < 0.0, 0.0, spread).to(dtype)
    tl.store(mean + channel, batch_mean, mask=valid)
    tl.store(var + channel, batch_var, mask=valid)
    if running_mean is not None:
        new = tl.full([], momentum, tl.float64)
        unbiased = batch_var.to(tl.float64) * (values / (values - 1.0))
        _update(running_mean, batch_mean.to(tl.float64), new, channel, valid)
        _update(running_var, unbiased, new, channel, valid)


@_jit
def _update(running, value, new, channel, valid):
    old = tl.load(running + channel, mask=valid, other=0.0).to(tl.float64)
    mixed = old * (1.0 - new) + value * new
    tl.store(running + channel, mixed.to(running.dtype.element_ty), mask=valid)


@_jit
def norm_act_kernel(
    x,
    residual,
    y,
    pitch,
    residual_pitch,
    mean,
    var,
    weight,
    bias,
    scale,
    eps: tl.float64,
    rows,
    channels,
    pixels,
    steps,
    act: tl.constexpr,
    before: tl.constexpr,
    fold: tl.constexpr,
    layout: tl.constexpr,
):
    dtype: tl.constexpr = mean.dtype.element_ty
    channel, group = _share(channels, layout)
    valid = channel < channels
    centre, gain, shift, _ = _affine(mean, var, weight, bias, eps, channel, valid)
    q = _value_or(scale, channel, valid, 1.0)
    if fold:
        gain = gain * q
        shift = shift * q
    begin = group * steps
    step = begin + steps
    while step > begin:
        step -= 1
        tile = _tile(step, channel, rows, channels, pixels, layout)
        u = _load(x, tile, pitch, dtype, layout)
        if residual is not None:
            added = _load(residual, tile, residual_pitch, dtype, layout)
        u = (u - centre) * gain + shift
        if before:
            u += added
        u = _activate(u, act)
        if not fold:
            u *= q
        if residual is not None and not before:
            u += added
        _store(y, u, tile, pitch, layout)


@_jit
def norm_act_sums_kernel(
    grad,
    x,
    residual,
    grad_residual,
    grad_pitch,
    pitch,
    residual_pitch,
    mean,
    var,
    weight,
    bias,
    scale,
    eps: tl.float64,
    partials,
    rows,
    channels,
    pixels,
    steps,
    act: tl.constexpr,
    kinds: tl.constexpr,
    layout: tl.constexpr,
):
    dtype: tl.constexpr = mean.dtype.element_ty
    channel, group = _share(channels, layout)
    valid = channel < channels
    centre, gain, shift, _ = _affine(mean, var, weight, bias, eps, channel, valid)
    if residual is not None:
        q = _value_or(scale, channel, valid, 1.0)
        gain = gain * q
        shift = shift * q
    s0 = tl.full(layout.accumulator, 0.0, dtype)
    s1 = tl.full(layout.accumulator, 0.0, dtype)
    s2 = tl.full(layout.accumulator, 0.0, dtype)
    step = group * steps
    end = step + steps
    while step < end:
        tile = _tile(step, channel, rows, channels, pixels, layout)
        dy = _load(grad, tile, grad_pitch, dtype, layout)
        d = _load(x, tile, pitch, dtype, layout) - centre
        u = d * gain + shift
        if residual is not None:
            u += _load(residual, tile, residual_pitch, dtype, layout)
        if kinds == 3:  # first, which saves registers
            s2 += _sum_of_loads(dy * _activate(u, act), layout)
        g = _times_slope(dy, u, act)
        s0 += _sum_of_loads(g, layout)
        s1 += _sum_of_loads(g * d, layout)
        if residual is not None:
            _store(grad_residual, g, tile, pitch, layout)
        step += 1
    row = kinds * group
    _store_partial(partials, s0, row, channel, valid, channels, layout)
    _store_partial(partials, s1, row + 1, channel, valid, channels, layout)
    if kinds == 3:
        _store_partial(partials, s2, row + 2, channel, valid, channels, layout)


@_jit
def norm_act_sums_total_kernel(
    partials, groups, sums, var, weight, bias, scale, eps: tl.float64, channels, kinds: tl.constexpr
):
    dtype: tl.constexpr = sums.dtype.element_ty
    channel = tl.program_id(0) * TOTAL_CHANNELS + tl.arange(0, TOTAL_CHANNELS)[None, :]
    valid = channel < channels
    s0 = _total(partials, 0, kinds, groups, channel, valid, channels)
    s1 = _total(partials, 1, kinds, groups, channel, valid, channels)
    centred = s1 * _inverse_std(var, eps, channel, valid).to(tl.float64)
    q = _value_or(scale, channel, valid, 1.0)
    tl.store(sums + channel, (s0 * q).to(dtype), mask=valid)
    tl.store(sums + channels + channel, (centred * q).to(dtype), mask=valid)
    if kinds == 3:
        by_scale = _total(partials, 2, kinds, groups, channel, valid, channels)
    else:
        by_scale = centred * _value_or(weight, channel, valid, 1.0)
        by_scale += s0 * _value_or(bias, channel, valid, 0.0)
    tl.store(sums + 2 * channels + channel, by_scale.to(dtype), mask=valid)


@_jit
def norm_act_grad_kernel(
    grad,
    x,
    grad_x,
    grad_pitch,
    pitch,
    mean,
    var,
    weight,
    bias,
    scale,
    sums,
    count: tl.float64,
    eps: tl.float64,
    rows,
    channels,
    pixels,
    steps,
    act: tl.constexpr,
    layout: tl.constexpr,
):
    dtype: tl.constexpr = mean.dtype.element_ty
    channel, group = _share(channels, layout)
    valid = channel < channels
    centre, gain, shift, r = _affine(mean, var, weight, bias, eps, channel, valid)
    by_gradient = gain * _value_or(scale, channel, valid, 1.0)
    if sums is not None:
        share = gain / tl.full([], count, dtype)
        constant = share * tl.load(sums + channel, mask=valid, other=0.0)
        by_input = share * r * tl.load(sums + channels + channel, mask=valid, other=0.0)
    begin = group * steps
    step = begin + steps
    while step > begin:
        step -= 1
        tile = _tile(step, channel, rows, channels, pixels, layout)
        d = _load(x, tile, pitch, dtype, layout) - centre
        dy = _load(grad, tile, grad_pitch, dtype, layout)
        dx = _times_slope(dy, d * gain + shift, act) * by_gradient
        if sums is not None:
            dx = dx - constant - d * by_input
        _store(grad_x, dx, tile, pitch, layout)


# --- Launchers, with the signatures of `dmcp.ops.norm_act_eager.EagerKernels` ---------------------


class _Matrix(NamedTuple):
    """How an operation walks its tensors.

    Attributes:
        arguments: what every kernel over the matrix takes.
        groups: how many programs share a channel.
        programs: how many there are in all.
    """

    arguments: dict[str, Any]
    groups: int
    programs: int


def _matrix(first: Placed, *others: Placed | None) -> _Matrix:
    """The matrix of an operation that reads these tensors, of one shape and in one order."""
    x, channels_last, pitch = first
    tensors = [first, *(each for each in others if each is not None)]
    batch, channels = x.shape[:2]
    pixels = x.numel() // max(batch * channels, 1)
    channels_last |= pixels == 1  # then the two orders are one
    rows, columns = (batch * pixels, channels) if channels_last else (batch, pixels)
    vec = math.gcd(
        ACCESS // x.itemsize,
        *(each.pitch for each in tensors),
        *(each.tensor.data_ptr() // x.itemsize for each in tensors),
        *(() if channels_last else (pixels,)),
    )
    layout = _layout(x.itemsize, rows, columns, channels_last, vec, len(tensors))
    tiles, across = _cdiv(rows, layout.block_rows), _cdiv(columns, layout.block_columns)
    sharers, tiles = (across, tiles) if channels_last else (channels, tiles * across)
    steps = _cdiv(tiles, _groups(_resident_programs(x.device), max(sharers, 1)))
    groups = _cdiv(tiles, max(steps, 1))
    arguments = {
        "pitch": pitch,
        "rows": rows,
        "channels": channels,
        "pixels": pixels,
        "steps": steps,
        "layout": layout,
        "num_warps": WARPS,
        "maxnreg": REGISTERS,
    }
    return _Matrix(arguments, groups, groups * sharers)


@functools.lru_cache(maxsize=1024)
def _layout(
    itemsize: int, rows: int, columns: int, channels_last: bool, vec: int, reads: int
) -> Layout:
    access = ACCESS // itemsize
    loads = LOADS if reads == 1 else LOADS // 2
    # Single elements take half a tile: the address of each needs registers.
    tile = 32 * WARPS * loads * (access if 2 * vec >= access else access // 2)
    widest = 32 * access
    if not channels_last:
        widest = max(widest, tile // _power_of_two(rows))
    block_columns = _block(columns, WIDTH // itemsize, widest)
    return Layout(channels_last, vec, loads, tile // block_columns, block_columns)


def _block(columns: int, narrowest: int, widest: int) -> int:
    """A power of two: of those that cover the columns with the least waste, about the widest."""
    if columns <= narrowest:
        return _power_of_two(columns)
    sizes = [narrowest]
    while sizes[-1] < widest:
        sizes.append(2 * sizes[-1])
    covered = [_cdiv(columns, size) * size for size in sizes]
    return max(
        size for size, cover in zip(sizes, covered, strict=True) if 8 * cover <= 9 * min(covered)
    )


def _groups(resident: int, sharers: int) -> int:
    """As many as are resident together; where they divide badly, several rounds of them."""
    return resident // sharers if 8 * sharers <= resident else _cdiv(4 * resident, sharers)


def _cdiv(size: int, part: int) -> int:
    return -(-size // part)  # that of Triton costs more than all else here


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _resident_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _total_grid(channels: int) -> tuple[int]:
    return (_cdiv(channels, TOTAL_CHANNELS.value),)


def _pitched(**tensors: Placed | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, placed in tensors.items():
        arguments[name] = None if placed is None else placed.tensor
        arguments[f"{name}_pitch"] = 0 if placed is None else placed.pitch
    return arguments


def _dense(**vectors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if each is None else each.contiguous() for name, each in vectors.items()}


def norm_stats(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel; updates the running ones."""
    placed = place(x)
    matrix = _matrix(placed)
    channels = x.shape[1]
    mean = x.new_empty(channels, dtype=stats_dtype(x))
    var = torch.empty_like(mean)
    partials = mean.new_empty(matrix.groups, 2, channels)
    norm_stats_kernel[(matrix.programs,)](
        x=placed.tensor, origin=mean, partials=partials, **matrix.arguments
    )
    running = _dense(running_mean=running_mean, running_var=running_var)
    norm_stats_total_kernel[_total_grid(channels)](
        partials=partials,
        mean=mean,
        var=var,
        **running,
        momentum=momentum,
        count=x.numel() / max(channels, 1),
        groups=matrix.groups,
        channels=channels,
    )
    for given, updated in zip((running_mean, running_var), running.values(), strict=True):
        if given is not None and updated is not None and given is not updated:
            given.copy_(updated)
    return mean, var


def norm_act(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: Activation,
    before: bool,
) -> Tensor:
    """y = scale act(v) + residual or, `before`, y = act(scale v + residual)."""
    placed = place(x)
    y = empty_like(placed)
    added = None if residual is None else place_like(residual, placed)
    matrix = _matrix(placed, added)
    norm_act_kernel[(matrix.programs,)](
        x=placed.tensor,
        y=y.tensor,
        **_pitched(residual=added),
        **_dense(mean=mean, var=var, weight=weight, bias=bias, scale=scale),
        eps=eps,
        act=act,
        before=before,
        fold=before or act in HOMOGENEOUS,
        **matrix.arguments,
    )
    return y.tensor


def norm_act_sums(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    eps: float,
    act: Activation,
) -> tuple[Tensor, Tensor]:
    """The gradients of bias, weight and scale [3, C]; that of a residual before the activation."""
    placed = place(x)
    incoming = place_like(grad, placed)
    added = None if residual is None else place_like(residual, placed)
    grad_residual = None if residual is None else empty_like(placed)
    matrix = _matrix(placed, incoming, added)
    vectors = _dense(var=var, weight=weight, bias=bias, scale=scale)
    # The gradient of the scale follows from the two others where the scale could have been folded.
    kinds = 2 if scale is None or residual is not None or act in HOMOGENEOUS else 3
    channels = x.shape[1]
    partials = mean.new_empty(matrix.groups, kinds, channels)
    norm_act_sums_kernel[(matrix.programs,)](
        x=placed.tensor,
        **_pitched(grad=incoming, residual=added),
        grad_residual=None if grad_residual is None else grad_residual.tensor,
        mean=mean.contiguous(),
        **vectors,
        eps=eps,
        partials=partials,
        act=act,
        kinds=kinds,
        **matrix.arguments,
    )
    sums = mean.new_empty(3, channels)
    norm_act_sums_total_kernel[_total_grid(channels)](
        partials=partials,
        sums=sums,
        **vectors,
        eps=eps,
        groups=matrix.groups,
        channels=channels,
        kinds=kinds,
    )
    return sums, x.new_empty(0) if grad_residual is None else grad_residual.tensor


def norm_act_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    act: Activation,
) -> Tensor:
    """The gradient of x; without `sums`, that of fixed mean and var."""
    placed = place(x)
    incoming = place_like(grad, placed)
    grad_x = empty_like(placed)
    matrix = _matrix(placed, incoming)
    norm_act_grad_kernel[(matrix.programs,)](
        x=placed.tensor,
        **_pitched(grad=incoming),
        grad_x=grad_x.tensor,
        **_dense(mean=mean, var=var, weight=weight, bias=bias, scale=scale, sums=sums),
        count=count,
        eps=eps,
        act=act,
        **matrix.arguments,
    )
    return grad_x.tensor
