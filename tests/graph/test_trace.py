import copy
import re

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise, same, zeroed
from torch import nn
from torch.nn.utils import parametrizations

import dmcp
from dmcp.cost import measured_macs
from dmcp.errors import ConfigError, TraceError
from dmcp.graph import check_widths

IMAGES = torch.zeros(2, 3, 8, 8)


def units(model, inputs=IMAGES):
    return named(dmcp.trace(model, inputs))


def named(graph):
    return {unit.name: unit for unit in graph.units}


def members(unit, role):
    return {member.module for member in unit.members if member.role == role}


class Calls(nn.Module):
    """A convolution to 8 channels, ``function(module, x)`` and another convolution."""

    def __init__(self, function, **modules):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.last(self.function(self, self.first(x)))


def test_a_residual_stream_is_one_unit(traced):
    found = named(traced("Residual").graph)
    assert list(found) == ["stem.0", "first.0", "down.0", "head.2"]
    assert [unit.channels for unit in found.values()] == [8, 6, 12, 5]
    stream = found["stem.0"]
    assert members(stream, "out") == {"stem.0", "stem.1", "second.0", "second.1"}
    assert members(stream, "in") == {"first.0", "down.0", "skip.0"}
    assert stream.choices == tuple(range(1, 9))
    assert stream.searchable
    assert not stream.reason
    assert members(found["down.0"], "out") == {"down.0", "down.1", "skip.0", "skip.1"}


def test_the_outputs_of_the_model_are_not_searchable(traced):
    found = named(traced("SeveralInputs").graph)
    assert members(found["left.0"], "out") == {"left.0", "left.1", "right.0", "right.1"}
    for name in ("last.0", "head.2"):
        assert not found[name].searchable
        assert found[name].reason == "its channels are the model's outputs"
        assert found[name].choices == (found[name].channels,)
    assert found["middle.0"].searchable


def test_channels_tied_to_the_inputs_are_not_searchable():
    model = Calls(F.relu)
    model.tied = nn.Conv2d(3, 3, 1)
    model.forward = lambda x: model.last(model.first(x + model.tied(x)))
    unit = units(model)["tied"]
    assert not unit.searchable
    assert unit.reason.startswith("its channels meet a dimension whose size stays (the model")


def test_channels_tied_to_the_inputs_in_part_are_split_off():
    model = Calls(F.relu, wide=nn.Conv2d(3, 11, 1))
    model.last = nn.Conv2d(11, 2, 1)
    model.forward = lambda x: model.last(torch.cat([x, model.first(x)], 1) + model.wide(x))
    found = units(model)
    assert {name: (unit.channels, unit.searchable) for name, unit in found.items()} == {
        "first": (8, True),
        "wide": (3, False),
        "last": (2, False),
    }
    wide = next(m for m in found["first"].members if m.module == "wide")
    assert wide.channels.tolist() == list(range(3, 11))
    small = dmcp.extract(dmcp.trace(model, IMAGES), {"first": 2})
    assert small.wide.out_channels == 5


def test_a_depthwise_convolution_follows_its_producer(traced):
    found = named(traced("Depthwise").graph)
    assert list(found) == ["0.0", "4.0", "5.2"]
    assert members(found["0.0"], "out") == {"0.0", "0.1", "2.0", "2.1"}
    assert members(found["0.0"], "in") == {"4.0"}


def test_a_depthwise_multiplier_gives_several_channels_each(traced):
    unit = named(traced("DepthwiseMultiplier").graph)["0.0"]
    channels = {member.module: member.channels.tolist() for member in unit.members}
    thirds = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    assert channels["0.0"] == list(range(6))
    assert channels["2.0"] == channels["2.1"] == channels["4.0"] == thirds


def test_a_concatenation_places_units_side_by_side(traced):
    found = named(traced("Concat").graph)
    places = {
        name: next(m.channels for m in unit.members if m.module == "last.0" and m.role == "in")
        for name, unit in found.items()
        if name in ("right.0", "stem.0", "left.0")
    }
    assert {name: place.tolist() for name, place in places.items()} == {
        "right.0": list(range(4)),
        "stem.0": list(range(4, 12)),
        "left.0": list(range(12, 18)),
    }


