"""The GPU acceptance command: its dry run, and how it deals with steps that go wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import gpu
import pytest
from gpu import Step, StepError


def python(code):
    return (sys.executable, "-c", code)


# --- The dry run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(root, environment, tmp_path_factory):
    """What it printed and what it wrote."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a compiler")
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "bench/gpu.py", "--dry-run", "--skip-build", "--output", str(output)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(output.read_text())


@pytest.mark.slow
def test_dry_run_takes_every_step(dry_run):
    printed, result = dry_run
    assert result["dry_run"] is True
    assert {step["status"] for step in result["steps"]} == {"ok"}
    names = ["machine", "tests", "ops", "search step", "norm_act"]
    assert [step["name"] for step in result["steps"]] == names
    for name in names:
        assert f"\n{name} " in f"\n{printed}"


@pytest.mark.slow
def test_dry_run_finds_the_gpu_tests(dry_run):
    (tests,) = (step["counts"] for step in dry_run[1]["steps"] if step["name"] == "tests")
    assert tests["tests"] > 0
    assert tests["failures"] == tests["errors"] == 0


@pytest.mark.slow
def test_dry_run_says_what_it_ran_on(dry_run):
    machine = dry_run[1]["machine"]
    assert machine["device"] == "cpu"
    assert {"eager", "native", "cuda", "triton"} <= set(machine["backends"])
    assert all(machine[key] for key in ("name", "python", "torch", "threads"))


@pytest.mark.slow
def test_dry_run_measures_every_op_and_rival(dry_run):
    printed, result = dry_run
    rows = result["summary"]["rows"]
    assert {row["op"] for row in rows} == {"retain", "expected_cost", "norm_act"}
    fused = {row["rival"]: row for row in rows if row["op"] == "norm_act"}
    assert set(fused) == {"ours", "eager", "published", "compile", "copy"}
    for rival, row in fused.items():
        directions = {"fwd", "bwd", "both"} & set(row)
        assert directions == ({"both"} if rival == "copy" else {"fwd", "bwd", "both"})
        assert all(row[direction]["of_copy"] > 0 for direction in directions)
    (case,) = result["iterations"]
    assert set(case["rivals"]) == {"ours", "published", "eager"}
    assert "an iteration of a search" in printed
    assert printed.count("DRY RUN, not a measurement") == 1
    assert "mobilenet_v2-1.0" in printed


# --- Steps ----------------------------------------------------------------------------------------


@pytest.fixture
def little_grace(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)


def test_a_step_that_fails_shows_the_end_of_its_output(tmp_path):
    step = Step("build", python("print('why'); raise SystemExit(3)"), 1)
    outcome = gpu.run(step, 60, tmp_path / "log")
    assert (outcome["status"], outcome["log"]) == ("failed", ["why"])


def test_a_step_that_takes_too_long_is_stopped_with_its_children(little_grace, tmp_path):
    mark = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = gpu.run(Step("tests", python(parent), 1), 2.0, tmp_path / "log")
    assert outcome["status"] == "out of time"
    assert outcome["seconds"] < 4
    time.sleep(4)
    assert not mark.exists()


def test_a_step_that_takes_too_long_may_write_what_it_has(little_grace, tmp_path):
    found = tmp_path / "found"
    code = (
        "import time, pathlib\n"
        "try: time.sleep(30)\n"
        f"except KeyboardInterrupt: pathlib.Path({str(found)!r}).write_text('half')"
    )
    step = Step("ops", python(code), 1, read=lambda _: {"found": found.read_text()})
    # Long enough for an interpreter to start on a busy machine.
    outcome = gpu.run(step, 8.0, tmp_path / "log")
    assert (outcome["status"], outcome["found"]) == ("out of time", "half")


def test_a_step_that_has_no_time_left_does_not_run(tmp_path):
    mark = tmp_path / "mark"
    step = Step("ops", python(f"import pathlib; pathlib.Path({str(mark)!r}).touch()"), 1)
    assert gpu.run(step, 5, tmp_path / "log")["status"] == "out of time"
    assert not mark.exists()


def test_benchmarks_that_come_too_late_do_not_start(root, environment):
    suite = "-m pytest -q bench/test_retain.py --seconds=0 -rs"
    command = [sys.executable, "-P", *suite.split()]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert "3 skipped" in done.stdout
    assert "out of time" in done.stdout


def test_a_step_that_did_nothing_is_a_failure(tmp_path):
    def read(_):
        raise StepError("nothing ran")

    outcome = gpu.run(Step("tests", python("pass"), 1, read=read), 60, tmp_path / "log")
    assert (outcome["status"], outcome["error"]) == ("failed", "nothing ran")


def test_a_gpu_without_its_kernels_is_a_failure(tmp_path):
    plan = gpu.Plan(tmp_path, dry_run=False, skip_build=True)
    missing = {"available": False, "reason": "built without CUDA"}
    backends = {"cuda": missing, "triton": {"available": True, "reason": ""}}
    output = "a warning\n" + json.dumps({"name": "a GPU", "backends": backends}, indent=1)
    machine = next(step for step in plan.steps() if step.name == "machine")
    with pytest.raises(StepError, match="'cuda' is missing: built without CUDA"):
        machine.read(output)


@dataclass
class Planned:
    folder: object
    all_steps: list
    dry_run: bool = True

    def steps(self):
        return iter(self.all_steps)


def test_later_steps_keep_their_time_and_earlier_results_stay(little_grace, tmp_path):
    output = tmp_path / "gpu.json"
    endless = Step("tests", python("import time; time.sleep(60)"), 2)
    seen = Step("ops", python(f"print(open({str(output)!r}).read())"), 6, read=json.loads)
    result = gpu.accept(Planned(tmp_path, [endless, seen]), 10 / 60, output)
    assert [step["status"] for step in result["steps"]] == ["out of time", "ok"]
    # What the second step found in the file was written after the first one.
    assert [step["name"] for step in result["steps"][1]["steps"]] == ["tests"]
    assert json.loads(output.read_text())["steps"][0]["status"] == "out of time"


@pytest.mark.parametrize("dry_run", [True, False])
def test_cuda_graphs_are_measured_on_a_gpu(dry_run, tmp_path):
    plan = gpu.Plan(tmp_path, dry_run=dry_run, skip_build=True)
    (step,) = (step for step in plan.steps() if step.name == "search step")
    assert ("graphs" in step.command) != dry_run


def test_all_promises_fit_into_nine_minutes(tmp_path):
    plan = gpu.Plan(tmp_path, dry_run=False, skip_build=False)
    assert sum(step.seconds for step in plan.steps()) <= 9 * 60
