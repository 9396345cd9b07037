"""Read what the benchmarks measured.

    pytest bench --benchmark-json=bench.json
    python bench/table.py bench.json --json summary.json

Times are medians over rounds and then over sweeps. Ratios are medians over sweeps of ratios within
a sweep, so that a machine which is slow for a while is slow for both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DIRECTIONS = ("fwd", "bwd", "both")
LARGE = 8e6
"""Bytes of a tensor above which bandwidth is summed up: smaller ones may stay in a cache."""

Key = tuple[str, ...]
Sweeps = Mapping[int, float]


@dataclass(frozen=True)
class Record:
    """One benchmark in one sweep.

    Attributes:
        count: how often the network has it, None where it is no layer of one.
        bytes: that have to be moved, 0 where no bandwidth is asked for.
        tensor_bytes: of the layer's output.
    """

    op: str
    network: str
    case: str
    dtype: str
    rival: str
    direction: str
    sweep: int
    seconds: float
    count: int | None
    bytes: int
    tensor_bytes: int

    @property
    def key(self) -> Key:
        """What the rivals of a benchmark have in common."""
        return (self.op, self.network, self.case, self.dtype)


def record(benchmark: Mapping[str, Any]) -> Record:
    """From an entry of pytest-benchmark's JSON; a suite without labels is named by its tests."""
    info = benchmark["extra_info"]
    module, _, function = benchmark["fullname"].partition("::")
    return Record(
        op=info.get("op", Path(module).stem.removeprefix("test_")),
        network=info.get("network", ""),
        case=info.get("case", function.partition("[")[0].removeprefix("test_").replace("_", " ")),
        dtype=info.get("dtype", ""),
        rival=info.get("rival", benchmark["param"] or "ours"),
        direction=info.get("direction", "both"),
        sweep=info.get("sweep", 0),
        seconds=benchmark["stats"]["median"] / info.get("calls", 1),
        count=info.get("count"),
        bytes=info.get("bytes", 0),
        tensor_bytes=info.get("tensor_bytes", 0),
    )


