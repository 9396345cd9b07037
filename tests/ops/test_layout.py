import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dmcp.ops.layout import Placed, empty_like, place, place_like


def numbered(shape, order, begin, step, end):
    """A view [N, C, ...] of distinct numbers: of a buffer with the axes in that order, a slice."""
    wide = [
        first + (size - 1) * stride + 1 + rest
        for size, first, stride, rest in zip(shape, begin, step, end, strict=True)
    ]
    buffer = torch.arange(math.prod(wide)).view([wide[axis] for axis in order])
    view = buffer.permute([order.index(axis) for axis in range(len(shape))])
    slices = zip(shape, begin, step, strict=True)
    return view[
        tuple(slice(first, first + (n - 1) * stride + 1, stride) for n, first, stride in slices)
    ]


@st.composite
def views(draw):
    """Mostly those that kernels follow: few axes are sliced, besides the channels."""
    rank = draw(st.integers(2, 5))
    sliced = {1, *draw(st.lists(st.integers(0, rank - 1), max_size=1))}

    def per_axis(least, most):
        return [draw(st.integers(least, most)) if axis in sliced else least for axis in range(rank)]

    shape = draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    last_or_first = st.sampled_from([[0, *range(2, rank), 1], [*range(rank)]])
    order = draw(st.one_of(last_or_first, st.permutations(range(rank))))
    x = numbered(shape, order, per_axis(0, 1), per_axis(1, 2), per_axis(0, 1))
    axis = draw(st.integers(0, 4 * rank))
    return x if axis >= rank else x.narrow(axis, 0, 1).expand(x.shape)


def walked(placed):
    """[batch, channels, pixels], read as a kernel reads: by the order and the pitch alone."""
    x, channels_last, pitch = placed
    batch, channels = x.shape[:2]
    pixels = math.prod(x.shape[2:])
    strides = (pixels * pitch, 1, pitch) if channels_last else (pitch, pixels, 1)
    return x.as_strided((batch, channels, pixels), strides)


def follows(placed, x):
    """Whether a kernel finds the values of x, none of them twice."""
    needed = x.shape[1] if placed.channels_last else math.prod(x.shape[1:])
    return placed.pitch >= needed and torch.equal(walked(placed), x[..., None].flatten(2))


@settings(max_examples=400, deadline=None)
@given(views())
def test_any_view_is_placed(x):
    placed = place(x)
    assert placed.tensor.shape == x.shape
    assert follows(placed, x)


@settings(max_examples=400, deadline=None)
@given(st.data(), views())
def test_any_view_is_placed_like_another(data, x):
    other = place(x)
    order = data.draw(st.permutations(range(x.ndim)))
    y = numbered(x.shape, order, [0] * x.ndim, [1] * x.ndim, [0, 1, *[0] * (x.ndim - 2)])
    placed = place_like(y, other)
    assert placed.channels_last == other.channels_last
    assert follows(placed, y)


@settings(max_examples=200, deadline=None)
@given(views())
def test_an_empty_tensor_has_the_place_of_the_other(x):
    other = place(x)
    made = empty_like(other)
    assert made.channels_last == other.channels_last
    assert made.pitch == other.pitch
    assert made.tensor.dtype == x.dtype
    assert made.tensor.stride() == other.tensor.stride()
    assert follows(made, made.tensor)
    assert made.tensor.data_ptr() != other.tensor.data_ptr()


@settings(max_examples=200, deadline=None)
@given(views())
def test_fake_tensors_are_placed_as_real_ones(x):
    placed = place(x)
    with FakeTensorMode() as mode:
        fake = place(mode.from_tensor(x))
    assert fake[1:] == placed[1:]
    assert fake.tensor.stride() == placed.tensor.stride()


WIDE = torch.arange(2 * 9 * 4 * 4).view(2, 9, 4, 4)
WIDE_LAST = WIDE.to(memory_format=torch.channels_last)
FOLLOWED = {
    "contiguous": (WIDE, False, 9 * 16),
    "channels last": (WIDE_LAST, True, 9),
    "prefix": (WIDE[:, :5], False, 9 * 16),
    "channels-last prefix": (WIDE_LAST[:, :5], True, 9),
    "channels from the middle": (WIDE_LAST[:, 3:6], True, 9),
    "one channel": (WIDE_LAST[:, 4:5], True, 9),
    "part of the batch": (WIDE_LAST[1:], True, 9),
    "one pixel": (WIDE_LAST[:, :5, :1, :1], True, 9 * 16),
    "every second pixel": (WIDE_LAST[..., ::2], True, 18),
    "vectors": (WIDE.flatten(1), True, 9 * 16),
    "one vector": (WIDE.flatten(1)[:1, :5], True, 5),
    "prefix of vectors": (WIDE.flatten(1)[:, :5], True, 9 * 16),
    "sequence": (WIDE.flatten(2), False, 9 * 16),
    "sequence, channels last": (WIDE_LAST.flatten(2)[:, :5], True, 9),
    "volume, channels last": (WIDE_LAST.unflatten(3, (2, 2))[:, :5], True, 9),
}


@pytest.mark.parametrize(("x", "channels_last", "pitch"), FOLLOWED.values(), ids=FOLLOWED)
def test_these_are_followed_without_a_copy(x, channels_last, pitch):
    placed = place(x)
    assert placed.tensor is x
    assert (placed.channels_last, placed.pitch) == (channels_last, pitch)
    assert place_like(x, placed).tensor is x


COPIED = {
    "every second channel": WIDE_LAST[:, ::2],
    "three of four columns": WIDE_LAST[..., :3],
    "some of the rows": WIDE_LAST[:, :, :3, :2],
    "rows and columns exchanged": WIDE_LAST.transpose(2, 3),
    "batch and channels exchanged": WIDE.transpose(0, 1),
    "one image for all": WIDE[:1].expand(2, -1, -1, -1),
    "one number for all": WIDE[:1, :1, :1, :1].expand(2, 9, 4, 4),
    "overlapping pixels": WIDE.as_strided((2, 3, 4, 4), (16, 1, 4, 1)),
}


@pytest.mark.parametrize("x", COPIED.values(), ids=COPIED)
def test_these_are_copied(x):
    placed = place(x)
    assert placed.tensor.is_contiguous()
    assert follows(placed, x)


@pytest.mark.parametrize("x", [WIDE[:, :5], WIDE_LAST[:, :5]], ids=["first", "last"])
def test_another_order_is_copied_into_that_order(x):
    for other in (WIDE[:, :5], WIDE_LAST[:, :5], WIDE_LAST[:, 4:]):
        placed = place_like(x, place(other))
        assert (placed.tensor is x) == (x.stride() == other.stride())
        assert follows(placed, x)


def test_a_wrong_pitch_is_noticed():
    x = WIDE_LAST[:, :5]
    assert follows(Placed(x, True, 9), x)
    assert not follows(Placed(x, True, 5), x)
    assert not follows(Placed(x, False, 9 * 16), x)
