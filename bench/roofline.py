"""How long an iteration of a search would take at the speeds of the machine.

An estimate of the floor under the times of `iteration.py`. An iteration is taken apart into
operations; each counts with the longer of two times: its multiply-accumulates at the speed of a
large matrix product, and the bytes it has to move at the speed of a copy. Both speeds are measured
in the same run, with the same device, threads and dtype. The floor is the sum over all operations.

**Operations** are what a library computes in one go, and what is between them goes through memory.
In accesses of every number of a tensor, as fused by hand and not across operations:

* a convolution or linear layer has three products: y from x and the weight; the gradient of x from
  those of y and the weight; the gradient of the weight from x and the gradient of y. Each has the
  layer's MACs (`dmcp.cost` counts them), reads two tensors and writes one. The first layer has no
  gradient of x. The gradient of a weight is written by the widest pass, read and written by those
  that add to it;
* a norm with all that follows it, activation, mask and residual, goes over memory twice each way:
  3 accesses forward, 5 backward, and a residual's (`layers.Layer.accesses`). A stem whose weights
  are frozen takes only the gradient of its mask: 2 accesses backward;
* a pooling reads its input and writes its output, and the reverse;
* the update of the weights reads parameter, gradient and momentum, and writes the first and last.

Activations are of the case's dtype; weights are read in it and have gradients, momentum and updates
in float32. The architecture pass has two products for three, as weights are frozen there. The
random sub-networks are those that ours drew in this very run. Nothing counts for what is small or
can be had on the way: losses, expected costs, casts of weights, sums of gradients where branches
meet, α and its optimizer, views, and every call itself. All of that keeps the floor low.

**It is no strict bound.** An implementation may go below it where

* it fuses across operations (statistics in the convolution that feeds the norm);
* it mostly reads: a CPU's copy also reads the lines that it writes, which is not counted, so that
  reads may be up to 1.5 times as fast as the counted speed;
* its tensors are far smaller than the smallest copy, 1 MiB, and stay in the nearest caches;
* a convolution is computed with fewer multiplications than the MACs counted (Winograd's).

**The product** is PyTorch's or `dmcp`'s, whichever is faster: in bfloat16 on a CPU they differ by a
factor. On a GPU, float32 may be rounded as convolutions are allowed to round it there.

**The copy** is one of a tensor as large as the largest of the operation, again and again between
the same two places. There is no single bandwidth: the tensors of small images stay in caches, where
a copy is several times as fast as from main memory, and a floor at main memory's speed would be too
high for them. So copies of several sizes are measured, and an operation gets the fastest of those
that are not smaller than its tensors. An iteration is not so lucky: between forward and backward,
all other layers' tensors come along and take the cache. That is part of what is missing to 100 %;
calls, losses and kernels slower than a large product or a copy are others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from iteration_rivals import options
from layers import Layer, module_of, norm_layer, shape_of, trace
from timing import synchronise
from torch import fx, nn

import dmcp
from dmcp.graph import ChannelGraph
from dmcp.graph.units import AxisMap

FLOAT32 = 4
"""Bytes of a number of weights, gradients and momentum."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the matrices of the large product."""
COPIES = tuple(1 << power for power in (20, 22, 24, 26))
"""Bytes of the tensors that are copied, the largest beyond the caches of a core and of a GPU."""
REPEATS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Widths = Mapping[str, int]
Channels = tuple[int, Mapping[int, int]]
"""See `AxisMap.counts`."""


# --- What a network does --------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """How many numbers a tensor has, or how many MACs an operation, for one image.

    Attributes:
        factor: what no width changes.
        axes: its channels; they multiply.
    """

    factor: int
    axes: tuple[Channels, ...] = ()

    @staticmethod
    def of(factor: int, axes: Iterable[AxisMap | None]) -> Size:
        return Size(factor, tuple(axis.counts() for axis in axes if axis is not None))

    @staticmethod
    def like(shape: Sequence[int], axes: Sequence[AxisMap | None]) -> Size:
        """Of a tensor of this shape at full widths, some of whose dimensions are axes."""
        return Size.of(prod(shape) // prod(len(axis.unit) for axis in axes if axis), axes)

    def at(self, steps: Sequence[int]) -> int:
        """Where the units keep so many steps."""
        return self.factor * prod(
            fixed + sum(count * steps[unit] for unit, count in units.items())
            for fixed, units in self.axes
        )


@dataclass(frozen=True)
class Part:
    """An operation at certain widths.

    Attributes:
        macs: multiply-accumulates.
        bytes: moved.
        largest: bytes of the largest tensor among them.
    """

    macs: int
    bytes: int
    largest: int


@dataclass(frozen=True)
class Pass:
    """A forward and its backward.

    Attributes:
        steps: that each unit keeps.
        batch: images.
        itemsize: bytes of a number of activations, and of weights where they are multiplied.
        gradient: accesses to every gradient of a weight, 0 where weights are frozen.
    """

    steps: Sequence[int]
    batch: int
    itemsize: int
    gradient: int

    def activations(self, size: Size) -> int:
        """Bytes."""
        return size.at(self.steps) * self.batch * self.itemsize


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer; ``first`` if there are no weights in front of it."""

    macs: Size
    x: Size
    y: Size
    weight: Size
    first: bool

    def parts(self, now: Pass) -> Iterator[Part]:
        macs = self.macs.at(now.steps) * now.batch
        sides = [now.activations(self.x), now.activations(self.y)]
        numbers = self.weight.at(now.steps)
        weight, gradient = numbers * now.itemsize, numbers * FLOAT32
        for _ in range(1 if self.first else 2):
            yield Part(macs, sum(sides) + weight, max(*sides, weight))
        if now.gradient:
            yield Part(macs, sum(sides) + now.gradient * gradient, max(*sides, gradient))


