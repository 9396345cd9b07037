from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmcp
from dmcp.graph import ChannelGraph
from dmcp.structure import graph_hash


class Other(nn.Sequential):
    """Another class, in another file than PyTorch's."""


def sequence(out: int = 8, step: int = 1, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, out, 3, **options),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, 4, 1, groups=step),
    )


def hash_of(
    model: nn.Module, *size: int, dtype: torch.dtype = torch.float32, **options: Any
) -> str:
    images = torch.zeros(size or (2, 3, 8, 8), dtype=dtype)
    return graph_hash(dmcp.trace(model, images, **options))


def test_it_is_the_same_in_every_process_and_machine() -> None:
    """Files that were written before stay readable: this is what the first process found."""
    found = "sha256:297c8c21f3e4a0812b9210dd5fc84772ed28a547ddaaca6a2242f3bc1f377397"
    assert hash_of(sequence()) == found
    assert hash_of(Other(*sequence()).double(), 5, 3, 16, 9, dtype=torch.float64) == found


class Branches(nn.Module):
    """Two branches; the order in which they are registered and run may be turned round."""

    def __init__(self, registered: str, run: str) -> None:
        super().__init__()
        self.run = run
        for name in registered:
            self.add_module(name, nn.Conv2d(3, 4, 1))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = {name: self.get_submodule(name)(x) for name in self.run}
        out: Tensor = self.head(torch.cat([branches["a"], branches["b"]], 1))
        return out


def test_order_does_not_matter_where_it_means_nothing() -> None:
    hashes = {hash_of(Branches(*order)) for order in (("ab", "ab"), ("ba", "ab"), ("ab", "ba"))}
    assert len(hashes) == 1


class Tied(nn.Module):
    """Two layers of one weight; either may be registered first."""

    def __init__(self, registered: str) -> None:
        super().__init__()
        for name in registered:
            self.add_module(name, nn.Linear(4, 4))
        self.a.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_a_shared_parameter_has_the_name_that_comes_first() -> None:
    assert hash_of(Tied("ab"), 2, 4) != hash_of(Tied("ba"), 2, 4)


def test_a_wrapper_gives_the_modules_other_names() -> None:
    assert hash_of(nn.Sequential(sequence())) != hash_of(sequence())


@pytest.mark.parametrize("place", ["around", "inside"])
def test_a_compiled_model_is_the_same_network(place: str) -> None:
    model = Branches("ab", "ab")
    if place == "inside":
        model.b = torch.compile(model.b, backend="eager")
    compiled = torch.compile(model, backend="eager") if place == "around" else model
    graph = dmcp.trace(compiled, torch.zeros(2, 3, 8, 8), min_width={"b": 2})
    plain = dmcp.trace(Branches("ab", "ab"), torch.zeros(2, 3, 8, 8))
    found = dmcp.Structure.of(plain, {"b": 3})
    assert found.extract(graph)(torch.zeros(2, 3, 8, 8)).shape == (2, 2, 8, 8)
    assert [unit.name for unit in graph.units] == ["a", "b", "head"]


def test_one_bare_layer_has_no_name_to_keep_when_it_is_compiled() -> None:
    layer = nn.Conv2d(3, 4, 1)
    assert hash_of(torch.compile(layer, backend="eager")) != hash_of(layer)


def test_weights_devices_grids_and_exclusions_do_not_matter(
    graph: ChannelGraph, block: type[nn.Module]
) -> None:
    model = block()
    net = dmcp.MarkovNet(model, torch.zeros(2, 3, 8, 8), groups=3, divisor=2)
    with torch.device("meta"):
        meta, images = block(), torch.zeros(2, 3, 8, 8)
    assert graph_hash(net.graph) == graph_hash(graph)
    assert graph_hash(dmcp.trace(meta, images)) == graph_hash(graph)
    assert hash_of(block(), exclude=["side"]) == graph_hash(graph)


@pytest.mark.parametrize(
    "model",
    [
        sequence(out=12),
        sequence(step=2),
        sequence(bias=False),
        nn.Sequential(*sequence(), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        nn.Sequential(*list(sequence())[:3], nn.Conv2d(8, 4, 3)),
        nn.Sequential(*list(sequence())[:3], nn.Conv2d(8, 5, 1)),
        nn.Sequential(nn.Identity(), *sequence()),
    ],
    ids=["width", "steps", "bias", "layer", "kernel", "classes", "names"],
)
def test_what_a_structure_depends_on_matters(model: nn.Module) -> None:
    assert hash_of(model) != hash_of(sequence())


def test_which_channel_goes_where_matters(block: type[nn.Module], graph: ChannelGraph) -> None:
    """The order of a concatenation, with the same units and shapes."""
    assert hash_of(block(reverse=True)) != graph_hash(graph)
