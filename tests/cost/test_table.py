import itertools
import json
import re
from dataclasses import replace

import pytest
import torch

import dmcp
from dmcp.cost import LatencyTable, TableAxis, TableCost, TableTerm
from dmcp.errors import ConfigError


def narrowed(graph, most=3):
    """The graph with few choices, so that all structures can be enumerated."""
    units = tuple(
        replace(unit, choices=(*unit.choices[:: max(1, len(unit.choices) // most)][:most],))
        if unit.searchable
        else unit
        for unit in graph.units
    )
    return replace(graph, units=units)


def some_q(units, seed=0):
    """Retain probabilities of chains, [T]."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.rand(len(u.choices) - 1, generator=generator).double() for u in units]
    return torch.cat([part.cumprod(0) for part in parts])


def enumerated(cost, q):
    """Mean and variance over all structures."""
    of_units = []
    for unit, part in zip(
        cost.units, q.split([len(u.choices) - 1 for u in cost.units]), strict=True
    ):
        reached = torch.cat([part.new_ones(1), part, part.new_zeros(1)])
        of_units.append(list(zip(unit.choices, reached[:-1] - reached[1:], strict=True)))
    structures = list(itertools.product(*of_units))
    widths = torch.tensor([[width for width, _ in each] for each in structures])
    chances = torch.stack([torch.stack([p for _, p in each]).prod() for each in structures])
    values = cost.function.of_many(widths)
    mean = (chances * values).sum()
    return mean, (chances * (values - mean) ** 2).sum()


def cost_of(graph, table):
    return dmcp.cost(graph, "latency", table)


@pytest.mark.parametrize("name", ["Residual", "Concat", "BothEnds", "Depthwise"])
def test_mean_and_variance_are_those_of_all_structures(traced, made_up_table, name):
    graph = narrowed(traced(name).graph)
    cost = cost_of(graph, made_up_table(graph))
    q = some_q(cost.units).requires_grad_()
    wanted, got = enumerated(cost, q), (cost.mean(q), cost.variance(q))
    for closed, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(closed, exact, rtol=1e-10, atol=0)
        (gradient,) = torch.autograd.grad(closed, q, retain_graph=True)
        (expected,) = torch.autograd.grad(exact, q, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_the_mean_over_a_concatenated_axis_is_that_of_all_structures(traced, made_up_table, parts):
    graph = narrowed(traced("Concat").graph)
    cost = cost_of(graph, made_up_table(graph, concatenated=min(parts, 3)))
    q = some_q(cost.units, seed=parts).requires_grad_()
    mean, variance = enumerated(cost, q)
    torch.testing.assert_close(cost.mean(q), mean, rtol=1e-10, atol=0)
    # What a concatenated axis adds beyond its linear part counts as uncorrelated with the rest.
    torch.testing.assert_close(cost.variance(q), variance, rtol=0.15, atol=0)
    (gradient,) = torch.autograd.grad(cost.mean(q), q)
    (expected,) = torch.autograd.grad(mean, q)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


def test_neither_the_mean_nor_its_gradient_waits_for_the_device(traced, made_up_table):
    graph = narrowed(traced("Concat").graph)
    cost = cost_of(graph, made_up_table(graph, concatenated=3))
    q = some_q(cost.units).requires_grad_()
    expectation = cost.expectation()
    with torch.profiler.profile() as profile:
        sum(expectation(q)).backward()
    assert "aten::_local_scalar_dense" not in {event.key for event in profile.key_averages()}


def test_the_variance_over_a_linear_concatenated_axis_is_exact(traced):
    graph = narrowed(traced("Concat").graph)
    names = [unit.name for unit in graph.searchable[:3]]
    whole = sum(graph.widths()[name] for name in names)
    axes = (
        TableAxis(dict.fromkeys(names, 1.0), (1.0, float(whole))),
        TableAxis({names[0]: 1.0}, (1.0, 3.0, 8.0)),
    )
    terms = [("cat", (0,), [1.0, 4.0]), ("one", (1,), [0.5, 0.6, 2.0])]
    table = table_of(graph, axes, terms)
    cost = cost_of(graph, table)
    q = some_q(cost.units)
    torch.testing.assert_close(cost.variance(q), enumerated(cost, q)[1], rtol=1e-10, atol=0)


def table_of(graph, axes, terms, **fields):
    return LatencyTable(
        setting={},
        units=graph.widths(),
        searchable=tuple(unit.name for unit in graph.searchable),
        macs=dmcp.cost(graph).of({}),
        operators=graph.operators,
        axes=tuple(axes),
        terms=tuple(TableTerm(name, (), where, ms, ms, ms) for name, where, ms in terms),
        **{"scale": 1.0, "offset": 0.0, **fields},
    )


def test_the_gradient_equals_finite_differences(traced, made_up_table):
    graph = narrowed(traced("Concat").graph)
    expectation = cost_of(graph, made_up_table(graph, concatenated=2)).expectation()
    q = some_q(graph.units).requires_grad_()
    assert torch.autograd.gradcheck(lambda q: expectation(q)[0], q)
    assert torch.autograd.gradcheck(lambda q: expectation(q)[1], q)


def test_certain_chains_have_the_cost_of_one_structure(traced, made_up_table):
    graph = traced("Concat").graph
    cost = cost_of(graph, made_up_table(graph, concatenated=3))
    ones = torch.ones(sum(len(u.choices) - 1 for u in graph.units), dtype=torch.float64)
    for q, place in ((ones, -1), (0 * ones, 0)):
        structure = {unit.name: unit.choices[place] for unit in graph.units}
        assert cost.mean(q).item() == pytest.approx(cost.of(structure), abs=1e-8)
        assert cost.variance(q).item() == pytest.approx(0, abs=1e-12)


def test_it_is_what_was_measured_linear_in_between_and_constant_beyond(traced):
    graph = traced("Residual").graph
    first, second = (unit.name for unit in graph.searchable[:2])
    axes = (TableAxis({first: 1.0}, (2.0, 4.0, 8.0)), TableAxis({second: 1.0}, (2.0, 6.0)))
    terms = [
        ("pair", (0, 1), [[1.0, 3.0], [2.0, 5.0], [4.0, 9.0]]),
        ("turned", (1, 0), [[0.0, 0.0, 0.0], [0.0, 0.0, 10.0]]),
        ("fixed", (), 0.25),
    ]
    cost = cost_of(graph, table_of(graph, axes, terms, scale=2.0, offset=1.0))
    for widths, sum_of_terms in (
        ((2, 2), 1.25),
        ((8, 6), 19.25),
        ((4, 6), 5.25),
        ((3, 4), (1 + 3 + 2 + 5) / 4 + 0.25),
        ((1, 1), 1.25),
        ((6, 4), (2 + 5 + 4 + 9) / 4 + 10 / 4 + 0.25),
    ):
        assert cost.of({first: widths[0], second: widths[1]}) == 2 * sum_of_terms + 1
    assert cost.of({}) == 2 * 19.25 + 1


def test_it_is_monotone_where_the_measurement_is(traced, made_up_table, random_widths):
    graph = traced("Concat").graph
    cost = cost_of(graph, made_up_table(graph, concatenated=3))
    for seed in range(5):
        widths = random_widths(graph, seed)
        for unit in graph.searchable:
            values = [cost.of({**widths, unit.name: width}) for width in unit.choices]
            assert values == sorted(values)


def test_many_structures_cost_what_each_does(traced, made_up_table, random_widths):
    graph = traced("Residual").graph
    cost = cost_of(graph, made_up_table(graph))
    structures = [random_widths(graph, seed) for seed in range(7)]
    many = cost.of_many(torch.tensor([[*widths.values()] for widths in structures]))
    assert many.dtype == torch.float64
    assert many.tolist() == [cost.of(widths) for widths in structures]
    with pytest.raises(ConfigError, match="widths must be int64"):
        cost.of_many(torch.zeros(2, 1))
    assert repr(cost).startswith("TableCost('latency', 4 units, full ")


def test_a_table_survives_its_file(traced, made_up_table, tmp_path):
    graph = traced("Concat").graph
    table = made_up_table(graph, concatenated=2)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table.to_json()))
    again = LatencyTable.read(path)
    assert again.digest == table.digest
    assert cost_of(graph, path).of({}) == cost_of(graph, table).of({})
    assert replace(table, offset=0.6).digest != table.digest


NO_SHAPES = (5, "2x3x4x4", [], [2, "3"], [2, True], [2.0, 3], {"2": 3}, 0)


@pytest.mark.parametrize("shape", NO_SHAPES)
def test_an_input_that_is_no_shape_is_named(traced, made_up_table, shape):
    data = {**made_up_table(traced("Residual").graph).to_json(), "setting": {"input": shape}}
    message = f"setting['input'] must be the shape of a batch, got {shape!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        LatencyTable.from_json(data)


def test_what_is_no_table_is_refused(traced, made_up_table, tmp_path):
    graph = traced("Residual").graph
    with pytest.raises(ConfigError, match=r"no '.*none.json': measure one with `dmcp bench latenc"):
        dmcp.cost(graph, "latency", tmp_path / "none.json")
    data = made_up_table(graph).to_json()
    path = tmp_path / "broken.json"
    for broken in (
        "{",
        "[]",
        json.dumps({**data, "format": 2}),
        json.dumps({**data, "setting": 3}),
        *(json.dumps({**data, "setting": {"input": shape}}) for shape in NO_SHAPES),
        json.dumps({**data, "terms": [{**data["terms"][1], "ms": [1.0]}]}),
        json.dumps({**data, "axes": data["axes"][:1]}),
        json.dumps({**data, "axes": [], "terms": []}),
        json.dumps(
            {**data, "axes": [{"weights": {}, "nodes": [2.0, 1.0, 1.0]}, *data["axes"][1:]]}
        ),
    ):
        path.write_text(broken)
        with pytest.raises(ConfigError, match="is not a table of `dmcp bench latency` of format 1"):
            dmcp.cost(graph, "latency", path)


def test_the_table_of_another_network_is_refused(traced, made_up_table):
    graph = traced("Residual").graph
    table = made_up_table(graph)
    with pytest.raises(ConfigError, match="of another network or image size: it has 4 units and"):
        dmcp.cost(traced("Concat").graph, "latency", table)
    with pytest.raises(ConfigError, match="of another network or image size"):
        dmcp.cost(graph, "latency", replace(table, macs=table.macs + 1))
    operators = ["aten.softplus.default" if "relu" in o else o for o in table.operators]
    with pytest.raises(
        ConfigError, match=r"where it has aten\.softplus\.default, this network has"
    ):
        dmcp.cost(graph, "latency", replace(table, operators=tuple(operators)))
    with pytest.raises(ConfigError, match="another network: where it has None, this network has"):
        dmcp.cost(graph, "latency", replace(table, operators=table.operators[:-1]))
    with pytest.raises(ConfigError, match=r"holds one width of 'stem\.0' only"):
        dmcp.cost(graph, "latency", replace(table, searchable=table.searchable[1:]))
    for shape in ([2, 3, 7, 8], [2, 1, 8, 8], [2, 3]):
        other = replace(table, setting={**table.setting, "input": shape})
        with pytest.raises(
            ConfigError, match=rf"is of images {re.escape(str(shape[1:]))}, .* \[3, 8, 8\]"
        ):
            dmcp.cost(graph, "latency", other)
    served = replace(table, setting={**table.setting, "input": [32, 3, 8, 8]})
    assert dmcp.cost(graph, "latency", served).of({}) == dmcp.cost(graph, "latency", table).of({})
    with pytest.raises(ConfigError, match=r"metric must be one of .*'latency'.*, got 'ms'"):
        dmcp.cost(graph, "ms")


@pytest.mark.parametrize("measured", ["plain", "compiled"])
def test_a_compiled_model_is_the_same_network(traced, made_up_table, measured):
    case = traced("Residual")
    compiled = dmcp.trace(torch.compile(case.model, backend="eager"), case.inputs)
    graphs = [case.graph, compiled]
    table = made_up_table(graphs.pop(measured == "compiled"))
    assert cost_of(*graphs, table).of({}) == cost_of(case.graph, table).of({})


def test_a_unit_may_become_unsearchable(traced, made_up_table):
    graph = traced("Residual").graph
    first, *others = graph.units
    held = replace(first, choices=(first.channels,), searchable=False, reason="so")
    cost = cost_of(replace(graph, units=(held, *others)), made_up_table(graph, concatenated=2))
    assert isinstance(cost, TableCost)
    q = some_q(cost.units)
    torch.testing.assert_close(cost.mean(q), enumerated(cost, q)[0], rtol=1e-10, atol=0)
