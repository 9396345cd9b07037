from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dmcp.cli import main
from dmcp.cost import LatencyTable

NET = """
from torch import nn

def net(num_classes, width=1.0):
    first, second = int(8 * width), int(12 * width)
    return nn.Sequential(
        nn.Conv2d(1, first, 3, bias=False), nn.BatchNorm2d(first), nn.ReLU(),
        nn.Conv2d(first, second, 3, bias=False), nn.BatchNorm2d(second), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, num_classes),
    )

def narrow(num_classes):
    return net(num_classes, 0.5)
"""
NETWORK = "--model net.py:net --groups 4 --divisor 1 --device cpu"
BENCH = f"bench latency {NETWORK} --data digits --points 2 --rounds 2 --threads 1"
SEARCH = (
    f"search {NETWORK} --batch-size 512 --budget 80% --search-epochs 1 --retrain-epochs 1 "
    "--no-baselines --quiet"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table and the cache of its timings."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "net.py").write_text(NET)
    assert run(f"{BENCH} --quiet", folder) == 0
    return folder


def run(command: str, folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return main(shlex.split(command))


def test_a_second_call_measures_nothing(measured: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (cache,) = (measured / "cache" / "dmcp" / "latency").iterdir()
    before = cache.read_bytes(), LatencyTable.read(measured / "latency.json").digest
    assert run(f"{BENCH} --json", measured) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["table"] == "latency.json"
    assert shown["setting"]["input"] == [1, 1, 8, 8]
    assert shown["full_ms"] > 0
    assert before == (cache.read_bytes(), LatencyTable.read(measured / "latency.json").digest)
    assert run(f"{BENCH} --output again.json", measured) == 0
    captured = capfd.readouterr()
    assert "written to again.json" in captured.out
    assert "runtime eager, device cpu" in captured.out


def test_a_search_keeps_the_table_it_was_begun_with(
    measured: Path, made_up_latency: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = f"{SEARCH} --budget-latency {made_up_latency} --output run"
    assert run(f"{command} --latency-table made_up.json", measured) == 0
    folder = measured / "run"
    config = json.loads((folder / "config.json").read_text())
    held = LatencyTable.read(folder / "latency.json")
    assert held.digest == config["budget"]["latency_table"]
    assert held.digest == LatencyTable.read(measured / "made_up.json").digest
    latency = json.loads((folder / "search.json").read_text())["costs"]["latency"]
    assert latency["budget"] == pytest.approx(0.8 * latency["interpolation"]["constant"] * 5)
    # Whatever latency.json holds by now: the run goes on with its own.
    assert run(command, measured) == 0
    capfd.readouterr()
    other = {**held.to_json(), "offset": 1.1}
    (measured / "other.json").write_text(json.dumps(other))
    assert run(f"{command} --latency-table other.json", measured) == 2
    assert "another configuration: budget.latency_table is" in capfd.readouterr().err


@pytest.fixture(scope="module")
def made_up_latency(measured: Path) -> str:
    """Writes a table of the same network that says how its latency grows; a bound on it."""
    data = json.loads((measured / "latency.json").read_text())
    units = data["searchable"]
    data["axes"] = [
        {"weights": {unit: 1.0}, "nodes": [1.0, float(data["units"][unit])]} for unit in units
    ]
    term = {"name": "", "operators": [], "low": None, "high": None}
    data["terms"] = [
        {**term, "axes": [n], "ms": [0.0, 4.0 / len(units)]} for n in range(len(units))
    ]
    (measured / "made_up.json").write_text(json.dumps({**data, "scale": 1.0, "offset": 1.0}))
    return "80%"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{BENCH} --device tpu", "--device must be cpu, cuda or cuda:<number>, got 'tpu'"),
        (f"{BENCH} --output none/latency.json", "--output: there is no folder 'none'"),
        (f"{BENCH} --runtime tensorrt", "'tensorrt' is not one of 'eager', 'compiled'"),
        (f"{SEARCH} --output x --budget-latency 5 --latency-table no.json", "dmcp bench latency"),
        (f"{SEARCH} --output x --budget-latency fast", "budget latency_ms must be a number, or"),
        (
            f"{SEARCH} --output x --budget-latency 5 --model net.py:narrow",
            "is of another network or image",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    measured: Path, capfd: pytest.CaptureFixture[str], command: str, message: str
) -> None:
    assert run(command, measured) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("dmcp: ")
    assert message in line
    assert not (measured / "x").exists()
