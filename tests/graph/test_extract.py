import copy
import os
import subprocess
import sys

import pytest
import torch
from oracle import zeroed
from torch import nn

import dmcp
from dmcp.errors import ConfigError


def zeroed_but(graph, kept):
    """The traced model with the channels outside ``kept`` zeroed, from the units' members alone."""
    channels = {unit.name: set(range(unit.channels)) for unit in graph.units}
    dropped = {name: sorted(channels[name] - set(stay)) for name, stay in kept.items()}
    return zeroed(graph, dropped)


def prefixes(widths):
    return {name: range(width) for name, width in widths.items()}


def random_kept(graph, seed):
    """Random steps of every searchable unit, not a prefix, in random order."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for unit in graph.searchable:
        order = torch.randperm(unit.channels // unit.step, generator=generator)
        size = int(torch.randint(1, len(order) + 1, (), generator=generator))
        steps = order[:size, None] * unit.step + torch.arange(unit.step)
        kept[unit.name] = steps.flatten().tolist()
    return kept


def assert_equal_up_to_rounding(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)]
)


@PRECISIONS
def test_a_prefix_equals_the_model_with_the_other_channels_zeroed(
    traced_network, random_widths, tensors, dtype, tolerance
):
    case = traced_network.to(dtype)
    case.model.eval()
    for seed in range(3):
        widths = random_widths(case.graph, seed)
        expected = zeroed_but(case.graph, prefixes(widths))(*case.inputs)
        small = dmcp.extract(case.graph, widths)
        assert_equal_up_to_rounding(tensors(small(*case.inputs)), tensors(expected), tolerance)


@PRECISIONS
def test_any_channels_equal_the_model_with_the_other_channels_zeroed(
    traced_network, tensors, dtype, tolerance
):
    case = traced_network.to(dtype)
    case.model.eval()
    for seed in range(3):
        kept = random_kept(case.graph, seed)
        expected = zeroed_but(case.graph, kept)(*case.inputs)
        small = dmcp.extract(case.graph, kept=kept)
        assert_equal_up_to_rounding(tensors(small(*case.inputs)), tensors(expected), tolerance)


def test_gradients_of_the_kept_weights_equal_those_of_the_zeroed_model(traced):
    case = traced("Residual").to(torch.float64)
    case.model.eval()
    widths = {"stem.0": 5, "first.0": 3}
    small = dmcp.extract(case.graph, widths)
    oracle = zeroed_but(case.graph, prefixes(widths))
    for model in (small, oracle):
        model(*case.inputs).square().sum().backward()
    torch.testing.assert_close(
        small.first[0].weight.grad, oracle.first[0].weight.grad[:3, :5], rtol=1e-11, atol=1e-12
    )


def test_attributes_follow_the_widths_and_names_stay(traced_network, random_widths):
    graph = traced_network.graph
    small = dmcp.extract(graph, random_widths(graph))
    assert list(small.state_dict()) == list(graph.model.state_dict())
    for name, module in small.named_modules():
        assert type(module) is type(graph.model.get_submodule(name))
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (
                module.out_channels,
                module.in_channels // module.groups,
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_var.shape == (module.num_features,)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_the_result_shares_nothing_with_the_model(traced):
    case = traced("Residual")
    graph = case.graph
    before = copy.deepcopy(case.model.state_dict())
    case.model.first[0].weight.requires_grad_(False)
    small = dmcp.extract(graph, {})
    assert not small.first[0].weight.requires_grad
    assert small.training
    assert case.model.training
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()
    for name, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_reads_the_weights_the_model_has_now(traced):
    case = traced("Residual")
    with torch.no_grad():
        case.model.stem[0].weight.fill_(7)
    case.model.second[0].weight = nn.Parameter(torch.full((8, 6, 3, 3), 5.0))
    small = dmcp.extract(case.graph, {"stem.0": 2})
    assert (small.stem[0].weight == 7).all()
    assert (small.second[0].weight == 5).all()


def test_an_extracted_network_can_be_extracted_again(traced_network, random_widths, tensors):
    case = traced_network.to(torch.float64)
    case.model.eval()
    first = random_widths(case.graph)
    once = dmcp.trace(dmcp.extract(case.graph, first), case.inputs)
    assert [unit.name for unit in once.units] == [name for name in first if first[name] > 1]
    widths = random_widths(once, seed=1)
    twice = dmcp.extract(once, widths)
    direct = dmcp.extract(case.graph, first | widths)
    for got, wanted in zip(
        tensors(twice(*case.inputs)), tensors(direct(*case.inputs)), strict=True
    ):
        assert torch.equal(got, wanted)


NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.features(x)).mean((2, 3))
"""