@dataclass(frozen=True)
class Norm:
    """A batch norm with what follows it; ``first`` if it is right behind a first product."""

    y: Size
    layer: Layer
    first: bool

    def parts(self, now: Pass) -> Iterator[Part]:
        size = now.activations(self.y)
        only_mask = self.first and not now.gradient
        backward = 2 if only_mask else self.layer.accesses("bwd")
        for accesses in (self.layer.accesses("fwd"), backward):
            yield Part(0, accesses * size, size)


@dataclass(frozen=True)
class Pool:
    x: Size
    y: Size

    def parts(self, now: Pass) -> Iterator[Part]:
        sides = [now.activations(self.x), now.activations(self.y)]
        yield from [Part(0, sum(sides), max(sides))] * 2


Operation = Product | Norm | Pool
Plan = Mapping[str, Sequence[tuple[float, Part]]]
"""By the name of a pass: its parts, with how often an iteration has them."""

_PRODUCTS = (nn.Conv2d, nn.Linear)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


def operations(graph: ChannelGraph) -> list[Operation]:
    """Of a network on the meta device that calls each of its modules once, in execution order."""
    image = graph.inputs[0]
    whole = trace(dmcp.extract(graph, {}), image[-1])
    calls = {layer.module: layer for layer in graph.layers}
    axes: dict[fx.Node, AxisMap | None] = {}
    inside: set[fx.Node] = set()  # nodes with weights in them or in front
    stems: set[fx.Node] = set()
    found: list[Operation] = []
    for node in whole.graph.nodes:
        sources = node.all_input_nodes
        if not sources:
            axes[node] = None
            continue
        source, name = sources[0], str(node.target)
        known = graph.modules.get(name) if node.op == "call_module" else None
        axes[node] = axes[source] if known is None else known.outputs
        module = module_of(whole, node)
        x, y = (Size.like(shape_of(one), (axes[one],)) for one in (source, node))
        if isinstance(module, _PRODUCTS):
            call, weight = calls[name], f"{name}.weight"
            macs = Size.of(call.factor, call.axes)
            numbers = Size.like(module.weight.shape, graph.tensors[weight])
            first = not inside.intersection(sources)
            stems.update([node] if first else [])
            found.append(Product(macs, x, y, numbers, first))
        elif isinstance(module, nn.BatchNorm2d):
            found.append(Norm(y, norm_layer(whole, node), source in stems))
        elif isinstance(module, _POOLS):
            found.append(Pool(x, y))
        if inside.intersection(sources) or known is not None:
            inside.add(node)
    return found


# --- What the machine does ------------------------------------------------------------------------


@dataclass(frozen=True)
class Peaks:
    """Speeds of a machine.

    Attributes:
        macs_per_second: of a large matrix product.
        bytes_per_second: of copies, reads and writes together, by bytes of the tensor.
    """

    macs_per_second: float
    bytes_per_second: Mapping[int, float]

    def seconds(self, part: Part) -> tuple[float, float]:
        """The time of a part by its MACs, and by its bytes."""
        largest = max(self.bytes_per_second)
        copies = self.bytes_per_second.items()
        fastest = max(speed for size, speed in copies if size >= min(part.largest, largest))
        return part.macs / self.macs_per_second, part.bytes / fastest