def test_sums_of_shifted_concatenations_tie_channels_of_one_convolution(traced):
    unit = named(traced("Interleaved").graph)["left.0"]
    channels = {(m.module, m.role): m.channels.tolist() for m in unit.members}
    assert (unit.channels, unit.step, unit.choices) == (8, 2, (2, 4, 6, 8))
    assert channels["left.0", "out"] == [[i, i + 4] for i in range(4)]
    assert channels["right.0", "out"] == list(range(4))
    assert channels["last.0", "in"] == [[i, i + 4, i + 8] for i in range(4)]


def test_a_flatten_gives_several_features_each(traced):
    unit = named(traced("FlattenedMap").graph)["0.0"]
    features = next(m.channels for m in unit.members if m.module == "4")
    assert features.tolist() == [list(range(4 * i, 4 * i + 4)) for i in range(6)]


def test_a_unit_may_stand_at_both_ends_of_a_layer(traced):
    found = named(traced("BothEnds").graph)
    assert list(found) == ["stem.0", "head.2"]
    assert "conv.0" in members(found["stem.0"], "in") & members(found["stem.0"], "out")


def test_a_module_that_is_called_twice_ties_its_inputs(traced):
    graph = traced("CalledTwice").graph
    assert [unit.name for unit in graph.units] == ["stem.0", "last.0", "head.2"]
    assert [layer.module for layer in graph.layers].count("block.0") == 2


@pytest.mark.parametrize(
    ("name", "units", "searchable"),
    [("mobilenet_v2", 26, 25), ("resnet18", 13, 12), ("resnet50", 38, 37)],
)
def test_the_papers_networks_have_the_papers_units(traced, name, units, searchable):
    graph = traced(name).graph
    assert (len(graph.units), len(graph.searchable)) == (units, searchable)
    assert graph.widths() == {unit.name: unit.channels for unit in graph.units}


def test_the_first_stage_of_resnet18_belongs_to_the_stem(traced):
    found = named(traced("resnet18").graph)
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2"} <= members(found["conv1"], "out")


def test_tracing_leaves_the_model_alone(network):
    network.model.train()
    frozen = next(module for module in network.model.modules() if not list(module.children()))
    frozen.eval()
    modes = [module.training for module in network.model.modules()]
    before = copy.deepcopy(network.model.state_dict())
    dmcp.trace(network.model, network.inputs)
    assert [module.training for module in network.model.modules()] == modes
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[name])


# What is not understood stays, with the reason and where; nothing is refused.

MEETS = r"its channels meet a dimension whose size stays"


@pytest.mark.parametrize(
    ("function", "modules", "reason"),
    [
        (
            lambda m, x: m.gate(x),
            {"gate": nn.Sigmoid()},
            r"would still count: sigmoid of zero need not be zero \(gate, Sigmoid, test_trace",
        ),
        (
            lambda m, x: torch.sigmoid(x),
            {},
            r"sigmoid of zero need not be zero \(the model itself, Calls, test_trace\.py:\d+\)",
        ),
        (
            lambda m, x: m.clip(x),
            {"clip": nn.Hardtanh(1, 2)},
            r"hardtanh of zero need not be zero \(clip, Hardtanh",
        ),
        (lambda m, x: x + 1, {}, r"add of zero need not be zero"),
        (lambda m, x: x - x.mean(1, keepdim=True), {}, "mean runs over its channels"),
        (lambda m, x: x + x.transpose(1, 2), {}, MEETS),
        (lambda m, x: x.flip(1).cumsum(1), {}, "cumsum runs over its channels"),
        (lambda m, x: F.layer_norm(x, x.shape[1:]), {}, "a layer norm runs over its channels"),
        (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(1, 8)}, "a group norm runs over all of"),
        (
            lambda m, x: F.group_norm(x, 2),
            {},
            r"the number of norm groups is written into the code \(the model itself",
        ),
        (
            lambda m, x: torch.linalg.inv(x),
            {},
            r"the operator linalg_inv\.default is not understood \(the model itself, Calls, test",
        ),
    ],
)
def test_what_is_not_exact_is_left_alone_with_the_reason(function, modules, reason):
    first = units(Calls(function, **modules))["first"]
    assert not first.searchable
    assert first.choices == (8,)
    assert re.search(reason, first.reason), first.reason


