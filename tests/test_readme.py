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
    example = blocks("python")[0]
    exec(example, namespace)
    import dmcp

    graph = namespace["net"].graph
    assert dmcp.cost(graph).of(namespace["widths"]) <= dmcp.cost(graph).of({}) / 2
    assert namespace["small"](torch.randn(2, 3, 20, 20)).shape == (2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(32, 24, 3, padding=1), nn.Conv2d(24, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.head = nn.Sequential(nn.Conv2d(32, 40, 1), nn.ReLU(), nn.Conv2d(40, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer1(self.stem(x).relu())).mean((2, 3))


def test_examples_with_any_network(namespace: dict[str, Any]) -> None:
    show, choose = blocks("python")[1:3]
    namespace |= {"model": Network(), "images": torch.zeros(2, 3, 8, 8)}
    exec("import dmcp\n" + show, namespace)
    assert [unit.step for unit in namespace["graph"].units] == [1] * 5
    exec(choose, namespace)
    units = {unit.name: unit for unit in namespace["graph"].units}
    assert units["head.0"].reason == "it is excluded by 'head.*'"
    assert units["stem"].choices[0] == 16
    assert {m.module for m in units["layer1.0.conv1"].members} >= {"layer1.1.conv1"}
    assert not any(chain.startswith("head") for chain in namespace["net"].chains)


def test_example_of_the_drop_in_layer(namespace: dict[str, Any]) -> None:
    example = blocks("python")[-1]
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
