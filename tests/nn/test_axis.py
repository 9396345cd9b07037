import torch

from dmcp.nn import ComposedAxis, MarkovChain
from dmcp.nn.axis import scale_channels, select
from dmcp.nn.chain import masked


def two_chains():
    """Position: 0-1 fixed, then the first chain twice over, then the second chain."""
    first, second = MarkovChain(3, divisor=1, groups=3), MarkovChain(2, divisor=1, groups=2)
    axis = ComposedAxis(
        10,
        [
            (first, torch.arange(2, 8), torch.tensor([0, 0, 1, 1, 2, 2])),
            (second, torch.arange(8, 10), torch.arange(2)),
        ],
    )
    return first, second, axis


def test_positions_follow_their_chains():
    first, second, axis = two_chains()
    assert axis.keep() is None
    first.width = 2
    assert axis.keep().tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    second.width = 1
    assert axis.keep().tolist() == [0, 1, 2, 3, 4, 5, 8]


def test_a_prefix_is_a_slice():
    _, second, axis = two_chains()
    second.width = 1
    assert axis.keep() == slice(0, 9)


def test_the_mask_gathers_the_chains():
    first, second, axis = two_chains()
    assert axis.mask is None
    with masked(first):
        q = first.channel_retain()
        torch.testing.assert_close(
            axis.mask, torch.cat([torch.ones(2), q.repeat_interleave(2), torch.ones(2)])
        )
        with masked(second):
            torch.testing.assert_close(axis.mask[8:], second.channel_retain())
            axis.mask.sum().backward()
    assert first.alpha.grad.abs().min() > 0
    assert second.alpha.grad.abs().min() > 0


def test_selecting_a_prefix_is_a_view():
    tensor = torch.arange(12).view(3, 4)
    assert select(tensor, 1, None) is tensor
    prefix = select(tensor, 1, slice(0, 2))
    assert prefix.tolist() == [[0, 1], [4, 5], [8, 9]]
    assert prefix.data_ptr() == tensor.data_ptr()
    assert select(tensor, 0, torch.tensor([0, 2])).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_scaling_follows_the_kept_channels():
    x = torch.ones(2, 2, 3)
    assert scale_channels(x, None, None, 1) is x
    mask = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    y = scale_channels(x, mask, torch.tensor([0, 2]), 1)
    assert y.dtype == torch.float32
    assert y[0, :, 0].tolist() == [1, 4]
