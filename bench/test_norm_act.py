"""`norm_act` in every layer of the paper's networks, against its rivals.

All rivals of a layer take turns, sweep by sweep, so that what else the machine does meets all of
them; ratios are to be taken within a sweep (`table.py` does). Tensors are rotated, see `timing`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import rivals
import timing
import torch
from layers import DIRECTIONS, NETWORKS, Direction, Layer, largest, layers
from pytest_benchmark.fixture import BenchmarkFixture
from rivals import Forward, Tensors
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH, SIZE = 8, 224


@dataclass(frozen=True)
class Case:
    """One benchmark in one sweep; `count` is how often the network has the layer."""

    network: str
    layer: Layer
    count: int
    dtype: str
    sweep: int
    rival: str
    direction: Direction

    def __str__(self) -> str:
        place = f"{self.network}-{self.layer}-{self.dtype}"
        return f"{place}-{self.rival}-{self.direction}-{self.sweep}"


def cases(config: pytest.Config) -> Iterator[Case]:
    device = torch.device(config.getoption("device"))
    turns = [*itertools.product(DIRECTIONS, rivals.available(device)), ("both", "copy")]
    for network in NETWORKS:
        counts = layers(network, config.getoption("size") or SIZE)
        chosen = largest(counts, config.getoption("largest") or len(counts))
        for (layer, count), dtype in itertools.product(chosen.items(), DTYPES):
            for sweep in range(config.getoption("sweeps")):
                for direction, rival in turns:
                    yield Case(network, layer, count, dtype, sweep, rival, direction)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", list(cases(metafunc.config)), ids=str)


@functools.lru_cache(maxsize=1)
def tensor_sets(layer: Layer, dtype: str, batch: int, device: torch.device) -> list[Tensors]:
    first = Tensors.of(layer, batch, DTYPES[dtype], device)
    copies = timing.rotation(first.bytes, device) - 1
    return [first, *(first.mapped(Tensor.clone) for _ in range(copies))]


@functools.lru_cache(maxsize=len(rivals.NAMES))
def checked(rival: str, layer: Layer, dtype: str, batch: int, device: torch.device) -> Forward:
    """The rival's function, after it has computed the right thing."""
    forward = rivals.forward_of(rival, layer)
    rivals.check(forward, layer, tensor_sets(layer, dtype, batch, device)[0])
    return forward


def test_norm_act(benchmark: BenchmarkFixture, case: Case, settings: Any) -> None:
    batch = settings.batch or BATCH
    problem = (case.layer, case.dtype, batch, settings.device)
    sets = tensor_sets(*problem)
    accesses = 2 if case.rival == "copy" else case.layer.accesses(case.direction)
    x = sets[0].x
    benchmark.extra_info.update(
        op="norm_act",
        network=case.network,
        case=f"{batch}x{case.layer}",
        count=case.count,
        dtype=case.dtype,
        rival=case.rival,
        direction=case.direction,
        sweep=case.sweep,
        tensor_bytes=x.numel() * x.element_size(),
        bytes=accesses * x.numel() * x.element_size(),
    )
    if case.rival == "copy":
        copies = itertools.cycle(tensors.x.detach() for tensors in sets)
        timing.measure(benchmark, Tensor.clone, copies, settings.device)
        return
    with rivals.kernels_of(case.rival):
        forward = checked(case.rival, *problem)
        _measure(benchmark, functools.partial(forward, case.layer), case, sets, settings.device)


def _measure(
    benchmark: BenchmarkFixture, forward: Forward, case: Case, sets: list[Tensors], device: Any
) -> None:
    def run(tensors: Tensors) -> Tensor:
        return forward(*tensors.arguments)

    def differentiate(y: Tensor, tensors: Tensors) -> None:
        torch.autograd.grad(y, tensors.inputs, tensors.grad)

    def graphs() -> Iterator[tuple[Tensor, Tensors]]:
        """All forwards first: no backward finds what its own has just left in the cache."""
        while True:
            yield from [(run(tensors), tensors) for tensors in sets]

    match case.direction:
        case "fwd":
            timing.measure(benchmark, run, itertools.cycle(sets), device)
        case "bwd":
            timing.measure(benchmark, lambda graph: differentiate(*graph), graphs(), device)
        case "both":
            timing.measure(
                benchmark,
                lambda tensors: differentiate(run(tensors), tensors),
                itertools.cycle(sets),
                device,
            )
