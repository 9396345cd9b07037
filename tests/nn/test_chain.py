import copy
import math
import pickle

import pytest
import torch
from torch import nn

from dmcp.errors import ConfigError
from dmcp.nn import MarkovChain, MarkovConv2d, masked


def chain(*alpha, choices):
    made = MarkovChain(choices[-1], choices=choices, dtype=torch.float64)
    with torch.no_grad():
        made.alpha.copy_(torch.tensor(alpha, dtype=torch.float64))
    return made


def test_the_grid_and_the_start_come_from_the_arguments():
    made = MarkovChain(64, groups=4, divisor=16, min_width=32, start=0.75)
    assert made.choices == (32, 48, 64)
    assert made.alpha.dtype == torch.float32
    torch.testing.assert_close(made.transition(), torch.full((2,), 0.75))
    made.reset(0.5)
    assert made.alpha.tolist() == [0, 0]
    assert list(made.state_dict()) == ["alpha"]


def test_retain_probabilities_are_products_of_transitions():
    made = chain(0.3, -1.0, 2.0, choices=(2, 3, 6, 10))
    p = [1 / (1 + math.exp(-a)) for a in (0.3, -1.0, 2.0)]
    q = [p[0], p[0] * p[1], p[0] * p[1] * p[2]]
    torch.testing.assert_close(made.transition(), torch.tensor(p, dtype=torch.float64))
    torch.testing.assert_close(made.retain(), torch.tensor(q, dtype=torch.float64))
    channels = [1, 1, q[0], *[q[1]] * 3, *[q[2]] * 4]
    torch.testing.assert_close(made.channel_retain(), torch.tensor(channels, dtype=torch.float64))
    torch.testing.assert_close(
        made.expected_width().item(), 2 + 1 * q[0] + 3 * q[1] + 4 * q[2], rtol=1e-15, atol=0
    )


def test_the_expected_width_is_differentiable():
    made = chain(0.3, -1.0, choices=(2, 3, 6))
    made.expected_width().backward()
    p, r = made.alpha.detach().sigmoid()
    expected = [(1 + 3 * r) * p * (1 - p), 3 * p * r * (1 - r)]
    torch.testing.assert_close(made.alpha.grad, torch.stack(expected))


def test_samples_have_the_chains_distribution():
    made = chain(0.5, -0.5, 1.0, choices=(2, 3, 6, 10))
    count = 20_000
    drawn = made.sample(count, torch.Generator().manual_seed(0))
    q = [1.0, *made.retain().tolist(), 0.0]
    for k, width in enumerate(made.choices):
        expected = q[k] - q[k + 1]
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs((drawn == width).double().mean().item() - expected) < 4 * deviation
    assert torch.equal(drawn, made.sample(count, torch.Generator().manual_seed(0)))


def test_a_chain_of_one_choice_has_nothing_to_search():
    made = MarkovChain(8)
    assert made.choices == (8,)
    assert made.alpha.shape == (0,)
    assert made.channel_retain().tolist() == [1] * 8
    assert made.sample(3).tolist() == [8, 8, 8]


def test_the_width_selects_a_prefix():
    made = MarkovChain(32)
    assert made.width == 32
    assert made.keep() is None
    made.width = 5
    assert made.keep() == slice(0, 5)


@pytest.mark.parametrize("width", [0, 33, 8.0, True])
def test_a_width_out_of_range_is_refused(width):
    made = MarkovChain(32)
    with pytest.raises(ConfigError, match=r"width must be an int in 1\.\.32"):
        made.width = width
    assert made.width == 32


@pytest.mark.parametrize("choices", [(8, 8, 32), (16, 8, 32), (0, 32), (8, 16)])
def test_choices_must_ascend_to_the_full_width(choices):
    with pytest.raises(ConfigError, match="choices must ascend"):
        MarkovChain(32, choices=choices)


@pytest.mark.parametrize("start", [0, 1, -0.5, 2, float("nan")])
def test_a_start_that_is_no_probability_is_refused(start):
    with pytest.raises(ConfigError, match="start must lie strictly between 0 and 1"):
        MarkovChain(32, start=start)


def test_masks_are_on_inside_the_context_only():
    model = nn.ModuleDict({"a": MarkovChain(24), "b": MarkovChain(8), "c": MarkovChain(32)})
    with masked(model):
        for made in model.values():
            torch.testing.assert_close(made.mask, made.channel_retain())
    assert [made.mask for made in model.values()] == [None, None, None]
    with pytest.raises(RuntimeError, match="stop"), masked(model):
        raise RuntimeError("stop")
    assert [made.mask for made in model.values()] == [None, None, None]


def test_masks_outside_of_a_chain_have_nothing_to_do():
    with masked(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_shared_chain_stays_shared_in_a_copy(clone):
    first = MarkovConv2d(3, 16, 1)
    model = nn.Sequential(first, MarkovConv2d(16, 16, 3, groups=16, chain=first.chain))
    copied = clone(model)
    copied[0].chain.width = 8
    assert copied(torch.zeros(1, 3, 4, 4)).shape == (1, 8, 2, 2)
    assert model(torch.zeros(1, 3, 4, 4)).shape == (1, 16, 2, 2)
