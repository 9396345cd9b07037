import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dmcp
from dmcp.cost import Cost
from dmcp.errors import ConfigError


def counted_macs(model, inputs):
    """MACs per image of convolutions and linear layers, counted by PyTorch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    macs, rest = divmod(counter.get_total_flops(), 2 * len(inputs[0]))
    assert rest == 0
    return macs


def counted_memory(model, inputs):
    """Numbers per image that convolutions and linear layers write, counted by hooks."""
    total = 0

    def count(module, arguments, output):
        nonlocal total
        total += output[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(*inputs)
    return total


def assert_costs_are_counted(case, random_widths, seeds):
    graph = dmcp.trace(case.model.eval(), case.inputs)
    for seed in seeds:
        widths = random_widths(graph, seed)
        model = dmcp.extract(graph, widths)
        params = sum(parameter.numel() for parameter in model.parameters())
        assert dmcp.cost(graph, "params").of(widths) == params
        assert dmcp.cost(graph, "macs").of(widths) == counted_macs(model, case.inputs)
        assert dmcp.cost(graph, "memory").of(widths) == counted_memory(model, case.inputs)


def test_costs_of_small_networks_equal_independent_counts(small, random_widths):
    assert_costs_are_counted(small, random_widths, range(3))


def test_costs_of_the_papers_networks_equal_independent_counts(large, random_widths):
    assert_costs_are_counted(large, random_widths, range(2))


def test_the_full_mobilenet_has_its_published_macs():
    graph = dmcp.trace(dmcp.models.mobilenet_v2(), torch.zeros(1, 3, 224, 224))
    assert dmcp.cost(graph).of({}) == 300_774_272
    assert dmcp.cost(graph, "params").of({}) == 3_504_872


def test_costs_are_exact_where_float32_and_int32_are_not(example):
    graph = dmcp.trace(*vars(example("BothEnds")).values())
    unit = graph.units[0]
    big = Cost(
        "macs",
        graph.units,
        7,
        torch.tensor([10**12, 0]),
        torch.tensor([[3 * 10**14 + 1, 0], [0, 0]]),
    )
    assert big.of({unit.name: 7}) == 7 + 7 * 10**12 + 49 * (3 * 10**14 + 1)


def test_many_structures_at_once(example, random_widths):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
    cost = dmcp.cost(graph)
    structures = [random_widths(graph, seed) for seed in range(5)]
    widths = torch.tensor([list(structure.values()) for structure in structures])
    assert cost.of_many(widths).tolist() == [cost.of(structure) for structure in structures]


def test_bad_arguments_are_named(example):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
    with pytest.raises(ConfigError, match=r"metric must be one of .*'macs'.* got 'flops'"):
        dmcp.cost(graph, "flops")
    with pytest.raises(ConfigError, match="nowhere"):
        dmcp.cost(graph).of({"nowhere": 1})
    with pytest.raises(ConfigError, match=r"int64 \[n, 4\], got torch.float32 \[1, 4\]"):
        dmcp.cost(graph).of_many(torch.ones(1, 4))
    with pytest.raises(ConfigError, match=r"int64 \[n, 4\], got torch.int64 \[1, 3\]"):
        dmcp.cost(graph).of_many(torch.ones(1, 3, dtype=torch.int64))


def test_cost_grows_with_every_width(example):
    case = example("CalledTwice")
    graph = dmcp.trace(case.model, case.inputs)
    for metric, unit in itertools.product(("macs", "params", "memory"), graph.searchable):
        costs = [dmcp.cost(graph, metric).of({unit.name: width}) for width in unit.choices]
        assert costs == sorted(set(costs))
