from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from dmcp.errors import ConfigError, ExportError
from dmcp.export import load_python, to_python
from dmcp.export.check import TOLERANCE, difference


def close(one: object, other: object) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(difference(a, b) <= TOLERANCE for a, b in pairs)


@pytest.mark.parametrize(
    "name",
    ["FunctionalReLU6", "SharedActivation", "CalledTwice", "SeveralInputs", "FlattenedMap"],
)
def test_a_small_network(name, example, tmp_path):
    small, path = example(name), tmp_path / "network.py"
    assert to_python(small.model, small.inputs, path) <= TOLERANCE
    network, model = load_python(path), small.model.eval()
    assert list(network.state_dict()) == list(model.state_dict())
    batch = [torch.cat([x, x.flip(0), x]) for x in small.inputs]
    with torch.no_grad():
        assert close(network(*batch), model(*batch))


def test_source_that_a_person_reads(example, tmp_path):
    case = example("Residual")
    to_python(case.model, case.inputs, tmp_path / "network.py")
    source = (tmp_path / "network.py").read_text()
    assert source.split("class ")[1].split("\n\ndef load")[0] == RESIDUAL


RESIDUAL = """Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        )
        self.first = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        )
        self.second = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        )
        self.down = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        )
        self.skip = nn.Sequential(
            nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12)
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = F.relu(self.first(x))
        out = self.second(out)
        x = F.relu(x + out)
        down = self.down(x)
        x = self.skip(x)
        x = F.relu(down + x)
        return self.head(x)
"""


