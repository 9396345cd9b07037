"""Triton kernels of pointwise (1x1) convolutions over a prefix of the channels, and what every
convolution here can take along.

No operation calls them yet: `dmcp.ops.convolution` is to choose them only for shapes for which
``bench/gpu_convolutions.py`` has measured that they win.

A channels-last tensor is a matrix: its rows are the pixels of the batch, its columns the channels,
a pitch apart. The convolution is a matrix product, its widths are numbers that come with a call,
and what it writes has rows that begin at multiples of `ACCESS` bytes, whatever the width.

* A `Prologue` is what lies between two convolutions. The second one applies it to what it loads, so
  that the values in between are never written.
* The moments of the output, which batch norm needs, are summed up while it is being written: every
  program leaves sums around an origin of its own, and a second kernel joins them in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmcp.kernels.norm_act import ACCESS, _activate, _cdiv, _power_of_two, _resident_programs
from dmcp.ops.layout import Placed, place
from dmcp.ops.norm_act_eager import Activation

ACCESS_BITS = tl.constexpr(8 * ACCESS)
VECTOR_ACCESS = tl.constexpr(ACCESS // 4)
STAGES = 3  # of the loads of a matrix product
REGISTERS = 255  # of a thread, at most: ptxas would rather spill than run fewer programs together
KINDS = tl.constexpr(4)  # of partial sums: count, origin, and the sums of d and d d
TOTAL_GROUPS = tl.constexpr(64)  # partial sums added at a time,
TOTAL_CHANNELS = tl.constexpr(8)  # for this many channels
TOTAL_VALUES = 1024  # or in all, where there are no channels

_jit = functools.partial(
    triton.jit,
    do_not_specialize=[
        *("rows", "inputs", "outputs", "steps", "depth", "groups", "channels", "values"),
        *("pitch", "weight_pitch", "y_pitch", "grad_pitch", "into_pitch"),
    ],
    do_not_specialize_on_alignment=["partials", "moments", "into"],
)


class Prologue(NamedTuple):
    """What is done to the values that a convolution reads: scale act(gain x + shift).

    The zeros around an image are zeros after it.

    Attributes:
        gain, shift, scale: float32 [C].
    """

    gain: Tensor
    shift: Tensor
    scale: Tensor
    act: Activation


class Blocks(NamedTuple):
    """What a program of a matrix product takes at a time, powers of two.

    Attributes:
        rows, columns: of the product.
        depth: terms of its sums.
    """

    rows: int
    columns: int
    depth: int


# --- Parts of kernels -----------------------------------------------------------------------------


@_jit
def seen(value, gain, shift, scale, act: tl.constexpr):
    """What a prologue makes of a loaded value, in float32."""
    return _activate(value.to(tl.float32) * gain + shift, act) * scale


@_jit
def vector(array, channel, channels):
    """Of a prologue, to the end of the last access: what is behind it belongs to no channel."""
    if array is None:
        return 0.0
    else:
        whole = tl.cdiv(channels, VECTOR_ACCESS) * VECTOR_ACCESS
        return tl.load(array + channel, mask=channel < whole, other=0.0)


@_jit
def _load(tensor, row, column, rows, columns, pitch, vec: tl.constexpr):
    """A block of a matrix, zero below it. Columns come to the end of the last access of ``vec``
    values: what lies there must not leave its column."""
    inside = (row < rows)[:, None] & (column < tl.cdiv(columns, vec) * vec)[None, :]
    # The compiler sees that vec divides the pitch.
    pointers = tensor + row.to(tl.int64)[:, None] * (pitch // vec * vec) + column[None, :]
    return tl.load(pointers, mask=inside, other=0.0)


@_jit
def store_moments(partials, group, count, origin, s1, s2, channel, valid, channels):
    at = partials + KINDS * group * channels + channel
    tl.store(at, tl.zeros_like(origin) + count, mask=valid)
    tl.store(at + channels, origin, mask=valid)
    tl.store(at + 2 * channels, s1, mask=valid)
    tl.store(at + 3 * channels, s2, mask=valid)


# --- Kernels --------------------------------------------------------------------------------------


@_jit
def moments_kernel(partials, moments, groups, channels):
    """Mean and biased variance from partial sums [groups, KINDS, channels], in float64."""
    channel = tl.program_id(0) * TOTAL_CHANNELS + tl.arange(0, TOTAL_CHANNELS)[None, :]
    valid = channel < channels
    origin = tl.load(partials + channels + channel, mask=valid, other=0.0).to(tl.float64)
    count = tl.zeros([TOTAL_GROUPS, TOTAL_CHANNELS], tl.float64)
    s1 = count
    s2 = count
    first = groups * 0
    while first < groups:
        group = first + tl.arange(0, TOTAL_GROUPS)[:, None]
        inside = valid & (group < groups)
        at = partials + KINDS * group * channels + channel
        n = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        d = tl.load(at + channels, mask=inside, other=0.0).to(tl.float64) - origin
        part = tl.load(at + 2 * channels, mask=inside, other=0.0).to(tl.float64)
        square = tl.load(at + 3 * channels, mask=inside, other=0.0).to(tl.float64)
        count += n
        s1 += tl.where(inside, part + n * d, 0.0)
        s2 += tl.where(inside, square + d * (2.0 * part + n * d), 0.0)
        first += TOTAL_GROUPS
    values = tl.sum(count, 0, keep_dims=True)
    off = tl.sum(s1, 0, keep_dims=True) / values
    spread = tl.sum(s2, 0, keep_dims=True) / values - off * off
    var = tl.where(spread < 0.0, 0.0, spread)
    tl.store(moments + channel, (origin + off).to(tl.float32), mask=valid)
    tl.store(moments + channels + channel, var.to(tl.float32), mask=valid)


@_jit
def pointwise_kernel(
    x,
    weight,
    y,
    gain,
    shift,
    scale,
    partials,
    pitch,
    weight_pitch,
    y_pitch,
    rows,
    inputs,
    outputs,
    steps,
    depth,
    act: tl.constexpr,
    transposed: tl.constexpr,
    ragged: tl.constexpr,
    vec: tl.constexpr,
    weight_vec: tl.constexpr,
    dtype: tl.constexpr,
    blocks: tl.constexpr,
):
    """y = x weight^T or, `transposed`, x weight, with the channels of x and y as `inputs` and
    `outputs` either way. A program takes `steps` blocks of rows."""
    stored: tl.constexpr = y.dtype.element_ty
    access: tl.constexpr = ACCESS_BITS // stored.primitive_bitwidth
    # Neighbours share rows of x; all of the weight stays in the L2 cache.
    across = tl.cdiv(outputs, blocks.columns)
    group = tl.program_id(0) // across
    column = tl.program_id(0) % across * blocks.columns + tl.arange(0, blocks.columns)
    origin = tl.full([blocks.columns], 0.0, tl.float32)
    s1 = origin
    s2 = origin
    first = group * steps
    end = tl.minimum(first + steps, tl.cdiv(rows, blocks.rows))
    step = first
    while step < end:
        row = step * blocks.rows + tl.arange(0, blocks.rows)
        total = tl.full([blocks.rows, blocks.columns], 0.0, tl.float32)
        for block in range(depth):
            k = block * blocks.depth + tl.arange(0, blocks.depth)
            a = _load(x, row, k, rows, inputs, pitch, vec)
            valid = k < inputs
            if gain is not None:
                gains = vector(gain, k, inputs)
                shifts = vector(shift, k, inputs)
                a = seen(a, gains, shifts, vector(scale, k, inputs), act).to(stored)
            if ragged:
                a = tl.where(valid[None, :], a, 0.0)
            if transposed:
                b = _load(weight, k, column, inputs, outputs, weight_pitch, weight_vec)
            else:
                b = _load(weight, column, k, outputs, inputs, weight_pitch, weight_vec)
                if ragged:
                    b = tl.where(valid[None, :], b, 0.0)
                b = tl.trans(b)
            b = b.to(stored).to(dtype)
            total = tl.dot(a.to(dtype), b, total, input_precision="ieee")
        value = total.to(stored)
        # To the end of the last access: nobody reads the rest of it.
        inside = (row < rows)[:, None] & (column < tl.cdiv(outputs, access) * access)[None, :]
        pointers = y + row.to(tl.int64)[:, None] * (y_pitch // access * access) + column[None, :]
        tl.store(pointers, value, mask=inside)
        if partials is not None:
            value = value.to(tl.float32)
            counted = (row < rows)[:, None]
            if step == first:
                present = tl.minimum(rows - step * blocks.rows, blocks.rows).to(tl.float32)
                origin = tl.sum(tl.where(counted, value, 0.0), 0) / present
            d = tl.where(counted, value - origin[None, :], 0.0)
            s1 += tl.sum(d, 0)
            s2 += tl.sum(d * d, 0)
        step += 1
    if partials is not None:
        count = tl.minimum(rows, end * blocks.rows) - first * blocks.rows
        written = column < outputs
        store_moments(partials, group, count, origin, s1, s2, column, written, outputs)


@_jit
def pointwise_grad_weight_kernel(
    grad,
    x,
    gain,
    shift,
    scale,
    partials,
    grad_pitch,
    pitch,
    rows,
    inputs,
    outputs,
    steps,
    act: tl.constexpr,
    grad_vec: tl.constexpr,
    vec: tl.constexpr,
    dtype: tl.constexpr,
    blocks: tl.constexpr,
):
    """The part of grad^T x of `steps` blocks of rows, [groups, outputs, inputs]."""
    stored: tl.constexpr = x.dtype.element_ty
    across = tl.cdiv(inputs, blocks.columns)
    tiles = tl.cdiv(outputs, blocks.rows) * across
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    o = tile // across * blocks.rows + tl.arange(0, blocks.rows)
    i = tile % across * blocks.columns + tl.arange(0, blocks.columns)
    valid = i < inputs
    gains = vector(gain, i, inputs)
    shifts = vector(shift, i, inputs)
    scales = vector(scale, i, inputs)
    total = tl.full([blocks.rows, blocks.columns], 0.0, tl.float32)
    for step in range(steps):
        row = (group * steps + step) * blocks.depth + tl.arange(0, blocks.depth)
        g = _load(grad, row, o, rows, outputs, grad_pitch, grad_vec)
        a = _load(x, row, i, rows, inputs, pitch, vec)
        if gain is not None:
            a = seen(a, gains, shifts, scales, act).to(stored)
        g = tl.trans(g).to(dtype)
        total = tl.dot(g, a.to(dtype), total, input_precision="ieee")
    at = (group * outputs + o).to(tl.int64)[:, None] * inputs + i[None, :]
    tl.store(partials + at, total, mask=(o < outputs)[:, None] & valid[None, :])


@_jit
def pointwise_grad_weight_total_kernel(
    partials, into, into_pitch, inputs, values, groups, together: tl.constexpr, block: tl.constexpr
):
    """Adds the parts of `values` numbers, `together` at a time."""
    value = tl.program_id(0) * block + tl.arange(0, block)[None, :]
    valid = value < values
    total = tl.full([together, block], 0.0, tl.float64)
    first = groups * 0
    while first < groups:
        group = first + tl.arange(0, together)[:, None]
        at = group.to(tl.int64) * values + value
        part = tl.load(partials + at, mask=valid & (group < groups), other=0.0)
        total += part.to(tl.float64)
        first += together
    at = into + (value // inputs).to(tl.int64) * into_pitch + value % inputs
    before = tl.load(at, mask=valid, other=0.0).to(tl.float64)
    tl.store(at, (before + tl.sum(total, 0, keep_dims=True)).to(tl.float32), mask=valid)


# --- Launchers ------------------------------------------------------------------------------------


def pointwise(
    x: Tensor, weight: Tensor, prologue: Prologue | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Convolve a channels-last tensor.

    Args:
        x: [N, I, H, W] in float32, bfloat16 or float16.
        weight: float32 [O, I].
        prologue: what is done to x before.
        sums: whether to return the moments of y as well.

    Returns:
        y [N, O, H, W] of the dtype of x, and mean and biased variance of its channels [2, O].
    """
    return _product(x, weight, weight.shape[0], prologue, sums, transposed=False)


