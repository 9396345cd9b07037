import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from handmade import ZOO
from oracle import difference, outputs, randomise, zeroed
from torch import nn

import dmcp
from dmcp.errors import ConfigError, TraceError
from dmcp.nn import MarkovBatchNorm2d
from dmcp.nn.chain import scaled
from dmcp.search import MarkovNet

_NETS = {}


@pytest.fixture
def net(network, request):
    """A net of one's own for every example network, in training mode."""
    name = request.node.callspec.params["network"]
    if name not in _NETS:
        _NETS[name] = MarkovNet(network.model, network.inputs, groups=4, divisor=1)
    return copy.deepcopy(_NETS[name])


def doubled(inputs):
    return tuple(x.double() for x in inputs)


def fill_alpha(net, value):
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(value)


def random_alpha(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.normal_(1.0, 1.0, generator=generator)


def retain_surely(net, widths):
    """Chains that are certain of these widths."""
    with torch.no_grad():
        for unit in net.graph.searchable:
            retained = torch.tensor(unit.choices[1:]) <= widths[unit.name]
            net.chain(unit.name).alpha.copy_(torch.where(retained, 80.0, -80.0))


def passes(model, inputs, tensors):
    """Outputs and every weight gradient of one pass."""
    outputs = tensors(model(*inputs))
    sum(output.sin().sum() for output in outputs).backward()
    return [output.detach() for output in outputs]


def gradients(parameters):
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("reference_ops")
def test_unmasked_and_surely_retained_nets_are_the_users_model_bit_for_bit(
    network, net, tensors, memory_format
):
    model = net.to(memory_format=memory_format).graph.model
    plain = copy.deepcopy(model)
    inputs = tuple(x.to(memory_format=memory_format) for x in network.inputs)
    fill_alpha(net, 80)
    assert (net.retain() == 1).all()
    expected = passes(plain, inputs, tensors)
    actual = passes(net, inputs, tensors)
    for wanted, got in zip(expected, actual, strict=True):
        assert torch.equal(wanted, got)
    for wanted, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted.grad, got.grad)
    for (name, wanted), got in zip(
        plain.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, got), name

    model.zero_grad()
    with net.masked():
        masked = passes(net, inputs, tensors)
    for wanted, got in zip(expected, masked, strict=True):
        assert torch.equal(wanted, got)
    for wanted, got in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted.grad, got.grad)
    assert all(alpha.grad is not None for alpha in net.architecture_parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_an_unmasked_net_is_the_users_model_to_rounding(network, net, tensors, memory_format):
    """With the kernels of this machine; the last bits are PyTorch's with the reference ops only."""
    model = net.double().to(memory_format=memory_format).graph.model
    plain = copy.deepcopy(model)
    inputs = tuple(x.to(memory_format=memory_format) for x in doubled(network.inputs))
    expected, actual = (passes(either, inputs, tensors) for either in (plain, net))
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def fused(net):
    """The activations that norms compute."""
    norms = [module for module in net.model.modules() if isinstance(module, MarkovBatchNorm2d)]
    return [norm.act for norm in norms if norm.act != "identity"]


def test_norms_compute_the_activation_modules_behind_them(example):
    case = example("mobilenet_v2")
    relus = sum(isinstance(module, nn.ReLU6) for module in case.model.modules())
    net = MarkovNet(case.model, case.inputs)
    assert relus > 0
    assert fused(net) == ["relu6"] * relus
    assert not any(isinstance(module, nn.ReLU6) for module in net.model.modules())


@pytest.mark.parametrize("name", ["Residual", "FunctionalReLU6", "SharedActivation", "ReadTwice"])
def test_activations_that_others_need_stay_where_they_are(example, name):
    """Functional calls, a module called twice, a norm that another module reads as well."""
    case = example(name)
    assert fused(MarkovNet(case.model, case.inputs, groups=4, divisor=1)) == []


def test_an_activation_with_a_hook_stays_a_module(example):
    case = example("Depthwise")
    seen = []
    case.model[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    seen.clear()
    net(*case.inputs)
    assert fused(net) == ["relu6"]
    assert len(seen) == 1


def test_a_sub_network_equals_the_extracted_network(network, net, random_widths, tensors):
    net.double().eval().graph.model.eval()
    inputs = doubled(network.inputs)
    for seed in range(3):
        widths = random_widths(net.graph, seed)
        small = dmcp.extract(net.graph, widths)
        with net.at(widths):
            actual = tensors(net(*inputs))
        for got, wanted in zip(actual, tensors(small(*inputs)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sub_network_in_training_equals_the_extracted_network(
    network, net, random_widths, tensors, memory_format
):
    """Batch statistics and gradients too; running statistics stay."""
    model = net.double().to(memory_format=memory_format).graph.model
    inputs = tuple(x.to(memory_format=memory_format) for x in doubled(network.inputs))
    widths = random_widths(net.graph)
    small = dmcp.extract(net.graph, widths)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with net.at(widths):
        actual = passes(net, inputs, tensors)
    expected = passes(small, inputs, tensors)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    norms = [sum(p.grad.square().sum() for p in m.parameters()) for m in (model, small)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-9, atol=0)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_certain_masks_equal_the_extracted_network(network, net, random_widths, tensors):
    net.double().eval().graph.model.eval()
    inputs = doubled(network.inputs)
    for seed in range(3):
        widths = random_widths(net.graph, seed)
        retain_surely(net, widths)
        with net.masked():
            actual = tensors(net(*inputs))
        expected = tensors(dmcp.extract(net.graph, widths)(*inputs))
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_masked_training_pass_leaves_the_running_statistics(network, net):
    random_alpha(net)
    before = {name: buffer.clone() for name, buffer in net.graph.model.named_buffers()}
    with net.masked():
        net(*network.inputs)
    for name, buffer in net.graph.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def batch_norm(norm, x):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def test_resnets_masks_are_in_the_published_place(example):
    """conv, norm, mask, ReLU; the projection and the last convolution share their mask."""
    case = example("Residual").to(torch.float64)
    net = MarkovNet(case.model, case.inputs, groups=3, divisor=1).double()
    random_alpha(net)
    model = case.model
    alphas = {unit.name: net.chain(unit.name).alpha for unit in net.graph.searchable}

    def q(unit):
        chain, channels = net.chain(unit), []
        p = alphas[unit].sigmoid()
        sizes = [b - a for a, b in zip(chain.choices, chain.choices[1:], strict=False)]
        for k, size in enumerate(sizes):
            channels += [p[: k + 1].prod()] * size
        return torch.stack([p.new_ones(())] * chain.choices[0] + channels).view(-1, 1, 1)

    def masked(block, unit, x):
        return batch_norm(block[1], block[0](x)) * q(unit)

    x = torch.relu(masked(model.stem, "stem.0", case.inputs[0]))
    inner = torch.relu(masked(model.first, "first.0", x))
    x = torch.relu(x + masked(model.second, "stem.0", inner))
    x = torch.relu(masked(model.down, "down.0", x) + masked(model.skip, "down.0", x))
    expected = model.head(x)
    expected.sin().sum().backward()
    by_hand = {name: alpha.grad.clone() for name, alpha in alphas.items()}
    for alpha in alphas.values():
        alpha.grad = None
    with net.masked():
        actual = net(*case.inputs)
        actual.sin().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for name, alpha in alphas.items():
        torch.testing.assert_close(alpha.grad, by_hand[name], rtol=1e-9, atol=1e-11)


def test_an_inverted_bottleneck_is_masked_once_behind_its_clipped_activations(example):
    case = example("Depthwise").to(torch.float64)
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1).double()
    random_alpha(net)
    model = case.model
    q = {name: net.chain(name).channel_retain().view(-1, 1, 1) for name in ("0.0", "4.0")}
    x = F.relu6(batch_norm(model[0][1], model[0][0](case.inputs[0])))
    x = F.relu6(batch_norm(model[2][1], model[2][0](x))) * q["0.0"]
    expected = model[5](batch_norm(model[4][1], model[4][0](x)) * q["4.0"])
    with net.masked():
        torch.testing.assert_close(net(*case.inputs), expected, rtol=1e-12, atol=1e-12)


def test_it_shares_the_users_tensors_and_leaves_the_users_modules(network):
    model = network.model
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    net = MarkovNet(model, network.inputs, groups=4, divisor=1)
    assert {n: (id(m), type(m)) for n, m in model.named_modules()} == modules
    assert list(model.state_dict()) == keys

    def assert_shared():
        for name, tensor in net.model.named_parameters():
            assert tensor is model.get_parameter(name)
        for name, tensor in net.model.named_buffers():
            assert tensor is model.get_buffer(name)
        assert list(net.model.state_dict()) == keys

    assert_shared()
    net.to(torch.float64)
    assert next(model.parameters()).dtype == torch.float64
    assert_shared()
    net.to(memory_format=torch.channels_last)
    assert_shared()
    net.load_state_dict(copy.deepcopy(net.state_dict()))
    assert_shared()


def test_training_the_net_trains_the_model(example):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    before = copy.deepcopy(case.model.state_dict())
    optimizer = torch.optim.SGD(net.weight_parameters(), lr=0.1)
    net(*case.inputs).sin().sum().backward()
    optimizer.step()
    changed = [
        name for name, t in case.model.state_dict().items() if not torch.equal(t, before[name])
    ]
    assert changed == list(before)


@pytest.mark.usefixtures("reference_ops")
def test_hooks_of_the_users_modules_run_in_the_net(example):
    case = example("Residual")
    plain = case.model.eval()(*case.inputs)
    case.model.first[0].register_forward_hook(lambda module, inputs, output: F.relu(output))
    hooked = case.model(*case.inputs)
    assert not torch.equal(plain, hooked)
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1).eval()
    assert torch.equal(net(*case.inputs), hooked)


def test_a_copy_of_the_net_is_another_net(example):
    case = example("Depthwise")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    copied = copy.deepcopy(net)
    assert copied.graph.model[0][0].weight is copied.model[0][0].weight
    assert copied.model[0][0].weight is not net.model[0][0].weight
    fill_alpha(copied, -80)
    with net.masked():
        surely = net(*case.inputs)
    with copied.masked():
        assert not torch.equal(copied(*case.inputs), surely)


def test_units_are_restricted_to_the_grid(example):
    case = example("resnet18")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=8, min_width=16)
    for unit in net.graph.units:
        if unit.searchable:
            assert unit.choices == dmcp.nn.width_choices(unit.channels, 4, 8, 16)
            if len(unit.choices) > 1:
                assert net.chain(unit.name).choices == unit.choices
        else:
            assert unit.choices == (unit.channels,)
    assert len(net.architecture_parameters()) == sum(len(u.choices) > 1 for u in net.graph.units)


def test_moments_and_expected_widths(example):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    random_alpha(net)
    moments = net.width_moments(2)
    assert moments.shape == (4, 2)
    means = net.expected_widths()
    for number, unit in enumerate(net.graph.units):
        expected = unit.channels
        if unit.searchable:
            expected = net.chain(unit.name).expected_width().item()
        assert means[unit.name] == pytest.approx(expected, rel=1e-6)
        assert moments[number, 0].item() == means[unit.name]
    assert torch.equal(
        net.retain(), torch.cat([net.chain(u.name).retain() for u in net.graph.searchable])
    )


def test_masks_and_expected_costs_come_from_one_evaluation(example):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    random_alpha(net)
    costs = [dmcp.cost(net.graph, metric) for metric in ("macs", "params")]
    with net.masked(net.cost_table(costs)) as expected:
        for unit, mask in zip(
            net.graph.units,
            expected.scale.split([u.channels for u in net.graph.units]),
            strict=True,
        ):
            if not unit.searchable:
                assert (mask == 1).all()
                continue
            chain = net.chain(unit.name)
            assert chain.mask.data_ptr() == mask.data_ptr()
            assert torch.equal(chain.mask, chain.channel_retain())
    assert expected.widths.tolist() == [*net.expected_widths().values()]
    for number, cost in enumerate(costs):
        torch.testing.assert_close(expected.cost[number], cost.mean(net.width_moments(2)))
        torch.testing.assert_close(expected.variance[number], cost.variance(net.width_moments(4)))
    with pytest.raises(ConfigError, match="orders must be 1, 2, 3 or 4, got 5"):
        net.width_moments(5)


def test_contexts_restore_the_net(example):
    case = example("Residual")
    net = MarkovNet(case.model.eval(), case.inputs, groups=4, divisor=1).eval()
    whole = net(*case.inputs)
    with net.at({"stem.0": 2}):
        with net.at({"first.0": 2}):
            assert net.chain("stem.0").width == 8
        assert net.chain("stem.0").width == 2
        with net.at():
            assert torch.equal(net(*case.inputs), whole)
    with pytest.raises(RuntimeError, match="stop"), net.at({"stem.0": 2}), net.masked():
        raise RuntimeError("stop")
    assert torch.equal(net(*case.inputs), whole)
    with pytest.raises(ConfigError, match=r"head\.2"), net.at({"head.2": 2}):
        pass
    assert torch.equal(net(*case.inputs), whole)


def test_networks_that_cannot_follow_chains_are_refused():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(TraceError, match="no unit whose width could be searched"):
        MarkovNet(nn.Sequential(nn.Conv2d(3, 8, 1)), images)
    with pytest.raises(TraceError, match="no unit whose width could be searched"):
        MarkovNet(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), images, divisor=8)


