import itertools

import pytest
import torch
import torch.nn.functional as F
from handmade import ZOO
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dmcp
from dmcp.cost import PolynomialCost, measured_macs
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
    graph = case.graph
    graph.model.eval()
    for seed in seeds:
        widths = random_widths(graph, seed)
        model = dmcp.extract(graph, widths)
        params = sum(parameter.numel() for parameter in model.parameters())
        assert dmcp.cost(graph, "params").of(widths) == params
        assert dmcp.cost(graph, "macs").of(widths) == counted_macs(model, case.inputs)
        assert dmcp.cost(graph, "memory").of(widths) == counted_memory(model, case.inputs)


def test_costs_of_example_networks_equal_independent_counts(traced_network, random_widths):
    assert_costs_are_counted(traced_network, random_widths, range(3))


def test_costs_of_bottlenecks_equal_independent_counts(traced, random_widths):
    assert_costs_are_counted(traced("resnet50"), random_widths, range(2))


# With steps, matrix products, recurrent layers, transposed convolutions and shared weights.
OTHERS = [
    "BilinearPooling",
    "EinsumChannels",
    "FusedAttention",
    "GRUHead",
    "Grouped",
    "GroupedResidual",
    "LSTMHead",
    "MultiheadAttention",
    "NonLocal",
    "OneDimension",
    "ShuffleNetUnit",
    "ThreeDimensions",
    "TiedAutoencoder",
    "TiedParameter",
    "TransposedGrouped",
    "VisionTransformer",
]


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export of recurrent layers
@pytest.mark.parametrize("name", OTHERS)
def test_costs_of_other_layers_equal_what_is_measured(name, random_widths):
    network = ZOO[name]()
    graph = dmcp.trace(network.model, network.inputs)
    macs, params = dmcp.cost(graph), dmcp.cost(graph, "params")
    for seed in range(2):
        widths = random_widths(graph, seed)
        small = dmcp.extract(graph, widths)
        assert macs.of(widths) == measured_macs(small, *network.inputs)
        assert params.of(widths) == sum(parameter.numel() for parameter in small.parameters())


class Two(nn.Module):
    """Two convolutions that share a weight, and a matrix product of activations."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(8, 6, 1, bias=False), nn.Conv2d(8, 6, 1, bias=False)
        self.right.weight = self.left.weight
        self.head = nn.Linear(36, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        product = self.left(x).flatten(2) @ self.right(x).flatten(2).mT
        return self.head(product.flatten(1))


def test_costs_by_hand():
    graph = dmcp.trace(Two(), torch.zeros(2, 3, 4, 4))
    stem = graph.units[0].name
    assert [unit.name for unit in graph.searchable] == [stem]
    macs = {c: 16 * (3 * c + 2 * 6 * c + 6 * 6) + 36 * 2 for c in (8, 5)}
    params = {c: 4 * c + 6 * c + 74 for c in (8, 5)}
    memory = {c: 16 * (c + 2 * 6) + 36 + 2 for c in (8, 5)}
    for c in (8, 5):
        assert dmcp.cost(graph, "macs").of({stem: c}) == macs[c]
        assert dmcp.cost(graph, "params").of({stem: c}) == params[c]
        assert dmcp.cost(graph, "memory").of({stem: c}) == memory[c]


def test_measured_macs_are_those_of_one_image():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)).train()
    before = model[1].running_mean.clone()
    for images in (1, 3):
        assert measured_macs(model, torch.zeros(images, 3, 8, 8)) == 36 * 3 * 4 * 9
    assert model.training
    assert torch.equal(model[1].running_mean, before)


def test_costs_do_not_depend_on_the_batch():
    for name in ("Grouped", "FusedAttention"):
        network = ZOO[name]()
        costs = []
        for repeats in (1, 3):
            inputs = tuple(x.repeat(repeats, *[1] * (x.ndim - 1)) for x in network.inputs)
            graph = dmcp.trace(network.model, inputs)
            costs.append([dmcp.cost(graph, metric).of({}) for metric in ("macs", "memory")])
        assert costs[0] == costs[1]


def test_the_full_mobilenet_has_its_published_macs():
    graph = dmcp.trace(dmcp.models.mobilenet_v2(), torch.zeros(1, 3, 224, 224))
    assert dmcp.cost(graph).of({}) == 300_774_272
    assert dmcp.cost(graph, "params").of({}) == 3_504_872


def test_costs_are_exact_where_float32_and_int32_are_not(traced):
    graph = traced("BothEnds").graph
    unit = graph.units[0]
    big = PolynomialCost(
        "macs",
        graph.units,
        7,
        torch.tensor([10**12, 0]),
        torch.tensor([[3 * 10**14 + 1, 0], [0, 0]]),
    )
    assert big.of({unit.name: 7}) == 7 + 7 * 10**12 + 49 * (3 * 10**14 + 1)


def test_many_structures_at_once(traced, random_widths):
    graph = traced("Residual").graph
    cost = dmcp.cost(graph)
    structures = [random_widths(graph, seed) for seed in range(5)]
    widths = torch.tensor([list(structure.values()) for structure in structures])
    assert cost.of_many(widths).tolist() == [cost.of(structure) for structure in structures]


def test_bad_arguments_are_named(traced):
    graph = traced("Residual").graph
    with pytest.raises(ConfigError, match=r"metric must be one of .*'macs'.* got 'flops'"):
        dmcp.cost(graph, "flops")
    with pytest.raises(ConfigError, match="nowhere"):
        dmcp.cost(graph).of({"nowhere": 1})
    with pytest.raises(ConfigError, match=r"int64 \[n, 4\], got torch.float32 \[1, 4\]"):
        dmcp.cost(graph).of_many(torch.ones(1, 4))
    with pytest.raises(ConfigError, match=r"int64 \[n, 4\], got torch.int64 \[1, 3\]"):
        dmcp.cost(graph).of_many(torch.ones(1, 3, dtype=torch.int64))


def test_cost_grows_with_every_width(traced):
    graph = traced("CalledTwice").graph
    for metric, unit in itertools.product(("macs", "params", "memory"), graph.searchable):
        costs = [dmcp.cost(graph, metric).of({unit.name: width}) for width in unit.choices]
        assert costs == sorted(set(costs))
