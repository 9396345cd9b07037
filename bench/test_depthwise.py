"""The depthwise convolutions of MobileNetV2 and their gradients, against PyTorch's.

PyTorch's are timed for shapes they have met; what a new one costs them is not here. Where oneDNN
meets an illegal instruction in bfloat16, the machine announces AMX and has none:
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
from layers import DepthwiseLayer, depthwise_layers, largest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from dmcp.ops.depthwise import SCHEMAS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NETWORK, BATCH, SIZE = "mobilenet_v2-1.5", 16, 64
CPU = torch.device("cpu")


class Tensors(NamedTuple):
    """What a layer and its gradients read."""

    x: Tensor
    weight: Tensor
    grad: Tensor

    @classmethod
    def of(cls, layer: DepthwiseLayer, batch: int, dtype: torch.dtype) -> Tensors:
        kernel, padding = layer.kernel, layer.kernel // 2
        weight = torch.randn(layer.channels, 1, kernel, kernel)
        x = torch.randn(batch, layer.channels, layer.height, layer.width)
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x, weight, None, layer.stride, padding, groups=layer.channels)
        return cls(x.to(dtype), weight, torch.randn_like(y).to(dtype))


def ours(op: str, layer: DepthwiseLayer, t: Tensors) -> Tensor:
    call = getattr(torch.ops.dmcp, op).default
    if op == "depthwise":
        return call(t.x, t.weight, layer.stride)
    if op == "depthwise_grad_input":
        return call(t.grad, t.weight, layer.height, layer.width, layer.stride)
    return call(t.grad, t.x, layer.kernel, layer.stride)


def aten(op: str, layer: DepthwiseLayer, t: Tensors) -> Tensor:
    weight, padding = t.weight.to(t.x.dtype), layer.kernel // 2
    if op == "depthwise":
        return F.conv2d(t.x, weight, None, layer.stride, padding, groups=layer.channels)
    of_input = op == "depthwise_grad_input"
    sizes = ([layer.stride] * 2, [padding] * 2, [1, 1], False, [0, 0], layer.channels)
    wanted = [of_input, not of_input, False]
    grads = torch.ops.aten.convolution_backward(t.grad, t.x, weight, None, *sizes, wanted)
    return grads[wanted.index(True)]


RIVALS = {"ours": ours, "aten": aten}


@functools.lru_cache(maxsize=1)
def tensor_sets(layer: DepthwiseLayer, dtype: str, batch: int) -> list[Tensors]:
    first = Tensors.of(layer, batch, DTYPES[dtype])
    copies = timing.rotation(sum(tensor.nbytes for tensor in first), CPU) - 1
    return [first, *(Tensors(*map(Tensor.clone, first)) for _ in range(copies))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    counts = depthwise_layers(NETWORK, option("size") or SIZE)
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


def test_depthwise(
    benchmark: BenchmarkFixture,
    layer: DepthwiseLayer,
    count: int,
    dtype: str,
    sweep: int,
    op: str,
    rival: str,
    settings: Any,
) -> None:
    if settings.device.type != "cpu":
        pytest.skip("the depthwise ops have kernels for the CPU alone")
    batch = settings.batch or BATCH
    sets = tensor_sets(layer, dtype, batch)
    call: Callable[[Tensors], Tensor] = functools.partial(RIVALS[rival], op, layer)
    exact = aten(op, layer, Tensors(*map(Tensor.double, sets[0])))
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
