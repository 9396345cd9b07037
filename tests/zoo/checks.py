"""What is measured on every network of the zoo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from handmade import Network
from oracle import difference, outputs, randomise, zeroed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import dmcp

TOLERANCE = 1e-9
"""Relative difference in float64 up to which two networks are the same."""


def prepared(network: Network, seed: int = 0) -> Network:
    """The network in float64 and evaluation mode, with random numbers everywhere, in place."""
    network.model.double().eval()
    randomise(network.model, seed)
    network.inputs = tree_map_only(Tensor, _double, network.inputs)
    return network


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@dataclass(frozen=True)
class Structure:
    """A smaller network: its channels in one unit each, those that stay ascending."""

    widths: dict[str, int]
    kept: dict[str, list[int]]
    prefix: bool

    def extract(self, graph) -> nn.Module:
        if self.prefix:
            return dmcp.extract(graph, self.widths)
        return dmcp.extract(graph, kept=self.kept)

    def zeroed(self, graph) -> nn.Module:
        units = {unit.name: unit.channels for unit in graph.units}
        dropped = {
            name: sorted(set(range(units[name])) - set(kept)) for name, kept in self.kept.items()
        }
        return zeroed(graph, dropped)


def structures(graph, seed: int = 0) -> list[Structure]:
    """Two random prefixes and one random subset of every searchable unit's channels."""
    generator = torch.Generator().manual_seed(seed)
    return [_structure(graph, generator, prefix=prefix) for prefix in (True, True, False)]


def narrowest(graph) -> Structure:
    """Every searchable unit as narrow as it may be."""
    widths = {unit.name: unit.choices[0] for unit in graph.units if unit.searchable}
    return Structure(widths, {name: list(range(width)) for name, width in widths.items()}, True)


def _structure(graph, generator: torch.Generator, *, prefix: bool) -> Structure:
    widths, kept = {}, {}
    for unit in graph.units:
        if not unit.searchable:
            continue
        width = unit.choices[int(torch.randint(len(unit.choices), (), generator=generator))]
        steps = torch.arange(unit.channels // unit.step)
        if not prefix:
            steps = torch.randperm(len(steps), generator=generator)
        stay = steps[: width // unit.step].sort().values
        channels = stay[:, None] * unit.step + torch.arange(unit.step)
        widths[unit.name], kept[unit.name] = width, channels.flatten().tolist()
    return Structure(widths, kept, prefix)


def error(graph, structure: Structure, inputs: Sequence[Tensor]) -> float:
    """How far the extracted network is from the zeroed one."""
    small, big = structure.extract(graph), structure.zeroed(graph)
    return difference(outputs(small, inputs), outputs(big, inputs))


def macs(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply–accumulates per image, as PyTorch counts them."""
    return sum(macs_by_module(model, inputs).values())


@torch.no_grad()
def macs_by_module(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Multiply–accumulates per image of every module's own code, without its children's."""
    images = len(inputs[0])
    fast = torch.backends.mha.get_fastpath_enabled()
    # Fused attention hides its matrix products from the counter.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            outputs(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    flops = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    root = type(model).__name__
    totals = {name: flops[name] for name in flops if name.split(".")[0] == root}
    own = dict(totals) | {"": flops.get("Global", 0) - totals.get(root, 0)}
    for name, total in totals.items():
        parent = _parent(name, totals)
        if parent is not None:
            own[parent] -= total
    return {name: count // (2 * images) for name, count in own.items()}


def _parent(name: str, known: dict[str, int]) -> str | None:
    """The nearest module around this one that was called itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in known:
            return name
    return None


def searchable_share(graph, inputs: Sequence[Tensor]) -> float:
    """The share of multiply–accumulates in layers that cost less in the narrowest network."""
    whole = macs_by_module(graph.model, inputs)
    narrow = macs_by_module(narrowest(graph).extract(graph), inputs)
    shrinks = sum(count for name, count in whole.items() if narrow.get(name, 0) < count)
    return shrinks / max(sum(whole.values()), 1)
