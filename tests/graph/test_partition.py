"""From tied channels to units: their names, order, steps and members."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp

IMAGES = torch.zeros(2, 3, 8, 8)


class Calls(nn.Module):
    """``function`` of the module and the images."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 1, **options)


def traced(function, **modules):
    return dmcp.trace(Calls(function, **modules), IMAGES)


def summary(graph):
    return {unit.name: (unit.channels, unit.step) for unit in graph.units}


def test_units_come_in_the_order_in_which_they_are_produced():
    graph = traced(
        lambda m, x: m.a(F.relu(m.c(F.relu(m.b(x))))), a=conv(4, 2), b=conv(3, 8), c=conv(8, 4)
    )
    assert list(summary(graph)) == ["b", "c", "a"]


def test_a_unit_is_named_by_its_first_producer():
    graph = traced(
        lambda m, x: m.head(m.z(x) + m.a(x)), a=conv(3, 8), z=conv(3, 8), head=conv(8, 2)
    )
    assert list(summary(graph)) == ["z", "head"]


def test_several_units_of_one_producer_are_numbered():
    def split(m, x):
        left, right = m.first(x).split([4, 4], 1)
        return m.last(torch.cat([F.relu(left), right * m.other(x)], 1))

    graph = traced(split, first=conv(3, 8), other=conv(3, 4), last=conv(8, 2))
    names = list(summary(graph))
    assert "first" in names
    assert len(set(names)) == len(names)
    chained = traced(
        lambda m, x: m.last(torch.cat([(y := m.first(x))[:, 2:], y[:, :2]], 1)),
        first=conv(3, 8),
        last=conv(8, 2),
    )
    assert [(u.name, u.channels, u.searchable) for u in chained.units] == [
        ("first", 2, False),
        ("first#1", 6, True),
        ("last", 2, False),
    ]


@pytest.mark.parametrize(
    ("function", "modules", "steps"),
    [
        (lambda m, x: m.g(m.a(x)), {"a": conv(3, 8), "g": conv(8, 12, groups=2)}, {"a": 2, "g": 2}),
        (lambda m, x: m.g(m.a(x)), {"a": conv(3, 8), "g": conv(8, 12, groups=4)}, {"a": 4, "g": 4}),
        (lambda m, x: m.g(m.a(x)), {"a": conv(3, 12), "g": conv(12, 12, groups=12)}, {"a": 1}),
        (lambda m, x: m.g(m.a(x)), {"a": conv(3, 8), "g": nn.GroupNorm(4, 8)}, {"a": 2}),
        (lambda m, x: F.channel_shuffle(m.a(x), 4), {"a": conv(3, 8)}, {"a": 4}),
        (lambda m, x: F.pixel_shuffle(m.a(x), 2), {"a": conv(3, 16)}, {"a": 4}),
        (lambda m, x: F.glu(m.a(x), 1), {"a": conv(3, 12)}, {"a": 2}),
        (lambda m, x: torch.cat(m.a(x).chunk(3, 1), 2), {"a": conv(3, 12)}, {"a": 3}),
        (
            lambda m, x: F.channel_shuffle(m.g(m.a(x)), 3),
            {"a": conv(3, 12), "g": conv(12, 12, groups=2)},
            {"a": 2, "g": 6},
        ),
    ],
)
def test_steps_are_the_channels_that_go_together(function, modules, steps):
    channels = Calls(function, **modules)(IMAGES).shape[1]
    model = Calls(lambda m, x: m.last(m.body(x)), body=Calls(function, **modules))
    model.last = conv(channels, 2)
    graph = dmcp.trace(model, IMAGES)
    found = {name.removeprefix("body."): step for name, (_, step) in summary(graph).items()}
    assert {name: found[name] for name in steps} == steps
    for unit in graph.units:
        if unit.searchable:
            assert unit.choices == tuple(range(unit.step, unit.channels + 1, unit.step))
        else:
            assert unit.choices == (unit.channels,)


def test_every_step_has_the_same_number_of_positions_in_every_member(traced_network):
    graph = traced_network.graph
    for unit in graph.units:
        for member in unit.members:
            assert len(member.channels) == unit.channels // unit.step
            assert len(member.channels.unique()) == member.channels.numel()
            module = graph.model.get_submodule(member.module)
            for name, dim in member.tensors:
                tensor = getattr(module, name)
                assert member.channels.max() < tensor.shape[dim]
                reads = (f"{member.module}.{name}", dim) in graph.consumed
                assert reads is (member.role == "in")


def test_members_cover_each_axis_once(traced_network):
    """Every position of a dimension belongs to one unit at most: what the maps say."""
    graph = traced_network.graph
    for name, axes in graph.tensors.items():
        module, _, key = name.rpartition(".")
        for dim, axis in enumerate(axes):
            if axis is None:
                continue
            covered = torch.full_like(axis.unit, -1)
            for number, unit in enumerate(graph.units):
                for member in unit.members:
                    if member.module == module and (key, dim) in member.tensors:
                        rows = member.channels.view(len(member.channels), -1)
                        assert (covered[rows] == -1).all()
                        covered[rows] = number
                        steps = torch.arange(len(rows))[:, None].expand_as(rows)
                        assert torch.equal(axis.index[rows], steps)
            assert torch.equal(covered, axis.unit)


def test_the_same_places_are_one_member():
    graph = traced(
        lambda m, x: m.last(m.norm(m.first(x))),
        first=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        last=conv(8, 2),
    )
    places = {(m.module, m.role): m.tensors for m in graph.units[0].members}
    assert places == {
        ("first", "out"): (("weight", 0), ("bias", 0)),
        ("norm", "out"): (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0)),
        ("last", "in"): (("weight", 1),),
    }


def test_counts_are_channels_per_step():
    graph = traced(
        lambda m, x: m.last(torch.cat([x, F.channel_shuffle(m.a(x), 2), m.b(x)], 1)),
        a=conv(3, 8),
        b=conv(3, 4),
        last=conv(15, 2),
    )
    axis = graph.tensors["last.weight"][1]
    assert [unit.name for unit in graph.units] == ["a", "b", "last"]
    assert axis.counts() == (3, {0: 2, 1: 1})
    assert len(axis.kept({0: torch.tensor([True, False, False, True])})) == 3 + 2 * 2 + 4


def test_channels_that_others_read_too_are_a_unit_of_their_own():
    """One convolution, half of whose channels another one reads: two units of one producer."""
    graph = traced(
        lambda m, x: m.last(F.relu(y := m.a(x))) + m.part(y[:, 4:]),
        a=conv(3, 8),
        last=conv(8, 2),
        part=conv(4, 2),
    )
    assert summary(graph) == {"a": (4, 1), "a#1": (4, 1), "last": (2, 1)}
    assert [unit.searchable for unit in graph.units] == [False, True, False]
