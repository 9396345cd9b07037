"""The directive `measured`: tables of what was measured, straight from bench/results/*.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

RESULTS = Path(__file__).parents[2] / "bench" / "results"

Table = tuple[Sequence[str], Iterable[Sequence[str]]]
"""The names of the columns, and the rows."""


class Measured(SphinxDirective):
    """``measured`` with the name of one of the functions below."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        file, make = TABLES[self.arguments[0]]
        path = RESULTS / f"{file}.json"
        self.env.note_dependency(str(path))
        if not path.exists():
            return self.parse_text_to_nodes(f"*Not measured yet: there is no `{path.name}`.*\n")
        data = json.loads(path.read_text())
        names, rows = make(data)
        lines = [names, ["---"] * len(names), *rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return self.parse_text_to_nodes(f"{table}\n\n{source(file, data)}\n")


def source(file: str, data: dict[str, Any]) -> str:
    """Where and when it was measured, as far as the file says."""
    run = data["runs"][-1] if "runs" in data else data
    machine = run.get("machine", {})
    name = machine if isinstance(machine, str) else machine.get("name", "")
    threads = run.get("threads") if isinstance(machine, str) else machine.get("threads")
    torch = run.get("torch") if isinstance(machine, str) else machine.get("torch")
    date = (run.get("date") or run.get("datetime") or "")[:10]
    facts = [
        name,
        f"{threads} threads" if threads else "",
        f"PyTorch {torch or data.get('torch')}" if torch or data.get("torch") else "",
        date,
    ]
    told = ", ".join(fact for fact in facts if fact)
    return f"{{.source}}\n*`bench/results/{file}.json`{': ' if told else ''}{told}*"


def percent(value: float, deviation: float) -> str:
    """98.6 ± 0.8, on one line."""
    return f"{100 * value:.1f}\u00a0±\u00a0{100 * deviation:.1f}"


def short(number: float) -> str:
    """12.3K, 4.56M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.0f}"


def digits(data: dict[str, Any]) -> Table:
    """A search and a uniform network on digits."""
    rows = []
    for budget, networks in data["table"].items():
        for name in ("dmcp", "uniform", "dense"):
            runs = networks[name]
            if name == "dense" and budget != list(data["table"])[-1]:
                continue
            top1 = [run["top1"] for run in runs]
            cells = [percent(mean(top1), stdev(top1))]
            cells += [short(mean(run[key] for run in runs)) for key in ("macs", "params")]
            rows.append(["" if name == "dense" else budget, f"`{name}`", *cells])
    return ("budget", "network", "top-1 in %", "MACs", "parameters"), rows


def methods(data: dict[str, Any]) -> Table:
    """All methods on digits."""
    by_method: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in data["rows"]:
        by_method.setdefault(row["method"], {})[row["track"], row["budget"]] = row
    columns = [("A", "50%"), ("A", "25%"), ("C", "50%"), ("C", "25%")]
    rows = []
    for name, found in by_method.items():
        if name == "dense":
            continue
        top1 = [percent(found[each]["top1"], found[each]["top1_deviation"]) for each in columns]
        last = found["A", "25%"]
        cost = [short(last[key]) for key in ("macs", "params", "forward", "backward")]
        rows.append([f"`{name}`", *top1, *cost, f"{last['search_seconds']:.0f}"])
    names = [f"{track}, {budget}" for track, budget in columns]
    costs = ["MACs", "params", "forward", "backward", "s"]
    return ["method", *names, *costs], rows


def budget_losses(data: dict[str, Any]) -> Table:
    """How closely the expected cost lands."""
    starts = {0.98: "wide, annealed", 0.5: "the paper's"}
    rows = [
        [budget, starts[start], loss, f"{100 * end:.1f} %", f"{100 * distance:.2f} %"]
        for budget, start, _, loss, end, distance in data["rows"]
    ]
    return ("budget", "start", "loss", "E / budget at the end", "mean distance"), rows


def iteration(data: dict[str, Any]) -> Table:
    """A whole iteration against the published way and eager PyTorch."""
    stages = {1: "sandwich step", 2: "with architecture step"}
    rows = []
    for case in data["cases"]:
        ours, published, eager = (case["rivals"][name] for name in ("ours", "published", "eager"))
        rows.append(
            [
                f"{case['model']}, {stages[case['stage']]}",
                f"{1000 * ours['seconds']:.0f}",
                *(f"{rival['over_ours']:.1f}" for rival in (published, eager)),
                *(f"{rival['calls']:,}" for rival in (ours, published)),
                *(str(rival["host_reads"]) for rival in (ours, published)),
            ]
        )
    times = ("ms, ours", "published over ours", "eager over ours")
    counts = ("calls, ours", "calls, published", "waits, ours", "waits, published")
    return ("", *times, *counts), rows


def scaling(data: dict[str, Any]) -> Table:
    """Our iteration against sizes."""
    rows = []
    for row in data["scaling"]:
        size = [
            row["against"],
            row["model"],
            *(str(row[key]) for key in ("size", "batch", "units")),
        ]
        rows.append([*size, f"{1000 * row['seconds']:.0f}", f"{row['images_per_second']:.0f}"])
    return ("against", "network", "side", "batch", "units", "ms", "images per second"), rows


def norm_act(data: dict[str, Any]) -> Table:
    """One fused op over the layers of a network."""
    rows = [
        [row["dtype"], row["rival"], str(row["layers"])]
        + [f"{row[way]['over_ours']:.1f}" for way in ("fwd", "bwd", "both")]
        + [f"{1000 * row['both']['seconds']:.0f}"]
        for row in data["means"]
    ]
    columns = ("dtype", "way", "layers", "forward over ours", "backward", "both", "total ms, both")
    return columns, rows


def latency(data: dict[str, Any]) -> Table:
    """Predicted against measured latency of random structures."""
    rows = []
    for result in data["results"]:
        setting = result["setting"]
        place = f"{setting['runtime']}, {setting['device']}, {setting['threads']} thread(s)"
        shares = ("median_error", "largest_error", "median_noise")
        rows.append(
            [result["network"], place, str(len(result["structures"])), f"{result['spearman']:.3f}"]
        )
        rows[-1] += [f"{100 * result[share]:.1f} %" for share in shares]
        rows[-1].append(f"{result['table_seconds']:.0f}")
    errors = ("median error", "largest error", "noise of the measurement")
    return ("network", "runtime", "structures", "Spearman", *errors, "s for the table"), rows


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Table]]] = {
    "digits": ("digits", digits),
    "methods": ("compare_digits", methods),
    "budget_losses": ("budget_losses", budget_losses),
    "iteration": ("iteration", iteration),
    "latency": ("latency", latency),
    "scaling": ("iteration_scaling", scaling),
    "norm_act_layers": ("norm_act_layers", norm_act),
    "norm_act_rivals": ("norm_act_rivals", norm_act),
}


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
