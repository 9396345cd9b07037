"""What a comparison found: one record per network, one row per method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from dmcp.compare.config import CompareConfig, Track
from dmcp.compare.latency import latencies
from dmcp.compare.tasks import Place, Pretrain, Retrain, bench_of
from dmcp.report import DENSE
from dmcp.runs import RunFolder

LATENCY_BATCH = 32
"""Images at a time, at most, where latency is measured."""


_Cell = tuple[str, Track | None, str | None]


@dataclass(frozen=True)
class Record:
    """One trained network.

    Attributes:
        method: its name, or ``"dense"``.
        track, budget: None for the dense network, which belongs to all.
        seed: of everything.
        top1: share of the test images that it classifies correctly.
        macs, params: of the network, see `dmcp.cost`.
        forward, backward: images that the search sent through networks.
        search_seconds, train_seconds: on the clock, over all restarts.
        widths: its structure.
    """

    method: str
    track: Track | None
    budget: str | None
    seed: int
    top1: float
    macs: int
    params: int
    forward: int
    backward: int
    search_seconds: float
    train_seconds: float
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Row:
    """One method at one budget in one track.

    Attributes:
        method, track, budget: as in `Record`.
        seeds: over how many everything else is a mean.
        top1, top1_deviation: mean and standard deviation over the seeds; 0 of a single one.
        macs, params: means.
        latency_ms: of a forward pass of the first seed's structure, see `latencies`.
        forward, backward, search_seconds: means of what a search cost.
    """

    method: str
    track: Track | None
    budget: str | None
    seeds: int
    top1: float
    top1_deviation: float
    macs: float
    params: float
    latency_ms: float
    forward: float
    backward: float
    search_seconds: float


def records_of(config: CompareConfig, root: Path) -> list[Record]:
    """The networks of a comparison that are trained, the dense ones first."""
    records = []
    for seed in config.seeds:
        if (dense := Pretrain(seed)).has_result(root):
            row = RunFolder(dense.folder(root)).read_json("result.json")
            records.append(_record(DENSE, None, None, seed, row, {}))
    for track in config.tracks:
        for budget in config.budgets:
            for method in config.methods:
                for seed in config.seeds:
                    task = Retrain(method, seed, budget, track)
                    if task.has_result(root):
                        spent = _spent(task.origin.found(root)[budget], track)
                        row = task.result(root)
                        records.append(_record(method, track, budget, seed, row, spent))
    return records


def rows_of(records: Sequence[Record], milliseconds: Mapping[str, float]) -> list[Row]:
    """Means over the seeds, in the order in which methods, budgets and tracks occur.

    Args:
        records: the networks.
        milliseconds: latency of structures, by `structure_key`.
    """
    cells: dict[_Cell, list[Record]] = defaultdict(list)
    for record in records:
        cells[record.method, record.track, record.budget].append(record)
    return [
        Row(
            method,
            track,
            budget,
            seeds=len(cell),
            top1=mean(record.top1 for record in cell),
            top1_deviation=stdev(record.top1 for record in cell) if len(cell) > 1 else 0.0,
            macs=mean(record.macs for record in cell),
            params=mean(record.params for record in cell),
            latency_ms=milliseconds[structure_key(cell[0].widths)],
            forward=mean(record.forward for record in cell),
            backward=mean(record.backward for record in cell),
            search_seconds=mean(record.search_seconds for record in cell),
        )
        for (method, track, budget), cell in cells.items()
    ]


def measure(
    config: CompareConfig, place: Place, threads: int, records: Sequence[Record]
) -> dict[str, float]:
    """The latency of the first seed's structures with so many threads, in milliseconds, by
    `structure_key`: of `LATENCY_BATCH` images, or of a batch where that is smaller."""
    first: dict[_Cell, Mapping[str, int]] = {}
    for record in records:
        first.setdefault((record.method, record.track, record.budget), record.widths)
    structures = {structure_key(widths): widths for widths in first.values()}
    job = bench_of(config, place, config.seeds[0]).job
    size, batch = job.data.image_size, min(LATENCY_BATCH, config.network.batch_size)
    images = torch.zeros(batch, job.data.channels, size, size, device=place.device)
    images = images.to(memory_format=torch.channels_last)
    networks = [job.extract(job.graph.model, widths) for widths in structures.values()]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return dict(zip(structures, latencies(networks, images), strict=True))
    finally:
        torch.set_num_threads(before)


def structure_key(widths: Mapping[str, int]) -> str:
    """The same for equal structures."""
    return repr(sorted(widths.items()))


def _spent(found: Mapping[str, Any], track: Track) -> dict[str, float]:
    """What a search has cost, in track B with the network whose weights it inherits."""
    if track != "B":
        return dict(found["spent"])
    return {key: value + found["inherited"][key] for key, value in found["spent"].items()}


def _record(
    method: str,
    track: Track | None,
    budget: str | None,
    seed: int,
    trained: Mapping[str, Any],
    spent: Mapping[str, Any],
) -> Record:
    return Record(
        method,
        track,
        budget,
        seed,
        top1=trained["top1"],
        macs=trained["macs"],
        params=trained["params"],
        forward=spent.get("forward", 0),
        backward=spent.get("backward", 0),
        search_seconds=spent.get("seconds", 0.0),
        train_seconds=trained["seconds"],
        widths=trained["widths"],
    )
