from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.errors import BudgetError, CheckpointError, ConfigError
from dmcp.integrations import LoopSearch
from dmcp.search import SearchOptions
from dmcp.train import Schedule, sgd

STEPS = 8


@pytest.fixture
def make(example):
    """A net in float64, always with the same weights."""

    def build(name="Residual"):
        case = example(name).to(torch.float64)
        return dmcp.MarkovNet(case.model, case.inputs, groups=4, divisor=1).train()

    return build


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (4,), generator=generator)


def loop(net, search, optimizer, steps, scaler=None):
    metrics = {}
    wrapped = scaler or torch.amp.GradScaler(enabled=False)
    for step in steps:
        images, labels = batch(step)

        def loss_of(images=images, labels=labels):
            return F.cross_entropy(net(images), labels)

        optimizer.zero_grad()
        wrapped.scale(loss_of()).backward()
        metrics = search.step(loss_of, scaler)
        wrapped.step(optimizer)
        wrapped.update()
    return metrics


def alphas(net):
    return torch.cat([alpha.detach() for alpha in net.architecture_parameters()])


def assert_same(first, second):
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, second.state_dict()[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("warmup", "rate"), [(0.99, 0.05), (0.0, 1e-12)], ids=["weights", "chains"]
)
def test_a_loop_does_what_a_search_does(make, warmup, rate):
    """One difference: its chains see the weights before their step. So weights are compared while
    chains wait, and chains while weights stand still."""
    options = SearchOptions(
        warmup=warmup,
        lr=Schedule(peak=rate, final=rate),
        distil=False,
        match_scale=False,
        start=0.7,
    )
    budget, steps = dmcp.Budget(macs="50%"), 101
    inside = dmcp.Search(make(), budget, steps, options, seed=3)
    net = make()
    outside = LoopSearch(net, budget, steps, options, seed=3)
    optimizer = sgd(net.model, options.lr, options.momentum, options.weight_decay)
    for step in range(5):
        wanted = inside.step(*batch(step))
    metrics = loop(net, outside, optimizer, range(5))
    assert_same(net, inside.net)
    assert metrics.keys() == wanted.keys() - {"loss", "accuracy"}
    for name, value in metrics.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)
        assert not value.requires_grad
    if not warmup:
        assert (alphas(net) != alphas(make())).all()
    assert outside.expected_widths() == inside.expected_widths()


def test_a_loss_of_several_inputs_and_outputs(make):
    net = make("SeveralInputs")
    search = LoopSearch(net, dmcp.Budget(macs="60%"), STEPS, SearchOptions(warmup=0.25))
    optimizer = torch.optim.AdamW(net.weight_parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    right = torch.randn(4, 2, 8, 8, generator=generator, dtype=torch.float64)

    def loss_of():
        logits, features = net(left, y=right)
        return logits.square().mean() + 0.1 * features.abs().mean()

    before = alphas(net)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of().backward()
        metrics = search.step(loss_of)
        optimizer.step()
    assert (alphas(net) != before).all()
    assert metrics["masked_loss"] > 0
    widths = search.expected_widths()
    assert dmcp.cost(net.graph).of(widths) <= 0.6 * dmcp.cost(net.graph).of({})
    small = dmcp.extract(net.graph, widths)
    assert small(left, right)[0].shape == (4, 5)
    with pytest.raises(ConfigError, match="all 8 steps are done"):
        search.step(loss_of)


def test_scaled_gradients_move_chains_as_unscaled_ones(make):
    ended = []
    options = SearchOptions(warmup=0.0, arch_optimizer="sgd")
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=256.0)):
        net = make()
        search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, options)
        loop(net, search, torch.optim.SGD(net.weight_parameters(), 0.01), range(3), scaler)
        ended.append(net)
    assert_same(*ended)


