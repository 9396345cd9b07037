"""Searches under a bound on latency, by a table that nobody measured."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dmcp
from dmcp.errors import BudgetError, CheckpointError, ConfigError
from dmcp.report import Chains
from dmcp.search import Budget, MarkovNet, Search, SearchOptions
from dmcp.search.bernoulli_net import BernoulliNet
from dmcp.train.optim import Schedule

ALL = {"macs": "60%", "params": "70%", "memory": "80%", "latency_ms": "75%"}


@pytest.fixture
def net(example):
    case = example("Residual")
    return MarkovNet(case.model, case.inputs, groups=4, divisor=1)


@pytest.fixture
def table(net, made_up_table):
    return made_up_table(net.graph)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (8,), generator=generator)


def run(net, budget, steps, **options):
    search = Search(net, budget, steps, SearchOptions(**options))
    while search.step_index < steps:
        metrics = search.step(*batch(search.step_index))
    return search, metrics


def test_a_bound_is_a_number_of_milliseconds_or_a_share(net, table, tmp_path):
    full = dmcp.cost(net.graph, "latency", table).of({})
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table.to_json()))
    for bound, expected in ((0.8 * full, 0.8 * full), ("80%", 0.8 * full), ("100%", full)):
        for given in (table, path, str(path)):
            targets = Budget(latency_ms=bound, latency_table=given).of(net.graph)
            assert targets.by_metric() == {"latency": pytest.approx(expected)}
    widest = torch.tensor([[unit.channels for unit in net.graph.units]])
    assert targets.met(widest).all()


def test_a_bound_that_cannot_be_is_refused(net, table, tmp_path):
    with pytest.raises(
        BudgetError, match=r"latency_ms=1000.0 is 1000, above the full network's \d"
    ):
        Budget(latency_ms=1000.0, latency_table=table).of(net.graph)
    with pytest.raises(BudgetError, match=r"latency_ms=0\.1 is 0\.1, below the narrowest"):
        Budget(latency_ms=0.1, latency_table=table).of(net.graph)
    with pytest.raises(BudgetError, match="budget latency_ms must be a number, or a string"):
        Budget(latency_ms="5 ms", latency_table=table)
    with pytest.raises(BudgetError, match="latency_ms must be positive and finite"):
        Budget(latency_ms="1e400", latency_table=table)
    with pytest.raises(ConfigError, match=r"there is no '.*none': measure one with `dmcp bench"):
        Budget(latency_ms=5, latency_table=tmp_path / "none")
    assert Budget(macs="50%", latency_table=tmp_path / "none")  # nobody asks for it


def test_only_a_bound_on_latency_shows_in_a_configuration(table):
    plain = {"macs": "50%", "params": None, "memory": None}
    assert Budget(macs="50%").to_json() == plain
    assert Budget(macs="50%", latency_table=table).to_json() == plain
    told = Budget(macs="50%", latency_ms=5, latency_table=table).to_json()
    assert told == {**plain, "latency_ms": 5, "latency_table": table.digest}


def test_expected_costs_come_in_the_order_of_the_costs(net, table):
    latency = dmcp.cost(net.graph, "latency", table)
    macs, params = dmcp.cost(net.graph), dmcp.cost(net.graph, "params")
    both = net.expected_cost(net.cost_table([macs, params]))
    alone = net.expected_cost(net.cost_table([latency]))
    all_of_them = net.expected_cost(net.cost_table([macs, latency, params]))
    for field in ("cost", "variance"):
        first, second = getattr(both, field)
        wanted = torch.stack([first, *getattr(alone, field), second])
        assert torch.equal(getattr(all_of_them, field), wanted)
    q = net.retain().double()
    choices = [unit.choices for unit in net.graph.units]
    assert torch.equal(alone.cost[0], latency.expectation(choices)(q)[0])


def test_structures_meet_all_bounds(net, table):
    search, metrics = run(net, Budget(**ALL, latency_table=table), steps=3, warmup=0.0)
    assert {f"expected_{metric}" for metric in search.targets.by_metric()} <= set(metrics)
    widths = search.expected_widths()
    for cost, bound in zip(search.targets.costs, search.targets.bounds, strict=True):
        assert cost.of(widths) <= bound
    samples = search.sample_widths(5, tolerance=0.2)
    assert (search.targets.largest_ratio(samples.widths) - 1).abs().max() <= 0.2


@pytest.mark.parametrize("others", [{}, {"macs": "90%"}])
def test_the_expected_latency_moves_to_the_bound(net, table, others):
    budget = Budget(**others, latency_ms="70%", latency_table=table)
    arch_lr = Schedule(peak=0.2, final=0.01)
    search, metrics = run(net, budget, 120, warmup=0.0, random_subnets=0, arch_lr=arch_lr)
    bounds = search.targets.by_metric()
    assert metrics["expected_latency"].item() == pytest.approx(bounds["latency"], rel=0.05)
    assert all(metrics[f"expected_{name}"].item() <= 1.01 * bounds[name] for name in bounds)


def test_the_file_of_a_search_tells_costs_without_the_network(net, table, tmp_path):
    search = Search(net, Budget(macs="60%", latency_ms="75%", latency_table=table), steps=1)
    (tmp_path / "search.json").write_text(json.dumps(search.describe()))
    chains = Chains.read(tmp_path / "search.json")
    samples = search.sample_widths(50).widths
    for cost in search.targets.costs:
        found = chains.costs[cost.metric].of(samples.numpy())
        assert found == pytest.approx(cost.of_many(samples).numpy())
    data = json.loads((tmp_path / "search.json").read_text())
    data["costs"]["latency"]["interpolation"]["weights"] = [[1.0]]
    (tmp_path / "search.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="does not hold the chains of a search"):
        Chains.read(tmp_path / "search.json")


def test_a_resumed_search_has_the_same_bits(example, made_up_table):
    def fresh():
        case = example("Residual")
        net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
        budget = Budget(latency_ms="60%", latency_table=made_up_table(net.graph))
        return Search(net, budget, 4, SearchOptions(warmup=0.0))

    straight, first, second = fresh(), fresh(), fresh()
    for step in range(4):
        straight.step(*batch(step))
    for step in range(2):
        first.step(*batch(step))
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.step(*batch(step))
    for wanted, got in zip(
        straight.net.state_dict().values(), second.net.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, got)


class Calls(TorchDispatchMode):
    """Notes all operators that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_latency_takes_a_few_operators_however_many_units(example, made_up_table):
    counts = []
    for name in ("Residual", "resnet18"):
        case = example(name)
        net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
        cost = dmcp.cost(net.graph, "latency", made_up_table(net.graph))
        plain, timed = net.cost_table([dmcp.cost(net.graph)]), net.cost_table([cost])
        seen = []
        for table in (plain, timed):
            with Calls() as calls, torch.no_grad():
                net.expected_cost(table)
            seen.append(calls.names)
        assert all("_local_scalar_dense" not in name for name in seen[1]), "it waits for the device"
        counts.append(len(seen[1]) - len(seen[0]))
        assert [each for each in seen[0] if each.startswith("dmcp")] == [
            "dmcp.expected_cost.default"
        ]
    assert counts[0] == counts[1] < 70


def test_gates_are_refused(example, made_up_table):
    case = example("Residual")
    net = BernoulliNet(case.model, case.inputs, groups=4, divisor=1)
    cost = dmcp.cost(net.graph, "latency", made_up_table(net.graph))
    with pytest.raises(ConfigError, match="a budget of latency needs Markov chains"):
        net.expected_cost(net.cost_table([cost]))


def test_a_graph_may_keep_its_own_choices(example):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
    assert MarkovNet(case.model, graph=graph, groups=None).graph.units == graph.units
