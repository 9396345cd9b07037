"""A whole iteration of a search, side by side with its rivals.

    python bench/iteration.py --model mobilenet_v2-1.5 resnet18 --stage 1 2 --json iteration.json
    python bench/iteration.py --scaling

Every rival (`iteration_rivals.py`) trains the same network from the same weights on the same batch
and is first held against float64, ``graphs`` with its passes run ordinarily, not replayed. All but
``graphs`` and ``float32``, which draw their own random widths, take those that ``ours`` drew. They
take turns, sweep by sweep; times are medians, ratios medians over the ratios within a sweep.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from checkout import commit
from dispatch import Calls
from iteration_rivals import PASSES, RIVALS, Gate, Ours, Rival, forget_gradients
from machine import describe, keep_freed_memory, make_bfloat16_work
from rich.table import Table
from roofline import hold_against, measure_peaks
from table import print_table, render_iterations
from timing import synchronise
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import dmcp
from dmcp.graph import ChannelGraph
from dmcp.models import build
from dmcp.train.loss import cross_entropy

CLASSES = 1000
WARM_UP, ITERATIONS = 2, 3
"""Iterations before the first sweep, and in a turn."""
KINDS = {
    "whole layers": ("_node", "dmcp::nodes"),
    "norm and activation": ("norm", "relu", "hardtanh", "threshold", "clamp"),
    "convolution": ("conv", "pointwise", "depthwise"),
    "compiled": ("compiled", "graph_", "inductor", "triton"),
}
"""Parts of names of operators; the first kind that fits. All others are the rest: masks, slices,
gradients added up, optimisers, what runs between the operators."""

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is measured; ``model`` is a name, with a width behind it if there is a dash."""

    model: str
    size: int
    batch: int
    dtype: str
    stage: int

    def autocast(self, device: torch.device, *, enabled: bool = True) -> torch.autocast:
        enabled = enabled and self.dtype == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def network_of(model: str) -> nn.Module:
    name, _, width = model.partition("-")
    return build(name, CLASSES, **({"width": float(width)} if width else {}))


@cache
def graph_of(model: str, size: int) -> ChannelGraph:
    """Its units on the grid of a `MarkovNet`; traced without data, which is quick."""
    with torch.device("meta"):
        network = network_of(model)
        images = torch.empty(2, 3, size, size)
    traced = dmcp.trace(network, images)
    return dmcp.MarkovNet(network, graph=traced).graph


@lru_cache(maxsize=1)
def gate_of(model: str, size: int, batch: int, device: torch.device) -> Gate:
    """The weights and the batch that all start from, and what comes out of them."""
    torch.manual_seed(0)
    network = network_of(model).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    return Gate(network, graph_of(model, size), images, labels)


# --- One case -------------------------------------------------------------------------------------


def compare(
    case: Case, names: Sequence[str], sweeps: int, device: torch.device, *, details: bool = True
) -> dict[str, Any]:
    """Everything about a case, ready for JSON."""
    gate = gate_of(case.model, case.size, case.batch, device)
    model, images, labels = gate.model, gate.images, gate.labels
    rivals, errors = {}, {}
    for name in names:
        make = RIVALS[name]
        layout = make.memory_format
        rivals[name] = make(copy.deepcopy(model).to(memory_format=layout), gate.graph, case.stage)
        errors[name] = gate.check(name, rivals[name])
    steps = {name: stepper(case, rival, images, labels, device) for name, rival in rivals.items()}
    for name, rival in rivals.items():
        for _ in range(WARM_UP + rival.warm_up):
            rival.begin(0)
            steps[name]()
    seconds: dict[str, list[float]] = defaultdict(list)
    beside = []
    for sweep in range(sweeps):
        drawn: Sequence[Mapping[str, int]] = ()
        for name, rival in rivals.items():
            rival.begin(sweep, drawn)
            turn = [timed(steps[name], device) for _ in range(ITERATIONS)]
            seconds[name].append(statistics.median(turn))
            drawn = rival.drawn if type(rival) is Ours else drawn
        if details and drawn:
            beside.append((drawn, measure_peaks(device, case.dtype)))
    result: dict[str, Any] = {**asdict(case), "rivals": {}}
    if details:
        result["plain_peak_bytes"] = peak_memory(plain_pass(case, model, images, labels), device)
    for name, rival in rivals.items():
        median = statistics.median(seconds[name])
        row = {
            "seconds": median,
            "sweeps": seconds[name],
            "over_ours": _ratio(seconds[name], seconds.get("ours")),
            "images_per_second": case.batch / median,
            "errors": errors[name],
        }
        if details:
            rival.begin(0)
            row |= asks(steps[name])
            row["kinds"] = kinds(steps[name], device)
            forget_gradients(rival)
            row["peak_bytes"] = peak_memory(steps[name], device)
            # A graph has no forward and no backward.
            graphs = name == "graphs"
            row["passes"] = {} if graphs else passes(case, rival, images, labels, device)
        result["rivals"][name] = row
    if beside:
        hold_against(result, gate.graph, beside)
    return result


def _ratio(seconds: Sequence[float], ours: Sequence[float] | None) -> float | None:
    if ours is None:
        return None
    return statistics.median(mine / base for mine, base in zip(seconds, ours, strict=True))


def stepper(case: Case, rival: Rival, images: Tensor, labels: Tensor, device: torch.device) -> Step:
    images = images.to(memory_format=rival.memory_format)

    def step() -> None:
        with case.autocast(device, enabled=not rival.in_float32):
            rival.step(images, labels)

    return step


