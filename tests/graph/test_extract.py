import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import dmcp
from dmcp.errors import ConfigError


def zeroed(graph, kept):
    """The traced model with the channels outside ``kept`` zeroed, from the units' members alone."""
    model = copy.deepcopy(graph.model)
    for unit in graph.units:
        dropped = torch.ones(unit.channels, dtype=torch.bool)
        dropped[torch.as_tensor(kept[unit.name])] = False
        for member in unit.members:
            if member.role == "in":
                continue
            module = model.get_submodule(member.module)
            channels = member.channels[dropped].flatten()
            with torch.no_grad():
                module.weight[channels] = 0
                if module.bias is not None:
                    module.bias[channels] = 0
    return model


def random_kept(graph, seed):
    """Random channels of every searchable unit, not a prefix."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for unit in graph.units:
        width = int(torch.randint(1, unit.channels + 1, (), generator=generator))
        order = torch.randperm(unit.channels, generator=generator)
        kept[unit.name] = order[: width if unit.searchable else unit.channels]
    return kept


def assert_equal_up_to_rounding(actual, expected, tolerance):
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_prefix_equals_the_model_with_the_other_channels_zeroed(
    network, random_widths, tensors, dtype, tolerance
):
    case = network.to(dtype)
    case.model.eval()
    graph = dmcp.trace(case.model, case.inputs)
    for seed in range(3):
        widths = random_widths(graph, seed)
        oracle = zeroed(graph, {name: range(width) for name, width in widths.items()})
        small = dmcp.extract(graph, widths)
        assert_equal_up_to_rounding(
            tensors(small(*case.inputs)), tensors(oracle(*case.inputs)), tolerance
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_channels_equal_the_model_with_the_other_channels_zeroed(
    network, tensors, dtype, tolerance
):
    case = network.to(dtype)
    case.model.eval()
    graph = dmcp.trace(case.model, case.inputs)
    for seed in range(3):
        kept = random_kept(graph, seed)
        small = dmcp.extract(graph, kept=kept)
        expected = zeroed(graph, kept)(*case.inputs)
        assert_equal_up_to_rounding(tensors(small(*case.inputs)), tensors(expected), tolerance)


def test_gradients_of_the_kept_weights_equal_those_of_the_zeroed_model(example):
    case = example("Residual").to(torch.float64)
    graph = dmcp.trace(case.model.eval(), case.inputs)
    widths = {"stem.0": 5, "first.0": 3}
    small = dmcp.extract(graph, widths)
    oracle = zeroed(graph, {u.name: range(widths.get(u.name, u.channels)) for u in graph.units})
    for model in (small, oracle):
        model(*case.inputs).square().sum().backward()
    torch.testing.assert_close(
        small.first[0].weight.grad, oracle.first[0].weight.grad[:3, :5], rtol=1e-11, atol=1e-12
    )


def test_attributes_follow_the_widths_and_names_stay(network, random_widths):
    graph = dmcp.trace(network.model, network.inputs)
    small = dmcp.extract(graph, random_widths(graph))
    assert list(small.state_dict()) == list(network.model.state_dict())
    for name, module in small.named_modules():
        assert type(module) is type(network.model.get_submodule(name))
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (
                module.out_channels,
                module.in_channels // module.groups,
            )
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.shape == module.running_var.shape == (module.num_features,)
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_the_result_shares_nothing_with_the_model(example):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
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


def test_it_reads_the_weights_the_model_has_now(example):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
    with torch.no_grad():
        case.model.stem[0].weight.fill_(7)
    assert (dmcp.extract(graph, {"stem.0": 2}).stem[0].weight == 7).all()


def test_an_extracted_network_can_be_extracted_again(network, random_widths, tensors):
    case = network.to(torch.float64)
    case.model.eval()
    graph = dmcp.trace(case.model, case.inputs)
    once = dmcp.trace(dmcp.extract(graph, random_widths(graph)), case.inputs)
    assert [unit.name for unit in once.units] == [unit.name for unit in graph.units]
    widths = random_widths(once, seed=1)
    twice = dmcp.extract(once, widths)
    direct = dmcp.extract(graph, widths)
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
def test_bad_arguments_are_named(example, arguments, message):
    case = example("Residual")
    graph = dmcp.trace(case.model, case.inputs)
    with pytest.raises(ConfigError, match=message):
        dmcp.extract(graph, **arguments)