def test_gradients_of_several_calls_are_scaled_together(make):
    net = make()
    search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.0))
    optimizer = torch.optim.SGD(net.weight_parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    images, labels = batch(0)

    def loss_of():
        return F.cross_entropy(net(images), labels)

    for _ in range(2):
        before = alphas(net)
        scaler.scale(loss_of() / 2).backward()
        search.step(loss_of, scaler, share=1 / 2)
        assert (alphas(net) != before).all()
    scaler.step(optimizer)
    scaler.update()

    state = search.state_dict()
    assert state["scaler"]["scale"] == 256
    resumed = LoopSearch(make(), dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.0))
    resumed.load_state_dict(state)
    assert resumed.state_dict()["scaler"] == state["scaler"]


def test_a_share_of_the_gradients_is_for_weights_alone(make):
    gradients, chains = [], []
    images, labels = batch(0)
    for share in (1.0, 0.25):
        net = make()
        search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.0))
        net.zero_grad()
        search.step(lambda net=net: F.cross_entropy(net(images), labels), share=share)
        gradients.append([p.grad / share for p in net.weight_parameters()])
        chains.append(alphas(net))
    torch.testing.assert_close(*gradients)
    assert torch.equal(*chains)


def test_an_optimizer_of_the_whole_net_leaves_chains_alone(make):
    net = make()
    search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.0))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    images, labels = batch(0)
    search.step(lambda: F.cross_entropy(net(images), labels))
    before = alphas(net)
    optimizer.step()
    assert torch.equal(alphas(net), before)


def test_what_else_the_loss_depends_on_learns_from_networks_alone(make):
    """The masked network moves α, and nothing that the loop trains."""
    net = make()
    factor = nn.Parameter(torch.ones((), dtype=torch.float64))
    options = SearchOptions(warmup=0.0, random_subnets=0)
    search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, options)
    images, labels = batch(0)

    def loss_of():
        return F.cross_entropy(factor * net(images), labels)

    net.zero_grad()
    search.step(loss_of)
    got = {name: p.grad.clone() for name, p in net.model.named_parameters()}
    of_factor = factor.grad.clone()
    net.zero_grad()
    factor.grad = None
    with net.at({unit.name: unit.choices[0] for unit in net.graph.units}):
        loss_of().backward()
    assert torch.equal(factor.grad, of_factor)
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)
        assert parameter.requires_grad


def test_a_loss_beside_the_net_is_refused(make):
    net = make()
    stranger = copy.deepcopy(net.graph.model)
    search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.0))
    images, labels = batch(0)
    with pytest.raises(ConfigError, match="does not call the net"):
        search.step(lambda: F.cross_entropy(stranger(images), labels))
    assert all(net.chain(unit.name).width == unit.channels for unit in net.graph.searchable)


def test_a_resumed_search_ends_with_the_same_bits(make):
    nets = make(), make()
    searches, optimizers = [], []
    for net in nets:
        searches.append(LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.25)))
        optimizers.append(torch.optim.SGD(net.weight_parameters(), lr=0.01))
    loop(nets[0], searches[0], optimizers[0], range(STEPS))

    loop(nets[1], searches[1], optimizers[1], range(5))
    saved = copy.deepcopy(searches[1].state_dict())
    weights = copy.deepcopy(nets[1].graph.model.state_dict())
    net = make()
    net.graph.model.load_state_dict(weights)
    search = LoopSearch(net, dmcp.Budget(macs="50%"), STEPS, SearchOptions(warmup=0.25), seed=7)
    search.load_state_dict(saved)
    loop(net, search, torch.optim.SGD(net.weight_parameters(), lr=0.01), range(5, STEPS))
    for first, second in zip(nets[0].state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(first, second)
    with pytest.raises(CheckpointError, match="a search with 8 steps, not with 9"):
        LoopSearch(net, dmcp.Budget(macs="50%"), 9).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="another network"):
        LoopSearch(make("Depthwise"), dmcp.Budget(macs="60%"), STEPS).load_state_dict(saved)


def test_arguments_are_checked(make):
    with pytest.raises(ConfigError, match="steps must be an int"):
        LoopSearch(make(), dmcp.Budget(macs="50%"), 0)
    with pytest.raises(BudgetError, match="below the narrowest"):
        LoopSearch(make(), dmcp.Budget(macs=10), 1)
