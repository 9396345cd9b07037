import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmcp.nn import MarkovBatchNorm2d, MarkovChain, masked
from dmcp.nn.batchnorm import ACTIVATIONS


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
@pytest.mark.usefixtures("reference_ops")
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


@pytest.mark.usefixtures("reference_ops")
def test_a_module_that_does_not_mask_ignores_the_mask():
    plain, markov = pair()
    markov.masks = False
    images = torch.randn(4, 24, 5, 5)
    with masked(markov._axes[0]):
        assert torch.equal(markov(images), plain(images))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_kernels_are_batch_norm_to_rounding(options, training):
    plain, markov = pair(**options)
    plain.train(training)
    markov.train(training)
    results = []
    for norm in (plain, markov):
        x = torch.randn(4, 24, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = norm(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("module", "act"), list(ACTIVATIONS.items()))
def test_activation_mask_and_residual_in_one_module(module, act, place):
    torch.manual_seed(0)
    chain = MarkovChain(24, start=0.7)
    norm = MarkovBatchNorm2d(24, chain=chain, act=act).double()
    images, residual = torch.randn(2, 4, 24, 5, 5, dtype=torch.float64)
    with masked(chain):
        y = norm(images, residual, place)
    v = F.batch_norm(images, None, None, training=True)
    q = chain.channel_retain().view(-1, 1, 1)
    expected = module()(q * v + residual) if place == "before" else q * module()(v) + residual
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_a_norm_in_half_precision_is_pytorchs():
    plain, markov = pair()
    chain = markov._axes[0]
    plain, markov = plain.bfloat16(), markov.bfloat16()
    images = torch.randn(4, 24, 5, 5, dtype=torch.bfloat16)
    y = markov(images)
    assert torch.equal(y, plain(images))
    assert torch.equal(markov.running_var, plain.running_var)
    with masked(chain):
        scaled = markov(images)
    assert scaled.dtype == torch.bfloat16
    expected = y.float() * chain.channel_retain().view(-1, 1, 1)
    torch.testing.assert_close(scaled.float(), expected, rtol=0.03, atol=0.03)


def test_a_batch_of_one_value_per_channel_is_refused_as_pytorch_does():
    _, markov = pair()
    with pytest.raises(ValueError, match="values per channel"):
        markov(torch.zeros(1, 24, 1, 1))


def test_what_was_handed_over_is_not_pickled():
    """A pass that ended with an exception leaves it behind."""
    norm = MarkovBatchNorm2d(4)
    norm.handed.give(torch.zeros(1))
    assert pickle.loads(pickle.dumps(norm)).handed.take() is None
    assert copy.deepcopy(norm).handed.take() is None


def test_statistics_move_without_a_count():
    images = torch.randn(4, 3, 5, 5)
    norms = nn.BatchNorm2d(3), MarkovBatchNorm2d(3)
    for norm in norms:
        norm.num_batches_tracked = None
        norm(images)
    torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
    torch.testing.assert_close(norms[1].running_var, norms[0].running_var)
