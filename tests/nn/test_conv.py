import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dmcp.errors import ConfigError
from dmcp.nn import MarkovBatchNorm2d, MarkovConv2d, masked


def same_weights(source, target):
    target.load_state_dict(source.state_dict(), strict=False)
    return target


def assert_same_pass(expected, actual, images):
    """The same output, input gradient and weight gradients, bit for bit."""
    results = []
    for module in (expected, actual):
        x = images.clone().requires_grad_()
        y = module(x)
        y.square().sum().backward()
        weights = [p.grad for name, p in module.named_parameters() if "alpha" not in name]
        results.append([y.detach(), x.grad, *weights])
        module.zero_grad(set_to_none=True)
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(wanted, got)


def test_the_signature_is_that_of_conv2d_and_the_chains():
    plain = list(inspect.signature(nn.Conv2d).parameters.values())
    markov = list(inspect.signature(MarkovConv2d).parameters.values())
    for wanted, got in zip(plain, markov, strict=False):
        assert (got.name, got.default, got.kind) == (wanted.name, wanted.default, wanted.kind)
    own = markov[len(plain) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in own)
    assert [parameter.name for parameter in own] == [
        "chain",
        "chain_groups",
        "divisor",
        "min_width",
        "start",
        "norm",
        "act",
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"stride": (1, 2), "padding": (2, 1), "dilation": 2},
        {"padding": "same"},
        {"padding": "valid"},
        {"padding": 1, "groups": 8},
        {"padding": 1, "groups": 2},
    ],
    ids=str,
)
def test_it_is_conv2d_at_full_width(options, padding_mode, bias):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, 3, bias=bias, padding_mode=padding_mode, **options)
    markov = MarkovConv2d(8, 16, 3, bias=bias, padding_mode=padding_mode, **options)
    same_weights(plain, markov)
    images = torch.randn(2, 8, 9, 9)
    assert_same_pass(plain, markov, images)
    assert_same_pass(plain, markov, images.to(memory_format=torch.channels_last))


def test_the_state_dict_is_that_of_conv2d_and_the_chain():
    assert list(MarkovConv2d(3, 16, 3).state_dict()) == ["weight", "bias", "chain.alpha"]
    assert list(MarkovConv2d(3, 16, 3, chain=None).state_dict()) == ["weight", "bias"]
    own = MarkovConv2d(3, 16, 3, bias=False, norm=nn.BatchNorm2d(16))
    norm = [f"norm.{name}" for name in nn.BatchNorm2d(16).state_dict()]
    assert list(own.state_dict()) == ["weight", "chain.alpha", *norm]
    follower = MarkovConv2d(16, 16, 3, groups=16, chain=own.chain)
    assert list(follower.state_dict()) == ["weight", "bias"]


def test_a_narrower_chain_computes_a_prefix_of_the_outputs():
    torch.manual_seed(0)
    conv = MarkovConv2d(3, 24, 3).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    whole = conv(images)
    conv.chain.width = 10
    torch.testing.assert_close(conv(images), whole[:, :10])


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_a_narrower_input_uses_a_prefix_of_the_inputs(padding_mode):
    torch.manual_seed(0)
    conv = MarkovConv2d(6, 16, 3, padding=1, padding_mode=padding_mode).double()
    images = torch.randn(2, 6, 8, 8, dtype=torch.float64)
    images[:, 4:] = 0
    torch.testing.assert_close(conv(images[:, :4]), conv(images))


def test_a_depthwise_convolution_follows_its_producers_chain():
    torch.manual_seed(0)
    first = MarkovConv2d(3, 16, 1)
    depthwise = MarkovConv2d(16, 16, 3, groups=16, chain=first.chain)
    images = torch.randn(2, 3, 8, 8)
    whole = depthwise(first(images))
    first.chain.width = 8
    torch.testing.assert_close(depthwise(first(images)), whole[:, :8])


