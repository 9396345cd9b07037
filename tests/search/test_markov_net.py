import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.errors import ConfigError, TraceError
from dmcp.nn import MarkovBatchNorm2d
from dmcp.search import MarkovNet


def fill_alpha(net, value):
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(value)


def random_alpha(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.normal_(1.0, 1.0, generator=generator)


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
    network, tensors, memory_format
):
    plain = copy.deepcopy(network.model).to(memory_format=memory_format)
    model = network.model.to(memory_format=memory_format)
    inputs = tuple(x.to(memory_format=memory_format) for x in network.inputs)
    net = MarkovNet(model, inputs, groups=4, divisor=1)
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


def test_an_unmasked_net_is_the_users_model_to_rounding(network, tensors):
    """With the kernels of this machine; the last bits are PyTorch's with the reference ops only."""
    case = network.to(torch.float64)
    plain = copy.deepcopy(case.model)
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    expected, actual = (passes(model, case.inputs, tensors) for model in (plain, net))
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    for got, wanted in zip(case.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(case.model.buffers(), plain.buffers(), strict=True):
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


def test_a_sub_network_equals_the_extracted_network(network, random_widths, tensors):
    case = network.to(torch.float64)
    net = MarkovNet(case.model.eval(), case.inputs, groups=4, divisor=1).eval()
    for seed in range(3):
        widths = random_widths(net.graph, seed)
        small = dmcp.extract(net.graph, widths)
        with net.at(widths):
            actual = tensors(net(*case.inputs))
        for got, wanted in zip(actual, tensors(small(*case.inputs)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_sub_network_in_training_equals_the_extracted_network(network, random_widths, tensors):
    """Batch statistics and gradients too; running statistics stay."""
    case = network.to(torch.float64)
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    widths = random_widths(net.graph)
    small = dmcp.extract(net.graph, widths)
    before = {name: buffer.clone() for name, buffer in case.model.named_buffers()}
    with net.at(widths):
        actual = passes(net, case.inputs, tensors)
    expected = passes(small, case.inputs, tensors)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    norms = [sum(p.grad.square().sum() for p in m.parameters()) for m in (case.model, small)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-9, atol=0)
    for name, buffer in case.model.named_buffers():
        assert torch.equal(buffer, before[name])


def test_certain_masks_equal_the_extracted_network(network, random_widths, tensors):
    case = network.to(torch.float64)
    net = MarkovNet(case.model.eval(), case.inputs, groups=4, divisor=1).eval().double()
    for seed in range(3):
        widths = random_widths(net.graph, seed)
        with torch.no_grad():
            for unit in net.graph.searchable:
                if len(unit.choices) > 1:
                    retained = torch.tensor(unit.choices[1:]) <= widths[unit.name]
                    net.chain(unit.name).alpha.copy_(torch.where(retained, 80.0, -80.0))
        with net.masked():
            actual = tensors(net(*case.inputs))
        expected = tensors(dmcp.extract(net.graph, widths)(*case.inputs))
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_masked_training_pass_leaves_the_running_statistics(network):
    net = MarkovNet(network.model, network.inputs, groups=4, divisor=1)
    random_alpha(net)
    before = {name: buffer.clone() for name, buffer in network.model.named_buffers()}
    with net.masked():
        net(*network.inputs)
    unsearched = {
        member.module for unit in net.graph.units if not unit.searchable for member in unit.members
    }
    for name, buffer in network.model.named_buffers():
        if name.rpartition(".")[0] not in unsearched:
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


class Clipped(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu6(super().forward(x))


def test_networks_that_cannot_follow_chains_are_refused():
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(TraceError, match="no unit whose width could be searched"):
        MarkovNet(nn.Sequential(nn.Conv2d(3, 8, 1)), images)
    with pytest.raises(TraceError, match="no unit whose width could be searched"):
        MarkovNet(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)), images, divisor=8)
    own = nn.Sequential(nn.Conv2d(3, 32, 1), Clipped(32), nn.Conv2d(32, 2, 1))
    with pytest.raises(TraceError, match=r"1 \(Clipped\).*forward of its own"):
        MarkovNet(own, images)


def test_an_unknown_unit_has_no_chain(example):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    with pytest.raises(KeyError):
        net.chain("head.2")
