import pytest
import torch
from torch import nn

from dmcp.nn import MarkovBatchNorm2d, MarkovChain, masked


def pair(channels=24, **options):
    """The same batch norm, plain and following a chain."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(channels, **options)
    if plain.affine:
        nn.init.uniform_(plain.weight, 0.5, 1.5)
        nn.init.normal_(plain.bias)
    markov = MarkovBatchNorm2d(channels, **options, chain=MarkovChain(channels, start=0.7))
    markov.load_state_dict(plain.state_dict())
    return plain, markov


OPTIONS = [
    {},
    {"affine": False},
    {"momentum": None},
    {"eps": 1e-3, "momentum": 0.5},
    {"track_running_stats": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_batch_norm_at_full_width(options):
    plain, markov = pair(**options)
    for training in (True, True, False):
        images = torch.randn(4, 24, 5, 5)
        plain.train(training)
        markov.train(training)
        assert torch.equal(plain(images), markov(images))
    assert list(plain.state_dict()) == list(markov.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, markov.state_dict()[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_narrower_chain_normalises_a_prefix(options, training):
    plain, markov = pair(**options)
    before = {name: tensor.clone() for name, tensor in markov.state_dict().items()}
    images = torch.randn(4, 24, 5, 5)
    plain.train(training)
    markov.train(training)
    markov._axes[0].width = 9
    torch.testing.assert_close(markov(images[:, :9]), plain(images)[:, :9])
    for name, tensor in markov.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_mask_scales_the_output_and_leaves_the_statistics(options, training):
    plain, markov = pair(**options)
    chain = markov._axes[0]
    before = {name: tensor.clone() for name, tensor in markov.state_dict().items()}
    images = torch.randn(4, 24, 5, 5)
    plain.train(training)
    markov.train(training)
    with masked(chain):
        y = markov(images)
    expected = plain(images) * chain.channel_retain().view(-1, 1, 1)
    torch.testing.assert_close(y, expected)
    for name, tensor in markov.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_module_that_does_not_mask_ignores_the_mask():
    plain, markov = pair()
    markov.masks = False
    images = torch.randn(4, 24, 5, 5)
    with masked(markov._axes[0]):
        assert torch.equal(markov(images), plain(images))
