import pytest
import torch


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sum(1), ""),
        (lambda x: x.sum(1, keepdim=True), ""),
        (lambda x: torch.linalg.vector_norm(x, dim=1), ""),
        (lambda x: x.sigmoid().sum(1), "would still count: sigmoid of zero"),
        (lambda x: x.mean(1), "mean runs over its channels"),
        (lambda x: x.mean(), "mean runs over its channels"),
        (lambda x: x.amax(1), "amax runs over its channels"),
        (lambda x: x.max(1).values, "max runs over its channels"),
        (lambda x: x.std(1), "std runs over its channels"),
        (lambda x: x.prod(1), "prod runs over its channels"),
        (lambda x: x.argmax(1), "argmax runs over its channels"),
        (lambda x: x.logsumexp(1), "logsumexp runs over its channels"),
    ],
)
def test_only_sums_of_zeros_are_the_same_without_them(follow, function, reason):
    found = follow(function)
    assert found.axes == {}
    assert set(found.blocked) == (set(range(8)) if reason else set())
    assert all(reason in why for why in found.blocked.values())


@pytest.mark.parametrize(
    ("function", "dim", "tainted"),
    [
        (lambda x: x.mean((2, 3)), 1, False),
        (lambda x: x.mean((-2, -1), keepdim=True), 1, False),
        (lambda x: x.mean(0), 0, False),
        (lambda x: x.sum((0, 2, 3)), 0, False),
        (lambda x: x.amax((2, 3)), 1, False),
        (lambda x: x.std((2, 3)), 1, False),
        (lambda x: x.logsumexp((2, 3)), 1, True),
        (lambda x: x.softmax(-1), 1, True),
        (lambda x: x.log_softmax(2), 1, True),
        (lambda x: x.cumsum(2), 1, False),
        (lambda x: x.sort(3).values, 1, True),
    ],
)
def test_other_dimensions_leave_the_channels(follow, function, dim, tainted):
    found = follow(function)
    assert found.axes == {dim: found.channels}
    assert found.blocked == {}
    assert found.node.tainted is tainted


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cumsum", "cumprod", "sort", "topk"])
def test_what_runs_along_the_channels_keeps_all(follow, name):
    run = {
        "softmax": lambda x: x.softmax(1),
        "log_softmax": lambda x: x.log_softmax(1),
        "cumsum": lambda x: x.cumsum(1),
        "cumprod": lambda x: x.cumprod(1),
        "sort": lambda x: x.sort(dim=1).values,
        "topk": lambda x: x.topk(2, 1).values,
    }
    found = follow(run[name])
    assert set(found.blocked) == set(range(8))
    assert f"{name} runs over its channels" in found.blocked[0]
