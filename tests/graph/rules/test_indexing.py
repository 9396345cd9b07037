import pytest
import torch

EVERY = range(8)


@pytest.mark.parametrize(
    ("function", "kept", "blocked"),
    [
        (lambda x: x[:, :3], range(3), range(3)),
        (lambda x: x[:, 3:], range(3, 8), range(3)),
        (lambda x: x[:, 2:5], range(2, 5), range(5)),
        (lambda x: x[:, -3:], range(5, 8), range(5, 8)),
        (lambda x: x[:, :-3], range(5), range(5, 8)),
        (lambda x: x[:, 1:-2], range(1, 6), [0, 6, 7]),
        (lambda x: x[:, 0:100], EVERY, []),
        (lambda x: x[:, -100:], EVERY, EVERY),
        (lambda x: x[:, : x.shape[1]], EVERY, []),
        (lambda x: x.narrow(1, 2, 3), range(2, 5), range(5)),
        (lambda x: x[:, ::2], [], EVERY),
        (lambda x: x[:, 7], [], EVERY),
        (lambda x: x[:, 2], [], range(3)),
        (lambda x: x[:, -2], [], [6, 7]),
        (lambda x: x[:, 3:4], [], range(4)),
        (lambda x: x[:, [0, 5]], [], EVERY),
        (lambda x: x.index_select(1, torch.tensor([1, 2])), [], EVERY),
        (lambda x: x[:, :, 1:3], EVERY, []),
        (lambda x: x[:, :, 1], EVERY, []),
        (lambda x: x[:, :, [0, 2]], EVERY, []),
        (lambda x: x[:, :, ::2, 1:], EVERY, []),
        (lambda x: x.unbind(1)[0], [], EVERY),
        (lambda x: x.unbind(2)[0], EVERY, []),
        (lambda x: x.split(4, 1)[0], range(4), range(4)),
        (lambda x: x.split(3, 1)[2], range(6, 8), range(6)),
        (lambda x: x.split([3, 5], 1)[1], range(3, 8), EVERY),
        (lambda x: x.split(2, 3)[1], EVERY, []),
        (lambda x: x.chunk(3, 1)[1], range(3, 6), EVERY),
        (lambda x: x.chunk(2, 2)[1], EVERY, []),
    ],
)
def test_places_that_the_code_names_stay(follow, function, kept, blocked):
    found = follow(function)
    labels = [found.channels[channel] for channel in kept]
    assert [*found.axes.values()] == ([labels] if labels else [])
    assert set(found.blocked) == set(blocked)
    assert found.tied == set()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("part", [0, -1])
def test_parts_shrink_alike(follow, count, part):
    found = follow(lambda x: x.chunk(count, 1)[part])
    size = 8 // count
    ties = {frozenset(range(place, 8, size)) for place in range(size)}
    assert found.tied == ties
    assert found.blocked == {}
    assert found.axes == {1: found.channels[:size]}


def test_indices_of_several_dimensions_are_not_followed(follow):
    found = follow(lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 1])])
    assert set(found.blocked) == set(EVERY)
    assert "index.Tensor is not understood" in found.blocked[0]
