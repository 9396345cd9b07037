"""The layers of the paper's networks that ops compute: batch norms, each with what follows it
(`norm_act`), depthwise and pointwise convolutions."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

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


@dataclass(frozen=True)
class DepthwiseLayer:
    """One kind of depthwise convolution, of [N, channels, height, width]."""

    channels: int
    height: int
    width: int
    kernel: int
    stride: int

    def __str__(self) -> str:
        return f"{self.channels}x{self.height}x{self.width}-k{self.kernel}-s{self.stride}"

    @property
    def elements(self) -> int:
        """Values of one image."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class PointwiseLayer:
    """One kind of convolution with a kernel of one pixel, of [N, inputs, height, width]."""

    inputs: int
    outputs: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.inputs}-{self.outputs}x{self.height}x{self.width}"

    @property
    def elements(self) -> int:
        """Values of one image, on both sides."""
        return (self.inputs + self.outputs) * self.height * self.width


AnyLayer = TypeVar("AnyLayer", Layer, DepthwiseLayer, PointwiseLayer)


def depthwise_layers(network: str, image_size: int = 224) -> Counter[DepthwiseLayer]:
    """The depthwise convolutions of a network, like `layers`."""
    return Counter(
        DepthwiseLayer(*shape, conv.kernel_size[0], conv.stride[0])
        for conv, shape in _convolutions(network, image_size)
        if conv.groups == conv.in_channels
    )


def pointwise_layers(network: str, image_size: int = 224) -> Counter[PointwiseLayer]:
    """The convolutions of a network with a kernel of one pixel, stride 1, like `layers`."""
    return Counter(
        PointwiseLayer(inputs, conv.out_channels, *size)
        for conv, (inputs, *size) in _convolutions(network, image_size)
        if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
    )


def layers(network: str, image_size: int = 224) -> Counter[Layer]:
    """The layers of a network for images of that size, in the order of execution, with counts."""
    whole = _network(network, image_size)
    return Counter(norm_layer(whole, node) for node in whole.graph.nodes if _is_norm(whole, node))


def largest(counts: Counter[AnyLayer], number: int) -> Counter[AnyLayer]:
    """The layers with most of a network's values."""
    chosen = sorted(counts, key=lambda layer: layer.elements * counts[layer], reverse=True)
    return Counter({layer: counts[layer] for layer in chosen[:number]})


def _convolutions(network: str, image_size: int) -> Iterator[tuple[nn.Conv2d, torch.Size]]:
    """With the shape of an image in front of each."""
    whole = _network(network, image_size)
    for node in whole.graph.nodes:
        conv = module_of(whole, node)
        if isinstance(conv, nn.Conv2d):
            (source,) = node.all_input_nodes
            yield conv, shape_of(source)


def _network(network: str, image_size: int) -> fx.GraphModule:
    with torch.device("meta"):
        model = NETWORKS[network]()
    return trace(model, image_size)


# --- Traced networks ------------------------------------------------------------------------------


def trace(model: nn.Module, image_size: int) -> fx.GraphModule:
    """A network on the meta device, with the shapes of all its tensors for images of that size."""
    whole = fx.symbolic_trace(model)
    ShapeProp(whole).propagate(torch.empty(2, 3, image_size, image_size, device="meta"))
    return whole


def shape_of(node: fx.Node) -> torch.Size:
    """Of what a node computes for one image."""
    shape: torch.Size = node.meta["tensor_meta"].shape[1:]
    return shape


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """That a node calls, if it calls one."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_norm(traced: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module_of(traced, node), nn.BatchNorm2d)


def norm_layer(traced: fx.GraphModule, norm: fx.Node) -> Layer:
    """A batch norm of a traced network, with what comes after it."""
    channels, height, width = shape_of(norm)
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
    module = None if reader is None else module_of(traced, reader)
    if isinstance(module, nn.ReLU6):
        return "relu6"
    return "relu" if isinstance(module, nn.ReLU) else "identity"
