import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.errors import TraceError
from dmcp.graph import check_widths

IMAGES = torch.zeros(2, 3, 8, 8)


def units(model, inputs=IMAGES):
    return {unit.name: unit for unit in dmcp.trace(model, inputs).units}


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


def test_a_residual_stream_is_one_unit(example):
    case = example("Residual")
    found = units(case.model, case.inputs)
    assert list(found) == ["stem.0", "first.0", "down.0", "head.2"]
    assert [unit.channels for unit in found.values()] == [8, 6, 12, 5]
    stream = found["stem.0"]
    assert members(stream, "out") == {"stem.0", "stem.1", "second.0", "second.1"}
    assert members(stream, "in") == {"first.0", "down.0", "skip.0"}
    assert stream.choices == tuple(range(1, 9))
    assert stream.searchable
    assert not stream.reason
    assert members(found["down.0"], "out") == {"down.0", "down.1", "skip.0", "skip.1"}


def test_the_outputs_of_the_model_are_not_searchable(example):
    case = example("SeveralInputs")
    found = units(case.model, case.inputs)
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
    assert unit.reason == "its channels are the model's inputs"


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


def test_a_depthwise_convolution_follows_its_producer(example):
    case = example("Depthwise")
    found = units(case.model, case.inputs)
    assert list(found) == ["0.0", "4.0", "5.2"]
    assert members(found["0.0"], "out") == {"0.0", "0.1", "2.0", "2.1"}
    assert members(found["0.0"], "in") == {"4.0"}


def test_a_depthwise_multiplier_gives_several_channels_each(example):
    case = example("DepthwiseMultiplier")
    unit = units(case.model, case.inputs)["0.0"]
    channels = {member.module: member.channels.tolist() for member in unit.members}
    thirds = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]
    assert channels["0.0"] == list(range(6))
    assert channels["2.0"] == channels["2.1"] == channels["4.0"] == thirds


def test_a_concatenation_places_units_side_by_side(example):
    case = example("Concat")
    found = units(case.model, case.inputs)
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


def test_sums_of_shifted_concatenations_tie_channels_of_one_convolution(example):
    case = example("Interleaved")
    unit = units(case.model, case.inputs)["left.0"]
    channels = {(m.module, m.role): m.channels.tolist() for m in unit.members}
    assert unit.channels == 4
    assert channels["left.0", "out"] == [[i, i + 4] for i in range(4)]
    assert channels["right.0", "out"] == list(range(4))
    assert channels["last.0", "in"] == [[i, i + 4, i + 8] for i in range(4)]


def test_a_flatten_gives_several_features_each(example):
    case = example("FlattenedMap")
    unit = units(case.model, case.inputs)["0.0"]
    features = next(m.channels for m in unit.members if m.module == "4")
    assert features.tolist() == [list(range(4 * i, 4 * i + 4)) for i in range(6)]


def test_a_unit_may_stand_at_both_ends_of_a_layer(example):
    case = example("BothEnds")
    found = units(case.model, case.inputs)
    assert list(found) == ["stem.0", "head.2"]
    assert "conv.0" in members(found["stem.0"], "in") & members(found["stem.0"], "out")


def test_a_module_that_is_called_twice_ties_its_inputs(example):
    case = example("CalledTwice")
    graph = dmcp.trace(case.model, case.inputs)
    assert [unit.name for unit in graph.units] == ["stem.0", "last.0", "head.2"]
    assert [layer.module for layer in graph.layers].count("block.0") == 2


@pytest.mark.parametrize(
    ("name", "units", "searchable"),
    [("mobilenet_v2", 26, 25), ("resnet18", 13, 12), ("resnet50", 38, 37)],
)
def test_the_papers_networks_have_the_papers_units(example, name, units, searchable):
    case = example(name)
    graph = dmcp.trace(case.model, case.inputs)
    assert (len(graph.units), len(graph.searchable)) == (units, searchable)
    assert graph.widths() == {unit.name: unit.channels for unit in graph.units}


def test_the_first_stage_of_resnet18_belongs_to_the_stem(example):
    case = example("resnet18")
    found = units(case.model, case.inputs)
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


