from __future__ import annotations

import json
from pathlib import Path

import pytest

from dmcp.errors import CheckpointError
from dmcp.train import Recorder


def records(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"]) for record in map(json.loads, lines)]


def scalars(folder: Path, phase: str, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard" / phase))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_writes_one_object_a_line_and_tells_the_watcher(tmp_path: Path):
    seen = []
    with Recorder(tmp_path, on_record=seen.append) as recorder:
        recorder.begin("search", 0)
        recorder.record("search", 10, {"loss": 1.5})
        recorder.record("search", 20, {"loss": 0.1 + 0.2, "accuracy": 0.5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = [
        {"phase": "search", "step": 10, "loss": 1.5},
        {"phase": "search", "step": 20, "loss": 0.1 + 0.2, "accuracy": 0.5},
    ]
    assert [json.loads(line) for line in lines] == expected
    assert seen == expected


def test_resuming_forgets_the_later_records_of_its_phase_only(tmp_path: Path):
    with Recorder(tmp_path) as recorder:
        for phase in ("search", "train"):
            recorder.begin(phase, 0)
            for step in (10, 20, 30):
                recorder.record(phase, step, {"loss": float(step)})
    with Recorder(tmp_path) as recorder:
        recorder.begin("train", 20)
        recorder.record("train", 30, {"loss": -1.0})
    assert records(tmp_path) == [(phase, s) for phase in ("search", "train") for s in (10, 20, 30)]
    assert scalars(tmp_path, "train", "loss") == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert scalars(tmp_path, "search", "loss") == [(10, 10.0), (20, 20.0), (30, 30.0)]


def test_beginning_anew_forgets_the_phase(tmp_path: Path):
    with Recorder(tmp_path) as recorder:
        recorder.begin("train", 0)
        recorder.record("train", 1, {"loss": 1.0})
        recorder.begin("train", 0)
        recorder.record("train", 1, {"loss": 2.0})
    assert records(tmp_path) == [("train", 1)]
    assert scalars(tmp_path, "train", "loss") == [(1, 2.0)]


@pytest.mark.parametrize("torn", ["{", '{"phase": "train", "st', '{"phase": "train", "step": 2}'])
def test_drops_a_torn_last_line(tmp_path: Path, torn: str):
    with Recorder(tmp_path) as recorder:
        recorder.begin("train", 0)
        recorder.record("train", 1, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with Recorder(tmp_path) as recorder:
        recorder.record("eval", 0, {"top1": 0.5})
    assert records(tmp_path) == [("train", 1), ("eval", 0)]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}'])
def test_refuses_a_file_that_is_not_of_records(tmp_path: Path, line: str):
    text = '{"phase": "train", "step": 1}\n' + line + "\n"
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(CheckpointError, match="line 2"):
        Recorder(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == text