def measure_peaks(device: torch.device, dtype: str) -> Peaks:
    """The product in this dtype, and copies of all sizes."""
    copies = {size: _copy_speed(device, size) for size in COPIES}
    return Peaks(_product_speed(device, DTYPES[dtype]), copies)


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device)
    left, product = left.to(dtype), torch.empty(side, side, dtype=dtype, device=device)
    cast = right.to(dtype)
    image = left.view(1, side // 32, 32, side).permute(0, 3, 1, 2)  # channels last
    ways: list[Callable[[], object]] = [
        lambda: torch.mm(left, cast, out=product),
        lambda: torch.ops.dmcp.pointwise(image, right),
    ]
    with _rounding_of_convolutions(device):
        return side**3 / min(_seconds(way, device) for way in ways)


@contextmanager
def _rounding_of_convolutions(device: torch.device) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _copy_speed(device: torch.device, size: int) -> float:
    source, target = torch.ones(2, size // FLOAT32, device=device)
    copies = max(COPIES) // size

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2 * size * copies / _seconds(copy, device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median over some calls, after one."""
    found = []
    for _ in range(1 + REPEATS):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


# --- The floor ------------------------------------------------------------------------------------


def hold_against(
    case: MutableMapping[str, Any],
    graph: ChannelGraph,
    sweeps: Sequence[tuple[Sequence[Widths], Peaks]],
) -> None:
    """Add the floor to what was found about a case, and to each rival its share of the time.

    Args:
        case: as `iteration.compare` returns it; gets ``"roofline"``, that of the sweep with the
            median floor, and its rivals ``"of_roofline"``, medians of ratios within a sweep.
        graph: of its network.
        sweeps: the widths of random sub-networks that ours drew in each, and the speeds beside it.
    """
    layers = operations(graph)
    floors = [floor(plan(case, graph, layers, drawn), peaks) for drawn, peaks in sweeps]
    ordered = sorted(floors, key=lambda one: one["floor_seconds"])
    case["roofline"] = ordered[(len(ordered) - 1) // 2]
    for row in case["rivals"].values():
        pairs = zip(floors, row["sweeps"], strict=True)
        shares = [floor["floor_seconds"] / seconds for floor, seconds in pairs]
        row["of_roofline"] = statistics.median(shares)


def plan(
    case: Mapping[str, Any],
    graph: ChannelGraph,
    layers: Sequence[Operation],
    drawn: Sequence[Widths],
) -> Plan:
    """An iteration of a case; a random pass is the mean over the widths that were drawn."""
    itemsize = DTYPES[case["dtype"]].itemsize
    narrowest = {unit.name: unit.choices[0] for unit in graph.units}

    def parts(widths: Widths, gradient: int, often: float = 1.0) -> list[tuple[float, Part]]:
        steps = [widths[unit.name] // unit.step for unit in graph.units]
        now = Pass(steps, case["batch"], itemsize, gradient)
        return [(often, part) for layer in layers for part in layer.parts(now)]

    share = (options(case["stage"]).sandwich - 2) / len(drawn)
    weights = FLOAT32 * dmcp.cost(graph, "params").of({})
    passes = {
        "widest": parts(graph.widths(), gradient=1),
        "narrowest": parts(narrowest, gradient=2),
        "random": [one for widths in drawn for one in parts(widths, 2, share)],
        "update": [(1.0, Part(0, 5 * weights, weights))],
    }
    if case["stage"] == 2:
        passes["architecture"] = parts(graph.widths(), gradient=0)
    return passes


def floor(passes: Plan, peaks: Peaks) -> dict[str, Any]:
    """The estimated least time of an iteration, ready for JSON.

    ``bound`` says which of both bounds the parts with most of that time, ``operations_share`` is
    the share of the time in parts that operations bound.
    """
    found = {name: _sum(parts, peaks) for name, parts in passes.items()}
    total = {key: sum(one[key] for one in found.values()) for key in found["widest"]}
    share = total.pop("operations_seconds") / total["floor_seconds"]
    return {
        **total,
        "bound": "operations" if share >= 0.5 else "bytes",
        "operations_share": share,
        "passes": found,
        "macs_per_second": peaks.macs_per_second,
        "bytes_per_second": {str(size): speed for size, speed in peaks.bytes_per_second.items()},
    }


def _sum(parts: Iterable[tuple[float, Part]], peaks: Peaks) -> dict[str, float]:
    found = dict.fromkeys(("floor_seconds", "operations_seconds", "macs", "bytes"), 0.0)
    for often, part in parts:
        by_macs, by_bytes = peaks.seconds(part)
        found["floor_seconds"] += often * max(by_macs, by_bytes)
        found["operations_seconds"] += often * by_macs if by_macs >= by_bytes else 0.0
        found["macs"] += often * part.macs
        found["bytes"] += often * part.bytes
    return found | {key: round(found[key]) for key in ("macs", "bytes")}