@pytest.mark.parametrize(
    ("function", "modules", "message"),
    [
        (lambda m, x: m.gate(x), {"gate": nn.Sigmoid()}, r"gate \(Sigmoid\).*sigmoid"),
        (lambda m, x: torch.sigmoid(x), {}, r"the model itself \(Calls\).*sigmoid"),
        (
            lambda m, x: m.grouped(x),
            {"grouped": nn.Conv2d(8, 8, 3, groups=2)},
            r"grouped \(Conv2d\).*groups=2",
        ),
        (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 8)}, r"norm \(GroupNorm\)"),
        (
            lambda m, x: m.norm(x),
            {"norm": nn.BatchNorm2d(8, track_running_stats=False)},
            r"norm \(BatchNorm2d\)",
        ),
        (lambda m, x: m.clip(x), {"clip": nn.Hardtanh(1, 2)}, r"clip \(Hardtanh\).*zero"),
        (lambda m, x: x + 1, {}, "an operand is not computed from the model's inputs"),
        (lambda m, x: torch.cat([x[:, 4:], x[:, :4]], 1), {}, "slice"),
        (lambda m, x: x - x.mean(1, keepdim=True), {}, "mixes channels"),
        (lambda m, x: x.view(2, 4, 16, 8).view(2, 8, 8, 8), {}, "splits the channels"),
        (lambda m, x: x + x.transpose(1, 2), {}, "transpose"),
        (lambda m, x: m.b(F.conv2d(x, m.b.weight * 2)), {"b": nn.Conv2d(8, 8, 1)}, "mul"),
        (lambda m, x: m.other(F.conv2d(x, m.other.weight)), {"other": nn.Conv2d(8, 8, 1)}, "other"),
        (lambda m, x: x, {"lost": nn.Linear(2, 2)}, r"lost \(Linear\): parameter lost.weight"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(function, modules, message):
    with pytest.raises(TraceError, match=message):
        dmcp.trace(Calls(function, **modules), IMAGES)


def test_a_tied_parameter_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    with pytest.raises(TraceError, match=r"1\.weight: the parameter is tied to 0\.weight"):
        dmcp.trace(model, IMAGES)


def test_a_norm_under_two_names_is_refused():
    norm = nn.BatchNorm2d(8, affine=False)
    model = Calls(lambda m, x: m.b(F.relu(m.a(x))), a=norm, b=norm)
    with pytest.raises(TraceError, match=r"b\.running_mean.*tied to a\.running_mean"):
        dmcp.trace(model, IMAGES)


def test_control_flow_that_depends_on_data_is_refused():
    model = Calls(lambda m, x: x * 2 if x.sum() > 0 else x)
    model.train()
    with pytest.raises(TraceError, match=r"Calls cannot be captured by torch\.export"):
        dmcp.trace(model, IMAGES)
    assert model.training


def test_a_computed_weight_is_refused():
    model = Calls(lambda m, x: F.relu(x))
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(TraceError, match="first"):
        dmcp.trace(model, IMAGES)


def test_an_input_without_channels_is_refused():
    with pytest.raises(TraceError, match="no channel dimension"):
        dmcp.trace(nn.Linear(3, 2), torch.zeros(3))


def test_widths_are_completed():
    found = tuple(units(Calls(lambda m, x: F.relu(x))).values())
    assert check_widths(found, {"first": 2}) == {"first": 2, "last": 4}


class Lenet(nn.Module):
    """The reshape of many tutorials, with the channel count written into it."""

    def __init__(self, view):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.fc = nn.Linear(32 * 16, 5)
        self.view = view

    def forward(self, images):
        return self.fc(self.view(torch.relu(self.conv(images))))


def test_a_channel_count_in_a_reshape_is_refused():
    example = torch.zeros(2, 3, 4, 4)
    computed = dmcp.trace(Lenet(lambda x: x.view(x.size(0), -1)), example)
    assert [unit.searchable for unit in computed.units] == [True, False]
    with pytest.raises(TraceError, match="Lenet: the forward pass fails once channels are removed"):
        dmcp.trace(Lenet(lambda x: x.view(-1, 32 * 16)), example)


def test_a_batch_norm_without_weights_is_refused():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 4, 1), nn.Flatten()
    )
    with pytest.raises(TraceError, match=r"1 \(BatchNorm2d\).*zeroed channel"):
        dmcp.trace(model, torch.zeros(2, 3, 4, 4))


def test_joining_batches_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, images):
            y = self.conv(images)
            return self.head(torch.cat([y, y], 0))

    with pytest.raises(TraceError, match="joins batches"):
        dmcp.trace(Twice(), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("dim", [None, ()])
def test_a_mean_over_everything_is_refused(dim):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, images):
            return self.conv(images).mean(dim, keepdim=True)

    with pytest.raises(TraceError, match="mixes channels"):
        dmcp.trace(Mean(), torch.zeros(2, 3, 4, 4))
