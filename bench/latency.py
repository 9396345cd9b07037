"""Latency as predicted from measured layers, against that of whole networks.

    python bench/latency.py --json bench/results/latency.json --figure docs/figures/latency.svg

For each network: a table as `dmcp bench latency` measures it, then random structures, whose
predicted latency is compared with that of the extracted networks, all of them measured in turns.
The chance to keep a group is another one for each structure, so that small and large ones occur.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from scipy.stats import spearmanr

import dmcp
from dmcp.graph import ChannelGraph
from dmcp.latency import RUNTIMES, Runtime, Timing, measure_latency, side_by_side
from dmcp.models import build
from dmcp.report.figure import LIGHT, new_figure, styled, to_svg

NETWORKS = {"mobilenet_v2": "MobileNetV2", "resnet18": "ResNet-18"}
SPEARMAN, ERROR = 0.95, 0.10
"""What is to be reached: rank correlation, and median relative error."""


def random_structures(graph: ChannelGraph, count: int, seed: int) -> list[dict[str, int]]:
    """Structures on the grid of a graph."""
    generator = torch.Generator().manual_seed(seed)
    structures = []
    for _ in range(count):
        keep = torch.rand((), generator=generator)
        structure = {}
        for unit in graph.units:
            groups = torch.rand(len(unit.choices) - 1, generator=generator)
            structure[unit.name] = unit.choices[int((groups < keep).sum())]
        structures.append(structure)
    return structures


def judge(name: str, arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """The table of a network, and how it predicts random structures."""
    runtime = Runtime(arguments.runtime, arguments.device, arguments.threads)
    model = build(name, num_classes=1000).eval().to(arguments.device)
    model = model.to(memory_format=torch.channels_last)
    shape = (arguments.batch, 3, arguments.size, arguments.size)
    images = torch.zeros(shape, device=arguments.device).to(memory_format=torch.channels_last)
    traced = dmcp.trace(model, images)
    graph = dmcp.MarkovNet(model, groups=10, divisor=8, graph=traced).graph
    begun = time.perf_counter()
    table = measure_latency(
        graph, images, runtime, points=arguments.points, rounds=arguments.rounds, cache=cache
    )
    seconds = time.perf_counter() - begun
    structures = random_structures(graph, arguments.structures, seed=1)
    cost = dmcp.cost(graph, "latency", table)
    predicted = [cost.of(structure) for structure in structures]
    with runtime.running():
        calls = [
            runtime.prepare(dmcp.extract(graph, widths).eval(), (images,)) for widths in structures
        ]
        found = side_by_side(calls, rounds=arguments.rounds, warmup=3, device=runtime.device)
    return {
        "network": NETWORKS[name],
        "setting": table.setting,
        "table_seconds": round(seconds, 1),
        "scale": table.scale,
        "offset": table.offset,
        "checks": table.checks,
        **accuracy(predicted, found),
        "structures": [
            {"predicted": ms, "measured": timing.median, "low": timing.low, "high": timing.high}
            for ms, timing in zip(predicted, found, strict=True)
        ],
    }


def accuracy(predicted: Sequence[float], found: Sequence[Timing]) -> dict[str, float]:
    measured = [timing.median for timing in found]
    errors = [abs(ms / seen - 1) for ms, seen in zip(predicted, measured, strict=True)]
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "median_error": median(errors),
        "largest_error": max(errors),
        # What the measurement itself leaves open: half the interval of the median.
        "median_noise": median((t.high - t.low) / (2 * t.median) for t in found),
    }


@styled
def draw(results: Sequence[Mapping[str, Any]], *, look: Any = LIGHT) -> Any:
    """Predicted against measured latency, a panel for each network."""
    figure = new_figure(4.2 * len(results), 4.6)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        measured = [each["measured"] for each in result["structures"]]
        predicted = [each["predicted"] for each in result["structures"]]
        ends = [0.0, 1.05 * max([*measured, *predicted])]
        axes.plot(ends, ends, color=look.full, linewidth=1.2)
        axes.scatter(measured, predicted, s=18, color=look.blue, alpha=0.8, linewidths=0)
        axes.set(xlim=ends, ylim=ends, xlabel="measured (ms)", ylabel="predicted (ms)")
        axes.set_box_aspect(1)
        axes.grid(True)
        axes.set_title(
            f"{result['network']}: Spearman {result['spearman']:.3f}, "
            f"median error {result['median_error']:.1%}"
        )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--runtime", choices=RUNTIMES, default="eager")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=128, help="of the images, in pixels")
    parser.add_argument("--points", type=int, default=5, help="widths per unit in the table")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--structures", type=int, default=50)
    parser.add_argument("--cache", type=Path, help="folder of timings  [a fresh one]")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--figure", type=Path, help="where the scatter plot goes, an SVG")
    arguments = parser.parse_args()

    results = []
    with tempfile.TemporaryDirectory() as fresh:
        for name in arguments.networks:
            result = judge(name, arguments, arguments.cache or Path(fresh))
            results.append(result)
            print(
                f"{result['network']}: table in {result['table_seconds']:.0f} s, "
                f"Spearman {result['spearman']:.4f} (goal {SPEARMAN}), "
                f"median error {result['median_error']:.1%} (goal {ERROR:.0%}), "
                f"largest {result['largest_error']:.1%}, noise {result['median_noise']:.1%}",
                flush=True,
            )
    if arguments.json:
        about = machine.describe(torch.device(arguments.device))
        arguments.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))
    if arguments.figure:
        arguments.figure.write_bytes(to_svg(draw(results)))


if __name__ == "__main__":
    main()