@pytest.mark.usefixtures("reference_ops")
def test_with_its_norm_and_activation_it_is_the_three_modules():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    markov = MarkovConv2d(3, 16, 3, bias=False, norm=norm, act=nn.ReLU6())
    assert isinstance(markov.norm, MarkovBatchNorm2d)
    assert markov.norm.weight is norm.weight
    assert markov.norm.running_var is norm.running_var
    markov.weight.data.copy_(plain[0].weight.data)
    assert_same_pass(plain, markov, torch.randn(4, 3, 8, 8))
    assert torch.equal(norm.running_mean, plain[1].running_mean)
    assert torch.equal(norm.running_var, plain[1].running_var)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("norm", "act"),
    [
        (False, None),
        (False, "relu6"),
        (True, None),
        (True, "relu"),
        (True, "relu6"),
        (False, "silu"),
    ],
)
def test_the_mask_scales_the_activation_once(norm, act):
    torch.manual_seed(0)
    acts = {None: nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6(), "silu": nn.SiLU()}
    conv = MarkovConv2d(
        3,
        24,
        3,
        norm=nn.BatchNorm2d(24) if norm else None,
        act=None if act is None else acts[act],
        start=0.6,
    ).double()
    images = 5 * torch.randn(4, 3, 8, 8, dtype=torch.float64)
    alpha = conv.chain.alpha.detach().clone().requires_grad_()
    q = torch.cat([alpha.new_ones(8), *(alpha.sigmoid().cumprod(0)[k].expand(8) for k in range(2))])
    y = F.conv2d(images, conv.weight, conv.bias)
    if norm:
        y = F.batch_norm(y, None, None, conv.norm.weight, conv.norm.bias, training=True)
    expected = q.view(-1, 1, 1) * acts[act](y)
    with masked(conv):
        actual = conv(images)
        actual.sin().sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(expected.sin().sum(), alpha)
    torch.testing.assert_close(conv.chain.alpha.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("act", [nn.ReLU(), None], ids=["relu", "none"])
def test_a_residual_joins_between_the_norm_and_the_activation(act):
    torch.manual_seed(0)
    conv = MarkovConv2d(8, 16, 3, padding=1, bias=False, norm=nn.BatchNorm2d(16), act=act).double()
    images = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    residual = torch.randn(4, 16, 6, 6, dtype=torch.float64)
    with masked(conv):
        actual = conv(images, residual)
    v = F.batch_norm(F.conv2d(images, conv.weight, padding=1), None, None, training=True)
    total = conv.chain.channel_retain().view(-1, 1, 1) * v + residual
    expected = total if act is None else act(total)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"norm": nn.BatchNorm2d(16), "act": nn.LeakyReLU()}])
def test_a_residual_without_a_place_to_join_is_refused(options):
    conv = MarkovConv2d(8, 16, 1, **options)
    with pytest.raises(ConfigError, match="a residual needs a norm"):
        conv(torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 4, 4))


def test_mask_and_width_together_scale_the_prefix():
    torch.manual_seed(0)
    conv = MarkovConv2d(3, 24, 3, norm=nn.BatchNorm2d(24), act=nn.ReLU()).eval()
    images = torch.randn(2, 3, 8, 8)
    with masked(conv):
        whole = conv(images)
        conv.chain.width = 16
        torch.testing.assert_close(conv(images), whole[:, :16])


def test_bad_arguments_are_named():
    other = MarkovConv2d(3, 16, 3)
    with pytest.raises(ConfigError, match="chain has 16 channels, out_channels is 8"):
        MarkovConv2d(3, 8, 3, chain=other.chain)
    with pytest.raises(ConfigError, match="norm has 4 features, out_channels is 16"):
        MarkovConv2d(3, 16, 3, norm=nn.BatchNorm2d(4))
    grouped = MarkovConv2d(8, 16, 3, groups=2)
    grouped.chain.width = 8
    with pytest.raises(ConfigError, match="groups=2 cannot be narrowed"):
        grouped(torch.zeros(1, 8, 4, 4))
    depthwise = MarkovConv2d(16, 16, 3, groups=16)
    depthwise.chain.width = 8
    with pytest.raises(
        ConfigError, match="depthwise convolution that gets 16 channels cannot make 8"
    ):
        depthwise(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize("bad", ["shape", "dtype"])
def test_a_residual_that_does_not_fit_is_refused(bad):
    layer = MarkovConv2d(4, 8, 1, bias=False, norm=nn.BatchNorm2d(8), act=nn.ReLU())
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    residual = torch.randn(2, 8, 1, 1) if bad == "shape" else torch.randn(2, 8, 3, 3).double()
    with pytest.raises(ValueError, match="residual must be"):
        layer(x, residual)
    with pytest.raises(ValueError, match="residual_place must be"):
        layer(x, torch.randn(2, 8, 3, 3), "behind")


def test_a_norm_of_another_dtype_is_left_to_pytorch():
    layer = MarkovConv2d(4, 8, 1, bias=False, norm=nn.BatchNorm2d(8).double())
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises((TypeError, RuntimeError)):
        layer(x)


def test_images_of_one_channel_keep_their_layout():
    layer = MarkovConv2d(1, 8, 3, padding=1, bias=False, norm=nn.BatchNorm2d(8))
    assert layer(torch.randn(2, 1, 5, 5)).is_contiguous()


# --- What PyTorch refuses, and what is no plain tensor --------------------------------------------


def fused(**options):
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    own = MarkovConv2d(8, 16, 3, padding=1, bias=False, norm=nn.BatchNorm2d(16), **options)
    same_weights(conv, own)
    return own


def images_of(channels):
    return torch.randn(4, channels, 6, 6).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(16)], ids=["bare", "norm"])
