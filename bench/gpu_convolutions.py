"""Which convolutions Triton's fused kernels win on a GPU: cuDNN and `norm_act` against them.

    python bench/gpu_convolutions.py
    python bench/gpu_convolutions.py --dry-run

Of every depthwise and every dense 1x1 convolution of stride 1 in MobileNetV2-1.5 and ResNet-50 it
times three pieces of a training step, in bfloat16:

* forward: from the input of the norm before it to its own output and the moments of that. PyTorch
  normalises, convolves and sums in three passes over memory, the fused kernel does all in one.
* input: the gradient of what it convolves.
* weight: the gradient of its weight. The fused kernel reads the input of the norm before it, so
  that the normalised values need not be kept.

For the other convolutions there are no kernels. A ratio above 1 is how much faster Triton is.
Caches are emptied before each call. The dry run interprets the kernels on the CPU, on tiny images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from layers import NETWORKS
from machine import cache_bytes
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import dmcp.ops  # noqa: F401  (registers its operations)
from dmcp.kernels import depthwise, pointwise

COMPARED = ("mobilenet_v2-1.5", "resnet50")
PIECES = ("forward", "input", "weight")
ROUNDS = 20
EPS = 1e-5

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Convolution:
    """One kind of convolution, and the activation in front of it.

    Attributes:
        kernel: 1, or that of a depthwise convolution.
        size: height and width of its input.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: tuple[int, int]
    act: str

    def __str__(self) -> str:
        kind = "pointwise" if self.kernel == 1 else f"depthwise {self.kernel}x{self.kernel}"
        height, width = self.size
        return f"{kind} /{self.stride} {self.inputs}->{self.outputs} {height}x{width} {self.act}"


def convolutions(network: str) -> Counter[Convolution]:
    """Those of a network that there are kernels for, in the order of execution, with counts."""
    with torch.device("meta"):
        traced = fx.symbolic_trace(NETWORKS[network]())
        ShapeProp(traced).propagate(torch.empty(2, 3, 224, 224))
    modules = dict(traced.named_modules())
    return Counter(
        _convolution(module, modules, node)
        for node in traced.graph.nodes
        if isinstance(module := modules.get(str(node.target)), nn.Conv2d) and _has_kernels(module)
    )


def _has_kernels(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return depthwise or (conv.kernel_size == (1, 1) and conv.stride == (1, 1))


def _convolution(conv: nn.Conv2d, modules: dict[str, nn.Module], node: fx.Node) -> Convolution:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before = modules.get(str(source.target))
    act = "relu6" if isinstance(before, nn.ReLU6) else "identity"
    act = "relu" if isinstance(before, nn.ReLU) else act
    _, _, *size = source.meta["tensor_meta"].shape
    shape = conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0]
    return Convolution(*shape, (size[0], size[1]), act)


