from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from dmcp.errors import CheckpointError
from dmcp.runs import RunFolder

CONFIG = {"kind": "train", "network": {"model": "resnet18", "seed": 0}, "epochs": 2}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.open(CONFIG)
    return folder


def test_a_folder_takes_up_its_own_run(folder):
    before = folder.config()
    folder.open({**CONFIG, "network": {"seed": 0, "model": "resnet18"}})
    assert folder.config() == before == {"format": 1, **CONFIG}
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"epochs": 3}, "epochs is 2, not 3"),
        ({"network": {"model": "resnet18", "seed": 1}}, "network.seed is 0, not 1"),
        ({"extra": True}, "extra is None, not True"),
        ({"kind": "search", "arch_data": "train"}, "kind is 'train', not 'search'"),
    ],
)
def test_another_configuration_is_refused(folder, change, difference):
    before = (folder.path / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=difference):
        folder.open({**CONFIG, **change})
    assert (folder.path / "config.json").read_bytes() == before


def dying_after(count, write):
    """A function that writes so many files, and then dies."""
    written = []

    def call(name, data):
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(name)
        write(name, data)

    return call


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    RunFolder(tmp_path / "run").open(CONFIG, write=False)
    assert not (tmp_path / "run").exists()


def test_begins_in_an_empty_folder_and_after_a_kill(tmp_path):
    """A kill during the very first write leaves a part of config.json."""
    (tmp_path / ".config.json.partial").write_text('{"format": ')
    RunFolder(tmp_path).open(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_run_needs_is_there_before_its_configuration(tmp_path, monkeypatch):
    """A run that was killed between the two can be taken up."""
    needed = {"latency.json": {"ms": (1.5, 2.0)}}
    folder = RunFolder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_json", dying_after(1, folder.write_json))
        with pytest.raises(KeyboardInterrupt):
            folder.open(CONFIG, needed)
    assert folder.read_json("latency.json") == {"ms": [1.5, 2.0]}
    with pytest.raises(CheckpointError, match="not empty and not a run folder"):
        folder.open(CONFIG, {"latency.json": {"ms": [3.0]}})  # someone else's
    folder.open(CONFIG, needed)
    written = (tmp_path / "latency.json").stat().st_mtime_ns
    folder.open(CONFIG, needed)
    assert (tmp_path / "latency.json").stat().st_mtime_ns == written
    assert folder.config() == {"format": 1, **CONFIG}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "latency.json"}


def test_something_else_is_refused(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    with pytest.raises(CheckpointError, match="not empty and not a run folder"):
        RunFolder(tmp_path).open(CONFIG)
    with pytest.raises(CheckpointError, match="is a file, not a run folder"):
        RunFolder(note).open(CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert note.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"format": 1, "ki', "not a readable JSON file"),
        (b"\xff\xfe", "not a readable JSON file"),
        (b"[1]", "holds a list, not an object"),
        (b"{}", "has format None, expected 1"),
        (b'{"format": 99}', "has format 99, expected 1"),
    ],
)
def test_a_corrupt_configuration_is_refused(folder, text, reason):
    (folder.path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        folder.open(CONFIG)
    assert "\n" not in str(caught.value)
    assert (folder.path / "config.json").read_bytes() == text


def test_json_is_replaced_whole(folder):
    folder.write_json("widths.json", {"widths": {"conv1": 100}})
    folder.write_json("widths.json", {"widths": {"fc": 3}})
    assert folder.read_json("widths.json") == {"widths": {"fc": 3}}
    assert json.loads((folder.path / "widths.json").read_text()) == {"widths": {"fc": 3}}
    assert not list(folder.path.glob(".*"))


def test_what_is_missing_is_named(folder):
    with pytest.raises(CheckpointError, match=r"not a finished run: it has no results\.json"):
        folder.read_json("results.json")
    with pytest.raises(CheckpointError, match="no trained network 'dmcp'"):
        folder.read_weights("dmcp", nn.Linear(2, 3))


def make_net(channels=6):
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels))
    return net.to(memory_format=torch.channels_last)


def test_weights_round_trip(folder):
    saved, loaded = make_net(), make_net()
    saved(torch.randn(2, 3, 5, 5))
    folder.write_weights("pruned", saved)
    folder.read_weights("pruned", loaded)
    states = zip(saved.state_dict().items(), loaded.state_dict().items(), strict=True)
    for (name, tensor), (other_name, other) in states:
        assert name == other_name
        assert torch.equal(tensor, other)
        assert tensor.stride() == other.stride()


def test_weights_that_do_not_fit_are_refused(folder):
    folder.write_weights("pruned", make_net())
    path = folder.path / "weights" / "pruned.safetensors"
    with pytest.raises(CheckpointError, match=str(path)):
        folder.read_weights("pruned", make_net(5))
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:4], b"", b"\0" * 64):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(path)) as caught:
            folder.read_weights("pruned", make_net())
        assert "\n" not in str(caught.value)
