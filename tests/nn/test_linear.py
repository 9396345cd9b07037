import inspect

import pytest
import torch
from torch import nn

from dmcp.errors import ConfigError
from dmcp.nn import MarkovConv2d, MarkovLinear, masked


def test_the_signature_is_that_of_linear_and_the_chains():
    plain = list(inspect.signature(nn.Linear).parameters.values())
    markov = list(inspect.signature(MarkovLinear).parameters.values())
    for wanted, got in zip(plain, markov, strict=False):
        assert (got.name, got.default, got.kind) == (wanted.name, wanted.default, wanted.kind)


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_linear_at_full_width(bias):
    torch.manual_seed(0)
    plain, markov = nn.Linear(6, 16, bias), MarkovLinear(6, 16, bias)
    markov.load_state_dict(plain.state_dict(), strict=False)
    assert set(markov.state_dict()) == {*plain.state_dict(), "chain.alpha"}
    x = torch.randn(4, 6)
    assert torch.equal(plain(x), markov(x))
    plain(x).square().sum().backward()
    markov(x).square().sum().backward()
    assert torch.equal(plain.weight.grad, markov.weight.grad)


def test_it_narrows_on_both_sides():
    torch.manual_seed(0)
    layer = MarkovLinear(6, 16).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    x[:, 4:] = 0
    whole = layer(x)
    layer.chain.width = 5
    torch.testing.assert_close(layer(x[:, :4]), whole[:, :5])


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (6,)])
def test_the_mask_scales_the_features(shape):
    torch.manual_seed(0)
    layer = MarkovLinear(6, 16, divisor=4)
    x = torch.randn(shape)
    whole = layer(x)
    with masked(layer):
        torch.testing.assert_close(layer(x), whole * layer.chain.channel_retain())


def test_a_classifier_follows_the_width_of_its_input():
    conv, classifier = MarkovConv2d(3, 16, 1), MarkovLinear(16, 5, chain=None)
    conv.chain.width = 8
    assert classifier(conv(torch.zeros(2, 3, 4, 4)).mean((2, 3))).shape == (2, 5)
    with masked(conv):
        assert list(classifier.state_dict()) == ["weight", "bias"]


def test_a_shared_chain_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="chain has 16 channels, out_features is 8"):
        MarkovLinear(6, 8, chain=MarkovLinear(6, 16).chain)


def test_more_inputs_than_there_are_weights_for_are_refused_while_gradients_add_up():
    layer = MarkovLinear(8, 16)
    layer.chain.width = 8
    layer.state.accumulates = True
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        layer(torch.randn(4, 12))