def test_an_unknown_unit_has_no_chain(example):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    with pytest.raises(KeyError):
        net.chain("head.2")


# Modules that are not replaced

OTHERS = [
    "BufferScale",
    "ConvNeXt",
    "GatedLinearUnit",
    "GroupNorm",
    "Grouped",
    "InstanceNorm",
    "NormWithoutAffine",
    "PReLUs",
    "PositionalEmbedding",
    "RawConvolution",
    "ShuffleNetUnit",
    "SqueezeExciteConv",
    "ThreeDimensions",
    "TiedParameter",
    "Transposed",
    "TransposedDepthwise",
    "TransposedGrouped",
    "VisionTransformer",
    "WeightStandardised",
]


@cache
def _net_once(name):
    network = ZOO[name]()
    randomise(network.model, seed=0).double()
    inputs = tuple(x.double() for x in network.inputs)
    return MarkovNet(network.model, inputs, groups=4, divisor=1).double(), inputs


@pytest.fixture(params=OTHERS)
def other(request):
    """A net of one's own, and its inputs."""
    net, inputs = _net_once(request.param)
    return copy.deepcopy(net), inputs


def run(model, inputs):
    torch.manual_seed(0)  # for what is dropped at random
    return flat(model(*[x.clone() for x in inputs]))


