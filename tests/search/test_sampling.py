import pytest
import torch

import dmcp
from dmcp.errors import SamplingError
from dmcp.search import Budget, MarkovNet, draw_widths, expected_widths, sample_within


def random_alpha(net, seed, mean=1.0, spread=1.5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.normal_(mean, spread, generator=generator)


@pytest.fixture
def net(example):
    case = example("Residual")
    made = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    random_alpha(made, 0)
    return made


@pytest.mark.parametrize(
    ("name", "divisor"), [("mobilenet_v2", 1), ("resnet18", 1), ("resnet18", 8)]
)
def test_expected_widths_fill_the_budget_on_the_grid(example, name, divisor):
    case = example(name)
    net = MarkovNet(case.model, case.inputs, groups=10, divisor=divisor)
    cost = dmcp.cost(net.graph)
    for seed in range(4):
        random_alpha(net, seed, mean=seed - 1.0)
        targets = Budget(macs=("30%", "50%", "70%", "90%")[seed]).of(net.graph)
        widths = expected_widths(net, targets)
        assert list(widths) == [unit.name for unit in net.graph.units]
        assert all(widths[unit.name] in unit.choices for unit in net.graph.units)
        (bound,) = targets.bounds
        assert 0.97 * bound <= cost.of(widths) <= bound
        assert expected_widths(net, targets) == widths


def test_expected_widths_meet_several_bounds(example):
    case = example("resnet18")
    net = MarkovNet(case.model, case.inputs, divisor=1)
    random_alpha(net, 0)
    targets = Budget(macs="50%", params="40%", memory="60%").of(net.graph)
    widths = expected_widths(net, targets)
    shares = [
        cost.of(widths) / bound for cost, bound in zip(targets.costs, targets.bounds, strict=True)
    ]
    assert 0.97 < max(shares) <= 1


def test_expected_widths_are_the_means_where_they_fit(net):
    """Chains that surely retain some groups, with the budget of that very structure."""
    structure = {}
    with torch.no_grad():
        for number, unit in enumerate(net.graph.searchable):
            structure[unit.name] = unit.choices[number + 1]
            retained = torch.tensor(unit.choices[1:]) <= structure[unit.name]
            net.chain(unit.name).alpha.copy_(torch.where(retained, 80.0, -80.0))
    targets = Budget(macs=dmcp.cost(net.graph).of(structure)).of(net.graph)
    assert expected_widths(net, targets) == {**net.graph.widths(), **structure}


def test_the_default_device_of_new_tensors_does_not_matter(net):
    targets = Budget(macs="60%").of(net.graph)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    drawn, expected = draw_widths(net, 20, generators[0]), expected_widths(net, targets)
    with torch.device("meta"):
        assert expected_widths(net, Budget(macs="60%").of(net.graph)) == expected
        assert torch.equal(draw_widths(net, 20, generators[1]).widths, drawn.widths)


def test_expected_widths_drop_the_least_retained_group_first(net):
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(80)
        net.chain("first.0").alpha[-1] = 2
    full = dmcp.cost(net.graph).of({})
    choices = next(unit.choices for unit in net.graph.units if unit.name == "first.0")
    expected = {**net.graph.widths(), "first.0": choices[-2]}
    assert expected_widths(net, Budget(macs=full - 1).of(net.graph)) == expected


def test_the_narrowest_budget_gives_the_narrowest_network(net):
    narrowest = {unit.name: unit.choices[0] for unit in net.graph.units}
    targets = Budget(macs=dmcp.cost(net.graph).of(narrowest)).of(net.graph)
    assert expected_widths(net, targets) == narrowest


def test_markov_samples_have_the_chains_distribution(net):
    count = 20_000
    drawn = draw_widths(net, count, torch.Generator().manual_seed(0))
    assert drawn.units == tuple(unit.name for unit in net.graph.units)
    assert drawn.widths.shape == (count, len(drawn.units))
    chi_square, cells = 0.0, 0
    for number, unit in enumerate(net.graph.units):
        if not unit.searchable:
            assert (drawn.widths[:, number] == unit.channels).all()
            continue
        p = net.chain(unit.name).transition().tolist()
        retain = 1.0
        for width, following in zip(unit.choices, [*p, 0.0], strict=True):
            expected = count * retain * (1 - following)
            observed = (drawn.widths[:, number] == width).sum().item()
            chi_square += (observed - expected) ** 2 / expected
            cells += 1
            retain *= following
    # Three standard deviations above the mean of chi-square with about that many degrees.
    assert chi_square < cells + 3 * (2 * cells) ** 0.5


def test_units_are_drawn_independently(net):
    widths = draw_widths(net, 20_000, torch.Generator().manual_seed(0)).widths[:, :3].double()
    correlation = torch.corrcoef(widths.T) - torch.eye(3)
    assert correlation.abs().max() < 4 / 20_000**0.5


def test_the_same_generator_draws_the_same_structures(net):
    first = draw_widths(net, 7, torch.Generator().manual_seed(3))
    second = draw_widths(net, 7, torch.Generator().manual_seed(3))
    assert torch.equal(first.widths, second.widths)
    assert len(first) == first.draws == 7
    assert first[2] == dict(zip(first.units, first.widths[2].tolist(), strict=True))
    assert all(first[2][unit.name] in unit.choices for unit in net.graph.units)


def test_rejection_keeps_structures_near_the_budget(net):
    targets = Budget(macs="50%").of(net.graph)
    found = sample_within(net, targets, 20, 0.05, torch.Generator().manual_seed(0))
    assert len(found) == 20
    assert found.draws > 20
    assert ((targets.largest_ratio(found.widths) - 1).abs() <= 0.05).all()


def test_rejection_with_several_bounds_follows_the_tightest(net):
    targets = Budget(macs="50%", params="45%").of(net.graph)
    found = sample_within(net, targets, 5, 0.1, torch.Generator().manual_seed(0))
    for number in range(len(found)):
        shares = [
            cost.of(found[number]) / bound
            for cost, bound in zip(targets.costs, targets.bounds, strict=True)
        ]
        assert 0.9 <= max(shares) <= 1.1


def test_rejection_is_bounded_and_says_what_it_found(net):
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(-80)
    targets = Budget(macs="50%").of(net.graph)
    narrowest = {unit.name: unit.choices[0] for unit in net.graph.units}
    ratio = dmcp.cost(net.graph).of(narrowest) / targets.bounds[0]
    message = (
        f"none of 5,000 sampled structures lies within 1.0% of the budget: the closest is "
        f"{1 - ratio:.1%} away and their mean is {ratio:.1%} of it"
    )
    with pytest.raises(SamplingError, match=message):
        sample_within(net, targets, 3, 0.01, max_draws=5000)


def test_rejection_returns_fewer_than_asked_when_draws_run_out(net):
    targets = Budget(macs="50%").of(net.graph)
    generator = torch.Generator().manual_seed(0)
    found = sample_within(net, targets, 10**6, 0.05, generator, max_draws=1000)
    assert 0 < len(found) < 1000
    assert found.draws == 1000