def plain_pass(case: Case, model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Forward and backward of the network itself, whose activations work in place."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)

    def step() -> None:
        with case.autocast(images.device):
            cross_entropy(model(images), labels).backward()

    step()
    model.zero_grad(set_to_none=True)
    return step


def timed(step: Step, device: torch.device) -> float:
    begin = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - begin


def asks(step: Step) -> dict[str, int]:
    """Calls of operators and host reads, see `dispatch.Calls`."""
    with Calls() as calls:
        step()
    return {"calls": calls.total, "host_reads": calls.host_reads.total()}


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that tensors take at most, beyond what there was before."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        now += change
        most = max(most, now)
    return most


def kinds(step: Step, device: torch.device) -> dict[str, float]:
    """Share of each of `KINDS` and of the rest in the time of the operators themselves."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        step()
        synchronise(device)
    of = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times: dict[str, float] = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in profiled.key_averages():
        name = event.key.lower()
        kind = next(
            (kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "rest"
        )
        times[kind] += getattr(event, of)
    total = sum(times.values())
    return {kind: value / total for kind, value in times.items()}


def passes(
    case: Case, rival: Rival, images: Tensor, labels: Tensor, device: torch.device
) -> dict[str, dict[str, float]]:
    """Each of `PASSES` by itself: seconds forward and backward, peak memory."""
    images = images.to(memory_format=rival.memory_format)
    teacher = torch.zeros(len(images), CLASSES, device=device)
    found = {}
    for name in PASSES if case.stage == 2 else PASSES[:2]:
        losses: list[Tensor] = []

        def forward(name: str = name, losses: list[Tensor] = losses) -> None:
            with case.autocast(device, enabled=not rival.in_float32):
                losses.append(rival.loss(name, images, labels, teacher))

        def backward(losses: list[Tensor] = losses) -> None:
            losses.pop().backward()

        def both(forward: Step = forward, backward: Step = backward) -> None:
            forward()
            backward()

        times = [(timed(forward, device), timed(backward, device)) for _ in range(1 + ITERATIONS)]
        ways = zip(*times[1:], strict=True)
        found[name] = dict(zip(("forward", "backward"), map(statistics.median, ways), strict=True))
        forget_gradients(rival)
        found[name]["peak_bytes"] = peak_memory(both, device)
    return found


# --- Scaling --------------------------------------------------------------------------------------


def scaling_cases(dtypes: Sequence[str]) -> Iterator[tuple[str, Case]]:
    """One thing changes at a time, around one case; the second stage has all passes."""
    for dtype in dtypes:
        middle = Case("mobilenet_v2-1.0", 64, 16, dtype, 2)
        yield from (("batch", replace(middle, batch=batch)) for batch in (4, 8, 16, 32))
        yield from (("size", replace(middle, size=size)) for size in (32, 64, 96, 128))
        widths = (f"mobilenet_v2-{width}" for width in (0.5, 1.0, 1.5))
        yield from (("width", replace(middle, model=model)) for model in widths)
        networks = ("resnet18", "mobilenet_v2-1.0", "resnet50")
        yield from (("units", replace(middle, model=model)) for model in networks)


def scale(dtypes: Sequence[str], sweeps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Ours alone."""
    done: dict[Case, dict[str, Any]] = {}
    for against, case in scaling_cases(dtypes):
        if case not in done:
            done[case] = compare(case, ["ours"], sweeps, device, details=False)
        row = done[case]["rivals"]["ours"]
        yield {
            "against": against,
            **asdict(case),
            "units": len(graph_of(case.model, case.size).searchable),
            "macs": dmcp.cost(graph_of(case.model, case.size)).of({}),
            **{key: row[key] for key in ("seconds", "images_per_second")},
        }


# --- For people -----------------------------------------------------------------------------------


def render_scaling(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("against", "model", "size", "batch", "dtype", "units", "MMACs", "ms", "images/s")
    table = Table(*columns, title="ours, stage 2")
    for row in rows:
        table.add_row(
            *(str(row[key]) for key in columns[:6]),
            f"{row['macs'] / 1e6:.1f}",
            f"{1e3 * row['seconds']:.0f}",
            f"{row['images_per_second']:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["mobilenet_v2-1.5", "resnet18"])
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="of an image's sides")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--stage", type=int, nargs="+", default=[1, 2], choices=[1, 2])
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), help="all by default")
    parser.add_argument("--sweeps", type=int, default=5, help="times that all rivals take turns")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", type=Path, help="where everything goes, after each case")
    parser.add_argument("--scaling", action="store_true", help="ours against size instead")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    offered = [name for name in RIVALS if name != "graphs" or device.type == "cuda"]
    if not set(given.rivals or ()) <= set(offered):
        parser.error("the rival graphs needs --device cuda")
    if "bfloat16" not in given.dtype:
        offered.remove("float32")
    setup = {"malloc": keep_freed_memory()}
    if device.type == "cpu" and "bfloat16" in given.dtype:
        setup["onednn"] = make_bfloat16_work()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**describe(device), **setup, "sweeps": given.sweeps},
        "cases": [],
        "scaling": [],
    }

    def keep(key: str, found: Mapping[str, Any]) -> None:
        result[key].append(found)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")

    if given.scaling:
        for row in scale(given.dtype, given.sweeps, device):
            keep("scaling", row)
        print_table(render_scaling(result["scaling"]))
        return
    names = [name for name in RIVALS if name in (given.rivals or offered)]
    for values in product(given.model, given.size, given.batch, given.dtype, given.stage):
        keep("cases", compare(Case(*values), names, given.sweeps, device))
    machine = {key: value for key, value in result["machine"].items() if key != "backends"}
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value is not None))
    print_table(render_iterations(result["cases"]))


if __name__ == "__main__":
    main()