def flat(values):
    return [x for x in torch.utils._pytree.tree_leaves(values) if torch.is_tensor(x)]


@torch.no_grad()
def test_masks_of_zeros_and_ones_are_the_sub_network_and_the_extracted_one(other, random_widths):
    net, inputs = other
    net.eval()
    net.graph.model.eval()
    assert net.graph.searchable
    for seed in range(2):
        widths = random_widths(net.graph, seed)
        expected = run(dmcp.extract(net.graph, widths), inputs)
        with net.at(widths):
            assert difference(run(net, inputs), expected) < 1e-11
        retain_surely(net, widths)
        with net.masked():
            assert difference(run(net, inputs), expected) < 1e-11
        dropped = {u.name: range(widths[u.name], u.channels) for u in net.graph.searchable}
        assert difference(outputs(zeroed(net.graph, dropped), inputs), expected) < 1e-11


@torch.no_grad()
def test_running_statistics_are_those_of_the_whole_network(other, random_widths):
    net, inputs = other
    net.train()
    widths = random_widths(net.graph)
    small = dmcp.extract(net.graph, widths)
    before = copy.deepcopy(dict(net.graph.model.named_buffers()))
    with net.at(widths):
        narrow = run(net, inputs)
    random_alpha(net)
    with net.masked():
        run(net, inputs)
    for name, buffer in net.graph.model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert difference(narrow, run(small, inputs)) < 1e-10


