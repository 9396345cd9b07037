import itertools

import pytest
import torch

import dmcp
from dmcp.errors import ConfigError
from dmcp.search import Budget, MarkovNet, Search, SearchOptions, draw_widths
from dmcp.search.bernoulli_net import BernoulliChain, BernoulliNet


@pytest.fixture
def make(traced):
    def build(name, groups=3, divisor=2, kind=BernoulliNet):
        graph = traced(name).graph
        return kind(graph.model, None, groups, divisor, graph=graph)

    return build


def random_alpha(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.normal_(0.3, 1.5, generator=generator)
    return net


def random_subset(net, seed=0):
    groups = len(net.transitions())
    return net.subset(torch.rand(groups, generator=torch.Generator().manual_seed(seed)) < 0.5)


def test_the_default_device_of_new_tensors_does_not_matter(make):
    net = make("Residual")
    with torch.device("meta"):
        other = make("Residual")
    for name, buffer in net.named_buffers():
        assert torch.equal(other.get_buffer(name), buffer), name


def test_a_group_is_retained_whatever_the_others_do():
    chain = BernoulliChain(10, choices=(2, 4, 10)).double()
    p = torch.tensor([0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        chain.alpha.copy_(p.logit())
    width = chain.expected_width()
    torch.testing.assert_close(width.item(), 2 + 2 * 0.3 + 6 * 0.9)
    # of one gate, s p (1 - p): nothing of the others
    (gradient,) = torch.autograd.grad(width, chain.alpha)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 6.0]).double() * p * (1 - p))
    expected = torch.tensor([1, 1, 0.3, 0.3, *[0.9] * 6], dtype=torch.float64)
    torch.testing.assert_close(chain.channel_retain(), expected)
    assert chain.channels_of(torch.tensor([False, True])).tolist() == [0, 1, *range(4, 10)]


def test_drawn_prefixes_have_as_many_groups_as_gates_pass(make):
    net = random_alpha(make("Depthwise", groups=4, divisor=1))
    drawn = draw_widths(net, 20_000, torch.Generator().manual_seed(0))
    # groups are equal here, but for the base
    means = drawn.widths.double().mean(0)
    torch.testing.assert_close(means, net.width_moments()[:, 0].detach(), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ["Depthwise", "BothEnds"])
def test_moments_and_costs_are_those_of_all_subsets(make, name):
    """Two units with groups of different sizes; a unit at both ends of a layer."""
    net = random_alpha(make(name).double())
    costs = [dmcp.cost(net.graph, metric) for metric in ("macs", "params", "memory")]
    alpha = torch.cat([*net.architecture_parameters()])
    p = alpha.sigmoid()
    subsets = torch.tensor(list(itertools.product([False, True], repeat=len(p))))
    probability = torch.where(subsets, p, 1 - p).prod(1)
    units = [unit.name for unit in net.graph.units]
    widths = torch.tensor(
        [
            [len(kept.get(unit.name, range(unit.channels))) for unit in net.graph.units]
            for kept in map(net.subset, subsets)
        ]
    )
    assert len(units) == 3 - (name == "BothEnds")  # the classes are one, and not searchable

    expected = net.expected_cost(net.cost_table(costs))
    torch.testing.assert_close(expected.q, p)
    for order, moments in enumerate(expected.moments, 1):
        torch.testing.assert_close(moments, probability @ widths.double() ** order)
    for number, cost in enumerate(costs):
        values = cost.of_many(widths).double()
        mean = probability @ values
        variance = probability @ (values - mean) ** 2
        for got, wanted in (
            (expected.cost[number], mean),
            (expected.variance[number], variance),
            (cost.mean(expected.moments.T), mean),
            (cost.variance(expected.moments.T), variance),
        ):
            torch.testing.assert_close(got, wanted)
            of_got, of_wanted = (
                torch.autograd.grad(value, net.architecture_parameters(), retain_graph=True)
                for value in (got, wanted)
            )
            torch.testing.assert_close(of_got, of_wanted)