def calls(conv: Convolution, batch: int, device: torch.device) -> tuple[Calls, Calls]:
    """The three pieces by PyTorch and by Triton."""

    def draw(channels: int, height: int, width: int) -> Tensor:
        values = torch.randn(batch, channels, height, width, device=device, dtype=torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last)

    height, width = conv.size
    dense, stride, kernel = conv.kernel == 1, conv.stride, conv.kernel
    groups = 1 if dense else conv.inputs
    x = draw(conv.inputs, height, width)
    grad = draw(conv.outputs, -(-height // stride), -(-width // stride))
    weight = torch.randn(conv.outputs, conv.inputs // groups, kernel, kernel, device=device)
    mean, var = torch.ops.dmcp.norm_stats(x, None, None, 0.0)
    scale = torch.rand(conv.inputs, device=device)
    gain = torch.rsqrt(var + EPS)
    prologue = pointwise.Prologue(gain, -mean * gain, scale, conv.act)
    half = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    padding = kernel // 2

    def normalised() -> Tensor:
        norm = (mean, var, None, None, scale, None, EPS, conv.act, False)
        return torch.ops.dmcp.norm_act(x, *norm)

    def forward() -> object:
        y = torch.conv2d(normalised(), half, None, stride, padding, 1, groups)
        return torch.ops.dmcp.norm_stats(y, None, None, 0.0)

    kept = normalised()

    def backward(wanted: list[bool]) -> object:
        return torch.ops.aten.convolution_backward(
            *(grad, kept, half, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups),
            wanted,
        )

    by_torch: Calls = {
        "forward": forward,
        "input": lambda: backward([True, False, False]),
        "weight": lambda: backward([False, True, False]),
    }
    if dense:
        matrix, into = weight.flatten(1), torch.zeros_like(weight).flatten(1)
        by_triton: Calls = {
            "forward": lambda: pointwise.pointwise(x, matrix, prologue, sums=True),
            "input": lambda: pointwise.pointwise_grad_input(grad, matrix),
            "weight": lambda: pointwise.pointwise_grad_weight(grad, x, into, prologue),
        }
    else:
        by_triton = {
            "forward": lambda: depthwise.depthwise(x, weight, stride, prologue, sums=True),
            "input": lambda: depthwise.depthwise_grad_input(grad, weight, height, width, stride),
            "weight": lambda: depthwise.depthwise_grad_weight(grad, x, kernel, stride, prologue),
        }
    return by_torch, by_triton


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls after the first ones."""
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    for _ in range(3):
        call()
    cache = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)
    spans = []
    for _ in range(ROUNDS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()  # also keeps the GPU busy while the call is being launched
        begun.record()
        call()
        ended.record()
        spans.append((begun, ended))
    torch.cuda.synchronize(device)
    return statistics.median(begun.elapsed_time(ended) for begun, ended in spans) / 1e3


def compare(
    counts: Counter[Convolution], batch: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Of each convolution, the seconds of each piece by either."""
    for conv, count in counts.items():
        times = [
            {piece: seconds(by[piece], device) for piece in PIECES}
            for by in calls(conv, batch, device)
        ]
        yield {"convolution": conv, "count": count, "torch": times[0], "triton": times[1]}


def tell(row: dict[str, Any]) -> str:
    """One line: milliseconds by PyTorch and by Triton, who wins, and by how much."""
    words = [f"{row['convolution']!s:<46}{row['count']:>3}x"]
    for piece in PIECES:
        ours, theirs = row["triton"][piece], row["torch"][piece]
        winner = "Triton" if ours < theirs else "cuDNN"
        pair = f"{1e3 * theirs:7.3f} {1e3 * ours:7.3f}"
        words.append(f"{piece} {pair} {theirs / ours:5.2f} {winner:<6}")
    return "  ".join(words)


def totals(rows: Sequence[dict[str, Any]]) -> str:
    """What a network takes with either, and with the better one for every piece."""
    spent = {"cuDNN": 0.0, "Triton": 0.0, "the better": 0.0}
    for row in rows:
        for piece in PIECES:
            theirs, ours = row["torch"][piece], row["triton"][piece]
            spent["cuDNN"] += row["count"] * theirs
            spent["Triton"] += row["count"] * ours
            spent["the better"] += row["count"] * min(theirs, ours)
    return ", ".join(f"{name} {1e3 * total:.2f} ms" for name, total in spent.items())


def tiny(counts: Counter[Convolution]) -> Counter[Convolution]:
    """One of each kind, with a few channels and pixels."""
    kinds = {}
    for conv in counts:
        narrow = {"inputs": min(conv.inputs, 8), "outputs": min(conv.outputs, 8)}
        kinds.setdefault((conv.kernel, conv.stride), replace(conv, size=(3, 3), **narrow))
    return Counter(kinds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small")
    arguments = parser.parse_args()
    if arguments.dry_run:
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton decides whether it interprets when it is imported.
            os.environ["TRITON_INTERPRET"] = "1"
            os.execv(sys.executable, [sys.executable, *sys.argv])
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run interprets the kernels on the CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    print("DRY RUN, not a measurement" if arguments.dry_run else torch.cuda.get_device_name())
    for network in COMPARED[:1] if arguments.dry_run else COMPARED:
        counts = convolutions(network)
        for batch in [1] if arguments.dry_run else arguments.batch:
            print(f"\n{network}, batch {batch}: ms by cuDNN, ms by Triton, ratio, winner")
            rows = []
            for row in compare(tiny(counts) if arguments.dry_run else counts, batch, device):
                print(tell(row), flush=True)
                rows.append(row)
            print(totals(rows))


if __name__ == "__main__":
    main()
