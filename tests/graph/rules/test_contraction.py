import pytest
import torch
import torch.nn.functional as F

EVERY = set(range(8))


def flat(x):
    return x.flatten(2)


@pytest.mark.parametrize(
    ("function", "dims", "reason"),
    [
        # Summed over the channels: nothing remains, nothing stays.
        (lambda x: torch.einsum("nchw,nchw->nhw", x, x), [], ""),
        (lambda x: flat(x).mT @ flat(x), [], ""),
        (lambda x: flat(x).mT @ flat(x).sigmoid(), [], ""),
        (lambda x: flat(x).mT.sigmoid() @ flat(x).sigmoid(), [], "sigmoid of zero need not be"),
        (lambda x: torch.einsum("nchw->nhw", x), [], ""),
        # Kept.
        (lambda x: flat(x) @ flat(x).mT, [1, 2], ""),
        (lambda x: torch.einsum("nchw,nchw->nc", x, x), [1], ""),
        (lambda x: torch.einsum("nchw,nkhw->nkc", x, x.mean((1,), True)), [2], "mean runs over"),
        (lambda x: torch.einsum("nc...->nc", x), [1], ""),
        (lambda x: torch.einsum("nchw", x), None, ""),
        (lambda x: torch.bmm(flat(x), torch.ones(2, 16, 3)), [1], ""),
        (lambda x: torch.matmul(x, torch.ones(4, 5)), [1], ""),
        (lambda x: F.linear(x, torch.ones(5, 4)), [1], ""),
        (lambda x: torch.einsum("nccw->ncw", x.mean(2)[:, :, None].expand(-1, 8, 8, 4)), [], "not"),
        (lambda x: F.conv1d(x.mean(3).mT, torch.ones(5, 4, 1)), [], "slides over its channels"),
    ],
)
def test_sums_run_over_channels_that_are_zero(follow, function, dims, reason):
    found = follow(function)
    if dims is not None:
        assert sorted(found.axes) == dims
    assert set(found.blocked) == (EVERY if reason else set())
    assert all(reason in why for why in found.blocked.values())


def test_attention_runs_over_all_positions(follow):
    def over(*order):
        def function(x):
            x = flat(x).permute(order)
            return F.scaled_dot_product_attention(x, x, x, scale=1.0)

        return function

    tokens, features = follow(over(0, 1, 2)), follow(over(0, 2, 1))
    assert set(tokens.blocked) == EVERY
    assert "a softmax runs over its positions" in tokens.blocked[0]
    assert features.blocked == {}
    assert features.axes == {2: features.channels}


def test_attention_that_divides_by_its_size_keeps_it(follow):
    def function(x):
        x = flat(x).mT
        return F.scaled_dot_product_attention(x, x, x)

    assert "attention divides by the square root of its size" in follow(function).blocked[0]


def test_heads_of_attention_go_as_the_size_of_one_stays(follow):
    """Channels at the same place of each head would change the scale, whole heads do not."""

    def function(x):
        x = flat(x).view(2, 4, -1, 16).mT
        return F.scaled_dot_product_attention(x, x, x, scale=0.5).mT.flatten(1, 2)

    found = follow(function)
    assert found.blocked == {}
    assert found.tied == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}
