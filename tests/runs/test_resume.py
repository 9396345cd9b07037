from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from dmcp.cli import main

SEARCH = shlex.split(
    "search --model resnet18 --width 0.125 --batch-size 96 --divisor 1 --budget 50% --device cpu "
    "--search-epochs 1 --retrain-epochs 1 --retrain distil --checkpoint-every 3 --log-every 1 "
    "--quiet"
)


def search_in(folder: Path, *more: str) -> int:
    return main([*SEARCH, *more, "--output", str(folder)])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert search_in(folder) == 0
    return folder


@pytest.fixture
def start(launch) -> Callable[[Path], ForkServerProcess]:
    return lambda folder: launch("dmcp", *SEARCH, "--output", folder)


def reached(folder: Path, phase: str, step: int) -> bool:
    """Whether metrics.jsonl has come to this step of this phase."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return False
    return f'{{"phase": "{phase}", "step": {step},' in metrics.read_text()


def results(folder: Path) -> dict[str, object]:
    """What must not depend on kills: everything but times, TensorBoard and torch's own archives."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_file() and path.parent.name == "weights")
        or path.suffix == ".jsonl"
        or path.name in ("config.json", "search.json")
    }
    structure = json.loads((folder / "widths.json").read_text())
    assert structure.pop("provenance")["seconds"] > 0
    table, ledger = (
        json.loads((folder / name).read_text()) for name in ("results.json", "ledger.json")
    )
    phases = ledger["phases"]
    for row in table["networks"]:
        searched = phases["search"]["seconds"] if row["network"] == "dmcp" else 0.0
        assert row.pop("seconds") == searched + phases[row["network"]]["seconds"] > searched
    for phase in phases.values():
        assert phase.pop("seconds") > 0
    assert shlex.split(ledger.pop("command")) == ["dmcp", *SEARCH, "--output", str(folder)]
    ledger.pop("commit", None)  # somebody may be at work on the checkout
    return {**found, "structure": structure, "results": table, "ledger": ledger}


def test_killed_in_every_phase(undisturbed, start, wait_until, tmp_path):
    """The same bits as a run that nobody killed."""
    folder = tmp_path / "run"
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draw = random.Random(seed)
    # Each phase has 14 steps; what is still to come gives the kill the time to come before its end.
    search, dense, dmcp, uniform = (draw.randint(1, 5) for _ in range(4))
    moments = [
        lambda: (folder / "config.json").exists(),
        lambda: reached(folder, "search", search),
        lambda: reached(folder, "dense", dense),
        lambda: reached(folder, "dmcp", dmcp),
        lambda: reached(folder, "uniform", uniform),
    ]
    for moment in moments:
        process = start(folder)
        wait_until(process, moment, poll=0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "results.json").exists()
    # Nothing may depend on the hash seed or on addresses, which the killed ones share.
    command = [sys.executable, "-P", "-m", "dmcp", *SEARCH, "--output", str(folder)]
    subprocess.run(command, check=True, timeout=300)
    assert results(folder) == results(undisturbed)


def test_a_finished_run_prints_the_same_table(undisturbed, contents, capfd):
    before = contents(undisturbed)
    shown = []
    for _ in range(2):
        command = [option for option in SEARCH if option != "--quiet"]
        assert main([*command, "--output", str(undisturbed)]) == 0
        shown.append(capfd.readouterr())
    assert shown[0] == shown[1]
    assert "DMCP (expected sampling)" in shown[0].out
    assert shown[0].err == ""
    assert contents(undisturbed) == before


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (["--budget", "40%"], "budget.macs is '50%', not '40%'"),
        (["--seed", "1"], "network.seed is 0, not 1"),
        (["--retrain-epochs", "2"], "retrain_epochs is 1, not 2"),
        (["--width", "0.25"], "network.model_options.width is 0.125, not 0.25"),
        (["--no-baselines"], "baselines is True, not False"),
        (["--precision", "bfloat16"], "search.precision is 'float32', not 'bfloat16'"),
        (["--micro-batches", "2"], "search.micro_batches is 1, not 2"),
    ],
)
def test_another_configuration_is_refused(undisturbed, contents, capfd, change, difference):
    before = contents(undisturbed)
    assert search_in(undisturbed, *change) == 2
    assert capfd.readouterr().err == (
        f"dmcp: {undisturbed} holds a run of another configuration: {difference}\n"
    )
    assert contents(undisturbed) == before


@pytest.fixture
def stopped(undisturbed, tmp_path) -> Path:
    """A copy of the run as it was before the table."""
    folder = tmp_path / "stopped"
    shutil.copytree(undisturbed, folder)
    (folder / "results.json").unlink()
    return folder


def test_a_run_from_before_an_option_is_of_another_configuration(stopped, contents, capfd):
    config = json.loads((stopped / "config.json").read_text())
    del config["train"]["micro_batches"]
    (stopped / "config.json").write_text(json.dumps(config))
    before = contents(stopped)
    assert search_in(stopped) == 2
    assert "another configuration: train.micro_batches is None, not 1" in capfd.readouterr().err
    assert contents(stopped) == before


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
    else:
        data = bytearray(b"cos\nsystem\n(S'true'\ntR.")
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("checkpoint/search.pt", "truncated"),
        ("checkpoint/search.pt", "empty"),
        ("checkpoint/search.pt", "flipped"),
        ("checkpoint/search.pt", "foreign"),
        ("config.json", "truncated"),
        ("config.json", "empty"),
        ("config.json", "foreign"),
        ("metrics.jsonl", "foreign"),
    ],
)
def test_a_damaged_file_stops_the_run(stopped, contents, capfd, name, how):
    damage(stopped / name, how)
    before = contents(stopped)
    assert search_in(stopped) == 2
    error = capfd.readouterr().err
    assert error.startswith("dmcp: ")
    assert str(stopped / name) in error
    assert error.count("\n") == 1
    assert contents(stopped) == before


@pytest.mark.parametrize("how", ["truncated", "empty", "foreign"])
@pytest.mark.parametrize("name", ["weights/dmcp.safetensors", "results.json", "config.json"])
def test_a_damaged_run_is_not_evaluated(undisturbed, tmp_path, contents, capfd, name, how):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    damage(folder / name, how)
    before = contents(folder)
    assert main(["eval", str(folder), "--network", "dmcp", "--device", "cpu"]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"dmcp: {folder / name} ")
    assert shown.err.count("\n") == 1
    assert contents(folder) == before


def test_a_checkpoint_of_another_run_is_refused(stopped, finished, capfd):
    """Of the same network, another length."""
    shutil.copy(finished.folder.checkpoint("search"), stopped / "checkpoint" / "search.pt")
    assert search_in(stopped) == 2
    error = capfd.readouterr().err
    assert re.search(r"\d+ steps, not of a search with \d+ steps", error)
    assert error.count("\n") == 1


def test_a_foreign_folder_is_left_alone(tmp_path, contents, capfd):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    before = contents(tmp_path)
    assert search_in(tmp_path) == 2
    assert capfd.readouterr().err == f"dmcp: {tmp_path} is not empty and not a run folder\n"
    assert contents(tmp_path) == before