@pytest.mark.usefixtures("reference_ops")
def test_an_unmasked_net_is_the_users_model_bit_for_bit(other):
    net, inputs = other
    plain = copy.deepcopy(net.graph.model)
    for training in (True, False):
        net.train(training)
        plain.train(training)
        for got, wanted in zip(run(net, inputs), run(plain, inputs), strict=True):
            assert torch.equal(got, wanted)
    sum(x.sin().sum() for x in run(net, inputs)).backward()
    sum(x.sin().sum() for x in run(plain, inputs)).backward()
    for got, wanted in zip(net.graph.model.parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) is (wanted.grad is None)
        assert wanted.grad is None or torch.equal(got.grad, wanted.grad)
    buffers = zip(net.graph.model.named_buffers(), plain.buffers(), strict=True)
    assert all(torch.equal(got, wanted) for (_, got), wanted in buffers)


@pytest.mark.usefixtures("reference_ops")
def test_masks_of_ones_change_nothing(other):
    net, inputs = other
    net.eval()
    whole = run(net, inputs)
    fill_alpha(net, 80)
    with net.masked():
        masked = run(net, inputs)
        assert difference([x.detach() for x in masked], [x.detach() for x in whole]) < 1e-12
        sum(x.sin().sum() for x in masked).backward()
    assert all(alpha.grad.isfinite().all() for alpha in net.architecture_parameters())