LOADING = """
import sys
sys.modules["dmcp"] = None
import torch
model = torch.load(sys.argv[1], weights_only=False)
inputs, expected = torch.load(sys.argv[2])
assert model.features[0].out_channels == 5
torch.testing.assert_close(model(inputs), expected)
print("same")
"""


def test_the_result_loads_where_dmcp_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a_users_network.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    import a_users_network

    model = a_users_network.Net().eval()
    images = torch.randn(2, 3, 8, 8)
    small = dmcp.extract(dmcp.trace(model, images), {"features.0": 5})
    torch.save(small, tmp_path / "model.pt")
    torch.save((images, small(images)), tmp_path / "data.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOADING, tmp_path / "model.pt", tmp_path / "data.pt"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either widths or kept"),
        ({"widths": {}, "kept": {}}, "either widths or kept"),
        ({"widths": {"nowhere": 2}}, "no unit is called 'nowhere'"),
        ({"widths": {"stem.0": 0}}, r"must lie in 1\.\.8, got 0"),
        ({"widths": {"stem.0": 9}}, r"must lie in 1\.\.8, got 9"),
        ({"widths": {"stem.0": 4.0}}, "must be an int"),
        ({"widths": {"stem.0": True}}, "must be an int"),
        ({"widths": {"head.2": 3}}, "the model's outputs"),
        ({"kept": {"nowhere": [1]}}, "no unit is called 'nowhere'"),
        ({"kept": {"stem.0": []}}, "stem.0"),
        ({"kept": {"stem.0": [8]}}, r"0\.\.7"),
        ({"kept": {"stem.0": [-1]}}, r"0\.\.7"),
        ({"kept": {"stem.0": [0.5]}}, "integers"),
        ({"kept": {"stem.0": torch.ones(8, dtype=torch.bool)}}, "integers"),
        ({"kept": {"head.2": [0, 1]}}, "the model's outputs"),
    ],
)
def test_bad_arguments_are_named(traced, arguments, message):
    with pytest.raises(ConfigError, match=message):
        dmcp.extract(traced("Residual").graph, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": {"left.0": 3}}, r"widths\['left.0'\] must be a multiple of 2, got 3"),
        ({"kept": {"left.0": [0, 1, 2]}}, "must be a multiple of 2, got 3"),
        ({"kept": {"left.0": [1, 2]}}, "2 consecutive channels are kept or dropped together"),
    ],
)
def test_a_part_of_a_step_is_refused(traced, arguments, message):
    with pytest.raises(ConfigError, match=message):
        dmcp.extract(traced("Interleaved").graph, **arguments)


def pretrained_differently(model):
    model.first[0].weight = nn.Parameter(torch.zeros(7, 8, 3, 3))


def without_a_norm(model):
    model.first[1] = nn.Identity()


def without_a_block(model):
    del model.first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pretrained_differently, r"first\.0\.weight has shape \[7, 8, 3, 3\] now: trace the model"),
        (without_a_norm, r"first\.1\.weight is gone: trace the model again"),
        (without_a_block, r"first\.0 is gone: trace the model again"),
    ],
)
def test_a_model_that_was_changed_since_is_refused(traced, change, message):
    case = traced("Residual")
    change(case.model)
    with pytest.raises(ConfigError, match=message):
        dmcp.extract(case.graph, {"stem.0": 4})


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten())
    model[2].weight = model[1].weight
    model.append(nn.Linear(8 * 16, 2))
    graph = dmcp.trace(model, torch.zeros(2, 3, 4, 4))
    small = dmcp.extract(graph, {"0": 3})
    assert small[1].weight is small[2].weight
    assert small[1].weight.shape == (3, 3, 1, 1)
    assert small[1].bias is not small[2].bias


def test_what_no_unit_decides_is_copied_whole():
    """Plain attributes, buffers that no operator met, parameters that nothing uses."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model.table = {"scale": torch.arange(8)}
    model.register_buffer("unused", torch.ones(8))
    model.register_parameter("idle", nn.Parameter(torch.ones(8)))
    small = dmcp.extract(dmcp.trace(model, torch.zeros(1, 3, 4, 4)), {"0": 3})
    assert small.unused.shape == small.idle.shape == (8,)
    assert torch.equal(small.table["scale"], torch.arange(8))
    assert small.table["scale"] is not model.table["scale"]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(3, 8, 1), nn.LSTM(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x))[0][:, -1])


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export of recurrent layers
def test_a_recurrent_layer_keeps_its_own_list_of_its_weights():
    """Of the copy's in the copy, of the model's in the model: tracing and copying go by names."""
    model = Recurrent()
    graph = dmcp.trace(model, torch.zeros(2, 3, 6))
    assert not graph.searchable
    small = dmcp.extract(graph, {})
    for rnn in (model.rnn, small.rnn):
        for listed, (_, parameter) in zip(rnn._flat_weights, rnn.named_parameters(), strict=True):
            assert listed is parameter
