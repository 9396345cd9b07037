from __future__ import annotations

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.cli.picture import to_dot, write_picture
from dmcp.errors import ConfigError, MissingDependencyError


class Net(nn.Module):
    """A skip, and a functional activation."""

    def __init__(self):
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.right, self.act = nn.Conv2d(6, 8, 1), nn.ReLU6()
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.parts = nn.ModuleDict({'"': nn.Linear(8, 5)})

    def forward(self, x):
        x = self.act(self.stem(x))
        x = x + self.right(F.relu(self.left(x)))
        return self.parts['"'](self.flat(self.pool(x)))


@pytest.fixture
def graph():
    return dmcp.trace(Net(), torch.zeros(2, 3, 4, 4))


def read(text):
    """Number -> attributes of the boxes, and the pairs of numbers that arrows join."""
    boxes = dict(re.findall(r"^n(\d+) \[(.*)\]$", text, re.MULTILINE))
    return boxes, re.findall(r"^n(\d+) -> n(\d+)$", text, re.MULTILINE)


def test_boxes_are_modules_in_the_colours_of_units(graph):
    text = to_dot(graph)
    assert text.startswith("digraph {\n")
    assert text.endswith("}\n")
    boxes, arrows = read(text)
    label = {number: re.search(r'label="(.*?[^\\])"', box) for number, box in boxes.items()}
    names = {number: found[1].split(r"\n")[0] for number, found in label.items() if found}
    colour = {
        names[number]: found[1]
        for number, box in boxes.items()
        if (found := re.search(r'fillcolor="(.*?)"', box))
    }
    last = r"parts.\""
    assert colour["stem"] == colour["right"] != colour["left"]
    assert colour[last] == "#d0d0d0"
    assert r'label="stem\nConv2d 8"' in text
    assert r"model's outputs" in text
    (join,) = boxes.keys() - names.keys()
    assert boxes[join] == "shape=point"
    joined = [(names.get(a, "+"), names.get(b, "+")) for a, b in arrows]
    assert joined == [
        ("stem", "act"),
        ("act", "left"),
        ("left", "right"),
        ("act", "+"),
        ("right", "+"),
        ("+", last),
    ]


def test_a_file_of_dot_text(graph, tmp_path):
    write_picture(graph, tmp_path / "net.dot")
    assert (tmp_path / "net.dot").read_text() == to_dot(graph)


@pytest.mark.skipif(shutil.which("dot") is None, reason="there is no Graphviz")
def test_graphviz_understands_it(graph, tmp_path):
    write_picture(graph, tmp_path / "net.svg")
    drawn = (tmp_path / "net.svg").read_text()
    assert drawn.count('class="node"') == len(read(to_dot(graph))[0])
    assert "Conv2d 8" in drawn


def test_refusals(graph, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"must be a file \.dot or \.svg, got .*net.png"):
        write_picture(graph, tmp_path / "net.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"Graphviz: .* write a file \.dot"):
        write_picture(graph, tmp_path / "net.svg")
    assert not list(tmp_path.iterdir())