class Awkward(nn.Module):
    """What a forward may hold between layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        self.reduce, self.expand = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("mean", torch.randn(1, 3, 1, 1))
        self.register_buffer("offset", torch.randn(8), persistent=False)

    def forward(self, image, other):
        x = self.stem((image - self.mean) / 2)
        left, right = x.chunk(2, 1)
        left, right = self.blocks[0](left), self.blocks[1](right)
        x = torch.cat([left, right, F.avg_pool2d(other, 2)], 1)[:, 1:9]
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x += self.scale
        se = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        x = F.interpolate(x * se, scale_factor=2, mode="bilinear", align_corners=False)
        x = F.hardswish(1 - x, inplace=True) ** 2
        tokens = self.norm(x.flatten(2).permute(0, 2, 1)) + self.offset
        top = tokens.amax(1)
        memory = F.dropout(tokens, 0.2, self.training)
        grid = torch.arange(8, device=x.device) * torch.ones(n, 1)
        return {"top": top, "rest": (self.drop(memory).reshape(n * 2, -1), grid), "x": [x[:, 0]]}


AWKWARD_INPUTS = (torch.randn(3, 3, 8, 8), torch.randn(3, 2, 16, 16))


def test_awkward_forward(tmp_path):
    model, path = Awkward().eval(), tmp_path / "export" / "awkward.py"
    assert to_python(model, AWKWARD_INPUTS, path) <= TOLERANCE
    source = path.read_text()
    for line in (
        "        x += self.scale\n",
        "x.view(x.shape[0], 2, -1, *x.shape[-2:])",
        "F.dropout(out, 0.2, training=self.training)",
        "self.blocks[1](",
    ):
        assert line in source
    network, batch = load_python(path), [x[:1] for x in AWKWARD_INPUTS]
    with torch.no_grad():
        found, expected = network(*batch), model(*batch)
    assert found.keys() == expected.keys()
    assert isinstance(found["rest"], tuple)
    assert close(found, expected)


class Unusual(nn.Module):
    """Names that Python has another use for, children numbered at will, a buffer that changes."""

    def __init__(self):
        super().__init__()
        for name in ("class", "1x1", 'a"), print("run'):
            self.add_module(name, nn.Sequential(OrderedDict({name: nn.Linear(6, 6)})))
        self.heads = nn.ModuleDict({"8": nn.Linear(6, 3), "16": nn.Linear(6, 2)})
        self.act = nn.LeakyReLU(np.float64(0.3))
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, batch):
        x = batch * torch.ones(batch.shape[0], 1)
        for module in [*self.children()][:3]:
            x = module(x)
        level = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        level += x.mean()
        mean = x.mean(0)
        self.seen += mean
        x = torch.pow(-2.0, (self.act(x) * level).round())
        return {name: head(x) for name, head in self.heads.items()}


def test_unusual_names_and_state(tmp_path, capfd):
    model, path, batch = Unusual().eval(), tmp_path / "network.py", torch.randn(4, 6)
    assert to_python(model, batch, path) <= TOLERANCE
    network = load_python(path)
    with torch.no_grad():
        assert close([network(batch) for _ in range(2)], [model(batch) for _ in range(2)])
    assert close(network.seen, model.seen)
    assert capfd.readouterr() == ("", ""), "a name is no code"


class Resized(nn.Module):
    def __init__(self, resize):
        super().__init__()
        self.resize = resize

    def forward(self, x):
        return self.resize(x)


def test_an_argument_of_several_types(tmp_path):
    """What the file says of it can be evaluated where it is imported."""
    resizes = [nn.Upsample(scale_factor=2.0), nn.Upsample(size=(3, 5))]
    model, images = nn.Sequential(*map(Resized, resizes)), torch.randn(2, 1, 4, 4)
    to_python(model, images, tmp_path / "network.py")
    source = (tmp_path / "network.py").read_text()
    assert "def __init__(self, size: None | tuple, scale_factor: float | None)" in source
    assert close(load_python(tmp_path / "network.py")(images), model(images))


def test_training_mode(example, tmp_path):
    """The same gradients, and the statistics of batch norms move alike."""
    case = example("Depthwise")
    path = tmp_path / "network.py"
    to_python(case.model, case.inputs, path)
    network, model = load_python(path).train(), copy.deepcopy(case.model).train()
    images = torch.randn(4, 3, 8, 8)
    for each in (network, model):
        each(images).square().sum().backward()
    pairs = zip(network.parameters(), model.parameters(), strict=True)
    assert all(close(one.grad, other.grad) for one, other in pairs)
    assert close(network.state_dict(), model.state_dict())
    before = dict(case.model.named_buffers())
    assert all(not torch.equal(each, before[name]) for name, each in network.named_buffers())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(F.gelu(self.encode(x)))


def test_tied_weights_stay_tied(tmp_path):
    to_python(Tied(), torch.randn(2, 6), tmp_path / "tied.py")
    network = load_python(tmp_path / "tied.py")
    assert network.decode.weight is network.encode.weight
    assert "self.encode(x)" in (tmp_path / "tied.py").read_text()


def test_frozen_parameters_stay_frozen(example, tmp_path):
    """One by one, or as whole modules; also where two modules share them."""
    case = example("Residual")
    case.model.stem.requires_grad_(False)
    case.model.second[0].weight.requires_grad_(False)
    case.model.second[1].weight = case.model.stem[1].weight  # of 8 channels both
    to_python(case.model, case.inputs, tmp_path / "network.py")
    found = dict(load_python(tmp_path / "network.py").named_parameters())
    assert {n: p.requires_grad for n, p in found.items()} == {
        name: parameter.requires_grad for name, parameter in case.model.named_parameters()
    }
    lines = [line.strip() for line in (tmp_path / "network.py").read_text().splitlines()]
    assert [line for line in lines if "requires_grad" in line] == [
        "self.stem.requires_grad_(False)",
        "self.second[0].requires_grad_(False)",
        "self.second[1].weight.requires_grad_(False)",
    ]
    case.model.requires_grad_(False)
    to_python(case.model, case.inputs, tmp_path / "network.py")
    assert not any(p.requires_grad for p in load_python(tmp_path / "network.py").parameters())


def test_double_precision(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)).double()
    to_python(model, torch.randn(2, 4).double(), tmp_path / "network.py")
    assert load_python(tmp_path / "network.py")[0].weight.dtype == torch.float64


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Private()

    def forward(self, x):
        return self.inner(x)


class Private(nn.Module):
    def forward(self, x):
        return torch.ops.aten._softmax(x, 1, False)


class CalledInTwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.fold = Fold()

    def forward(self, x):
        return self.fold(x) + self.fold(x[:, :, :4])


class Fold(nn.Module):
    def forward(self, x):
        return x.sum(2) * x.shape[2]


class Keeps(nn.Module):
    """Something computed: no leaf can be copied."""

    def __init__(self):
        super().__init__()
        self.last = torch.ones(3, requires_grad=True) * 2


class ForSeveral(nn.Module):
    """Not for a single image, whose classes it squeezes away."""

    def forward(self, x):
        return x.squeeze().softmax(1)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Keeps(), (2, 3), "Keeps cannot be copied: Only Tensors created explicitly"),
        (ForSeveral(), (2, 3), "the network does not run on a batch of 1: Dimension out of range"),
        (
            Nested(),
            (2, 3),
            r"operator aten\._softmax\.default in module inner has no form in Python",
        ),
        (CalledInTwoWays(), (2, 3, 8), "module fold is called in different ways"),
    ],
)
def test_what_has_no_form_is_refused(model, shape, message, tmp_path, written):
    with pytest.raises(ExportError, match=message):
        to_python(model, torch.randn(shape), tmp_path / "new" / "network.py")
    assert not written(tmp_path)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="path must be that of a Python file"):
        to_python(nn.ReLU(), torch.randn(2, 3), tmp_path / "network.txt")


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="there is no ruff")
def test_it_is_formatted(example, tmp_path):
    to_python(Awkward(), AWKWARD_INPUTS, tmp_path / "awkward.py")
    case = example("SharedActivation")
    to_python(case.model, case.inputs, tmp_path / "shared.py")
    ruff = [sys.executable, "-m", "ruff"]
    subprocess.run([*ruff, "format", "--isolated", "--check", str(tmp_path)], check=True)
    rules = ["--select", "E,F,I,UP,B"]
    subprocess.run([*ruff, "check", "--isolated", *rules, str(tmp_path)], check=True)