def summarise(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows and means, ready for JSON, from reports of pytest-benchmark."""
    reports = list(reports)
    records = [record(entry) for report in reports for entry in report["benchmarks"]]
    rows = _rows(records)
    runs = [
        {
            "datetime": report["datetime"],
            "commit": report["commit_info"].get("id"),
            "machine": report["machine_info"].get("dmcp", {}),
        }
        for report in reports
    ]
    return {"runs": runs, "rows": rows, "means": _means(rows)}


def _rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One for each rival of each case, with values by direction."""
    cases: dict[Key, dict[str, dict[str, list[Record]]]] = defaultdict(dict)
    for one in records:
        rivals = cases[one.key]
        rivals.setdefault(one.rival, {}).setdefault(one.direction, []).append(one)
    rows = []
    for (op, network, case, dtype), rivals in cases.items():
        copies = rivals.get("copy", {}).get("both", ())
        copy = {one.sweep: one.bytes / one.seconds for one in copies}
        ours = rivals.get("ours", {})
        for rival, found in rivals.items():
            some = next(iter(found.values()))[0]
            row: dict[str, Any] = {
                "op": op,
                "network": network,
                "case": case,
                "dtype": dtype,
                "rival": rival,
                "count": some.count,
                "tensor_bytes": some.tensor_bytes,
            }
            for direction in DIRECTIONS:
                if direction in found:
                    base = () if rival == "copy" else ours.get(direction, ())
                    row[direction] = _values(found[direction], base, copy)
            rows.append(row)
    return rows


def _values(
    records: Sequence[Record], ours: Sequence[Record], copy: Sweeps
) -> dict[str, float | None]:
    seconds = {one.sweep: one.seconds for one in records}
    bandwidth = {one.sweep: one.bytes / one.seconds for one in records if one.bytes}
    of_copy = _median_ratio(bandwidth, copy)
    return {
        "seconds": statistics.median(seconds.values()),
        "over_ours": _median_ratio(seconds, {one.sweep: one.seconds for one in ours}),
        "bandwidth": statistics.median(bandwidth.values()) if bandwidth else None,
        "of_copy": of_copy,
        "over_floor": None if of_copy is None else 1 / of_copy,
    }


def _median_ratio(above: Sweeps, below: Sweeps) -> float | None:
    ratios = [above[sweep] / below[sweep] for sweep in above if sweep in below]
    return statistics.median(ratios) if ratios else None


def _means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the layers of a network, as often as they occur."""
    groups: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["count"] is not None and row["rival"] != "copy":
            groups[row["op"], row["network"], row["dtype"], row["rival"]].append(row)
    means = []
    for (op, network, dtype, rival), members in groups.items():
        mean: dict[str, Any] = {
            "op": op,
            "network": network,
            "dtype": dtype,
            "rival": rival,
            "layers": sum(row["count"] for row in members),
        }
        large = [row for row in members if row["tensor_bytes"] > LARGE]
        for direction in DIRECTIONS:
            there = [row for row in members if direction in row]
            shares = [row[direction]["of_copy"] for row in large if direction in row]
            shares = [share for share in shares if share is not None]
            if there:
                mean[direction] = {
                    "seconds": sum(row["count"] * row[direction]["seconds"] for row in there),
                    "over_ours": _geometric_mean(there, direction),
                    "of_copy_large": statistics.geometric_mean(shares) if shares else None,
                    "of_copy_large_least": min(shares, default=None),
                }
        means.append(mean)
    return means


def _geometric_mean(rows: Iterable[Mapping[str, Any]], direction: str) -> float | None:
    pairs = [(row["count"], row[direction]["over_ours"]) for row in rows]
    weights = [(count, ratio) for count, ratio in pairs if ratio is not None]
    if not weights:
        return None
    total = sum(count for count, _ in weights)
    return math.exp(sum(count * math.log(ratio) for count, ratio in weights) / total)


# --- For people ----------------------------------------------------------------------------------


def render(summary: Mapping[str, Any], title: str | None = None) -> Table:
    """One table: a section for each case, then the means of each network.

    A cell of a direction is the time and its ratio to ours; bandwidth is that of both directions.
    """
    caption = (
        "×: time over ours. GB/s by the least bytes that two passes each way must move; of copy: "
        "share of the bandwidth of a copy of the same tensor; over floor: time over the time at "
        "that bandwidth. Means: total time, geometric mean of the ratios over all layers, and over "
        f"those above {LARGE / 1e6:.0f} MB the geometric mean and least share of copy."
    )
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("op")
    table.add_column("case", overflow="fold")
    table.add_column("rival")
    for name in (*DIRECTIONS, "GB/s", "of copy", "over floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for lines in _sections(summary):
        for number, (op, case, values) in enumerate(lines):
            table.add_row(*((op, case) if number == 0 else ("", "")), *values)
        table.add_section()
    return table


Line = tuple[str, str, tuple[str, ...]]


def _sections(summary: Mapping[str, Any]) -> Iterable[list[Line]]:
    sections: dict[Key, list[Line]] = defaultdict(list)
    for row in summary["rows"]:
        case = " ".join(filter(None, (row["network"], row["case"], row["dtype"])))
        sections[row["op"], case].append((row["op"], case, _row_cells(row)))
    for mean in summary["means"]:
        case = f"{mean['network']} {mean['dtype']}, {mean['layers']} layers"
        sections[mean["op"], case].append((mean["op"], case, _mean_cells(mean)))
    return sections.values()


def _row_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    whole = row.get("both", {})
    bandwidth, share, floor = (whole.get(key) for key in ("bandwidth", "of_copy", "over_floor"))
    return (
        row["rival"],
        *(_cell(row.get(direction)) for direction in DIRECTIONS),
        "" if bandwidth is None else f"{bandwidth / 1e9:.3g}",
        "" if share is None else f"{share:.0%}",
        "" if floor is None else f"{floor:.2f}",
    )


def _mean_cells(mean: Mapping[str, Any]) -> tuple[str, ...]:
    whole = mean.get("both", {})
    share, least = whole.get("of_copy_large"), whole.get("of_copy_large_least")
    cells = (_cell(mean.get(direction)) for direction in DIRECTIONS)
    shares = "" if share is None else f"{share:.0%}, ≥ {least:.0%}"
    return (mean["rival"], *cells, "", shares, "")


def _cell(values: Mapping[str, float | None] | None) -> str:
    if not values:
        return ""
    seconds, ratio = values["seconds"], values["over_ours"]
    assert seconds is not None
    scale, unit = next(
        (one for one in ((1.0, "s"), (1e-3, "ms")) if seconds >= one[0]), (1e-6, "µs")
    )
    return f"{seconds / scale:.2f} {unit:<2} {'' if ratio is None else f'{ratio:.2f}×':>7}"


_PASSES = ("widest", "narrowest", "architecture")


def render_iterations(cases: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """What `iteration.py` found: a section for each case."""
    caption = (
        "×: time over ours, median over sweeps. of roofline: a floor of the time by operations and "
        "bytes, at the speeds of a matrix product and a copy in the same sweep, over the time "
        "(`roofline.py`); in brackets which of both bounds most of it. calls: operators that reach "
        "a device's kernels; reads: waits of the host for numbers. Passes: forward + backward, ms. "
        "Memory: most that tensors take beyond weights and optimiser state, in the iteration, in "
        "the architecture pass, in a training pass of the plain network. layers, conv, norm: "
        "shares of the operators' time, of those that compute whole layers, convolutions, norms "
        "and activations."
    )
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("case", overflow="fold", max_width=24)
    table.add_column("rival")
    columns = ("ms", "×", "of roofline", "images/s", "calls", "reads", *_PASSES)
    for name in (*columns, "MB", "arch. MB", "plain MB", "layers", "conv", "norm"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        label = "{model}, stage {stage}, batch {batch}, {size}x{size}, {dtype}".format(**case)
        plain = f"{case['plain_peak_bytes'] / 1e6:.1f}"
        bound = case["roofline"]["bound"] if "roofline" in case else ""
        for number, (name, row) in enumerate(case["rivals"].items()):
            table.add_row("" if number else label, name, *_iteration_cells(row, plain, bound))
        table.add_section()
    return table


def _iteration_cells(row: Mapping[str, Any], plain: str, bound: str) -> tuple[str, ...]:
    ratio, found = row["over_ours"], row["passes"]
    times = [found.get(name) for name in _PASSES]
    architecture = found.get("architecture")
    return (
        f"{1e3 * row['seconds']:.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{row['of_roofline']:.0%} ({bound})" if bound else "",
        f"{row['images_per_second']:.1f}",
        f"{row['calls']:,}",
        f"{row['host_reads']}",
        *(
            "" if t is None else f"{1e3 * t['forward']:.0f} + {1e3 * t['backward']:.0f}"
            for t in times
        ),
        f"{row['peak_bytes'] / 1e6:.1f}",
        "" if architecture is None else f"{architecture['peak_bytes'] / 1e6:.1f}",
        plain,
        f"{row['kinds']['whole layers']:.0%}",
        f"{row['kinds']['convolution']:.0%}",
        f"{row['kinds']['norm and activation']:.0%}",
    )


def print_table(table: Table) -> None:
    """On stdout; wide enough for its columns where that is not a terminal."""
    Console(markup=False, width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="JSON of pytest-benchmark")
    parser.add_argument("--json", type=Path, help="where the rows and means go")
    arguments = parser.parse_args()
    summary = summarise(json.loads(path.read_text()) for path in arguments.reports)
    for run in summary["runs"]:
        machine = {key: value for key, value in run["machine"].items() if key != "backends"}
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print_table(render(summary))
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