def test_every_chain_has_a_gradient(other):
    """No unit that is searchable is without a mask: scaling its channels changes the outputs."""
    net, inputs = other
    random_alpha(net)
    net.train()
    with net.masked():
        sum(x.sin().sum() for x in run(net, inputs)).backward()
    for unit in net.graph.searchable:
        assert net.chain(unit.name).alpha.grad.abs().sum() > 0, unit.name


def test_a_unit_that_nothing_can_scale_is_not_searchable():
    net, _ = _net_once("WeightNorm")
    found = {unit.name: unit for unit in net.graph.units}
    (unit,) = [unit for name, unit in found.items() if "conv." in name]
    assert not unit.searchable
    assert unit.reason == "no module or parameter could scale its channels"
    assert unit.choices == (16,)
    with pytest.raises(ConfigError, match="could scale its channels"), net.at({unit.name: 8}):
        pass


def test_a_class_with_a_forward_of_its_own_is_followed():
    class Clipped(nn.BatchNorm2d):
        def forward(self, x):
            return F.relu6(super().forward(x))

    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(3, 32, 1), Clipped(32), nn.Conv2d(32, 2, 1)).double()
    net = MarkovNet(randomise(model, seed=0).eval(), images).eval()
    assert type(net.model[1]) is Clipped
    with torch.no_grad():
        with net.at({"0": 8}):
            assert net.model[1].num_features == 8
            narrow = net(images)
        assert net.model[1].num_features == 32
        assert difference([narrow], [dmcp.extract(net.graph, {"0": 8})(images)]) < 1e-12


