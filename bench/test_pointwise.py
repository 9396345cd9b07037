"""The pointwise convolutions of MobileNetV2 and their gradients, against PyTorch's.

PyTorch's are timed for shapes they have met; what a new one costs them is not here. Where oneDNN
meets an illegal instruction in bfloat16, a hypervisor hides the shape of AMX's tiles from it:
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16`` helps.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timing
import torch
from layers import PointwiseLayer, largest, pointwise_layers
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from dmcp.ops.pointwise import SCHEMAS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NETWORK, BATCH, SIZE = "mobilenet_v2-1.5", 16, 64


class Tensors(NamedTuple):
    """What a layer and its gradients read, and the gradient of the weight so far."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    into: Tensor

    @classmethod
    def of(
        cls, layer: PointwiseLayer, batch: int, dtype: torch.dtype, device: torch.device
    ) -> Tensors:
        def image(channels: int) -> Tensor:
            values = torch.randn(batch, channels, layer.height, layer.width, device=device)
            return values.to(dtype, memory_format=torch.channels_last)

        weight = torch.randn(layer.outputs, layer.inputs, device=device)
        return cls(image(layer.inputs), weight, image(layer.outputs), torch.zeros_like(weight))


def ours(op: str, t: Tensors) -> Tensor:
    call = getattr(torch.ops.dmcp, op).default
    if op == "pointwise":
        return call(t.x, t.weight)
    if op == "pointwise_grad_input":
        return call(t.grad, t.weight)
    call(t.grad, t.x, t.into)
    return t.into


def aten(op: str, t: Tensors) -> Tensor:
    weight = t.weight.to(t.x.dtype)[:, :, None, None]
    if op == "pointwise":
        return F.conv2d(t.x, weight)
    of_input = op == "pointwise_grad_input"
    sizes = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    wanted = [of_input, not of_input, False]
    grads = torch.ops.aten.convolution_backward(t.grad, t.x, weight, None, *sizes, wanted)
    return grads[0] if of_input else t.into.add_(grads[1][:, :, 0, 0])


RIVALS = {"ours": ours, "aten": aten}


@functools.lru_cache(maxsize=1)
def tensor_sets(
    layer: PointwiseLayer, dtype: str, batch: int, device: torch.device
) -> list[Tensors]:
    first = Tensors.of(layer, batch, DTYPES[dtype], device)
    copies = timing.rotation(sum(tensor.nbytes for tensor in first), device) - 1
    return [first, *(Tensors(*map(Tensor.clone, first)) for _ in range(copies))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    counts = pointwise_layers(NETWORK, option("size") or SIZE)
    sweeps = range(option("sweeps"))
    metafunc.parametrize(
        ("layer", "count", "dtype", "sweep", "op", "rival"),
        [
            (layer, count, *turn)
            for layer, count in largest(counts, option("largest") or len(counts)).items()
            for turn in itertools.product(DTYPES, sweeps, SCHEMAS, RIVALS)
        ],
        ids=str,
    )


def test_pointwise(
    benchmark: BenchmarkFixture,
    layer: PointwiseLayer,
    count: int,
    dtype: str,
    sweep: int,
    op: str,
    rival: str,
    settings: Any,
) -> None:
    batch = settings.batch or BATCH
    sets = tensor_sets(layer, dtype, batch, settings.device)
    call: Callable[[Tensors], Tensor] = functools.partial(RIVALS[rival], op)
    for tensors in sets:
        tensors.into.zero_()
    exact = aten(op, Tensors(*(tensor.double() for tensor in sets[0])))
    assert (call(sets[0]).double() - exact).norm() <= 1e-2 * exact.norm()
    benchmark.extra_info.update(
        op=op,
        network=NETWORK,
        case=f"{batch}x{layer}",
        count=count,
        dtype=dtype,
        rival=rival,
        direction="both",
        sweep=sweep,
    )
    timing.measure(benchmark, call, itertools.cycle(sets), settings.device)
