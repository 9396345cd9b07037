"""The traced network: its units, its layers and how channels flow through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dmcp.graph.units import AxisMap, ChannelUnit

NodeKind = Literal[
    "input", "dense", "depthwise", "norm", "activation", "linear_map", "join", "output"
]


@dataclass(frozen=True)
class ModuleAxes:
    """Channel axes of one module that holds parameters.

    Attributes:
        kind: what the module does to channels: ``"dense"`` mixes them (convolution, linear),
            ``"depthwise"`` and ``"norm"`` keep them apart.
        inputs: the axis it consumes; equal to ``outputs`` for a norm.
        outputs: the axis it produces.
    """

    kind: Literal["dense", "depthwise", "norm"]
    inputs: AxisMap
    outputs: AxisMap


@dataclass(frozen=True)
class LayerCall:
    """One call of a convolution or linear layer, what its cost depends on.

    Attributes:
        module: qualified name.
        kernel: weights per pair of input and output channels (k_h * k_w; 1 for linear).
        positions: output positions per image (H * W).
    """

    module: str
    kernel: int
    positions: int


@dataclass(frozen=True)
class Node:
    """One operator call, as far as the place of a mask depends on it.

    Attributes:
        kind: ``"dense"`` mixes channels; ``"depthwise"`` and ``"linear_map"`` commute with a
            per-channel scale; ``"norm"`` cancels it; ``"activation"`` see ``homogeneous``;
            ``"join"`` combines several values.
        module: qualified name of the module the call belongs to (that owns the parameters, or the
            activation module itself), or None for a functional call.
        inputs: numbers of the nodes it reads.
        homogeneous: f(q v) = q f(v) for q >= 0, for an activation (ReLU, but not ReLU6) and a
            depthwise convolution (without bias).
    """

    kind: NodeKind
    module: str | None
    inputs: tuple[int, ...]
    homogeneous: bool = True


@dataclass(frozen=True)
class ChannelGraph:
    """What `trace` found out about a model.

    Attributes:
        model: the traced model itself, not a copy: extraction reads its current weights.
        units: all channel units in execution order, unsearchable ones included.
        modules: qualified name -> channel axes, for every module that holds parameters.
        layers: every call of a convolution or linear layer, in execution order.
        nodes: the flow of channels, in execution order.
    """

    model: nn.Module
    units: tuple[ChannelUnit, ...]
    modules: Mapping[str, ModuleAxes]
    layers: tuple[LayerCall, ...]
    nodes: tuple[Node, ...]

    def widths(self) -> dict[str, int]:
        """The full width of every unit."""
        return {unit.name: unit.channels for unit in self.units}

    @property
    def searchable(self) -> tuple[ChannelUnit, ...]:
        """The units whose width may change."""
        return tuple(unit for unit in self.units if unit.searchable)

    def __repr__(self) -> str:
        return (
            f"ChannelGraph({type(self.model).__name__}, {len(self.units)} units, "
            f"{len(self.searchable)} searchable, {len(self.layers)} layers)"
        )