def test_widths_lie_on_the_grid_of_their_steps():
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 3, groups=3), nn.BatchNorm2d(48), nn.Conv2d(48, 4, 1)
    )
    images = torch.zeros(2, 3, 8, 8)
    found = {u.name: u for u in MarkovNet(model, images, groups=4, divisor=8).graph.units}
    assert found["0"].step == found["1"].step == 3
    assert found["1"].choices == (24, 48)
    assert found["0"].choices[-1] == 24
    assert all(width % 3 == 0 for unit in (found["0"], found["1"]) for width in unit.choices)
    fine = {u.name: u for u in MarkovNet(model, images, groups=4, divisor=1).graph.units}
    assert all(width % 3 == 0 for width in fine["1"].choices)
    assert len(fine["1"].choices) >= 4


def test_a_grid_without_a_narrower_width_is_a_reason():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 2, 1)
    )
    net = MarkovNet(model, torch.zeros(2, 3, 8, 8), divisor=8)
    first, second, _ = net.graph.units
    assert (first.searchable, first.choices) == (False, (8,))
    assert first.reason == "no narrower width lies on its grid"
    assert second.searchable


def test_keyword_inputs_are_passed_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.offset = nn.Parameter(torch.rand(1, 8, 1, 1))

        def forward(self, images, *, gain):
            return self.last(self.first(images) * gain + self.offset)

    inputs = {"images": torch.randn(2, 3, 8, 8), "gain": torch.tensor(3.0)}
    net = MarkovNet(Scaled(), inputs, groups=4, divisor=1)
    with torch.no_grad():
        assert torch.equal(net(**inputs), net.graph.model(**inputs))
        with net.at({"first": 4}):
            narrow = net(**inputs)
        expected = dmcp.extract(net.graph, {"first": 4})(**inputs)
    torch.testing.assert_close(narrow, expected)


class InAList(nn.Module):
    """The modules are called through a plain list, not by their names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(16), nn.ReLU()
        self.order = [self.a, self.norm, self.act, self.b, self.c]

    def forward(self, x):
        for module in self.order:
            x = module(x)
        return x


class Doubling(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 2 + 1


class Gained(nn.Module):
    """The block asks its convolution for more than a convolution has."""

    def __init__(self):
        super().__init__()
        self.a, self.keys, self.c = nn.Conv2d(3, 16, 1), Doubling(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.a.gain = 3.0

    def forward(self, x):
        return self.c(self.keys(self.a(x) * self.a.gain).relu())


@pytest.mark.parametrize("kind", [InAList, Gained])
def test_modules_that_are_more_than_their_operator_follow_too(kind):
    torch.manual_seed(0)
    model, images = kind().eval(), torch.randn(2, 3, 5, 5)
    net = MarkovNet(model, images, groups=4, divisor=1).eval()
    torch.testing.assert_close(net(images), model(images))
    narrow = {unit.name: unit.choices[0] for unit in net.graph.units}
    small = dmcp.extract(net.graph, narrow).eval()
    with torch.no_grad(), net.at(narrow):
        torch.testing.assert_close(net(images), small(images))
    masks = [
        (chain, (torch.arange(chain.channels) < narrow[unit.name]).float())
        for unit in net.graph.searchable
        for chain in [net.chain(unit.name)]
    ]
    with torch.no_grad(), scaled(masks):
        net._set_tracking()
        torch.testing.assert_close(net(images), small(images))


class ComputedShift(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.shift = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return self.c((self.b(self.a(x).relu()) + self.shift.view(1, -1, 1, 1)).relu())


def test_a_unit_with_a_shift_that_no_mask_reaches_is_not_searched():
    net = MarkovNet(ComputedShift(), torch.zeros(2, 3, 5, 5), groups=4, divisor=1)
    units = {unit.name: unit for unit in net.graph.units}
    assert units["a"].searchable
    assert "could scale its channels" in units["b"].reason
