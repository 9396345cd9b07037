"""Random networks out of everything that `dmcp` follows, held against the oracle.

A network is described by integers: a list of operators (`Step`) over a pool of feature maps, and
a list of outputs. Every operator takes its integers modulo what is possible, so every list is a
network, a shorter or smaller list is a simpler one, and the list is all it takes to reproduce it.

python tests/zoo/fuzz.py --graphs 500 --seed 0 [--minutes 10]
python tests/zoo/fuzz.py --program "([(0, 0, 0, 0, 0)], [(0, 0, 0)])"
"""

from __future__ import annotations

import argparse
import ast
import faulthandler
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from checks import TOLERANCE, Structure, macs, narrowest, prepared, structures
from handmade import Network
from oracle import difference, outputs
from torch import Tensor, nn

import dmcp

Step = tuple[int, int, int, int, int]
"""Operator, the map it reads and another one (both counted back from the newest), variant,
size."""

Output = tuple[int, int, int]
"""Kind of output, the map it reads (counted back from the newest), variant."""

Program = tuple[list[Step], list[Output]]

LARGEST = 12
"""Every integer of a program lies in 0 … this, but those that name an operator or an output."""

IMAGE = (2, 4, 8, 8)
MOST_CHANNELS = 32
WIDTHS = (8, 12, 6, 16, 4, 10, 24)


class Interpreted(nn.Module):
    """Runs instructions, each a function of modules, parameters and earlier maps.

    The functions close over integers alone, so that a copy of the network shares nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.instructions: list[tuple[Callable[..., Any], list[str], list[int]]] = []
        self.results: list[int] = []

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps: list[Any] = [image]
        for function, names, sources in self.instructions:
            held = [getattr(self, name) for name in names]
            maps.append(function(*held, *(maps[source] for source in sources)))
        return tuple(maps[result] for result in self.results)


class Builder:
    """Grows a network and runs it along the way, to know every shape.

    Attributes:
        net: the network.
        maps: what every instruction returned, the image first.
        pool: numbers of the feature maps that further operators may read.
        convs: names of the convolutions that may be called again, or share their weight.
        names: the operators in words.
    """

    def __init__(self) -> None:
        self.net = Interpreted()
        self.maps: list[Any] = [torch.randn(IMAGE)]
        self.pool = [0]
        self.convs: list[str] = []
        self.names: list[str] = []

    def layer(self, module: nn.Module) -> str:
        """Store a module under the next free name."""
        name = f"{type(module).__name__.lower()}{len(self.net._modules)}"
        setattr(self.net, name, module)
        return name

    def raw(self, *shape: int, name: str = "weight") -> str:
        """Store a parameter."""
        name = f"{name}_{len(self.net._parameters)}"
        setattr(self.net, name, nn.Parameter(torch.randn(shape)))
        return name

    def run(self, function: Callable[..., Any], *names: str, on: Sequence[int]) -> int:
        """Append an instruction; returns the number of its result."""
        held = [getattr(self.net, name) for name in names]
        with torch.no_grad():
            self.maps.append(function(*held, *(self.maps[source] for source in on)))
        self.net.instructions.append((function, list(names), list(on)))
        return len(self.maps) - 1

    def call(self, module: nn.Module, x: int) -> int:
        """Append a module's call."""
        return self.run(_called, self.layer(module), on=[x])

    def channels(self, x: int) -> int:
        return int(self.maps[x].shape[1])

    def side(self, x: int) -> int:
        return int(self.maps[x].shape[-1])

    def resized(self, x: int, side: int) -> int:
        """A map of this size."""
        if self.side(x) == side:
            return x
        return self.run(lambda m: F.adaptive_avg_pool2d(m, side), on=[x])

    def like(self, y: int, x: int) -> int:
        """``y``, made the shape of ``x``."""
        y = self.resized(y, self.side(x))
        if self.channels(y) == self.channels(x):
            return y
        return self.call(nn.Conv2d(self.channels(y), self.channels(x), 1, bias=False), y)

    def offer(self, x: int) -> None:
        """Let further operators read a map, if it has a shape they can deal with."""
        shape = self.maps[x].shape
        fits = len(shape) == 4 and 2 <= shape[1] <= MOST_CHANNELS and 2 <= shape[2] == shape[3] <= 8
        if fits and shape[0] == IMAGE[0]:
            self.pool.append(x)

    def back(self, steps: int) -> int:
        """The map ``steps`` back from the newest one."""
        return self.pool[-1 - steps % len(self.pool)]


