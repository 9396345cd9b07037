"""The batch norms of the paper's networks, each with what follows it: what `norm_act` computes."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from dmcp.models import mobilenet_v2, resnet18, resnet50
from dmcp.ops import Activation, ResidualPlace

Direction = Literal["fwd", "bwd", "both"]
DIRECTIONS: tuple[Direction, ...] = ("fwd", "bwd", "both")

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2-1.0": partial(mobilenet_v2, width=1.0),
    "mobilenet_v2-1.5": partial(mobilenet_v2, width=1.5),
    "resnet18": resnet18,
    "resnet50": resnet50,
}


@dataclass(frozen=True)
class Layer:
    """One kind of batch norm: its output [N, channels, height, width] and what comes after it.

    Attributes:
        act: the activation.
        residual: where a residual joins, None where there is none.
    """

    channels: int
    height: int
    width: int
    act: Activation
    residual: ResidualPlace | None = None

    def __str__(self) -> str:
        kind = self.act if self.residual is None else f"{self.act}+residual"
        return f"{self.channels}x{self.height}x{self.width}-{kind}"

    @property
    def elements(self) -> int:
        """Values of one image."""
        return self.channels * self.height * self.width

    @property
    def scale_commutes(self) -> bool:
        """Whether the scale may be applied in front of the activation, so folded into the norm."""
        return self.act in ("identity", "relu")

    def accesses(self, direction: Direction) -> int:
        """How often a value of the layer is read or written in two passes over memory each way.

        Forward: x, x again and y. Backward: twice the gradient of y and x, and the gradient of x. A
        residual is read once more forward; in front of an activation also once backward, where its
        gradient is written and takes the place of y's in the second pass.
        """
        forward = 3 + (self.residual is not None)
        backward = 5 + 2 * (self.residual == "before")
        return {"fwd": forward, "bwd": backward, "both": forward + backward}[direction]


def layers(network: str, image_size: int = 224) -> Counter[Layer]:
    """The layers of a network for images of that size, in the order of execution, with counts."""
    with torch.device("meta"):
        traced = fx.symbolic_trace(NETWORKS[network]())
        ShapeProp(traced).propagate(torch.empty(2, 3, image_size, image_size))
    return Counter(_layer(traced, node) for node in traced.graph.nodes if _is_norm(traced, node))


def largest(counts: Counter[Layer], number: int) -> Counter[Layer]:
    """The layers with most of a network's values."""
    chosen = sorted(counts, key=lambda layer: layer.elements * counts[layer], reverse=True)
    return Counter({layer: counts[layer] for layer in chosen[:number]})


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(_module(traced, node), nn.BatchNorm2d)


def _layer(traced: fx.GraphModule, norm: fx.Node) -> Layer:
    _, channels, height, width = norm.meta["tensor_meta"].shape
    shape = (channels, height, width)
    reader = _only_reader(norm)
    if reader is None or not _is_sum(reader):
        return Layer(*shape, _activation(traced, reader))
    # Where both terms of a sum come from norms, the first one takes the sum along.
    first, second = reader.args[:2]
    assert isinstance(first, fx.Node)
    if norm is second and _is_norm(traced, first) and _only_reader(first) is reader:
        return Layer(*shape, "identity")
    act = _activation(traced, _only_reader(reader))
    return Layer(*shape, act, "after" if act == "identity" else "before")


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.add


def _activation(traced: fx.GraphModule, reader: fx.Node | None) -> Activation:
    module = None if reader is None else _module(traced, reader)
    if isinstance(module, nn.ReLU6):
        return "relu6"
    return "relu" if isinstance(module, nn.ReLU) else "identity"
