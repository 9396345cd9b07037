import itertools
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmcp.graph.rules.shape import _aligned_runs


def where_channels_went(function, shape, dim):
    """The channel of every number of the output, by moving the numbers themselves."""
    sizes = [size if place == dim else 1 for place, size in enumerate(shape)]
    numbers = torch.arange(shape[dim]).view(sizes).expand(shape)
    return function(numbers.contiguous())


def assert_labels_are_where_the_numbers_are(found, moved):
    """Positions of a labelled dimension hold channels of their label; where no dimension is
    labelled, all channels stay."""
    if not found.axes:
        left = {int(channel) for channel in moved.unique()}
        assert len(left) <= 1 or left <= set(found.blocked)
        return
    ((dim, labels),) = found.axes.items()
    assert len(labels) == moved.shape[dim]
    for place, label in enumerate(labels):
        held = {found.channels[channel] for channel in moved.select(dim, place).unique()}
        assert held == {label}


@pytest.mark.parametrize(
    ("shape", "dim", "function"),
    [
        ((2, 3, 2, 2), 1, lambda x: x.flatten(1)),
        ((2, 3, 2, 2), 1, lambda x: x.reshape(2, -1)),
        ((2, 3, 1, 1), 1, lambda x: x.squeeze(-1).squeeze(-1)),
        ((2, 3), 1, lambda x: x[:, :, None, None]),
        ((2, 3, 4, 4), 1, lambda x: x.flatten(2).transpose(1, 2)),
        ((1, 3, 2, 2), 1, lambda x: x.view(1, 12)),
        ((2, 3, 2), 1, lambda x: x.reshape(6, 2)),
        ((2, 3, 1, 1), 1, lambda x: x.view(2, 1, 3)),
        ((2, 3, 4, 4), 1, lambda x: x.permute(0, 2, 3, 1).reshape(-1, 3)),
        ((2, 3, 4, 4), 1, lambda x: x.movedim(1, -1)),
        ((2, 8, 4, 4), 1, lambda x: F.pixel_unshuffle(x, 2)),
        ((2, 3, 4), 1, lambda x: x.mT),
        ((2, 6, 4), 1, lambda x: x.flip(1)),
        ((2, 6, 4), 1, lambda x: x.repeat(1, 2, 1)),
        ((2, 6, 4), 1, lambda x: x.repeat_interleave(3, 1)),
        ((2, 6, 4), 1, lambda x: x.expand(5, 2, 6, 4)),
        ((2, 6, 4), 1, lambda x: torch.cat([x, x.flip(1)], 1)),
        ((2, 6, 4), 1, lambda x: torch.cat([x, x], 2)),
        ((2, 6, 4), 1, lambda x: torch.cat([x, x], 0)),
        ((2, 6, 4), 1, lambda x: torch.stack([x, x], 1)),
        ((2, 6, 4), 1, lambda x: torch.stack([x, x], 2).flatten(1, 2)),
        ((4, 3), 0, lambda x: x.t()),
    ],
)
def test_channels_are_followed_without_a_loss(follow, shape, dim, function):
    """None of these ties two channels, or keeps one that could go."""
    found = follow(function, shape, dim)
    assert_labels_are_where_the_numbers_are(found, where_channels_went(function, shape, dim))
    assert len(found.axes) == 1
    assert found.blocked == {}
    assert found.tied == set()


@pytest.mark.parametrize(
    ("function", "ties", "dim"),
    [
        # The larger dimension shrinks, or the one whose size the code leaves open.
        (lambda x: x.view(2, 2, 4), [{0, 4}, {1, 5}, {2, 6}, {3, 7}], 2),
        (lambda x: x.view(2, 4, 2), [{0, 1}, {2, 3}, {4, 5}, {6, 7}], 1),
        (lambda x: x.view(2, -1, 4), [{0, 1, 2, 3}, {4, 5, 6, 7}], 1),
        (lambda x: x.view(2, 4, -1), [{0, 2, 4, 6}, {1, 3, 5, 7}], 2),
        (lambda x: x.unflatten(1, (2, 4)), [{0, 4}, {1, 5}, {2, 6}, {3, 7}], 2),
        (lambda x: F.channel_shuffle(x[..., None], 2)[..., 0], [{n, n + 4} for n in range(4)], 1),
        (lambda x: F.pixel_shuffle(x.view(2, 8, 1, 1), 2), [{0, 1, 2, 3}, {4, 5, 6, 7}], 1),
    ],
)
def test_a_split_of_the_channels_ties_those_at_the_same_places(follow, function, ties, dim):
    found = follow(function, (2, 8))
    assert found.blocked == {}
    assert found.tied == {frozenset(tie) for tie in ties}
    assert list(found.axes) == [dim]


def test_a_shuffle_by_views_is_the_shuffle_of_the_module(follow):
    def by_views(x):
        return x.view(2, 2, 4, 4, 4).transpose(1, 2).reshape(2, 8, 4, 4)

    views, module = follow(by_views), follow(lambda x: F.channel_shuffle(x, 2))
    assert views.tied == module.tied
    places = [[f.channels.index(label) % 4 for label in f.axes[1]] for f in (views, module)]
    assert places[0] == places[1]
    moved = where_channels_went(lambda x: F.channel_shuffle(x.float(), 2), (2, 8, 4, 4), 1)
    assert_labels_are_where_the_numbers_are(module, moved.int())


def factors(size):
    return [d for d in range(1, size + 1) if size % d == 0]


