from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from dmcp.errors import CheckpointError
from dmcp.train import Recorder
from dmcp.train.readback import Snapshot


def records(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(record["phase"], record["step"]) for record in map(json.loads, lines)]


def events_of(folder: Path, phase: str) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = {"histograms": 0, "images": 0, "scalars": 0, "tensors": 0}
    events = accumulator.EventAccumulator(str(folder / "tensorboard" / phase), everything)
    return events.Reload()


def scalars(folder: Path, phase: str, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(folder, phase).Scalars(tag)]


def test_writes_one_object_a_line(tmp_path: Path):
    with Recorder(tmp_path) as recorder:
        recorder.begin("search", 0)
        seen = [
            recorder.record("search", 10, {"loss": 1.5}),
            recorder.record("search", 20, {"loss": 0.1 + 0.2, "accuracy": 0.5}),
        ]
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


CHOICES = {"stem": (8, 16), "layer1.conv": (2, 4, 10)}


def snapshot(*q: float) -> Snapshot:
    return Snapshot(CHOICES, torch.tensor(q))


def test_chains_have_a_file_of_their_own(tmp_path: Path):
    """That a resumed run cuts as it cuts the metrics."""
    with Recorder(tmp_path) as recorder:
        recorder.begin("search", 0)
        recorder.record("search", 10, {"loss": 1.0})
        seen = recorder.chains("search", 15, snapshot(0.5, 0.75, 0.25))
        recorder.chains("search", 20, snapshot(0.5, 0.5, 0.5))
    assert seen == {
        "phase": "search",
        "step": 15,
        "retain": {"stem": [0.5], "layer1.conv": [0.75, 0.25]},
    }
    with Recorder(tmp_path) as recorder:
        assert [record["step"] for record in recorder.begin("search", 18)] == [10, 15]
        recorder.chains("search", 20, snapshot(1.0, 1.0, 0.0))
        assert recorder.begin("train", 100) == []
    first, last = map(json.loads, (tmp_path / "chains.jsonl").read_text().splitlines())
    assert first == seen
    assert last["retain"] == {"stem": [1.0], "layer1.conv": [1.0, 0.0]}
    assert records(tmp_path) == [("search", 10)]


def test_a_snapshot_is_of_its_moment():
    q = torch.tensor([0.5, 0.75, 0.25])
    taken = Snapshot(CHOICES, q)
    q.zero_()
    assert taken.retain() == {"stem": [0.5], "layer1.conv": [0.75, 0.25]}


def test_tensorboard_shows_chains(tmp_path: Path):
    image = pytest.importorskip("PIL.Image")
    snapshots = [snapshot(1.0, 1.0, 1.0), snapshot(0.0, 0.75, 0.25)]
    # The default device of new tensors does not matter.
    with torch.device("meta"), Recorder(tmp_path, {"budget": {"macs": "50%"}}) as recorder:
        recorder.begin("search", 0)
        for step, taken in enumerate(snapshots, 1):
            recorder.chains("search", step, taken)
    events = events_of(tmp_path, "search")
    assert sorted(events.Tags()["histograms"]) == ["q/layer1.conv", "q/stem"]
    full, halved = (event.histogram_value for event in events.Histograms("q/layer1.conv"))
    assert (full.num, full.min, full.max) == (2, 1.0, 1.0)
    assert (halved.num, halved.min, halved.max, halved.sum) == (2, 0.25, 0.75, 1.0)
    (text,) = events.Tensors("config/text_summary")
    (markdown,) = text.tensor_proto.string_val
    lines = markdown.decode().splitlines()
    assert all(line.startswith("    ") for line in lines), "a block of code"
    assert json.loads("".join(lines)) == {"budget": {"macs": "50%"}}

    pictures = [
        numpy.asarray(image.open(io.BytesIO(event.encoded_image_string)))
        for event in events.Images("expected_widths")
    ]
    blue = [(picture == (31, 119, 180)).all(2) for picture in pictures]
    grey = [(picture == (222, 222, 222)).all(2) for picture in pictures]
    assert not grey[0].any()
    for unit, kept in enumerate([8 / 16, (2 + 0.75 * 2 + 0.25 * 6) / 10]):
        (column,) = {tuple(c) for c in blue[1].T[unit * 8 : unit * 8 + 6]}
        assert sum(column) == 64 * kept
        assert all(column[-sum(column) :]), "filled from below"
        assert not blue[1].T[unit * 8 + 6 : unit * 8 + 8].any()
    assert (blue[1] | grey[1] == blue[0]).all()


def test_a_finished_phase_gets_no_new_events(tmp_path: Path):
    for done in (0, 1):
        with Recorder(tmp_path, {"seed": 0}) as recorder:
            for phase in ("search", "train"):
                recorder.begin(phase, done)
            if not done:
                recorder.record("search", 1, {"loss": 1.0})
            recorder.record("train", 1 + done, {"loss": 1.0})
    files = {
        phase: len(list((tmp_path / "tensorboard" / phase).iterdir()))
        for phase in ("search", "train")
    }
    assert files == {"search": 1, "train": 2}
    assert len(events_of(tmp_path, "train").Tensors("config/text_summary")) == 1


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
@pytest.mark.parametrize("name", ["metrics.jsonl", "chains.jsonl"])
def test_refuses_a_file_that_is_not_of_records(tmp_path: Path, name: str, line: str):
    text = '{"phase": "train", "step": 1}\n' + line + "\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"line 2 of .*{name}"):
        Recorder(tmp_path)
    assert (tmp_path / name).read_text() == text