@pytest.mark.parametrize(
    ("function", "modules", "steps"),
    [
        (lambda m, x: m.grouped(x), {"grouped": nn.Conv2d(8, 8, 3, groups=2)}, {"grouped": 2}),
        (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 8)}, {"first": 4}),
        (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(8, 8)}, {"first": 1}),
        (
            lambda m, x: m.norm(x),
            {"norm": nn.BatchNorm2d(8, track_running_stats=False)},
            {"first": 1},
        ),
        (lambda m, x: m.norm(x), {"norm": nn.BatchNorm2d(8, affine=False)}, {"first": 1}),
        (lambda m, x: m.b(F.conv2d(x, m.b.weight * 2)), {"b": nn.Conv2d(8, 8, 1)}, {"first": 1}),
        (lambda m, x: m.b(F.conv2d(x, m.b.weight)), {"b": nn.Conv2d(8, 8, 1)}, {"first": 1}),
        (lambda m, x: x, {"lost": nn.Linear(2, 2)}, {"first": 1}),
        (lambda m, x: torch.cat([x, x], 0), {}, {"first": 1}),
        (lambda m, x: torch.cat([x[:, 4:], x[:, :4]], 1), {}, {"first#1": 1}),
        (lambda m, x: F.channel_shuffle(x, 2), {}, {"first": 2}),
        (lambda m, x: m.last.weight.new_ones(()) * x, {}, {"first": 1}),
        (lambda m, x: x.flatten(0, 1).mean((1, 2)).view(2, 8, 1, 1), {}, {}),
    ],
)
def test_what_was_awkward_is_exact(function, modules, steps):
    """These units are searchable, with these steps, and dropping some channels equals zeroing."""
    model = randomise(Calls(function, **modules), seed=1)
    graph = dmcp.trace(model, IMAGES)
    found = named(graph)
    assert {name: found[name].step for name in steps} == steps
    assert set(steps) <= {unit.name for unit in graph.searchable}
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = {unit.name: range(unit.step, unit.channels) for unit in graph.searchable}
    small = dmcp.extract(graph, kept=kept)
    dropped = {unit.name: range(unit.step) for unit in graph.searchable}
    assert same(small, zeroed(graph, dropped), [images]) < 1e-12


def test_the_reason_names_the_innermost_module_and_the_line():
    class Gate(nn.Module):
        def forward(self, x):
            return x.softmax(1)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Gate()), nn.Conv2d(8, 2, 1))
    line = Gate.forward.__code__.co_firstlineno + 1
    reason = units(model)["0"].reason
    assert reason == f"softmax runs over its channels (1.0, Gate, test_trace.py:{line})"


def test_channels_that_could_only_go_together_stay():
    model = Calls(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8))
    model.first, model.last = nn.Conv2d(3, 1, 1), nn.Conv2d(8, 2, 1)
    model.function = lambda m, x: x.expand(-1, 8, -1, -1)
    assert [unit.name for unit in dmcp.trace(model, IMAGES).units] == ["last"]
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)
    )
    first = units(pooled)["0"]
    assert (first.channels, first.choices) == (4, (4,))
    assert not first.searchable


# Control flow


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


def test_control_flow_that_depends_on_values_is_refused_by_its_line():
    model = Branching().train()
    line = Branching.forward.__code__.co_firstlineno + 1
    message = (
        rf"Branching cannot be captured by torch\.export: .*test_trace\.py:{line}: "
        r"if x\.sum\(\) > 0:"
    )
    with pytest.raises(TraceError, match=message):
        dmcp.trace(model, IMAGES)
    assert model.training


