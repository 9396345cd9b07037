"""The code of the documentation runs, page by page, each in one namespace and folder of its own."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Document, Example
from sybil.parsers.myst import CodeBlockParser, PythonCodeBlockParser
from torch import nn

from dmcp.cli import main

DOCS = Path(__file__).parents[2] / "docs"

SEARCH = (
    "dmcp search --model resnet18 --width 0.125 --divisor 2 --budget 50% --batch-size 256 "
    "--search-epochs 1 --retrain-epochs 1 --no-baselines --output runs/first --quiet"
)


def names() -> list[str]:
    pages = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
    return [str(page.relative_to(DOCS)) for page in pages if "```python" in page.read_text()]


def commands(source: str) -> list[list[str]]:
    """The arguments of the dmcp commands in a block."""
    lines = source.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["dmcp"]]


def run(example: Example) -> None:
    """Run the commands of a block behind the comment ``<!-- run -->``."""
    before = example.document.text[: example.region.start].rstrip()
    if before.endswith("<!-- run -->"):
        for arguments in commands(example.parsed):
            assert main(arguments) == 0, arguments


def search() -> None:
    """A finished run in runs/first, small enough to wait for."""
    for arguments in commands(SEARCH):
        assert main(arguments) == 0


def namespace() -> dict[str, Any]:
    """What pages take for granted: your model and your loader."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 24, 3, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
    )
    loader = [(torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))) for _ in range(4)]
    images, labels = loader[0]
    yours = {"model": model, "loader": loader, "images": images, "labels": labels, "epochs": 2}
    return {**yours, "search_in_small": search, "torch": torch, "nn": nn}


@pytest.mark.filterwarnings("ignore::dmcp.SearchWarning")  # the searches are too short
@pytest.mark.parametrize("name", names())
def test_code_of_a_page(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if "lightning" in (DOCS / name).read_text():
        request.getfixturevalue("zoo")  # lightning imports torchvision
    parsers = PythonCodeBlockParser(), CodeBlockParser("bash", run)
    document = Document.parse(str(DOCS / name), *parsers)
    document.namespace.update(namespace(), page=document.text)
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