@st.composite
def chains(draw):
    """A shape, which of its dimensions holds channels, and one to four moves."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)))
    dim = draw(st.sampled_from(range(len(shape))))
    shape = tuple(max(size, 2) if n == dim else size for n, size in enumerate(shape))
    now, moves = list(shape), []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["reshape", "permute", "chunk", "flip", "repeat", "cat"]))
        place = draw(st.sampled_from(range(len(now))))
        if kind == "reshape":
            rest, sizes = prod(now), []
            while rest > 1 and len(sizes) < 4:
                sizes.append(draw(st.sampled_from(factors(rest))))
                rest //= sizes[-1]
            now = [*sizes, rest]
            opened = draw(st.sampled_from([None, *range(len(now))]))
            moves.append((kind, [-1 if n == opened else size for n, size in enumerate(now)]))
        elif kind == "permute":
            order = draw(st.permutations(range(len(now))))
            now = [now[n] for n in order]
            moves.append((kind, order))
        elif kind == "chunk" and now[place] % 2 == 0:
            now[place] //= 2
            moves.append((kind, (place, draw(st.sampled_from([0, 1])))))
        elif kind in ("repeat", "cat") and prod(now) < 200:
            now[place] *= 2
            moves.append((kind, place))
        else:
            moves.append(("flip", place))
    return shape, dim, moves


def moved_by(moves):
    def function(x):
        for kind, how in moves:
            if kind == "reshape":
                x = x.reshape(how)
            elif kind == "permute":
                x = x.permute(how)
            elif kind == "chunk":
                x = x.chunk(2, how[0])[how[1]]
            elif kind == "repeat":
                x = x.repeat_interleave(2, how)
            elif kind == "cat":
                x = torch.cat([x, x.flip(how)], how)
            else:
                x = x.flip(how)
        return x

    return function


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it holds nothing
)
@given(chain=chains())
def test_labels_are_where_the_numbers_went(follow, chain):
    shape, dim, moves = chain
    function = moved_by(moves)
    moved = where_channels_went(function, shape, dim)
    assert_labels_are_where_the_numbers_are(follow(function, shape, dim), moved)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), data=st.data())
def test_runs_of_a_reshape_are_the_finest_that_agree(sizes, data):
    cuts = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    merged = [
        prod(size for size, _ in group)
        for _, group in itertools.groupby(
            zip(sizes, np.cumsum(cuts), strict=True), key=lambda pair: pair[1]
        )
    ]
    for old, new in ((sizes, merged), (merged, sizes)):
        runs = _aligned_runs(tuple(old), tuple(new))
        assert [place for (first, last), _ in runs for place in range(first, last)] == [
            *range(len(old))
        ]
        assert [place for _, (first, last) in runs for place in range(first, last)] == [
            *range(len(new))
        ]
        for (first, last), (new_first, new_last) in runs:
            assert prod(old[first:last]) == prod(new[new_first:new_last])
            inner = set(itertools.accumulate(old[first : last - 1], initial=1)) - {1}
            assert not inner & (
                set(itertools.accumulate(new[new_first : new_last - 1], initial=1)) - {1}
            )


def test_a_reshape_of_several_labelled_dimensions_keeps_them(follow):
    def function(x):
        return (x.mean((2, 3))[:, :, None] * x.mean((2, 3))[:, None]).flatten(1)

    found = follow(function)
    assert set(found.blocked) == set(range(8))
    assert "a reshape mixes several of its dimensions" in found.blocked[0]


@pytest.mark.parametrize(
    ("sizes", "value", "before", "after", "tainted"),
    [
        ((0, 0, 0, 0, 0, 4), 0.0, 0, 4, False),
        ((0, 0, 0, 0, 2, 1), 0.0, 2, 1, False),
        ((0, 0, 0, 0, 0, 4), 1.0, 0, 4, True),
        ((1, 1, 2, 0), 0.0, 0, 0, False),
        ((1, 1, 2, 0), 1.0, 0, 0, True),
    ],
)
def test_padding_adds_fixed_channels(follow, sizes, value, before, after, tainted):
    found = follow(lambda x: -F.pad(x, sizes, value=value))
    labels = found.axes[1]
    assert labels[before : before + 8] == found.channels
    assert len(labels) == before + 8 + after
    assert not set(labels[:before] + labels[before + 8 :]) & set(found.channels)
    assert found.blocked == {}
    assert found.node.tainted is tainted


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_by_neighbours_in_space_leaves_the_channels(follow, mode):
    found = follow(lambda x: F.pad(x, (1, 1, 1, 1), mode=mode))
    assert found.axes == {1: found.channels}
    assert found.blocked == {}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.roll(1, 1), "roll shifts it by a fixed number of channels"),
        (lambda x: x.roll(1), "roll shifts it by a fixed number of channels"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, -2)), "it is padded by other channels"),
        (lambda x: x.repeat_interleave(2), "repeat_interleave flattens it"),
        (lambda x: x + x.transpose(1, 2).flip(1), "its channels meet a dimension whose size"),
    ],
)
def test_what_the_channel_count_decides_keeps_all(follow, function, reason):
    found = follow(function, (2, 8, 8, 4))
    assert set(found.blocked) == set(range(8))
    assert reason in found.blocked[0]


@pytest.mark.parametrize("dims", [2, 3])
def test_rolling_space_leaves_the_channels(follow, dims):
    found = follow(lambda x: x.roll(1, dims))
    assert found.axes == {1: found.channels}
    assert found.blocked == {}


def test_an_expanded_channel_takes_the_size_of_what_it_meets(follow):
    found = follow(lambda x: x * x.sum(1, keepdim=True).expand(-1, 8, -1, -1))
    assert found.axes == {1: found.channels}
    assert not found.node.tainted
    alone = follow(lambda x: x + x.sum(1, keepdim=True).expand_as(x))
    assert alone.axes == {1: alone.channels}
    assert alone.node.tainted