def test_control_flow_that_depends_on_sizes_is_followed():
    def once_per_row(m, x):
        for _ in range(x.shape[2] // 4):
            x = F.relu(x)
        return x if x.shape[3] == 8 else None

    assert units(Calls(once_per_row))["first"].searchable


def test_training_that_cannot_be_captured_is_left_out():
    """A part that runs in training only, if a value is positive."""

    def function(m, x):
        if m.training and x.sum() > 0:
            x = m.extra(x)
        return x

    model = Calls(function, extra=nn.Conv2d(8, 8, 1)).train()
    graph = dmcp.trace(model, IMAGES)
    assert model.training
    assert [layer.module for layer in graph.layers] == ["first", "last"]


# Parameters


def test_a_parametrised_weight_is_followed():
    model = Calls(lambda m, x: F.relu(x))
    parametrizations.weight_norm(model.first)
    graph = dmcp.trace(model, IMAGES)
    (unit,) = graph.searchable
    assert members(unit, "out") >= {"first"}
    assert {m.module for m in unit.members} >= {"first.parametrizations.weight", "last"}
    small = dmcp.extract(graph, {unit.name: 3})
    assert small.first.weight.shape == (3, 3, 3, 3)
    assert torch.allclose(small.first.weight, model.first.weight[:3])
    assert list(small.state_dict()) == list(model.state_dict())


def test_a_norm_under_two_names_is_cut_once():
    norm = nn.BatchNorm2d(8, affine=False)
    model = Calls(lambda m, x: m.b(F.relu(m.a(x))), a=norm, b=norm)
    small = dmcp.extract(dmcp.trace(model, IMAGES), {"first": 3})
    assert small.a is small.b
    assert small.a.num_features == 3
    assert small(IMAGES).shape == (2, 4, 8, 8)


def test_a_tied_parameter_ties_what_it_makes():
    model = Calls(
        lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
        **{name: nn.Conv2d(8, 8, 1) for name in "abc"},
    )
    model.b.weight = model.a.weight
    graph = dmcp.trace(model, IMAGES)
    found = named(graph)
    assert list(found) == ["first", "c", "last"]
    assert {"first", "a", "b"} <= members(found["first"], "out")
    assert set(graph.tensors) == {name for name, _ in model.named_parameters()}
    small = dmcp.extract(graph, {"first": 5})
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (5, 5, 1, 1)


def test_a_tied_parameter_between_inputs_and_outputs_stays():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    (unit,) = dmcp.trace(model, IMAGES).units
    assert unit.reason == f"{MEETS} (0, Conv2d)"


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.extra = nn.Conv2d(8, 6, 1)
        self.auxiliary = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.training:
            return self.head(x), self.auxiliary(F.relu(self.extra(x)))
        return self.head(x)


def test_what_only_training_uses_follows_and_costs_nothing():
    model = Auxiliary()
    graph = dmcp.trace(model, IMAGES)
    found = named(graph)
    assert members(found["stem"], "in") == {"head", "extra"}
    assert found["extra"].searchable
    assert not found["auxiliary"].searchable
    small = dmcp.extract(graph, {"stem": 3, "extra": 2})
    assert [out.shape for out in small.train()(IMAGES)] == [(2, 4, 8, 8)] * 2
    assert [layer.module for layer in graph.layers] == ["stem", "head"]


def test_a_training_part_with_sizes_in_its_code_is_found_by_the_proof():
    class Fixed(Auxiliary):
        def forward(self, x):
            x = F.relu(self.stem(x))
            if self.training:
                return self.head(x), self.extra(x.view(2, 8, 8, 8))
            return self.head(x)

    graph = dmcp.trace(Fixed(), IMAGES)
    assert not named(graph)["stem"].searchable
    assert "fails without some of its channels" in graph.proof.refuted["stem"]


def test_a_module_called_twice_with_different_inputs_ties_them():
    model = Calls(
        lambda m, x: m.shared(x) + m.shared(F.relu(m.other(x))),
        shared=nn.Conv2d(8, 8, 1),
        other=nn.Conv2d(8, 8, 1),
    )
    found = units(model)
    assert list(found) == ["first", "shared", "last"]
    assert members(found["first"], "out") == {"first", "other"}


# Inputs


def test_an_input_without_channels_is_traced():
    (unit,) = dmcp.trace(nn.Linear(3, 2), torch.zeros(3)).units
    assert not unit.searchable
    found = units(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(3))
    assert found["0"].searchable


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images, *, scale=None, options=None):
        x = self.stem(images)
        x = x if scale is None else x * scale
        return {"logits": self.head(x if options is None else x * options["gain"])}


@pytest.mark.parametrize(
    "inputs",
    [
        IMAGES,
        (IMAGES,),
        [IMAGES],
        {"images": IMAGES},
        {"images": IMAGES, "scale": torch.ones(2, 1, 1, 1)},
        {"images": IMAGES, "options": {"gain": torch.ones(1)}},
    ],
)
def test_inputs_may_be_positional_or_keywords(inputs):
    graph = dmcp.trace(Keywords(), inputs)
    assert [unit.searchable for unit in graph.units] == [True, False]
    assert dmcp.cost(graph).of({}) == 64 * (3 * 8 + 8 * 4)


