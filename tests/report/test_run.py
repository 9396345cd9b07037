from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmcp.errors import CheckpointError
from dmcp.report import Run, write_page


def test_everything_of_a_run(run_folder: Path) -> None:
    run = Run.read(run_folder)
    assert (run.name, run.kind) == ("first", "search")
    assert run.curves is not None
    assert list(run.curves) == ["search", "dmcp"]
    steps, values = run.curves["search"]["expected_macs"]
    assert (steps[0], steps[-1], values[-1]) == (1, 40, 80_000)
    assert run.retained is not None
    assert run.retained.steps.tolist() == list(range(2, 41, 2))
    chains = run.chains()
    assert chains is not None
    for unit, q in run.retained.of.items():
        assert q.shape == (20, len(chains.choices[unit]) - 1)
        np.testing.assert_allclose(q[-1], chains.retain[unit])
    assert run.targets() == {"macs": 80_000}


def test_a_run_that_has_just_begun(write: Any, tmp_path: Path) -> None:
    write("config.json", {"format": 1, "kind": "search"})
    run = Run.read(tmp_path)
    assert (run.curves, run.retained, run.ledger, run.results) == (None, None, None, None)
    assert run.chains() is None
    assert run.targets() == {}
    (tmp_path / "metrics.jsonl").touch()
    assert Run.read(tmp_path).curves is None


def test_a_line_that_is_being_written_is_left_out(write: Any, tmp_path: Path) -> None:
    write("config.json", {"format": 1})
    lines = [json.dumps({"phase": "search", "step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines)[:-5])
    curves = Run.read(tmp_path).curves
    assert curves is not None
    assert curves["search"]["loss"][0].tolist() == [1, 2]


@pytest.mark.parametrize("other", ["groups", "units"])
def test_chains_on_the_way_of_another_search(run_folder: Path, tmp_path: Path, other: str) -> None:
    path = shutil.copytree(run_folder, tmp_path / "run")
    records = [json.loads(line) for line in (path / "chains.jsonl").read_text().splitlines()]
    for record in records:
        groups = record["retain"].pop("stem")
        if other == "groups":
            record["retain"]["stem"] = groups[:-1]
    (path / "chains.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(
        CheckpointError, match=r"chains.jsonl is not of the search in .*search.json"
    ):
        write_page([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["none", ""])
def test_a_folder_that_is_no_run(tmp_path: Path, folder: str) -> None:
    (tmp_path / "notes.txt").touch()
    said = "is not a run: it has neither config.json nor search.json"
    with pytest.raises(CheckpointError, match=said):
        Run.read(tmp_path / folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", "{}\n", "does not hold the records"),
        ("metrics.jsonl", "{\n{}\n", "line 1 of .* is not a record"),
        ("metrics.jsonl", '{"phase": "a", "step": 1, "loss": "x"}\n', "does not hold the records"),
        ("chains.jsonl", '{"step": 1, "retain": {"a": 0.5}}\n', "does not hold the records"),
        ("results.json", '{"networks": [{"network": "dmcp"}]}', "is not that of a run"),
        ("results.json", "{}", "is not that of a run"),
        ("results.json", '{"rows": [], "records": []}', "is not that of a search run"),
        ("ledger.json", '{"phases": {"search": {}}}', "is not that of a run"),
        ("ledger.json", "[]", "holds a list, not an object"),
        ("config.json", '{"network": 3}', "is not that of a run"),
    ],
)
def test_a_file_of_something_else(
    write: Any, tmp_path: Path, name: str, text: str, said: str
) -> None:
    write("config.json", {"format": 1})
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        Run.read(tmp_path)
