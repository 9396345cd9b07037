"""Labs where every method takes seconds: the digits, and a network of two searchable units or one
with a residual stream."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.data import open_data
from dmcp.data.images import MemoryImages
from dmcp.methods import Lab


class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 10),
        )


@pytest.fixture
def make_lab():
    """A lab with fresh weights that are always the same; one epoch of everything."""

    def make(budgets=("40%", "60%"), folder=None, **options):
        torch.manual_seed(0)
        graph = dmcp.trace(Tiny(), torch.zeros(2, 1, 8, 8))
        recipe = replace(
            recipes.get("digits"), search_epochs=1, retrain_epochs=1, groups=8, divisor=1
        )
        return Lab(
            graph,
            open_data("digits"),
            {budget: dmcp.Budget(macs=budget) for budget in budgets},
            recipe,
            folder=folder,
            shared=folder,
            checkpoint_every=1,
            **options,
        )

    return make


@pytest.fixture
def killed():
    """Runs a method, in which a function of a class dies at one of its calls."""

    def run(monkeypatch, owner, name, calls, find):
        real, done = getattr(owner, name), []

        def dying(*arguments, **keywords):
            if len(done) == calls:
                raise KeyboardInterrupt
            done.append(name)
            return real(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying)
            with pytest.raises(KeyboardInterrupt):
                find()

    return run


@pytest.fixture
def assert_fills():
    """That structures lie inside their budgets, and no further below than the grid demands."""

    def check(lab, found, room=0.1):
        assert list(found) == list(lab.targets)
        for label, pruned in found.items():
            assert list(pruned.widths) == [unit.name for unit in lab.graph.units]
            row = torch.tensor([list(pruned.widths.values())])
            assert 1 - room <= lab.targets[label].largest_ratio(row).item() <= 1
            if pruned.network is not None:
                lab.calibrate(pruned.network)
                traced = dmcp.trace(pruned.network, torch.zeros(2, 1, 8, 8))
                assert list(traced.widths().values()) == row[0].tolist()

    return check


class Residual(nn.Module):
    """One stream of two producers, a unit inside the block and one behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.norm1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.norm3 = nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))
        return self.head(F.relu(self.norm3(self.last(x))).mean((2, 3)))


@pytest.fixture(scope="session")
def traced_residual():
    torch.manual_seed(0)
    return dmcp.trace(Residual(), torch.zeros(2, 1, 8, 8))


@pytest.fixture
def residual(traced_residual):
    """The graph of a `Residual` of one's own: units ``stem``, ``first``, ``last`` and ``head``."""
    return copy.deepcopy(traced_residual)


@pytest.fixture(scope="session")
def few_digits():
    """Four batches of 32 digits to train on."""
    digits = open_data("digits", None, 0.1, 0)
    train = digits.train
    return replace(digits, train=MemoryImages(*train.batch(range(140)), train.format))


@pytest.fixture
def residual_lab(residual, few_digits):
    """A lab for a `Residual`: a search is two epochs of four steps, a training one."""
    recipe = replace(
        recipes.get("digits"), batch_size=32, search_epochs=2, retrain_epochs=1, groups=4, divisor=1
    )
    budgets = {"half": dmcp.Budget(macs="50%"), "fifth": dmcp.Budget(macs="20%")}
    return Lab(residual, few_digits, budgets, recipe)


@pytest.fixture
def check_found():
    """Whether what a method found for a `Residual`, channels picked and network included, is
    sound."""

    def check(lab, found):
        assert found.keys() == lab.budgets.keys()
        for label, pruned in found.items():
            assert set(pruned.widths) == {unit.name for unit in lab.graph.units}
            assert dmcp.cost(lab.graph, "macs").of(pruned.widths) <= lab.targets[label].bounds[0]
            assert all(pruned.widths[unit.name] in unit.choices for unit in lab.graph.units)
            assert pruned.kept.keys() == {unit.name for unit in lab.graph.searchable}
            for name, channels in pruned.kept.items():
                assert len(channels.unique()) == len(channels) == pruned.widths[name]
            assert len(pruned.network.last.weight) == pruned.widths["last"]
            lab.calibrate(pruned.network)
            assert 0 <= lab.accuracy(pruned.network) <= 1

    return check
