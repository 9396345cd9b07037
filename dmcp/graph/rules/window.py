"""Operators on the last dimensions: pooling, resampling, patches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dmcp.graph.rules.registry import rule
from dmcp.graph.values import Value

if TYPE_CHECKING:
    from dmcp.graph.tracer import Tracer


def _spatial(tracer: Tracer, x: Value, dims: int) -> Any:
    """Channels lie in front of the last ``dims`` dimensions."""
    tracer.block(x.axes[-dims:], "a window slides over its channels")
    axes = [*x.axes[: len(x.shape) - dims], *([None] * dims)]
    results = [tracer.emit("linear_map", [x], axes, shape=s) for s in tracer.call.shapes]
    return results if tracer.call.several else results[0]


def _register() -> None:
    pools = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for dims in (1, 2, 3):
        names = [f"{pool}{dims}d" for pool in pools]
        names += [f"max_pool{dims}d_with_indices", f"max_unpool{dims}d"]
        names += [f"upsample_nearest{dims}d", f"_upsample_nearest_exact{dims}d"]
        names += [f"replication_pad{dims}d", f"reflection_pad{dims}d"]
        names += {1: ["upsample_linear1d"], 3: ["upsample_trilinear3d"]}.get(dims, [])
        if dims == 2:
            names += ["upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa"]
        rule(*names)(lambda tracer, x, *_, dims=dims: _spatial(tracer, x, dims))


_register()


@rule("grid_sampler", "grid_sampler_2d")
def grid_sample(tracer: Tracer, x: Value, grid: Value, *_: Any) -> Value:
    tracer.block(grid.axes, "it says where to sample")
    return tracer.emit("join", [x, grid], [*x.axes[:2], None, None])


@rule("pixel_shuffle")
def pixel_shuffle(tracer: Tracer, x: Value, factor: int) -> Value:
    """factor² channels make one."""
    axes = list(x.axes)
    axis = axes[-3]
    if axis is not None:
        rows = axis.slots.reshape(-1, factor * factor)
        axes[-3] = axis.carrying(tracer.table.tie_rows(rows.T))
    return tracer.emit("linear_map", [x], axes)


@rule("pixel_unshuffle")
def pixel_unshuffle(tracer: Tracer, x: Value, factor: int) -> Value:
    """One channel makes factor²."""
    axes = list(x.axes)
    axis = axes[-3]
    if axis is not None:
        axes[-3] = axis.carrying(np.repeat(axis.slots, factor * factor))
    return tracer.emit("linear_map", [x], axes)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(tracer: Tracer, x: Value, groups: int) -> Value:
    """Channel (group, place) goes to (place, group)."""
    axes = list(x.axes)
    axis = axes[1]
    if axis is not None:
        columns = tracer.table.tie_rows(axis.slots.reshape(groups, -1))
        axes[1] = axis.carrying(np.repeat(columns, groups))
    return tracer.emit("linear_map", [x], axes)
