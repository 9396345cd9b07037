from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmcp
from dmcp.cli import main
from dmcp.graph import ChannelGraph
from dmcp.models import build
from dmcp.structure import Provenance, Structure

OPTIONS = {"width": 0.125, "in_channels": 1, "small_images": True}


@pytest.fixture(scope="module")
def digits() -> ChannelGraph:
    """Of the network that ``dmcp train`` makes of ``--width 0.125`` for the digits."""
    return dmcp.trace(build("resnet18", 10, **OPTIONS), torch.zeros(2, 1, 8, 8))


@pytest.fixture
def file(digits: ChannelGraph, tmp_path: Path) -> Path:
    """A structure file that names this network."""
    structure = Structure.of(
        digits,
        {"conv1": 5},
        model="resnet18",
        model_kwargs=OPTIONS,
        image=(1, 8, 8),
        classes=10,
        budget={"macs": 400_000},
        provenance=Provenance(seed=3, seconds=1.5, images_forward=7),
    )
    structure.save(tmp_path / "found.json")
    return tmp_path / "found.json"


def shown(command: str, capsys: pytest.CaptureFixture[str]) -> Any:
    assert main(shlex.split(command)) == 0
    return json.loads(capsys.readouterr().out)


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(shlex.split(command)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_inspect_takes_the_network_and_its_images_from_the_file(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = shown(f"inspect --widths {file} --json", capsys)
    structure = Structure.load(file)
    assert {unit["name"]: unit["width"] for unit in found["units"]} == structure.widths
    assert {name: found["costs"][name] for name in ("macs", "params")} == structure.metrics


def test_train_takes_the_network_from_the_file_and_writes_where_it_was_found(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = "--epochs 1 --batch-size 719 --device cpu --json"
    (row,) = shown(f"train --widths {file} {options} --output {run}", capsys)["networks"]
    found, written = Structure.load(file), Structure.load(run / "widths.json")
    assert (row["network"], row["macs"]) == ("pruned", found.metrics["macs"])
    assert written == found
    config = json.loads((run / "config.json").read_text())
    assert config["widths"] == found.widths
    assert config["network"]["model"] == "resnet18"
    again = shown(f"train --widths {run}/widths.json {options} --output {run}", capsys)
    assert again == {"networks": [row]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model mobilenet_v2", "--model is 'mobilenet_v2', but structure"),
        ("--width 0.25", "--width is 0.25, but structure"),
        ("--data digits --size 72", "small_images is True, but the images make it False: see --da"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "train --output {run}"])
def test_another_network_than_the_files_is_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str,
    command: str,
) -> None:  # fmt: skip
    command = command.format(run=tmp_path / "run")
    assert said in refusal(f"{command} --widths {file} {options}", capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "image", "said"),
    [
        ({"small_images": True}, (3, 8, 72), "small_images is True, but the images make it False"),
        ({"small_images": False}, (3, 8, 8), "small_images is False, but the images make it True"),
        ({"in_channels": 1}, (3, 8, 8), "in_channels is 1, but the images make it 3"),
        ({"width": 1e5}, None, "model.options.width must be a number of at most 16, got 100000.0"),
        ({"dropout": 0.5}, None, "with model.options that no command builds it with: dropout"),
        ({"width": True}, None, "model.options.width must be a number of at most 16, got True"),
    ],
)
def test_options_that_the_network_is_not_built_with_are_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    image: tuple[int, int, int] | None,
    said: str,
) -> None:
    """Of MobileNetV2, whose variants for large and small images have the same hash."""
    path, options = tmp_path / "found.json", {"width": 0.25, **options}
    Structure({"conv1": 5}, model="mobilenet_v2", model_kwargs=options, image=image).save(path)
    assert said in refusal(f"inspect --widths {path}", capsys)


def test_inspect_shows_the_costs_for_images_that_are_not_square(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = Structure.of(
        dmcp.trace(build("resnet18", 10, **OPTIONS), torch.zeros(2, 1, 8, 24)),
        {"conv1": 5},
        model="resnet18",
        model_kwargs=OPTIONS,
        image=(1, 8, 24),
        classes=10,
    )
    structure.save(tmp_path / "found.json")
    found = shown(f"inspect --widths {tmp_path}/found.json --json", capsys)
    assert found["costs"]["macs"] == structure.metrics["macs"]
    square = shown(f"inspect --widths {tmp_path}/found.json --size 8 --json", capsys)
    assert square["costs"]["macs"] < structure.metrics["macs"]


def test_inspect_takes_the_images_from_a_file_that_names_no_network(
    digits: ChannelGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure = Structure.of(digits, {"conv1": 5}, image=(1, 8, 8), classes=10)
    structure.save(tmp_path / "found.json")
    network = "--model resnet18 --width 0.125"
    found = shown(f"inspect {network} --widths {tmp_path}/found.json --json", capsys)
    assert found["costs"]["macs"] == structure.metrics["macs"]


def test_a_network_in_a_file_is_not_built_because_a_structure_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mark = tmp_path / "found.json", tmp_path / "mark"
    (tmp_path / "net.py").write_text(f"open({str(mark)!r}, 'w')\n")
    Structure({"conv1": 5}, model="net.py:factory").save(path)
    said = refusal(f"inspect --widths {path}", capsys)
    assert "prunes a network in a file, net.py:factory: name it with --model" in said
    assert not mark.exists()


def test_inspect_a_file_of_another_tool(
    digits: ChannelGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "sample.npy", {"conv1": 6, "layer1": {"0": {"conv1": (6, 3)}}})  # type: ignore[arg-type]
    network = "--model resnet18 --width 0.125 --data digits"
    found = shown(f"inspect {network} --widths {tmp_path}/sample.npy --json", capsys)
    widths = {"conv1": 6, "layer1.0.conv1": 3}
    assert found["costs"]["macs"] == dmcp.cost(digits, "macs").of(widths)
    history = tmp_path / "history.json"
    history.write_text('[["layer1.0.conv1", true, [8]]]')
    said = refusal(f"inspect {network} --widths {history}", capsys)
    assert f"{history}: history[0], layer1.0.conv1 drops channel 8 of 8 that are left" in said