def _called(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


Operator = Callable[[Builder, int, int, int, int], "int | Sequence[int] | None"]
"""Takes the builder, the map, another map, variant and size; returns the new maps, if any."""

OPERATORS: list[Operator] = []
HARD_CODED: set[str] = set()
"""Operators with sizes written into their code, which only the proof can find out."""


def operator(*, weight: int = 1, hard_coded: bool = False) -> Callable[[Operator], Operator]:
    """Register an operator, ``weight`` times as frequent."""

    def register(function: Operator) -> Operator:
        OPERATORS.extend([function] * weight)
        if hard_coded:
            HARD_CODED.add(function.__name__)
        return function

    return register


def _divisor(number: int, choice: int) -> int:
    """One of the divisors above one; 1 where there is only the number itself."""
    found = [n for n in range(2, number) if number % n == 0]
    return found[choice % len(found)] if found else 1


# Layers


@operator(weight=4)
def conv(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    kernel, stride = (1, 3)[v % 2], 2 if v % 4 > 1 and b.side(x) > 2 else 1
    options: dict[str, Any] = {"stride": stride, "padding": kernel // 2, "bias": v % 8 > 3}
    layer = b.layer(nn.Conv2d(b.channels(x), WIDTHS[s % len(WIDTHS)], kernel, **options))
    b.convs.append(layer)
    return b.run(_called, layer, on=[x])


@operator(weight=3)
def conv_norm(b: Builder, x: int, y: int, v: int, s: int) -> int:
    x = conv(b, x, y, v % 4, s)
    x = b.call(nn.BatchNorm2d(b.channels(x)), x)
    return b.run(_ACTIVATIONS[v % 2], on=[x])


@operator(weight=2)
def grouped(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    groups = _divisor(b.channels(x), s)
    out = groups * (1 + v % 4)
    if v % 3 == 2:
        return b.call(nn.ConvTranspose2d(b.channels(x), out, 3, padding=1, groups=groups), x)
    bias = v % 2 > 0
    return b.call(nn.Conv2d(b.channels(x), out, 3, padding=1, groups=groups, bias=bias), x)


@operator(weight=2)
def depthwise(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    c = b.channels(x)
    kind = (nn.Conv2d, nn.ConvTranspose2d)[v % 4 == 3]
    times, bias = (2 if v % 3 == 2 else 1), v % 2 > 0
    return b.call(kind(c, c * times, 3, padding=1, groups=c, bias=bias), x)


@operator()
def transposed(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    out, bias = WIDTHS[s % len(WIDTHS)], v % 2 > 0
    if b.side(x) <= 4:
        return b.call(nn.ConvTranspose2d(b.channels(x), out, 2, stride=2, bias=bias), x)
    return b.call(nn.ConvTranspose2d(b.channels(x), out, 3, padding=1, bias=bias), x)


@operator()
def raw_conv(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    c, out = b.channels(x), WIDTHS[s % len(WIDTHS)]
    weight = b.raw(out, c, 3, 3)
    if v % 3 == 0:
        return b.run(lambda w, m: F.conv2d(m, w, padding=1), weight, on=[x])
    x = b.run(lambda w, k, m: F.conv2d(m, w, k, padding=1), weight, b.raw(out, name="bias"), on=[x])
    if v % 3 == 1:
        return x
    x = b.run(F.relu, on=[x])
    return b.run(lambda w, m: F.conv_transpose2d(m, w, padding=1), weight, on=[x])


@operator()
def computed_weight(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    """A convolution whose weight is the result of something."""
    c, out = b.channels(x), WIDTHS[s % len(WIDTHS)]
    w, other = b.raw(out, c, 1, 1), b.raw(out, c, 1, 1)
    scale = b.raw(out, 1, 1, 1, name="scale")
    two: list[Callable[..., Tensor]] = [
        lambda w, o, m: F.conv2d(m, w + o),
        lambda w, o, m: F.conv2d(m, torch.cat([w, o])),
        lambda w, o, m: F.conv2d(m, w * o.sigmoid()),
        lambda w, o, m: F.conv2d(m, w.sigmoid() + o),
        lambda w, o, m: F.conv2d(m, w.flip(0)) + F.conv2d(m, o),
        lambda w, o, m: F.conv2d(m, w[:3]) - F.conv2d(m, o[:3]),
        lambda w, o, m: F.conv2d(m, w.softmax(0) * o),
        lambda w, o, m: F.conv2d(m, w - w.mean((1, 2, 3), keepdim=True)) * F.conv2d(m, o),
        lambda w, o, m: torch.einsum("nchw,oc->nohw", m, (w * o).flatten(1)),
        lambda w, o, m: F.conv2d(F.conv2d(m, w), o.transpose(0, 1)),
    ]
    if v % (len(two) + 1) == len(two):
        return b.run(lambda w, g, m: F.conv2d(m, w * g), w, scale, on=[x])
    return b.run(two[v % len(two)], w, other, on=[x])


@operator()
def linear(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    """A dense layer on channels that are moved to the end, in several ways."""
    c, out = b.channels(x), WIDTHS[s % len(WIDTHS)]
    layer = b.layer(nn.Linear(c, out, bias=v % 2 > 0))
    ways: list[Callable[..., Tensor]] = [
        lambda f, m: f(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda f, m: f(m.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, m.shape[2:]),
        lambda f, m: f(m.movedim(1, -1)).movedim(-1, 1),
        lambda f, m: (
            f(m.permute(0, 2, 3, 1).reshape(-1, m.shape[1]))
            .reshape(len(m), *m.shape[2:], -1)
            .permute(0, 3, 1, 2)
        ),
    ]
    return b.run(ways[v // 2 % len(ways)], layer, on=[x])


@operator()
def along_positions(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    """Layers that mix positions and treat channels alike."""
    side, bias = b.side(x), v % 2 > 0
    if v // 2 % 4 == 0:
        layer = b.layer(nn.Linear(side, side, bias=bias))
        return b.run(_called, layer, on=[x])
    if v // 2 % 4 == 1:
        layer = b.layer(nn.Linear(side**2, side**2, bias=bias))
        return b.run(lambda f, m: m + f(m.flatten(2)).view(m.shape), layer, on=[x])
    if v // 2 % 4 == 2:
        layer = b.layer(nn.LayerNorm(side, bias=bias))
        return b.run(_called, layer, on=[x])
    layer = b.layer(nn.Conv1d(side**2, side**2, 1, bias=bias))
    return b.run(
        lambda f, m: m + f(m.flatten(2).transpose(1, 2)).transpose(1, 2).view(m.shape),
        layer,
        on=[x],
    )


@operator(weight=2)
def norm(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    c = b.channels(x)
    groups = _divisor(c, s)
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.BatchNorm2d(c),
        lambda: nn.BatchNorm2d(c, affine=False),
        lambda: nn.BatchNorm2d(c, track_running_stats=False),
        lambda: nn.GroupNorm(groups, c),
        lambda: nn.GroupNorm(groups, c, affine=False),
        lambda: nn.GroupNorm((1, c)[s % 2], c),
        lambda: nn.InstanceNorm2d(c),
        lambda: nn.InstanceNorm2d(c, affine=True),
        lambda: nn.InstanceNorm2d(c, track_running_stats=True),
    ]
    return b.call(kinds[v % len(kinds)](), x)


@operator()
def norm_over_channels(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    c = b.channels(x)
    if v % 3 == 0:
        return b.run(lambda m: F.normalize(m, dim=1, eps=1e-3), on=[x])
    layer = b.layer(nn.LayerNorm(c) if v % 3 == 1 else nn.RMSNorm(c, eps=1e-5))
    return b.run(lambda f, m: f(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), layer, on=[x])


_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    F.relu6,
    F.silu,
    F.hardswish,
    torch.sigmoid,
    torch.tanh,
    lambda x: F.leaky_relu(x, 0.2),
    F.gelu,
    F.elu,
    F.hardsigmoid,
    F.softplus,
    lambda x: F.hardtanh(x, -1, 2),
    F.mish,
]


@operator(weight=2)
def activation(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    return b.run(_ACTIVATIONS[v % len(_ACTIVATIONS)], on=[x])


@operator()
def activation_module(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    c = b.channels(x)
    kinds = [nn.PReLU(c), nn.PReLU(), nn.ReLU(), nn.SiLU(), nn.Sigmoid(), nn.Dropout2d()]
    return b.call(kinds[v % len(kinds)], x)


# Elementwise


_BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.maximum,
    lambda x, y: x / (1 + y.abs()),
    torch.minimum,
    lambda x, y: torch.where(x > y, x, 0.5 * y),
    lambda x, y: torch.lerp(x, y, 0.3),
    lambda x, y: torch.add(x, y, alpha=2),
    lambda x, y: x * y.sigmoid(),
    lambda x, y: torch.where(y > 0, x, torch.zeros_like(x)),
    lambda x, y: torch.addcmul(x, x, y),
    lambda x, y: x - y.mean((2, 3), keepdim=True),
]


@operator(weight=4)
def binary(b: Builder, x: int, y: int, v: int, _s: int) -> int:
    return b.run(_BINARY[v % len(_BINARY)], on=[x, b.like(y, x)])


@operator(weight=2)
def learned(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    """A parameter that scales or shifts."""
    c, side = b.channels(x), b.side(x)
    shapes = [(c, 1, 1), (1, c, 1, 1), (), (1,), (c, side, side), (1, 1, side, side), (2, c, 1, 1)]
    weight = b.raw(*shapes[s % len(shapes)], name="scale")
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda w, m: m * w,
        lambda w, m: m + w,
        lambda w, m: w - m,
        lambda w, m: m * (1 + w),
        lambda w, m: m * w.sigmoid() + w,
        lambda w, m: m / (1 + w.abs()),
        lambda w, m: m * w + m,
        lambda w, m: torch.where(m > 0, m, m * w),
    ]
    return b.run(ways[v % len(ways)], weight, on=[x])


@operator()
def buffer(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    name = f"fixed_{len(b.net._buffers)}"
    b.net.register_buffer(name, torch.rand(b.channels(x), 1, 1))
    return b.run((torch.mul, torch.add, torch.sub)[v % 3], name, on=[x])


_SCALAR: list[Callable[[Tensor], Tensor]] = [
    lambda x: x * 2,
    lambda x: x + 1,
    lambda x: 1 - x,
    lambda x: x / 3,
    lambda x: x**2,
    lambda x: -x,
    lambda x: x.clamp(-1, 1),
    lambda x: x.clamp(min=0.1),
    lambda x: x.abs(),
    lambda x: x.tanh().exp(),
    lambda x: torch.where(x > 0, x, -1.0),
    lambda x: (x > 0).to(x.dtype) * x,
    lambda x: x.masked_fill(x < 0, 0.5),
    lambda x: x.sin() + x.cos(),
]


@operator()
def scalar(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    return b.run(_SCALAR[v % len(_SCALAR)], on=[x])


@operator()
def in_place(b: Builder, x: int, y: int, v: int, s: int) -> int:
    """On a fresh copy, and through views of it."""
    c = b.channels(x)
    k = 1 + s % (c - 1)
    y = b.like(y, x)

    def view(change: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Tensor]:
        def changed(m: Tensor, _: Tensor) -> Tensor:
            m = m.clone()
            change(m)
            return m

        return changed

    def written(m: Tensor, _: Tensor) -> Tensor:
        m = m.clone()
        m[:, :k] = 0.5
        return m

    def written_map(m: Tensor, o: Tensor) -> Tensor:
        m = m.clone()
        m[:, :k] = o[:, :k]
        return m

    def scaled(m: Tensor, o: Tensor) -> Tensor:
        m = m * 1
        m *= o
        m += 1
        return m

    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda m, _: m.clone().relu_(),
        lambda m, o: (m * 1).add_(o),
        scaled,
        written,
        written_map,
        view(lambda m: m[:, :k].add_(1)),
        view(lambda m: m.flatten(2).add_(1)),
        view(lambda m: m[:, k:].mul_(2)),
        view(lambda m: m.view(len(m), -1, *m.shape[2:]).sigmoid_()),
        view(lambda m: m.transpose(0, 1).sub_(0.5)),
        view(lambda m: m[:, 0].zero_()),
        view(lambda m: m.permute(0, 2, 3, 1).clamp_(min=0.2)),
        lambda m, o: (m * 1).copy_(o),
    ]
    return b.run(ways[v % len(ways)], on=[x, y])


@operator()
def on_the_map_itself(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    """In place, where earlier readers' and later readers' maps are the same memory."""
    if x == 0 or any(name.startswith("parts") for name in b.names):
        return x  # PyTorch refuses to write on one of several views
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m.add_(1),
        lambda m: m.mul_(2),
        lambda m: F.relu(m, inplace=True),
        lambda m: m.sub_(0.5),
    ]
    return b.run(ways[v % len(ways)], on=[x])


# Gates and attention


@operator(weight=2)
def squeeze_excite(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    c, inner = b.channels(x), WIDTHS[s % len(WIDTHS)]
    if v % 3 == 0:
        g = b.run(lambda m: m.mean((2, 3), keepdim=True), on=[x])
        g = b.run(F.relu, on=[b.call(nn.Conv2d(c, inner, 1), g)])
        g = b.call(nn.Conv2d(inner, c, 1), g)
        return b.run(lambda m, g: m * g.sigmoid(), on=[x, g])
    if v % 3 == 1:
        g = b.run(lambda m: F.adaptive_avg_pool2d(m, 1).flatten(1), on=[x])
        g = b.run(F.relu, on=[b.call(nn.Linear(c, inner), g)])
        g = b.call(nn.Linear(inner, c), g)
        return b.run(lambda m, g: m * F.hardsigmoid(g)[:, :, None, None], on=[x, g])
    # ECA: a convolution along the channels.
    g = b.run(lambda m: m.mean((2, 3)).unsqueeze(1), on=[x])
    g = b.call(nn.Conv1d(1, 1, 3, padding=1, bias=False), g)
    return b.run(lambda m, g: m * g.sigmoid().view(len(m), -1, 1, 1), on=[x, g])


@operator()
def spatial_gate(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m * m.mean(1, keepdim=True).sigmoid(),
        lambda m: m * m.sum(1, keepdim=True).tanh(),
        lambda m: m * m.amax(1, keepdim=True).tanh(),
        lambda m: m * m.pow(2).sum(1, keepdim=True).tanh(),
        lambda m: m + m.sum(1, keepdim=True),
        lambda m: m * m.max(1, keepdim=True)[0].sigmoid(),
    ]
    if v % (len(ways) + 1) < len(ways):
        return b.run(ways[v % (len(ways) + 1)], on=[x])
    g = b.call(nn.Conv2d(b.channels(x), 1, 3, padding=1), x)
    return b.run(lambda m, g: m * g.sigmoid(), on=[x, g])


@operator()
def along(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    """Over channels or over positions."""
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m.softmax(1),
        lambda m: m * m.flatten(2).softmax(2).view(m.shape),
        lambda m: m.cumsum(1),
        lambda m: m.cumsum(2),
        lambda m: m - m.mean((2, 3), keepdim=True),
        lambda m: m / (1 + m.std((2, 3), keepdim=True)),
        lambda m: m * m.amax((2, 3), keepdim=True).sigmoid(),
        lambda m: m / (1 + m.abs().sum((1, 2, 3), keepdim=True)),
        lambda m: m * m.mean(dim=(1, 2, 3), keepdim=True),
        lambda m: m + m.logsumexp((2, 3), keepdim=True),
        lambda m: m * m.flatten(1).softmax(1).view(m.shape),
        lambda m: m + m.mean(0, keepdim=True),
        lambda m: m.sum((0, 2, 3), keepdim=True) * m,
    ]
    return b.run(ways[v % len(ways)], on=[x])


@operator()
def product_of_maps(b: Builder, x: int, y: int, v: int, _s: int) -> int:
    same = b.like(y, x)
    y = b.resized(y, b.side(x))
    if v % 6 == 0:  # how alike two maps are, everywhere
        g = b.run(lambda m, o: torch.einsum("nchw,nchw->nhw", m, o), on=[x, same])
        return b.run(lambda m, g: m * g.unsqueeze(1).tanh(), on=[x, g])
    if v % 6 == 1:  # what one channel has of the others
        g = b.run(lambda m, o: m.flatten(2) @ o.flatten(2).transpose(1, 2), on=[x, y])
        return b.run(lambda g, o: (g @ o.flatten(2)).view(len(o), -1, *o.shape[2:]), on=[g, y])
    if v % 6 == 2:
        g = b.run(lambda m, o: torch.einsum("nchw,ndhw->ncd", m, o), on=[x, y])
        return b.run(lambda g, o: torch.einsum("ncd,ndhw->nchw", g.tanh(), o), on=[g, y])
    if v % 6 == 3:  # between positions
        g = b.run(lambda m, o: m.flatten(2).transpose(1, 2) @ o.flatten(2), on=[x, same])
        return b.run(
            lambda g, o: (o.flatten(2) @ g.softmax(-1)).view(len(o), -1, *o.shape[2:]), on=[g, y]
        )
    if v % 6 == 4:
        return b.run(lambda m, o: torch.einsum("nchw,nc->nchw", m, o.mean((2, 3))), on=[x, same])
    g = b.run(lambda m, o: m.flatten(2) @ o.flatten(2).transpose(1, 2), on=[x, x])
    return b.run(
        lambda g, o: (g.softmax(-1) @ o.flatten(2)).view(len(o), -1, *o.shape[2:]), on=[g, x]
    )


@operator()
def attention(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    heads = 1 + s % 2
    inner = heads * (2 + s % 3)
    qkv = b.layer(nn.Linear(b.channels(x), 3 * inner))
    out = b.layer(nn.Linear(inner, b.channels(x)))

    def attend(qkv: nn.Module, out: nn.Module, m: Tensor) -> Tensor:
        parts = qkv(m.flatten(2).transpose(1, 2)).chunk(3, -1)
        q, k, o = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)
        a = F.scaled_dot_product_attention(q, k, o, scale=(None, 0.5)[v % 2])
        y = out(a.transpose(1, 2).flatten(2)).transpose(1, 2)
        return y.unflatten(2, m.shape[2:])

    def by_hand(qkv: nn.Module, out: nn.Module, m: Tensor) -> Tensor:
        t = qkv(m.flatten(2).transpose(1, 2))
        q, k, o = t.reshape(*t.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ o
        y = out(a.transpose(1, 2).reshape(*t.shape[:2], -1))
        return m + y.transpose(1, 2).reshape(len(m), -1, *m.shape[2:])

    return b.run((attend, by_hand)[v // 2 % 2], qkv, out, on=[x])


# Moving channels about


@operator(weight=2)
def concat(b: Builder, x: int, y: int, v: int, s: int) -> int:
    y = b.resized(y, b.side(x))
    if v % 4 == 0:
        return b.run(lambda m, o: torch.cat([m, o], 1), on=[x, y])
    if v % 4 == 1:
        return b.run(lambda m: torch.cat([m, m], 1), on=[x])
    if v % 4 == 2:
        z = b.resized(b.back(s), b.side(x))
        return b.run(lambda m, o, p: torch.cat([m, o, m * p.mean(1, True)], 1), on=[x, y, z])
    return b.run(lambda m: torch.cat([F.relu(m), F.relu(-m)], 1), on=[x])


@operator()
def stacked(b: Builder, x: int, y: int, v: int, _s: int) -> int:
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda m, o: torch.stack([m, o], 1).flatten(1, 2),
        lambda m, o: torch.stack([m, o], 2).flatten(1, 2),
        lambda m, o: torch.stack([m, o]).sum(0),
        lambda m, o: torch.stack([m, o], 1).amax(1),
        lambda m, o: (torch.stack([m, o], 1).softmax(1) * torch.stack([o, m], 1)).sum(1),
    ]
    return b.run(ways[v % len(ways)], on=[x, b.like(y, x)])


@operator(weight=2)
def parts(b: Builder, x: int, _y: int, v: int, s: int) -> Sequence[int] | None:
    c = b.channels(x)
    k = 1 + s % (c - 1)
    ways: list[Callable[[Tensor], Any]] = [
        lambda m: m.chunk(2, 1),
        lambda m: m.split(k, 1),
        lambda m: m.split([k, c - k], 1),
        lambda m: m.tensor_split(2, 1),
        lambda m: m.unflatten(1, (2, -1)).unbind(1),
        lambda m: m.unflatten(1, (-1, 2)).unbind(2),
        lambda m: (m[:, :k], m[:, k:]),
        lambda m: (m[:, ::2], m[:, 1::2]),
        lambda m: m.chunk(3, 1),
    ]
    if c % 2 and v % len(ways) not in (1, 2, 6, 8):
        return None
    pieces = b.run(ways[v % len(ways)], on=[x])
    found = range(min(3, len(b.maps[pieces])))
    return [b.run(lambda p, n=n: p[n], on=[pieces]) for n in found]


@operator()
def gated_halves(b: Builder, x: int, _y: int, v: int, _s: int) -> int | None:
    def simple(m: Tensor) -> Tensor:
        left, right = m.chunk(2, 1)
        return left * right

    if b.channels(x) % 2:
        return None
    return b.run((lambda m: F.glu(m, 1), simple)[v % 2], on=[x])


@operator()
def picked(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    k = 1 + s % (b.channels(x) - 1)
    order = [(3 * n + k) % b.channels(x) for n in range(b.channels(x))]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m[:, :k],
        lambda m: m[:, k:],
        lambda m: m[:, -k:],
        lambda m: m[:, :-k],
        lambda m: m[:, ::2],
        lambda m: m.narrow(1, 0, k),
        lambda m: m * m[:, 0:1],
        lambda m: m * m.select(1, -1).unsqueeze(1),
        lambda m: m[:, order],
        lambda m: m[:, [k, 0, k]],
        lambda m: m.index_select(1, torch.tensor([0, k])),
        lambda m: m[:, 1:-1],
        lambda m: m * m[:, k].unsqueeze(1),
    ]
    return b.run(ways[v % len(ways)], on=[x])


@operator()
def reordered(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    g = _divisor(b.channels(x), s)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m.flip(1),
        lambda m: m.roll(1, 1),
        lambda m: m.flip(2),
        lambda m: m.roll(1, 2),
        lambda m: m + m.flip(1),
        lambda m: m.roll((1, 1), (1, 3)),
        lambda m: m.unflatten(1, (g, -1)).transpose(1, 2).flatten(1, 2),
        lambda m: m.unflatten(1, (-1, g)).transpose(1, 2).reshape(m.shape),
        lambda m: m.transpose(2, 3),
        lambda m: m.unflatten(1, (g, -1)).flip(1).flatten(1, 2),
    ]
    if v % (len(ways) + 1) < len(ways):
        return b.run(ways[v % (len(ways) + 1)], on=[x])
    return b.call(nn.ChannelShuffle(g), x)


@operator()
def padded(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    before, after = (s % 3, 2), (0, 4)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: F.pad(m, (0, 0, 0, 0, *before)),
        lambda m: F.pad(m, (0, 0, 0, 0, *after)),
        lambda m: F.pad(m, (0, 0, 0, 0, 1, 1), value=1.0),
        lambda m: F.pad(m[:, :, 1:, 1:], (1, 0, 1, 0)),
        lambda m: F.pad(m[:, :, 1:, 1:], (1, 0, 1, 0), value=0.5),
        lambda m: F.pad(m[:, :, 1:, 1:], (1, 0, 1, 0), mode="replicate"),
        lambda m: F.pad(m, (0, 0, 0, 0, -1, 0)),
    ]
    return b.run(ways[v % len(ways)], on=[x])


@operator()
def shuffled_pixels(b: Builder, x: int, _y: int, v: int, _s: int) -> int | None:
    def to_depth(m: Tensor) -> Tensor:
        n, _, h, w = m.shape
        m = m.view(n, -1, h // 2, 2, w // 2, 2)
        return m.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // 2, w // 2)

    def to_space(m: Tensor) -> Tensor:
        n, _, h, w = m.shape
        m = m.view(n, 2, 2, -1, h, w)
        return m.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, 2 * h, 2 * w)

    if v % 2 and b.side(x) <= 4 and b.channels(x) % 4 == 0:
        return b.run((lambda m: F.pixel_shuffle(m, 2), to_space)[v // 2 % 2], on=[x])
    if b.side(x) % 2 or b.side(x) < 4 or 4 * b.channels(x) > MOST_CHANNELS:
        return None
    ways = (
        lambda m: F.pixel_unshuffle(m, 2),
        to_depth,
        lambda m: torch.cat([m[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1),
    )
    return b.run(ways[v // 2 % len(ways)], on=[x])


@operator()
def repeated(b: Builder, x: int, y: int, v: int, _s: int) -> int:
    ways: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda m, _: m.repeat(1, 2, 1, 1),
        lambda m, _: m.repeat_interleave(2, 1),
        lambda m, _: m.tile(1, 2, 1, 1),
        lambda m, _: m.sum(1, keepdim=True).expand_as(m) * m,
        lambda m, o: m + o.sum(1, keepdim=True).tanh().expand(m.shape),
        lambda m, _: m.mean((2, 3), keepdim=True).expand(-1, -1, *m.shape[2:]),
        lambda m, o: m * o.sum(1, keepdim=True).repeat(1, m.shape[1], 1, 1),
        lambda m, _: m.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
        lambda m, _: m.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2),
        lambda m, o: torch.cat([m, o.sum(1, keepdim=True).expand(-1, 3, -1, -1)], 1),
    ]
    return b.run(ways[v % len(ways)], on=[x, b.resized(y, b.side(x))])


@operator()
def reshaped(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    g = _divisor(b.channels(x), s)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m.view(len(m), g, -1, *m.shape[2:]).sum(1),
        lambda m: m.view(len(m), -1, g, *m.shape[2:]).amax(2),
        lambda m: m.view(len(m), -1, g, *m.shape[2:]).mean(2),
        lambda m: m.view(len(m), g, -1, *m.shape[2:]).amax(1),
        lambda m: m.reshape(len(m), -1, m.shape[2] * m.shape[3]).unflatten(2, m.shape[2:]),
        lambda m: m.flatten(0, 1).unflatten(0, (len(m), -1)),
        lambda m: m.view(len(m), g, -1, *m.shape[2:]).softmax(1).flatten(1, 2),
        lambda m: m.view(len(m), -1, g, *m.shape[2:])[:, :, 0],
        lambda m: (m.view(len(m), g, -1, *m.shape[2:]) * 2).flatten(1, 2),
        lambda m: m.reshape(m.shape[0], -1).reshape(m.shape),
        lambda m: m.reshape(len(m), -1, *m.shape[2:]),
    ]
    if v % (len(ways) + 1) < len(ways):
        return b.run(ways[v % (len(ways) + 1)], on=[x])
    # One filter for all channels.
    layer = b.layer(nn.Conv2d(1, 1, 3, padding=1))
    return b.run(
        lambda f, m: f(m.reshape(-1, 1, *m.shape[2:])).reshape(m.shape),
        layer,
        on=[x],
    )


@operator(hard_coded=True)
def hard_coded(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    """Sizes that the code names outright."""
    n, c, h, w = b.maps[x].shape
    g = _divisor(c, s)
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: m.reshape(n, c, h, w),
        lambda m: m.view(n, g, c // g, h, w).transpose(1, 2).reshape(n, c, h, w),
        lambda m: m.view(len(m), g, m.shape[1] // g, *m.shape[2:]).transpose(1, 2).reshape(m.shape),
        lambda m: m.reshape(len(m), m.shape[1] // g, g, *m.shape[2:]).mean(2),
        lambda m: m * m.sum(1, keepdim=True).expand(n, c, h, w),
        lambda m: m / c,
        lambda m: torch.cat([m[:, m.shape[1] // 2 :], m[:, : m.shape[1] // 2]], 1),
        lambda m: m + torch.ones(c, 1, 1, dtype=m.dtype),
    ]
    if v % (len(ways) + 1) < len(ways):
        return b.run(ways[v % (len(ways) + 1)], on=[x])
    # The one map has to have as many channels as the other.
    y = b.call(nn.Conv2d(c, c, 1), x)
    return b.run(lambda m, o: o.flatten(2).view(m.shape), on=[x, y])


# Resolution


@operator()
def pooled(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    if b.side(x) < 4:
        return b.run(lambda m: F.max_pool2d(m, 3, 1, 1), on=[x])
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda m: F.max_pool2d(m, 2),
        lambda m: F.avg_pool2d(m, 2),
        lambda m: F.adaptive_avg_pool2d(m, 3),
        lambda m: F.adaptive_max_pool2d(m, 2),
        lambda m: F.avg_pool2d(m, 3, 1, 1) - m,
    ]
    return b.run(ways[v % len(ways)], on=[x])


@operator()
def interpolated(b: Builder, x: int, _y: int, v: int, _s: int) -> int:
    if b.side(x) <= 4:
        mode = ("nearest", "bilinear", "bicubic")[v % 3]
        return b.run(lambda m: F.interpolate(m, scale_factor=2, mode=mode), on=[x])
    mode = ("nearest", "bilinear", "area")[v % 3]
    return b.run(lambda m: F.interpolate(m, size=4, mode=mode), on=[x])


# Sharing


@operator(weight=2)
def residual(b: Builder, x: int, _y: int, v: int, s: int) -> int:
    c, inner = b.channels(x), WIDTHS[s % len(WIDTHS)]
    y = b.call(nn.Conv2d(c, inner, 1, bias=False), x)
    y = b.run(F.relu, on=[b.call(nn.BatchNorm2d(inner), y)])
    y = b.call(nn.Conv2d(inner, c, 3, padding=1, bias=v % 2 > 0), y)
    return b.run((torch.add, lambda m, o: F.relu(m + 0.5 * o))[v // 2 % 2], on=[x, y])


@operator()
def called_again(b: Builder, x: int, y: int, v: int, _s: int) -> Sequence[int] | int:
    """A layer that was called before, or a new one that is called on two maps."""
    c = b.channels(x)
    fitting = [n for n in b.convs if getattr(b.net, n).in_channels == c]
    if fitting and v % 3:
        return b.run(_called, fitting[v % len(fitting)], on=[x])
    layer = b.layer(nn.Conv2d(c, c, 3, padding=1))
    b.convs.append(layer)
    if v % 2:
        return b.run(_called, layer, on=[b.run(_called, layer, on=[x])])
    return [b.run(_called, layer, on=[m]) for m in (b.like(y, x), x)]


@operator()
def tied(b: Builder, x: int, y: int, v: int, _s: int) -> int:
    """A convolution with the weight of another one, and its own bias."""
    c = b.channels(x)
    fitting = [n for n in b.convs if getattr(b.net, n).in_channels == c]
    first = getattr(b.net, fitting[v % len(fitting)]) if fitting else None
    if first is None:
        return conv(b, x, y, v, 0)
    layer = nn.Conv2d(c, first.out_channels, first.kernel_size, padding=first.padding)
    layer.weight = first.weight
    return b.call(layer, x)


# Outputs


def _head(b: Builder, output: Output) -> int:
    kind, back, v = output
    x = b.back(back)
    c, side = b.channels(x), b.side(x)
    ways: list[Callable[[], int]] = [
        lambda: b.call(nn.Linear(c, 5), b.run(lambda m: m.mean((2, 3)), on=[x])),
        lambda: b.call(nn.Linear(c * side**2, 5), b.run(lambda m: m.flatten(1), on=[x])),
        lambda: b.call(nn.Conv2d(c, 3, 1, bias=v % 2 > 0), x),
        lambda: b.run(lambda w, m: m.mean((2, 3)) @ w, b.raw(c, 5), on=[x]),
        lambda: b.run(lambda m: m.sum(1), on=[x]),
        lambda: b.call(nn.Linear(c, 5, bias=False), b.run(lambda m: m.amax((2, 3)), on=[x])),
        lambda: b.run(lambda w, m: torch.einsum("nchw,ck->nk", m, w), b.raw(c, 5), on=[x]),
        lambda: b.call(
            nn.Linear(c * side**2, 5), b.run(lambda m: m.permute(0, 2, 3, 1).flatten(1), on=[x])
        ),
        lambda: x,
        lambda: b.run(lambda m: m.mean(), on=[x]),
        lambda: b.call(nn.Linear(side, 3), b.run(lambda m: m.pow(2).sum((1, 2)), on=[x])),
    ]
    return ways[kind % len(ways)]()


KINDS_OF_OUTPUT = 11


def build(program: Program) -> tuple[Interpreted, list[str]]:
    """The network of a program, and its operators' names."""
    steps, heads = program
    with torch.random.fork_rng():
        torch.manual_seed(0)
        b = Builder()
        # Read the image through a convolution, else most maps would have its few channels.
        b.offer(conv(b, 0, 0, 1, 0))
        for number, x, y, v, s in steps:
            function = OPERATORS[number % len(OPERATORS)]
            made = function(b, b.back(x), b.back(y), v, s)
            b.names.append(f"{function.__name__}:{v}")
            for new in [made] if isinstance(made, int) else made or ():
                b.offer(new)
        b.net.results = [_head(b, head) for head in heads]
    return b.net, b.names


@dataclass
class Finding:
    """What one network showed.

    Attributes:
        wrong: what differs from what it should be, empty if all is well.
        refuted: unit name -> why the proof did away with what the rules claimed.
        units, searchable: how many there are.
        hard_coded: whether sizes are written into its code.
        seconds: how long the trace took.
    """

    wrong: list[str] = field(default_factory=list)
    refuted: dict[str, str] = field(default_factory=dict)
    units: int = 0
    searchable: int = 0
    hard_coded: bool = False
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """What sort of mistake it is, for shrinking."""
        return self.wrong[0].partition(":")[0] if self.wrong else ""


def examine(program: Program) -> Finding:
    """Trace a program's network and hold it against the oracle."""
    net, names = build(program)
    finding = Finding(hard_coded=any(n.partition(":")[0] in HARD_CODED for n in names))
    network = prepared(Network(net, (torch.randn(IMAGE, generator=torch.Generator()),)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    whole = outputs(net, network.inputs)
    assert all(output.isfinite().all() for output in whole), "the program overflows"
    started = time.perf_counter()
    try:
        graph = dmcp.trace(net, network.inputs)
    except Exception as error:
        finding.wrong.append(f"trace raises {type(error).__name__}: {_innermost(error)}")
        return finding
    finding.seconds = time.perf_counter() - started
    finding.refuted = dict(graph.proof.refuted)
    finding.units, finding.searchable = len(graph.units), len(graph.searchable)
    if any(not torch.equal(before[name], tensor) for name, tensor in net.state_dict().items()):
        finding.wrong.append("the model is changed: by trace")
    for number, structure in enumerate(structures(graph)[1:]):
        try:
            finding.wrong += _compare(graph, structure, network, whole, number)
        except Exception as error:
            finding.wrong.append(f"comparing raises {type(error).__name__}: {_innermost(error)}")
    noise = all(bool((output.abs() < 1e-9).all()) for output in whole)
    if finding.refuted and not noise and not _claims_too_much(graph, network):
        finding.wrong.append(f"refuted without need: {finding.refuted}")
    return finding


def _innermost(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/dmcp/" in f.filename] or frames
    place = f"{own[-1].filename.rpartition('/')[2]}:{own[-1].lineno}"
    return f"{place}: {next(iter(str(error).splitlines()), '')}"


def _compare(
    graph: Any, structure: Structure, network: Network, whole: list[Tensor], number: int
) -> Iterator[str]:
    """What is wrong with one smaller network."""
    inputs = network.inputs
    small, big = structure.extract(graph), structure.zeroed(graph)
    found, wanted = outputs(small, inputs), outputs(big, inputs)
    if [x.shape for x in found] != [x.shape for x in whole]:
        yield f"shapes: {[*structure.widths.items()]}"
        return
    error = _apart(found, wanted)
    if not error < TOLERANCE:
        yield f"outputs: differ by {error:.1e} at {structure.kept}"
    # Where the network writes over what its gradients need, there are none.
    pulled = _pulled(big, inputs, number)
    error = 0.0 if pulled is None else _apart(_pulled(small, inputs, number) or [], pulled)
    if not error < TOLERANCE:
        yield f"gradients: of the input differ by {error:.1e} at {structure.kept}"
    widths = graph.widths() | structure.widths
    counted = dmcp.cost(graph, "macs").of(widths), macs(small, inputs)
    # Along a letter of size one torch.einsum has nothing to sum, and multiplies as it is.
    least = any(structure.widths.get(unit.name) == unit.step for unit in graph.units)
    tiny = least and any("einsum" in node.operator for node in graph.nodes)
    if counted[0] != counted[1] and not tiny:
        yield f"macs: {counted[0]} instead of {counted[1]} at {structure.widths}"
    counted = dmcp.cost(graph, "params").of(widths), sum(p.numel() for p in small.parameters())
    if counted[0] != counted[1]:
        yield f"params: {counted[0]} instead of {counted[1]} at {structure.widths}"


def _apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The difference relative to the largest number, unless all of them are but rounding."""
    floor = torch.full((1,), 1e-6, dtype=torch.double)
    pairs = ([torch.cat([x.flatten(), floor]) for x in side] for side in (found, wanted))
    return difference(*pairs)


def _pulled(model: nn.Module, inputs: Sequence[Tensor], seed: int) -> list[Tensor] | None:
    """The gradients of the inputs for random ones of the outputs, None where there are none."""
    generator = torch.Generator().manual_seed(seed)
    copies = [x.double().clone().requires_grad_() for x in inputs]
    ends = [y for y in model.double().eval()(*[x * 1 for x in copies]) if y.requires_grad]
    directions = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in ends]
    try:
        found = torch.autograd.grad(ends, copies, directions, allow_unused=True)
    except RuntimeError:
        return None
    return [torch.zeros_like(x) if g is None else g for x, g in zip(copies, found, strict=True)]


def unproved(graph: Any) -> Any:
    """The graph as the rules alone made it."""
    units = tuple(
        replace(
            unit,
            searchable=True,
            choices=tuple(range(unit.step, unit.channels + 1, unit.step)),
            reason="",
        )
        if unit.name in graph.proof.refuted
        else unit
        for unit in graph.units
    )
    return replace(graph, units=units)


def _claims_too_much(graph: Any, network: Network) -> bool:
    """Whether some smaller network that the rules allow is wrong."""
    raw = unproved(graph)
    whole = outputs(network.model, network.inputs)
    for number, structure in enumerate([*structures(raw, seed=5), narrowest(raw)]):
        try:
            if any(True for _ in _compare(raw, structure, network, whole, number)):
                return True
        except Exception:  # it does not even run
            return True
    return False


# Finding programs, and making them small


def drawn(source: random.Random, operators: int = 10) -> Program:
    """A random program."""

    def step() -> Step:
        # Mostly the newest map: chains are deeper than bushes.
        x = source.choice((0, 0, 0, 1, 2, 3, 4))
        rest = [source.randint(0, LARGEST) for _ in range(3)]
        return (source.randrange(len(OPERATORS)), x, *rest)

    steps = [step() for _ in range(source.randint(3, operators))]
    # The first heads more often: they read all channels and keep none.
    heads = [
        (source.choice((*range(4), *range(KINDS_OF_OUTPUT))), n and source.randint(1, 5), n)
        for n in range(source.choice((1, 1, 1, 2, 3)))
    ]
    return steps, heads


def shrunk(program: Program, fails: Callable[[Program], bool], seconds: float = 60) -> Program:
    """A smaller program that still fails: steps and outputs less, then smaller integers."""
    deadline = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < deadline:
        progress = False
        for candidate in _simpler(program):
            if time.monotonic() > deadline:
                break
            if _still(candidate, fails):
                program, progress = candidate, True
                break
    return program


def _still(program: Program, fails: Callable[[Program], bool]) -> bool:
    try:
        return fails(program)
    except Exception:  # it is no network any more
        return False


def _simpler(program: Program) -> Iterator[Program]:
    steps, heads = program
    for n in range(len(heads)):
        if len(heads) > 1:
            yield steps, heads[:n] + heads[n + 1 :]
    for n in reversed(range(len(steps))):
        yield steps[:n] + steps[n + 1 :], heads
    for part, items in enumerate((heads, steps)):
        for n, item in enumerate(items):
            for place, value in enumerate(item):
                for smaller in {0, value // 2} - {value}:
                    new = (*item[:place], smaller, *item[place + 1 :])
                    changed: Any = [*items[:n], new, *items[n + 1 :]]
                    yield (steps, changed) if part == 0 else (changed, heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--operators", type=int, default=10, help="the most of a network")
    parser.add_argument("--program", help="examine this one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.program is not None:
        program = ast.literal_eval(options.program)
        print(*build(program)[1])
        finding = examine(program)
        print(finding)
        sys.exit(bool(finding.wrong))
    sys.exit(_search(options.graphs, options.seed, options.minutes, options.operators))


def _search(graphs: int, seed: int, minutes: float, operators: int) -> bool:
    """Examine many programs and print what they showed; returns whether any is wrong."""
    deadline = time.monotonic() + 60 * minutes
    totals: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for number in range(seed, seed + graphs):
        if time.monotonic() > deadline:
            break
        program = drawn(random.Random(number), operators)
        faulthandler.dump_traceback_later(120)  # says where a trace hangs
        finding = examine(program)
        faulthandler.cancel_dump_traceback_later()
        totals["graphs"] += 1
        totals["units"] += finding.units
        totals["searchable"] += finding.searchable
        totals["milliseconds of tracing"] += int(1000 * finding.seconds)
        totals["wrong"] += bool(finding.wrong)
        refuted = "refuted, sizes in the code" if finding.hard_coded else "refuted"
        totals[refuted] += bool(finding.refuted)
        if finding.wrong:
            seen[finding.kind] += 1
            if seen[finding.kind] <= 5:
                _tell(number, finding.wrong[0], program, lambda f, k=finding.kind: f.kind == k)
        elif finding.refuted and not finding.hard_coded:
            _tell(number, f"refuted {finding.refuted}", program, _is_refuted)
    print(dict(totals), dict(seen), flush=True)
    return totals["wrong"] > 0


def _is_refuted(finding: Finding) -> bool:
    return bool(finding.refuted) and not finding.hard_coded


def _tell(seed: int, what: str, program: Program, alike: Callable[[Finding], bool]) -> None:
    small = shrunk(program, lambda p: alike(examine(p)))
    finding = examine(small)
    print(f"seed {seed}: {what}")
    print(f"  as small as it gets: --program {str(small)!r}")
    print(f"  {' '.join(build(small)[1])}, outputs {small[1]}: {finding.wrong} {finding.refuted}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
