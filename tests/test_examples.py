"""The examples are run as they are, with few steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script of the folder as a program; returns what it printed."""

    def script(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def test_first_search(run, tmp_path):
    printed = run("first_search.py", "--steps", 20, "--output", tmp_path / "new")
    assert "0.0: 32 channels, it is excluded by '0.0'" in printed
    assert "logits of five images: [5, 10]" in printed
    assert (tmp_path / "new" / "small.onnx").stat().st_size > 10_000


def test_own_loop(run):
    printed = run("own_loop.py", "--steps", 12)
    assert "step 6: went on with" in printed
    assert "of 1,036,928 MACs" in printed


def test_lightning_search(run, zoo):
    printed = run("lightning_search.py", "--steps", 8)
    assert "'layer4.1.conv1'" in printed
    assert "top-1 on the test images" in printed


def test_timm_model(run, zoo, tmp_path):
    printed = run("timm_model.py", "--model", "test_resnet", "--steps", 6, "--output", tmp_path)
    assert f"{tmp_path} holds the small test_resnet" in printed


def test_the_notebook():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(EXAMPLES / "first_search.ipynb", as_version=4)
    for cell in notebook.cells:
        assert not cell.get("outputs"), "it is stored without outputs"
        cell.source = cell.source.replace("steps = 300", "steps = 12")
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "MACs" in printed


def test_the_list_is_complete():
    listed = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert f"[{path.name}]({path.name})" in listed