def test_more_channels_than_there_are_weights_for_are_refused_while_gradients_add_up(norm):
    conv = MarkovConv2d(8, 16, 1, bias=False, norm=norm)
    conv.chain.width = 8
    conv.state.accumulates = True
    for parameter in conv.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        conv(images_of(12))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_images_that_no_convolution_takes_are_refused_under_autocast_too(dtype):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((RuntimeError, TypeError)):
        fused()(images_of(8).to(dtype))


def test_images_without_data_have_a_shape():
    own = MarkovConv2d(8, 16, 3, norm=nn.BatchNorm2d(16, device="meta"), bias=False, device="meta")
    assert own(torch.empty(2, 8, 4, 4, device="meta")).shape == (2, 16, 2, 2)


@pytest.mark.parametrize(
    "options",
    [{"stride": 0}, {"padding": -1}, {"dilation": 0}],
    ids=lambda options: next(iter(options)),
)
def test_windows_that_pytorch_refuses_are_refused(options):
    own = MarkovConv2d(8, 16, 3, bias=False, norm=nn.BatchNorm2d(16), **options)
    with pytest.raises(RuntimeError):
        own(images_of(8))


class Halved(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight / 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_parametrised_weight_is_computed_once_in_a_pass(layout):
    own = fused()
    nn.utils.parametrize.register_parametrization(own, "weight", halved := Halved())
    images = images_of(8).to(memory_format=layout)
    halved.calls = 0
    y = own(images)
    assert halved.calls == 1
    expected = F.batch_norm(F.conv2d(images, own.weight, padding=1), None, None, training=True)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert own.parametrizations.weight.original.grad is not None


class Standardised(MarkovConv2d):
    @property
    def weight(self):
        weight = self._parameters["weight"]
        return weight - weight.mean((1, 2, 3), keepdim=True)


def test_a_weight_that_the_class_computes_is_used_in_every_layout():
    own, images = fused(), images_of(8)
    own.__class__ = Standardised
    torch.testing.assert_close(own(images), own(images.contiguous()))


def test_a_weight_that_is_no_leaf_gets_its_gradient_by_autograd():
    own, source = fused(), torch.randn(16, 8, 3, 3, requires_grad=True)
    own.state.accumulates = True
    for parameter in own.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weight = source * 1
    weight.retain_grad()
    weight.grad = torch.zeros_like(weight)
    torch.func.functional_call(own, {"weight": weight}, images_of(8)).square().sum().backward()
    assert source.grad.abs().sum() > 0


def test_gradients_are_the_same_under_compiled_autograd():
    own, images = fused(), images_of(8)
    own(images).square().sum().backward()
    expected = own.weight.grad.clone()
    own.weight.grad = None
    compiler = torch.compile(backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        own(images).square().sum().backward()
    torch.testing.assert_close(own.weight.grad, expected)


def test_a_pass_that_is_refused_is_not_counted():
    own = fused()
    with pytest.raises(ValueError, match="residual must be"):
        own(images_of(8), torch.randn(4, 16, 5, 5))
    assert own.norm.num_batches_tracked == 0
    own(images_of(8))
    assert own.norm.num_batches_tracked == 1