def test_certain_gates_have_no_variance(make):
    net = make("BothEnds")
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(30.0)
    expected = net.expected_cost(net.cost_table([dmcp.cost(net.graph)]))
    assert 0 <= expected.variance.item() < 1e-3
    assert expected.cost.item() == pytest.approx(dmcp.cost(net.graph).of({}))


@pytest.mark.parametrize("start", [0.5, 0.9, 0.98])
def test_the_start_has_the_widths_of_markov_chains(make, start):
    found = []
    for kind in (MarkovNet, BernoulliNet):
        net = make("resnet18", groups=10, divisor=2, kind=kind)
        Search(net, Budget(macs="50%"), 2, SearchOptions(start=start))
        found.append(net.expected_widths())
    markov, bernoulli = found
    assert bernoulli == pytest.approx(markov, rel=1e-5)
    assert all(len(alpha.unique()) == 1 for alpha in net.architecture_parameters())


def test_channels_are_scaled_by_their_gates(make):
    net = random_alpha(make("resnet18"))
    with net.masked() as expected:
        for unit in net.graph.searchable:
            chain = net.chain(unit.name)
            torch.testing.assert_close(chain.mask, chain.channel_retain())
        loss = net(torch.randn(2, 3, 16, 16)).square().sum()
    (loss + expected.widths.sum()).backward()
    assert all(alpha.grad.abs().min() > 0 for alpha in net.architecture_parameters())


def test_a_subset_is_the_network_extracted_with_it(traced_network, tensors):
    graph, inputs = traced_network.graph, traced_network.inputs
    net = BernoulliNet(graph.model, None, 4, 1, graph=graph).eval()
    whole = net(*inputs)
    for seed in range(3):
        kept = random_subset(net, seed)
        small = dmcp.extract(net.graph, kept=kept).eval()
        with torch.no_grad(), net.at(kept):
            got = net(*inputs)
        for one, other in zip(tensors(got), tensors(small(*inputs)), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for before, after in zip(tensors(whole), tensors(net(*inputs)), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["Residual", "Depthwise", "Concat"])
def test_a_subset_learns_as_the_network_extracted_with_it(make, traced, name):
    net = make(name, groups=4, divisor=1).train()
    kept = random_subset(net, 1)
    assert any(int(channels[-1]) >= len(channels) for channels in kept.values())
    small = dmcp.extract(net.graph, kept=kept)
    running = [buffer.clone() for buffer in net.model.buffers()]
    inputs = traced(name).inputs
    small(*inputs).square().sum().backward()
    for parameter in net.weight_parameters():
        parameter.grad = torch.zeros_like(parameter)
    with net.accumulating(), net.at(kept):
        net(*inputs).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in small.named_parameters()}
    # of the dropped channels there is none
    for name, parameter in net.graph.model.named_parameters():
        assert parameter.grad.abs().sum() == pytest.approx(
            float(wanted[name].abs().sum()), rel=1e-3, abs=1e-4
        )
    assert all(map(torch.equal, running, net.model.buffers()))


def test_a_subset_may_stand_inside_another(make):
    net = make("Residual", groups=4, divisor=1)
    chains = [net.chain(unit.name) for unit in net.graph.searchable]
    kept = random_subset(net, 1)

    def keeps():
        return [
            [*range(c.channels)][c.keep()] if isinstance(c.keep(), slice) else c.keep().tolist()
            for c in chains
            if c.keep() is not None
        ]

    with net.at(kept):
        outer = keeps()
        assert outer == [channels.tolist() for channels in kept.values()]
        with net.at({unit.name: unit.choices[0] for unit in net.graph.units}):
            assert keeps() == [[*range(c.choices[0])] for c in chains]
        assert keeps() == outer
    assert keeps() == []
    with pytest.raises(ConfigError, match="no unit"), net.at({"none": torch.arange(3)}):
        pass


def test_a_prefix_stays_a_view(make):
    net = make("Residual", groups=4, divisor=1)
    groups = torch.ones(len(net.transitions()), dtype=torch.bool)
    with net.at(net.subset(groups)):
        assert all(net.chain(unit.name).keep() is None for unit in net.graph.searchable)
    with net.at(net.subset(~groups)):
        for unit in net.graph.searchable:
            assert net.chain(unit.name).keep() == slice(0, unit.choices[0])