def pointwise_grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient [N, I, H, W] of what was convolved, from that of y."""
    return _product(grad, weight, weight.shape[1], None, False, transposed=True)[0]


def pointwise_grad_weight(
    grad: Tensor, x: Tensor, into: Tensor, prologue: Prologue | None = None
) -> None:
    """Add the gradient of the weight to a float32 tensor [O, I], whatever its first stride."""
    incoming, placed = place_last(grad), place_last(x)
    outputs, inputs = into.shape
    rows = x.numel() // inputs
    depth = 64 if prologue is None else 32
    blocks, warps = _blocks(columns_of(outputs), columns_of(inputs), depth, x.itemsize)
    tiles = _cdiv(outputs, blocks.rows) * _cdiv(inputs, blocks.columns)
    row_blocks = _cdiv(rows, blocks.depth)
    steps = _cdiv(row_blocks, _cdiv(_resident_programs(x.device), tiles))
    groups = _cdiv(row_blocks, steps)
    partials = into.new_empty(groups, outputs, inputs)
    pointwise_grad_weight_kernel[(tiles * groups,)](
        grad=incoming.tensor,
        x=placed.tensor,
        **prologue_arguments(prologue),
        partials=partials,
        grad_pitch=incoming.pitch,
        pitch=placed.pitch,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        steps=_loops(steps, x.device),
        grad_vec=vec_of(incoming),
        vec=vec_of(placed),
        dtype=_multiplied(x),
        blocks=blocks,
        num_warps=warps,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
    together = min(_power_of_two(groups), TOTAL_GROUPS.value)
    block = TOTAL_VALUES // together
    values = outputs * inputs
    pointwise_grad_weight_total_kernel[(_cdiv(values, block),)](
        partials=partials,
        into=into,
        into_pitch=into.stride(0),
        inputs=inputs,
        values=values,
        groups=groups,
        together=together,
        block=block,
    )


def _product(
    x: Tensor,
    weight: Tensor,
    outputs: int,
    prologue: Prologue | None,
    sums: bool,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor | None]:
    placed = place_last(x)
    batch, inputs, height, width = x.shape
    rows = batch * height * width
    y, _, y_pitch = empty_last(x, outputs, height, width)
    columns = columns_of(outputs)
    resident = _resident_programs(x.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    vec, weight_vec = vec_of(placed), vec_of(Placed(weight, True, weight.stride(0)))
    few = _cdiv(rows, 128) * _cdiv(outputs, columns) < resident
    # What needs registers: the addresses of single elements, a prologue, sums.
    single = 1 in (vec, weight_vec)
    crowded = single or (columns == 128 and (prologue is not None or sums))
    shallow = inputs <= 32 or columns == 128 or single or prologue is not None
    blocks, warps = _blocks(
        64 if few or crowded else 128, columns, 32 if shallow else 64, x.itemsize
    )
    across, row_blocks = _cdiv(outputs, blocks.columns), _cdiv(rows, blocks.rows)
    # Few partial sums, but several rounds of programs: their last one is not full.
    steps = _cdiv(row_blocks, _cdiv(4 * resident, across)) if sums else 1
    groups = _cdiv(row_blocks, steps)
    partials = new_partials(x, groups, outputs) if sums else None
    pointwise_kernel[(across * groups,)](
        x=placed.tensor,
        weight=weight,
        y=y,
        **prologue_arguments(prologue),
        partials=partials,
        pitch=placed.pitch,
        weight_pitch=weight.stride(0),
        y_pitch=y_pitch,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        steps=steps,
        depth=_loops(_cdiv(inputs, blocks.depth), x.device),
        transposed=transposed,
        ragged=inputs % (ACCESS // x.itemsize) != 0,
        vec=vec,
        weight_vec=weight_vec,
        dtype=_multiplied(x),
        blocks=blocks,
        num_warps=warps,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
    return y, moments_of(partials)


def _blocks(rows: int, columns: int, depth: int, itemsize: int) -> tuple[Blocks, int]:
    """With the number of warps. Products in float32 keep all their operands in registers."""
    if itemsize == 4:
        return Blocks(min(rows, 64), min(columns, 64), 16), 8
    return Blocks(rows, columns, depth), 8 if rows * columns >= 4096 else 4


def columns_of(channels: int) -> int:
    """How many channels a program takes: many, as long as few of them are none."""
    sizes = (32, 64, 128)
    least = _cdiv(channels, sizes[0]) * sizes[0]
    return max(size for size in sizes if 3 * _cdiv(channels, size) * size <= 4 * least)


def place_last(x: Tensor) -> Placed:
    """``x`` channels last; a dense copy where it is not."""
    placed = place(x)
    if placed.channels_last:
        return placed
    return Placed(x.contiguous(memory_format=torch.channels_last), True, x.shape[1])


def empty_last(like: Tensor, channels: int, height: int, width: int) -> Placed:
    """An uninitialised channels-last tensor whose pixels begin at multiples of an access."""
    access = ACCESS // like.itemsize
    pitch = _cdiv(channels, access) * access
    memory = like.new_empty(like.shape[0], height, width, pitch)
    return Placed(memory[..., :channels].movedim(-1, 1), True, pitch)


def vec_of(matrix: Placed) -> int:
    """The values that an access takes. In between is nothing: that compiles fewer kernels."""
    vec = ACCESS // matrix.tensor.itemsize
    aligned = matrix.pitch % vec == 0 and matrix.tensor.data_ptr() % ACCESS == 0
    return vec if aligned else 1


def prologue_arguments(prologue: Prologue | None) -> dict[str, Any]:
    """What a kernel takes."""
    if prologue is None:
        return {"gain": None, "shift": None, "scale": None, "act": "identity"}
    *vectors, act = prologue
    gain, shift, scale = (_aligned(vector) for vector in vectors)
    return {"gain": gain, "shift": shift, "scale": scale, "act": act}


def _aligned(vector: Tensor) -> Tensor:
    vector = vector.contiguous()
    return vector.clone() if vector.data_ptr() % ACCESS else vector


def new_partials(like: Tensor, groups: int, channels: int) -> Tensor:
    """For the sums of so many programs for each channel."""
    return like.new_empty(groups, KINDS.value, channels, dtype=torch.float32)


def moments_of(partials: Tensor | None) -> Tensor | None:
    """Mean and biased variance [2, C]."""
    if partials is None:
        return None
    groups, _, channels = partials.shape
    moments = partials.new_empty(2, channels)
    moments_kernel[(_cdiv(channels, TOTAL_CHANNELS.value),)](
        partials=partials, moments=moments, groups=groups, channels=channels
    )
    return moments


def _loops(count: int, device: torch.device) -> Any:
    # The interpreter of Triton 3.6 cannot run range() over its own numbers with numpy 2.4.
    return tl.constexpr(count) if device.type == "cpu" else count


def _multiplied(x: Tensor) -> Any:
    # The interpreter would multiply the bits of bfloat16 as integers.
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
