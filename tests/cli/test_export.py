from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from dmcp.cli import main
from dmcp.export import OnnxNetwork, load_python

MODEL = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of a pruned network."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "tiny.py").write_text(MODEL)
    (folder / "widths.json").write_text(json.dumps({"widths": {"0": 5}}))
    train = f"train --model {folder}/tiny.py:tiny --widths {folder}/widths.json --epochs 1"
    machine = f"--batch-size 256 --device cpu --quiet --output {folder}/run"
    assert main([*shlex.split(train), *shlex.split(machine)]) == 0
    return folder / "run"


def exporting(run: Path, *arguments: str) -> list[str]:
    return ["export", str(run), "--model", f"{run.parent / 'tiny.py'}:tiny", *arguments]


def test_python(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(exporting(run, "--to", "python")) == 0
    shown = capfd.readouterr()
    source, weights, compared, timed = shown.out.splitlines()
    folder = run / "export"
    assert source.startswith(f"{folder / 'pruned_network.py'}  ")
    assert weights.startswith(f"{folder / 'pruned_network.safetensors'}  ")
    assert compared.startswith("largest difference to PyTorch: ")
    assert timed.startswith("latency of 1 image on the CPU: ")
    assert " before pruning, " in timed
    assert shown.err == ""
    assert load_python(folder / "pruned_network.py")[0].out_channels == 5


def test_onnx_as_json(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = exporting(run, "--to", "onnx", "--network", "pruned", "--batch", "2", "--json")
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    (line,) = shown.out.splitlines()
    exported = json.loads(line)
    path = tmp_path / "out" / "pruned_network.onnx"
    assert exported["files"] == {str(path): path.stat().st_size}
    assert 0 <= exported["difference"] <= 1e-4
    assert (exported["form"], exported["network"], exported["batch"]) == ("onnx", "pruned", 2)
    assert exported["latency_ms"]["median"] > 0
    assert exported["full_latency_ms"]["median"] > 0
    assert OnnxNetwork(path).inputs == ["input"]


def test_torch_quietly(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = exporting(run, "--to", "torch", "--quiet", "--output", str(tmp_path))
    assert main(command) == 0
    assert capfd.readouterr() == ("", "")
    assert [each.name for each in tmp_path.iterdir()] == ["pruned_network.pt2"]


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_what_cannot_be_exported_is_one_line(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export = exporting(run, "--output", str(tmp_path / "out"))
    assert "'caffe' is not one of" in refusal([*export, "--to", "caffe"], capfd)
    error = refusal([*export, "--to", "onnx", "--network", "dense"], capfd)
    assert f"{run} trained pruned, not 'dense'" in error
    error = refusal(["export", str(tmp_path), "--to", "onnx"], capfd)
    assert f"{tmp_path} is not a finished run" in error
    assert not (tmp_path / "out").exists()


def test_code_in_a_file_runs_only_if_it_is_named(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refusal(["export", str(run), "--to", "python"], capfd)
    assert "is code in a file, which runs only if you name it" in error


def test_without_an_extra_it_is_one_line(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it raises
    error = refusal(exporting(run, "--to", "onnx", "--output", str(tmp_path / "out")), capfd)
    assert "needs the package 'onnxruntime': pip install 'dmcp[export]'" in error
    assert not (tmp_path / "out").exists()