def test_inputs_without_a_tensor_are_refused():
    with pytest.raises(ConfigError, match="example_inputs must hold a tensor"):
        dmcp.trace(Keywords(), ())


# Options


def test_units_of_a_compiled_model_may_be_named_by_its_modules():
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    compiled = torch.compile(nn.Sequential(*layers), backend="eager")
    graph = dmcp.trace(compiled, IMAGES, tied=[["_orig_mod.0", "2"]])
    assert [unit.name for unit in graph.searchable] == ["0"]
    assert dmcp.cost(graph).of({"_orig_mod.0": 3}) == dmcp.cost(graph).of({"0": 3})
    by_width = dmcp.extract(graph, {"_orig_mod.0": 2})
    by_index = dmcp.extract(graph, kept={"_orig_mod.0": [0, 1]})
    for one, two in zip(by_width.parameters(), by_index.parameters(), strict=True):
        assert one.shape == two.shape
    with pytest.raises(ConfigError, match=r"no unit is called '_orig_mod\.1'"):
        dmcp.extract(graph, {"_orig_mod.1": 2})


def test_excluded_units_stay_whole(example):
    case = example("Residual")
    found = named(dmcp.trace(case.model, case.inputs, exclude=["sec*", "down.0"]))
    assert found["stem.0"].reason == "it is excluded by 'sec*'"
    assert found["down.0"].reason == "it is excluded by 'down.0'"
    assert found["stem.0"].choices == (8,)
    assert [name for name, unit in found.items() if unit.searchable] == ["first.0"]
    assert found["head.2"].reason == "its channels are the model's outputs"


def test_tied_units_share_one_width():
    wide = nn.Sequential(
        *[nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    )
    randomise(wide, seed=2)
    graph = dmcp.trace(wide, IMAGES, tied=[["0", "2"]])
    assert [unit.name for unit in graph.units] == ["0", "4"]
    assert members(graph.units[0], "out") == {"0", "2"}
    assert graph.units[0].choices == tuple(range(1, 9))
    small = dmcp.extract(graph, kept={"0": [1, 5, 6]})
    assert small[2].weight.shape == (3, 3, 1, 1)
    images = torch.randn(2, 3, 8, 8)
    assert same(small, zeroed(graph, {"0": [0, 2, 3, 4, 7]}), [images]) < 1e-12


def test_the_smallest_width_is_an_option(example):
    case = example("Residual")
    found = named(dmcp.trace(case.model, case.inputs, min_width=8))
    assert found["down.0"].choices == (8, 9, 10, 11, 12)
    for name in ("stem.0", "first.0"):
        channels = found[name].channels
        assert found[name].reason == f"its {channels} channels are no more than min_width"
        assert found[name].choices == (channels,)

    patterns = {"*": 2, "second.*": 4, "stem.0": 5}
    found = named(dmcp.trace(case.model, case.inputs, min_width=patterns))
    assert {name: unit.choices[0] for name, unit in found.items()} == {
        "stem.0": 5,
        "first.0": 2,
        "down.0": 2,
        "head.2": 5,
    }


def test_the_smallest_width_is_a_number_of_channels_not_of_steps(example):
    case = example("Interleaved")
    found = named(dmcp.trace(case.model, case.inputs, min_width=3))
    assert found["left.0"].choices == (4, 6, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["stem.0", "nowhere.*"]}, r"exclude: no unit matches 'nowhere\.\*'"),
        ({"min_width": {"nowhere": 4}}, "min_width: no unit matches 'nowhere'"),
        ({"tied": [["stem.0", "nowhere"]]}, "tied: no unit is called 'nowhere'; units are .*stem"),
        (
            {"tied": [["stem.0", "first.0"]]},
            r"tied: units must have the same number of steps, got \{'stem.0': 8, 'first.0': 6\}",
        ),
    ],
)
def test_options_that_name_nothing_are_refused(example, options, message):
    case = example("Residual")
    with pytest.raises(ConfigError, match=message):
        dmcp.trace(case.model, case.inputs, **options)


