"""GPU acceptance: build, test and measure on the CUDA device of this machine, in nine minutes.

    python bench/gpu.py --output gpu.json
    python bench/gpu.py --dry-run --skip-build

Needs no network, but nvcc, and in the environment of this Python torch, triton, cmake, ninja,
pybind11, setuptools, pytest, pytest-benchmark, hypothesis and rich. The dry run takes every step on
the CPU, in small.

Every step is a process of its own with a time limit. It may use what earlier ones have left over,
but not what later ones are promised. What was measured is written after each step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checkout import ROOT, commit
from table import print_table, render, render_iterations, summarise

GRACE = 10.0
"""Seconds that an interrupted step has to write down what it measured."""
LOG_LINES = 100
GPU_RIVALS = ("ours", "graphs", "published", "eager")

Read = Callable[[str], dict[str, Any]]
"""From what a step printed to what goes into the result."""


class StepError(Exception):
    """A step ended well and has not done what it is for."""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        seconds: what it is promised.
        benchmarks: where it writes pytest-benchmark's JSON, if it does.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    benchmarks: Path | None = None
    read: Read = lambda output: {}


@dataclass(frozen=True)
class Plan:
    """The steps; their files go into the folder."""

    folder: Path
    dry_run: bool
    skip_build: bool

    def steps(self) -> Iterator[Step]:
        """In the order in which they run: the most elastic one is the last."""
        if not self.skip_build:
            yield self._build()
        yield self._machine()
        yield self._tests()
        yield self._benchmark("ops", 25, "retain", "expected_cost")
        yield self._iteration()
        layers = (
            ("--batch=4", "--size=32", "--largest=1", "--sweeps=1", "-kv2-1.0 and float32")
            if self.dry_run
            else ("--batch=128", "--largest=5", "--sweeps=2", "-kbfloat16 and (v2-1.0 or resnet50)")
        )
        yield self._benchmark("norm_act", 100, "norm_act", *layers)

    def _build(self) -> Step:
        install = "-m pip install --disable-pip-version-check --no-build-isolation --no-deps ."
        environment = {} if self.dry_run else {"DMCP_NATIVE": "ON", "DMCP_CUDA": "ON"}
        return Step("build", (sys.executable, *install.split()), 150, environment)

    def _machine(self) -> Step:
        script = str(ROOT / "bench/machine.py")
        device = "cpu" if self.dry_run else "cuda"
        return Step("machine", (sys.executable, script, device), 20, read=self._read_machine)

    def _read_machine(self, output: str) -> dict[str, Any]:
        machine, _ = json.JSONDecoder().raw_decode(output, output.index("{\n"))
        for name in () if self.dry_run else ("cuda", "triton"):
            backend = machine["backends"][name]
            if not backend["available"]:
                raise StepError(f"the backend {name!r} is missing: {backend['reason']}")
        return {"machine": machine}

    def _tests(self) -> Step:
        cores = os.cpu_count() or 1
        parallel = importlib.util.find_spec("xdist") and cores >= 4 and not self.dry_run
        workers = (f"-n{min(cores // 2, 8)}",) if parallel else ()
        # Collecting all tests would take as long as running these.
        marked = [
            str(path.relative_to(ROOT))
            for path in sorted((ROOT / "tests").rglob("test_*.py"))
            if "mark.gpu" in path.read_text()
        ]
        # On the CPU they are collected and skipped.
        return self._pytest("tests", 140, "-mgpu", *workers, *marked, may_skip=self.dry_run)

    def _iteration(self) -> Step:
        report = self.folder / "iteration.json"
        script = (sys.executable, str(ROOT / "bench/iteration.py"), f"--json={report}")
        small = ("--model=resnet18-0.25", "--batch=4", "--size=32", "--sweeps=1")
        where = (
            ("--device=cpu", "--threads=1", *small)
            if self.dry_run
            else ("--device=cuda", "--model=mobilenet_v2-1.5", "--batch=64", "--size=224")
        )
        # Without compile, which would take minutes of it.
        rivals = ("ours", "published", "eager") if self.dry_run else GPU_RIVALS
        what = ("--stage=2", "--rivals", *rivals)

        def read(output: str) -> dict[str, Any]:
            return {"cases": json.loads(report.read_text())["cases"]}

        return Step("search step", (*script, *where, *what), 80, read=read)

    def _benchmark(
        self,
        name: str,
        seconds: float,
        *suites_and_options: str,
        environment: Mapping[str, str] | None = None,
    ) -> Step:
        device = ("--device=cpu", "--threads=1") if self.dry_run else ("--device=cuda",)
        arguments = [
            one if one.startswith("-") else f"bench/test_{one}.py" for one in suites_and_options
        ]
        report = self.folder / f"{name}.json"
        output = f"--benchmark-json={report}"
        step = self._pytest(name, seconds, *arguments, *device, output)
        return Step(step.name, step.command, seconds, environment or {}, report, step.read)

    def _pytest(self, name: str, seconds: float, *arguments: str, may_skip: bool = False) -> Step:
        report = self.folder / f"{name}.xml"

        def read(output: str) -> dict[str, Any]:
            counts = _counts(report)
            if counts["tests"] == (0 if may_skip else counts["skipped"]):
                raise StepError("nothing ran")
            return {"counts": counts}

        # -P: what runs is the installed package, not the folder of that name in the checkout.
        pytest = (sys.executable, "-P", "-m", "pytest", "-q", f"--junitxml={report}")
        return Step(name, (*pytest, *arguments), seconds, read=read)


def _counts(report: Path) -> dict[str, int]:
    suites = list(ElementTree.parse(report).iter("testsuite"))
    kinds = ("tests", "failures", "errors", "skipped")
    return {kind: sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds}


def run(step: Step, seconds: float, log: Path) -> dict[str, Any]:
    """Run one step for so many seconds at most.

    Returns:
        name, status (``"ok"``, ``"failed"`` or ``"out of time"``), seconds, what the step reads,
        and the end of the output unless it is ok.
    """
    outcome: dict[str, Any] = {"name": step.name, "status": "out of time", "seconds": 0.0}
    limit = seconds - GRACE
    if limit <= 0:
        return outcome
    # A benchmark that would be interrupted is better not started.
    last = () if step.benchmarks is None else (f"--seconds={0.9 * limit:.0f}",)
    begin = time.monotonic()
    with log.open("w") as output:
        code = _execute((*step.command, *last), step.environment, output, limit)
    outcome["seconds"] = round(time.monotonic() - begin, 1)
    printed = log.read_text(errors="replace")
    if code is not None:
        outcome["status"] = "failed" if code else "ok"
    try:
        outcome.update(step.read(printed))
    except (StepError, OSError, ValueError, ElementTree.ParseError) as error:
        if code == 0:
            outcome.update(status="failed", error=str(error))
    if outcome["status"] != "ok":
        outcome["log"] = printed.splitlines()[-LOG_LINES:]
    return outcome


def _execute(
    command: tuple[str, ...], environment: Mapping[str, str], output: Any, seconds: float
) -> int | None:
    """The exit code; None if the process had to be stopped."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def accept(plan: Plan, minutes: float, output: Path) -> dict[str, Any]:
    """Run the steps, telling of each, and write the result after each."""
    end = time.monotonic() + 60 * minutes
    result: dict[str, Any] = {
        "dry_run": plan.dry_run,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {},
        "steps": [],
        "iterations": [],
        "summary": {"runs": [], "rows": [], "means": []},
    }
    steps, reports = list(plan.steps()), []
    for number, step in enumerate(steps):
        promised = sum(later.seconds for later in steps[number + 1 :])
        outcome = run(step, end - time.monotonic() - promised, plan.folder / "log")
        _tell(outcome)
        result["machine"].update(outcome.pop("machine", {}))
        result["iterations"] += outcome.pop("cases", [])
        result["steps"].append(outcome)
        if step.benchmarks is not None and step.benchmarks.exists():
            reports.append(json.loads(step.benchmarks.read_text()))
            result["summary"] = summarise(reports)
        output.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _tell(outcome: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{count} {kind}" for kind, count in outcome.get("counts", {}).items())
    print(f"{outcome['name']:<24}{outcome['status']:<12}{outcome['seconds']:6.1f} s  {counts}")
    for line in outcome.get("log", []):
        print(f"    {line}")
    if "error" in outcome:
        print(f"    {outcome['error']}")
    sys.stdout.flush()


def _title(result: Mapping[str, Any]) -> str:
    machine, commit = result["machine"], result["commit"]["id"]
    parts = {name: machine.get(name) for name in ("driver", "torch", "triton")}
    words = [
        "DRY RUN, not a measurement" if result["dry_run"] else None,
        machine.get("name"),
        *(f"{name} {value}" for name, value in parts.items() if value),
        f"commit {commit[:12]}" if commit else None,
    ]
    return ", ".join(word for word in words if word)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="where the JSON goes")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take")
    parser.add_argument("--skip-build", action="store_true", help="use the package as installed")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, in small")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(Path(folder), arguments.dry_run, arguments.skip_build)
        result = accept(plan, arguments.minutes, arguments.output)
    print_table(render(result["summary"], title=_title(result)))
    print_table(render_iterations(result["iterations"], title="an iteration of a search"))
    print(f"written to {arguments.output}")
    return int(any(step["status"] != "ok" for step in result["steps"]))


if __name__ == "__main__":
    sys.exit(main())
