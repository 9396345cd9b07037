"""The README's Python is run, and its commands are the ones that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def namespace() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    loader = [(torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,)))]
    return {"model": model, "loader": loader, "nn": nn, "torch": torch}


def test_example_with_your_own_network(namespace: dict[str, Any]) -> None:
    example, _ = blocks("python")
    exec(example, namespace)
    import dmcp

    graph = namespace["net"].graph
    assert dmcp.cost(graph).of(namespace["widths"]) <= dmcp.cost(graph).of({}) / 2
    assert namespace["small"](torch.randn(2, 3, 20, 20)).shape == (2, 4)


def test_example_of_the_drop_in_layer(namespace: dict[str, Any]) -> None:
    _, example = blocks("python")
    images, labels = torch.randn(2, 64, 8, 8), torch.randint(0, 4, (2,))
    build, use = example.split("conv.chain.width")
    exec(build, namespace)
    head = nn.Sequential(namespace["conv"], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    namespace |= {
        "model": head,
        "images": images,
        "labels": labels,
        "criterion": nn.CrossEntropyLoss(),
        "weight": 0.1,
    }
    exec("conv.chain.width" + use, namespace)
    assert head(images).shape == (2, 96)
    namespace["loss"].backward()
    assert bool(namespace["conv"].chain.alpha.grad.abs().sum() > 0)


def test_commands_exist() -> None:
    from dmcp.cli.commands import commands

    documented = set(re.findall(r"^\| `dmcp (\w+)`", README.read_text(), re.MULTILINE))
    assert documented == set(commands.commands)


def test_the_two_commands_are_marked() -> None:
    text = README.read_text()
    for marker in ("main-command", "test-command"):
        assert re.search(rf"<!-- {marker} -->\n```bash\n.+\n```", text)
