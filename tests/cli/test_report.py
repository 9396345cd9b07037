from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmcp.cli import main

MODEL = """
from torch import nn

def net(num_classes):
    def conv(inputs, outputs):
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)]
    return nn.Sequential(*conv(1, 8), nn.MaxPool2d(2), *conv(8, 16), *pool)
"""
NAMES = ["front", "curves", "expected-costs", "retained", "expected-widths", "widths"]
NAMES += ["costs-macs", "channels"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a search of seconds, without the folder."""
    path = tmp_path_factory.mktemp("model") / "model.py"
    path.write_text(MODEL)
    return shlex.split(
        f"search --model {path}:net --batch-size 256 --device cpu --divisor 2 --groups 4 "
        "--budget 50% --search-epochs 2 --retrain-epochs 1 --quiet --output"
    )


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("report") / "first"
    assert main([*command, str(folder)]) == 0
    return folder


def test_report_of_a_run(run: Path, command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    page, *pictures = [Path(line) for line in capfd.readouterr().out.splitlines()]
    assert page == run / "report" / "report.html"
    assert [path.name for path in pictures] == [
        f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")
    ]
    assert all(path.is_file() for path in [page, *pictures])
    text = page.read_text()
    for row in json.loads((run / "results.json").read_text())["networks"]:
        assert f"<td>{row['macs']:,}</td>" in text
        assert f"<td>{100 * row['top1']:.2f}</td>" in text
    # Everything that a run writes was found, and nothing is said to be missing.
    assert "there is no" not in text
    assert 'class="text">search</td>' in text
    assert main([*command, str(run)]) == 0, "the run is the same one with a report in it"


def test_several_runs_into_one_folder(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of one there is little to draw, and the other has just begun."""
    runs = [tmp_path / "second", tmp_path / "third"]
    copy(run, runs[0], "config.json", "results.json")
    copy(run, runs[1], "config.json")
    output = tmp_path / "figures"
    command = ["report", *map(str, runs), "--every-unit", "--output", str(output)]
    assert main(command) == 0
    written = [Path(line) for line in capfd.readouterr().out.splitlines()]
    assert written == [output / name for name in ("report.html", "front.png", "front.svg")]
    assert "2 runs" in written[0].read_text()


def copy(run: Path, folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes((run / name).read_bytes())


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_what_cannot_be_reported_is_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any run is drawn."""
    error = refusal(["report", str(run), str(tmp_path), "--output", str(tmp_path / "out")], capfd)
    assert f"{tmp_path} is not a run: it has neither config.json nor search.json" in error
    same = tmp_path / "first"
    same.mkdir()
    (same / "search.json").write_text(json.dumps({}))
    command = ["report", str(run), str(same), "--output", str(tmp_path / "out")]
    assert "--output needs runs of different names" in refusal(command, capfd)
    assert f"{same / 'search.json'} does not hold the chains" in refusal(
        ["report", str(same)], capfd
    )
    assert "the same run is named twice" in refusal(["report", str(run), f"{run}/."], capfd)
    assert "Missing argument 'RUN...'" in refusal(["report"], capfd)
    assert not (tmp_path / "out").exists()


WITHOUT = """
import sys
from dmcp.cli import main
for name in ("matplotlib", "jinja2"):
    kept = {key: sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == name}
    sys.modules[name] = None
    assert main(["report", sys.argv[1], "--output", sys.argv[2]]) == 2
    del sys.modules[name]
    sys.modules.update(kept)
"""


def test_a_missing_package_is_one_line(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(run), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for name, line in zip(("matplotlib", "jinja2"), lines, strict=True):
        assert f"needs the package '{name}': pip install 'dmcp[report]'" in line
    assert not (tmp_path / "out").exists()


PYPLOT = """
import sys
from dmcp.cli import main
for name in ("matplotlib", "jinja2.environment"):
    assert name not in sys.modules, f"the command line imports {name} before it is needed"
assert main(["report", sys.argv[1]]) == 0
assert "matplotlib.pyplot" not in sys.modules
"""


def test_there_is_no_global_state(run: Path, tmp_path: Path) -> None:
    copy(run, tmp_path, "config.json", "results.json")
    subprocess.run([sys.executable, "-c", PYPLOT, str(tmp_path)], check=True)
