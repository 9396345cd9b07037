"""The script that runs a comparison in pieces, on images drawn here."""

from __future__ import annotations

import io
import json
import sys
import tarfile

import cifar10
import pytest
from PIL import Image


@pytest.fixture
def archive(tmp_path):
    """Three images of either part for each of two classes, noise in two colours."""
    path = tmp_path / "images.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for part in ("train", "test"):
            for red, label in ((255, "fire"), (0, "sea")):
                for number in range(8):
                    file = io.BytesIO()
                    Image.new("RGB", (32, 32), (red, 10 * number, 255 - red)).save(file, "JPEG")
                    entry = tarfile.TarInfo(f"{part}/{label}/{number}.jpg")
                    entry.size = file.tell()
                    file.seek(0)
                    tar.addfile(entry, file)
    return path


def test_takes_the_first_images_of_every_class(archive, tmp_path):
    cifar10.unpack(archive, tmp_path / "some", per_class=2)
    cifar10.unpack(archive, tmp_path / "all", per_class=None)
    for folder, count in (("some", 2), ("all", 8)):
        classes = sorted((tmp_path / folder).glob("*/*"))
        assert len(classes) == 4
        assert all(len(list(path.iterdir())) == count for path in classes)


@pytest.fixture
def started_soon(launch, monkeypatch):
    """``python -m dmcp …`` begins at once."""

    def call(command, cwd):
        assert command[:3] == [sys.executable, "-m", "dmcp"]
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            process = launch("dmcp", *command[3:])
        process.join()
        return process.exitcode

    monkeypatch.setattr(cifar10.subprocess, "call", call)


@pytest.mark.usefixtures("started_soon")
def test_goes_on_from_its_state_alone(archive, tmp_path, monkeypatch):
    state = tmp_path / "state.tar"
    options = [
        *("--methods", "uniform", "--seeds", "0", "--width", "0.125", "--divisor", "2"),
        *("--search-epochs", "1", "--retrain-epochs", "1", "--batch-size", "4"),
        *("--model", "resnet18"),
    ]
    monkeypatch.setattr(
        sys, "argv", ["cifar10.py", "--archive", str(archive), "--state", str(state), *options]
    )
    assert cifar10.main() == 0
    first = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in first["rows"]] == ["dense", "uniform", "uniform"]
    with tarfile.open(state) as tar:
        names = tar.getnames()
    assert not [name for name in names if name.endswith((".pt", ".safetensors"))]
    assert len([name for name in names if name.endswith("result.json")]) == 3
    assert cifar10.main() == 0
    second = json.loads((tmp_path / "results.json").read_text())
    assert second["records"] == first["records"]  # seconds too: nothing was trained again
