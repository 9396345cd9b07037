from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dmcp.cli import main

SEARCH = shlex.split(
    "search --model resnet18 --width 0.125 --batch-size 256 --device cpu --divisor 1 "
    "--budget 50% --search-epochs 1 --retrain-epochs 1 --no-baselines --quiet --output"
)
NAMES = {
    f"{name}.{kind}" for name in ("costs-macs", "channels", "widths") for kind in ("png", "svg")
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("report") / "first"
    assert main([*SEARCH, str(folder)]) == 0
    return folder


def test_figures_of_a_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    shown = capfd.readouterr()
    paths = [Path(line) for line in shown.out.splitlines()]
    assert {path.name for path in paths} == NAMES
    assert {path.parent for path in paths} == {run / "report"}
    assert all(path.is_file() for path in paths)
    assert main([*SEARCH, str(run)]) == 0, "the run is the same one with figures in it"


def test_several_runs_into_one_folder(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "second"
    other.mkdir()
    (other / "search.json").write_text((run / "search.json").read_text())
    output = tmp_path / "figures"
    command = ["report", str(run), str(other), "--every-unit", "--output", str(output)]
    assert main(command) == 0
    assert len(capfd.readouterr().out.splitlines()) == 12
    assert {path.name for path in output.iterdir()} == {"first", "second"}
    assert {path.name for path in (output / "second").iterdir()} == NAMES


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_what_cannot_be_drawn_is_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before any run is drawn."""
    error = refusal(["report", str(run), str(tmp_path), "--output", str(tmp_path / "out")], capfd)
    assert f"{tmp_path} is not a finished search: it has no search.json" in error
    same = tmp_path / "first"
    same.mkdir()
    (same / "search.json").write_text(json.dumps({}))
    command = ["report", str(run), str(same), "--output", str(tmp_path / "out")]
    assert "--output needs runs of different names" in refusal(command, capfd)
    assert f"{same / 'search.json'} does not hold the chains" in refusal(
        ["report", str(same)], capfd
    )
    assert "Missing argument 'RUN...'" in refusal(["report"], capfd)
    assert not (tmp_path / "out").exists()


WITHOUT = """
import sys
sys.modules["matplotlib"] = None
from dmcp.cli import main
sys.exit(main(["report", sys.argv[1], "--output", sys.argv[2]]))
"""


def test_without_matplotlib_it_is_one_line(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(run), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs the package 'matplotlib': pip install 'dmcp[report]'" in done.stderr
    assert not (tmp_path / "out").exists()


PYPLOT = """
import sys
from dmcp.cli import main
assert "matplotlib" not in sys.modules, "the command line imports it before it is needed"
assert main(["report", sys.argv[1], "--output", sys.argv[2]]) == 0
assert "matplotlib.pyplot" not in sys.modules
"""


def test_there_is_no_global_state(run: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", PYPLOT, str(run), str(tmp_path)], check=True)
