import operator
from itertools import pairwise

import pytest
import torch
from torch import fx, nn

import dmcp
from dmcp.errors import ConfigError
from dmcp.graph.capture import capture
from dmcp.latency import segments as cutting
from dmcp.latency.segments import Piece, name_of, operators_of, segments


def cut(graph, inputs):
    program = capture(graph.model, inputs, {}, training=False)
    nodes = list(program.graph.nodes)
    return program, [
        (part, [nodes[call] for call in part.calls]) for part in segments(graph, program)
    ]


class Values(fx.Interpreter):
    """Remembers what every node gives."""

    def __init__(self, module):
        super().__init__(module)
        self.of = {}

    def run_node(self, node):
        self.of[node.name] = result = super().run_node(node)
        return result.clone() if isinstance(result, torch.Tensor) else result


def test_the_pieces_together_are_the_network(traced_network):
    graph, inputs = traced_network.graph, traced_network.inputs
    program, parts = cut(graph, inputs)
    calls = [node.name for _, nodes in parts for node in nodes]
    assert sorted(calls) == sorted(n.name for n in program.graph.nodes if n.op == "call_function")
    held = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    given = iter(inputs)
    values = Values(program.graph_module)
    with torch.no_grad():
        values.run(*(held[s.target] if s.target in held else next(given) for s in specs))
        for _, nodes in parts:
            piece = Piece(program, nodes)
            outside = dict.fromkeys(
                source for node in nodes for source in node.all_input_nodes if source not in nodes
            )
            tensors = [
                values.of[s.name] for s in outside if s.op != "placeholder" or is_input(s, specs)
            ]
            assert [t.shape for t in tensors] == [t.shape for t in piece.inputs]
            last = [node for node in nodes if any(user not in nodes for user in node.users)]
            for got, node in zip(piece.body(*tensors), last, strict=True):
                torch.testing.assert_close(got, values.of[node.name])


def is_input(node, specs):
    places = [each for each in node.graph.nodes if each.op == "placeholder"]
    return specs[places.index(node)].target is None


def test_a_segment_is_a_layer_and_what_follows_it(traced):
    case = traced("Residual")
    _, parts = cut(case.graph, case.inputs)
    assert [(name_of(nodes), operators_of(nodes)) for _, nodes in parts] == [
        ("stem.0", ("conv2d", "batch_norm", "relu")),
        ("first.0", ("conv2d", "batch_norm", "relu")),
        ("second.0", ("conv2d", "batch_norm", "add", "relu")),
        ("down.0", ("conv2d", "batch_norm")),
        ("skip.0", ("conv2d", "batch_norm", "add", "relu", "adaptive_avg_pool2d", "flatten")),
        ("head.2", ("linear",)),
    ]
    units = [unit.name for unit in case.graph.units]
    axes = [[[units[u] for u, _ in axis] for axis in part.axes] for part, _ in parts]
    stem, first, down = [["stem.0"]], ["first.0"], ["down.0"]
    assert axes == [stem, [*stem, first], [*stem, first], [*stem, down], [*stem, down], [down]]


def test_a_concatenation_has_an_axis_of_several_units(traced):
    case = traced("Concat")
    _, parts = cut(case.graph, case.inputs)
    for part, nodes in parts:
        units = [u for axis in part.axes for u, _ in axis]
        assert len(units) == len(set(units)), "the axes of a segment are independent"
        assert len(part.axes) <= 2
        if "cat" in operators_of(nodes):
            assert [len(axis) for axis in part.axes] == [3]
        if name_of(nodes) == "last.0":
            assert sorted(len(axis) for axis in part.axes) == [1, 3]


class Blocks(nn.Sequential):
    def __init__(self, *widths):
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        super().__init__(*layers)


def test_equal_segments_have_equal_signatures():
    graph = dmcp.trace(Blocks(3, 8, 8, 8, 6), torch.zeros(1, 3, 8, 8))
    program, parts = cut(graph, (torch.zeros(1, 3, 8, 8),))
    first, second, third, last = (Piece(program, nodes).signature for _, nodes in parts)
    assert second == third
    assert len({first, second, last}) == 3


def test_what_depends_on_too_many_widths_is_refused(traced, monkeypatch):
    monkeypatch.setattr(cutting, "_MOST_AXES", 1)
    case = traced("Residual")
    with pytest.raises(ConfigError, match=r"conv2d of first\.0 depends on 2 widths"):
        cut(case.graph, case.inputs)


def test_expanded_tensors_pass_between_segments():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.last(self.stem(x.mean((2, 3), keepdim=True)).expand(-1, -1, 4, 4))

    graph = dmcp.trace(Gated(), torch.zeros(1, 3, 4, 4))
    program, parts = cut(graph, (torch.zeros(1, 3, 4, 4),))
    (given,) = Piece(program, parts[-1][1]).inputs
    assert (given.shape, given.stride()) == ((1, 8, 4, 4), (8, 1, 0, 0))
    assert given.std() > 0


def test_parts_of_a_split_stay_with_it():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            left, right = self.stem(x).chunk(2, dim=1)
            return self.last(torch.relu(left) * right)

    graph = dmcp.trace(Halves(), torch.zeros(1, 3, 4, 4))
    _, parts = cut(graph, (torch.zeros(1, 3, 4, 4),))
    for _, nodes in parts:
        for node in nodes:
            assert node.target is not operator.getitem or node.args[0] in nodes