def test_widths_are_completed():
    found = tuple(units(Calls(lambda m, x: F.relu(x))).values())
    assert check_widths(found, {"first": 2}) == {"first": 2, "last": 4}


# Sizes


class Lenet(nn.Module):
    """The reshape of many tutorials."""

    def __init__(self, view):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 16, 5)
        self.view = view

    def forward(self, images):
        return self.fc(self.view(torch.relu(self.conv(images))))


def test_a_channel_count_in_a_reshape_is_found_by_the_proof():
    example = torch.zeros(2, 3, 4, 4)
    computed = dmcp.trace(Lenet(lambda x: x.view(x.size(0), -1)), example)
    assert [unit.searchable for unit in computed.units] == [True, False]
    assert computed.proof.refuted == {}
    written = dmcp.trace(Lenet(lambda x: x.view(-1, 32 * 16)), example)
    assert not written.searchable
    assert written.units[0].reason == written.proof.refuted["conv"]
    assert written.units[0].reason.startswith(
        "the network fails without some of its channels: shape '[-1, 512]' is invalid for input"
    )


@pytest.mark.parametrize("dim", [None, ()])
def test_a_mean_over_everything_runs_over_the_channels(dim):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, images):
            return self.conv(images).mean(dim, keepdim=True)

    (unit,) = dmcp.trace(Mean(), IMAGES).units
    assert unit.reason.startswith("mean runs over its channels (the model itself, Mean")


def test_the_graph_prints_what_it_holds(traced):
    assert repr(traced("Residual").graph) == (
        "ChannelGraph(Residual, 4 units, 3 searchable, 6 layers)"
    )


class Regions(nn.Module):
    """A frozen beginning, an end in another precision."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x).relu()
        with torch.autocast("cpu", torch.bfloat16):
            x = self.last(x)
        return x.float()


def test_regions_without_gradients_or_in_another_precision_are_followed():
    model, images = Regions(), torch.zeros(2, 3, 5, 5)
    graph = dmcp.trace(model, images)
    assert [unit.searchable for unit in graph.units] == [True, False]
    assert dmcp.cost(graph).of({}) == measured_macs(model, images) == 25 * (3 * 16 + 16 * 4)


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.keys, self.last = (nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 8), (8, 2)))

    def forward(self, x):
        self.features = self.first(x)
        y = self.keys(self.features).mean((2, 3))
        return self.last(self.keys(self.features)), y[y > 0], torch.dot(y[0], y[1])


def test_a_trace_leaves_nothing_on_the_model_and_values_decide_sizes_only_there():
    model = Remembers()
    graph = dmcp.trace(model, torch.zeros(2, 3, 4, 4))
    assert "features" not in vars(model)
    searchable = {unit.name: unit.searchable for unit in graph.units}
    assert searchable == {"first": True, "keys": False, "last": False}


@pytest.mark.parametrize(
    ("example", "message"),
    [(5, "got int"), (torch.zeros(0, 3, 4, 4), "at least 1"), ((), "batch dimension")],
)
def test_examples_that_are_none_are_refused(example, message):
    with pytest.raises(ConfigError, match=message):
        dmcp.trace(nn.Conv2d(3, 4, 1), example)


def test_the_default_device_of_new_tensors_does_not_matter():
    # Nobody has asked yet what this activation makes of zero.
    model = Calls(lambda module, x: F.leaky_relu(x, 0.138))
    with torch.device("meta"):
        graph = dmcp.trace(model, IMAGES)
        small = dmcp.extract(graph, {"first": 5})
        chosen = dmcp.extract(graph, kept={"first": [4, 0, 3, 1, 2]})
        macs = dmcp.cost(graph).of({"first": 5})
    assert [unit.name for unit in graph.searchable] == ["first"]
    assert graph.proof.structures == 3
    assert macs == 64 * (3 * 9 * 5 + 5 * 4)
    for one, two in zip(small.parameters(), chosen.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_model_without_data_is_traced_without_proof():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).to("meta")
    graph = dmcp.trace(model, torch.zeros(2, 3, 4, 4, device="meta"))
    assert graph.proof is None
    assert dmcp.cost(graph).of({"0": 5}) == 16 * (3 * 5 + 5 * 2)
