"""The traced network: its units, its layers and how channels flow through it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dmcp.graph.units import AxisMap, ChannelUnit

NodeKind = Literal[
    "input", "dense", "depthwise", "norm", "activation", "linear_map", "join", "product", "output"
]


@dataclass(frozen=True)
class ModuleAxes:
    """Channel axes of a module that is called as the operator it stands for.

    Attributes:
        kind: what the module does to channels: ``"dense"`` mixes them (convolution, linear),
            ``"depthwise"`` and ``"norm"`` keep them apart.
        inputs: the axis it consumes, None if that never shrinks.
        outputs: the axis it produces.
    """

    kind: Literal["dense", "depthwise", "norm"]
    inputs: AxisMap | None
    outputs: AxisMap


@dataclass(frozen=True)
class ModuleSize:
    """An attribute of a module that tells the length of an axis, divided by ``per``: a number, or
    the item at ``place`` of a list."""

    module: str
    attribute: str
    axis: AxisMap
    per: int = 1
    place: int | None = None

    def set(self, module: nn.Module, length: int) -> None:
        """Write what follows from a length of the axis into a copy of the module."""
        if self.place is None:
            setattr(module, self.attribute, length // self.per)
            return
        items = getattr(module, self.attribute)
        changed = [length if n == self.place else item for n, item in enumerate(items)]
        setattr(module, self.attribute, type(items)(changed))


@dataclass(frozen=True)
class LayerCall:
    """One call that multiplies and sums: a convolution, a linear layer, a matrix product.

    Attributes:
        module: qualified name of the module that makes it.
        factor: multiply–accumulates per image are this times the lengths of ``axes``.
        axes: the dimensions that may shrink, at most two.
        numbers: it makes this many numbers per image times the lengths of ``outputs``.
        outputs: those of its output.
    """

    module: str
    factor: int
    axes: tuple[AxisMap, ...]
    numbers: int
    outputs: tuple[AxisMap, ...]


@dataclass(frozen=True)
class Node:
    """One operator call, as far as the place of a mask depends on it.

    Attributes:
        kind: ``"dense"`` mixes channels; ``"depthwise"`` and ``"linear_map"`` commute with a
            per-channel scale; ``"norm"`` cancels it; ``"activation"`` see ``homogeneous``;
            ``"join"`` combines several values; so does ``"product"``, which is zero where one of
            them is.
        module: qualified name of the module whose output this is, or None for a functional call.
        inputs: numbers of the nodes it reads.
        homogeneous: f(q v) = q f(v) for q >= 0, for an activation (ReLU, but not ReLU6) and a
            depthwise convolution (without bias).
        operator: its name, for pictures and messages.
        axes: (dimension, channels) of its output, for every dimension that may shrink.
        parameters: qualified names of the parameters it reads as they are stored.
        tainted: whether a dropped channel may be other than zero in its output (a sigmoid's).
        computed: whether it reads channels of something that no mask can be folded into: a computed
            parameter, a buffer.
        call: name of the captured call that it stands for.
    """

    kind: NodeKind
    module: str | None
    inputs: tuple[int, ...]
    homogeneous: bool = True
    operator: str = ""
    axes: tuple[tuple[int, AxisMap], ...] = ()
    parameters: tuple[str, ...] = ()
    tainted: bool = False
    computed: bool = False
    call: str = ""


@dataclass(frozen=True)
class Proof:
    """What `trace` compared on the model itself, with random weights: the network extracted at
    random widths, at random kept channels and at the narrowest widths against the whole network
    with the dropped channels zeroed, in evaluation mode and once in training mode.

    It says nothing about other image sizes than the example's where the code takes other branches
    for them, about code that asks for particular widths which were not drawn, and about outputs
    that are no tensors.

    Attributes:
        structures: networks that were compared after the last unit was refuted.
        forward_error: largest difference of an output, relative to the largest output.
        gradient_error: the same of the gradients of the parameters; NaN where the model has none.
        dtype: the precision that decided, ``"float32"`` or ``"float64"``.
        refuted: unit name -> what went wrong; these units are unsearchable.
        seconds: how long it took.
    """

    structures: int
    forward_error: float
    gradient_error: float
    dtype: str
    refuted: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class ChannelGraph:
    """What `trace` found out about a model.

    Attributes:
        model: the traced model itself, not a copy: extraction reads its current weights.
        units: all channel units in execution order, unsearchable ones included.
        tensors: qualified name -> what each dimension of a parameter or buffer carries, None for
            one that never shrinks. Tied parameters are there once.
        consumed: (qualified name, dimension) of the dimensions that read channels; all others
            produce or scale them.
        sizes: the module attributes that have to follow.
        modules: qualified name -> channel axes of the modules that are called as the operator they
            stand for, with their own weights.
        layers: every call that costs multiply–accumulates, in execution order.
        nodes: the flow of channels, in execution order.
        proof: what was checked; None for a model on the meta device, which cannot be run.
        inputs: shapes of the example's tensors without the first dimension, in order.
    """

    model: nn.Module
    units: tuple[ChannelUnit, ...]
    tensors: Mapping[str, tuple[AxisMap | None, ...]]
    consumed: frozenset[tuple[str, int]]
    sizes: tuple[ModuleSize, ...]
    modules: Mapping[str, ModuleAxes]
    layers: tuple[LayerCall, ...]
    nodes: tuple[Node, ...]
    proof: Proof | None = None
    inputs: tuple[tuple[int, ...], ...] = ()

    def widths(self) -> dict[str, int]:
        """The full width of every unit."""
        return {unit.name: unit.channels for unit in self.units}

    @property
    def searchable(self) -> tuple[ChannelUnit, ...]:
        """The units whose width may change."""
        return tuple(unit for unit in self.units if unit.searchable)

    @property
    def operators(self) -> tuple[str, ...]:
        """The names of the operators that channels flow through, in execution order."""
        return tuple(node.operator for node in self.nodes)

    def __repr__(self) -> str:
        return (
            f"ChannelGraph({type(self.model).__name__}, {len(self.units)} units, "
            f"{len(self.searchable)} searchable, {len(self.layers)} layers)"
        )
