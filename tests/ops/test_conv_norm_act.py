"""A convolution and the norm behind it against PyTorch's own in float64."""

import pytest
import torch
from torch import nn

from dmcp.backends import native_nodes
from dmcp.nn import MarkovConv2d
from dmcp.ops import library, norm_act_reference
from dmcp.ops.conv_norm_act import Norm, conv_norm_act
from dmcp.ops.convolution import Convolution
from dmcp.ops.layout import prefix
from dmcp.ops.norm_act import Options

INPUTS, OUTPUTS, BATCH, SIZE = 11, 13, 3, 9

POINTWISE = Convolution(INPUTS, (1, 1), (1, 1), (0, 0), (1, 1), False)
CONVOLUTIONS = {
    "pointwise": POINTWISE,
    "strided pointwise": POINTWISE._replace(stride=(2, 2)),
    "depthwise 3": Convolution(INPUTS, (3, 3), (1, 1), (1, 1), (1, 1), True),
    "depthwise 3 / 2": Convolution(INPUTS, (3, 3), (2, 2), (1, 1), (1, 1), True),
    "depthwise 5": Convolution(INPUTS, (5, 5), (1, 1), (2, 2), (1, 1), True),
    "depthwise 5 / 2": Convolution(INPUTS, (5, 5), (2, 2), (2, 2), (1, 1), True),
    "depthwise dilated": Convolution(INPUTS, (3, 3), (1, 1), (2, 2), (2, 2), True),
    "depthwise oblong": Convolution(INPUTS, (3, 5), (1, 2), (1, 2), (1, 1), True),
    "dense 3": Convolution(INPUTS, (3, 3), (1, 1), (1, 1), (1, 1), False),
    "dense 3 / 2 narrowed": Convolution(2 * INPUTS, (3, 3), (2, 2), (1, 1), (1, 1), False),
    "dense 3 narrowed, dilated": Convolution(2 * INPUTS, (3, 3), (1, 1), (2, 2), (2, 2), False),
    "dense 3 narrowed, unpadded": Convolution(2 * INPUTS, (3, 3), (3, 3), (0, 0), (1, 1), False),
    "dense 3 x 5 narrowed": Convolution(2 * INPUTS, (3, 5), (2, 1), (1, 0), (1, 2), False),
    "strided pointwise narrowed": POINTWISE._replace(stride=(2, 2), inputs=2 * INPUTS),
    "dense 7 / 2": Convolution(INPUTS, (7, 7), (2, 2), (3, 3), (1, 1), False),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-1}


@pytest.fixture(params=["Python", "C++"], autouse=True)
def nodes(request, monkeypatch):
    """What the nodes of the autograd graph are written in."""
    if request.param == "Python":
        monkeypatch.setattr(library, "_original", False)
    elif not native_nodes():
        pytest.skip("the C++ nodes are not built")
    return request.param


class Layer:
    """Random tensors of a layer, in float64."""

    def __init__(self, conv, *, residual=False, inputs=INPUTS, outputs=OUTPUTS, seed=0):
        generator = torch.Generator().manual_seed(seed)
        outputs = inputs if conv.depthwise else outputs

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = random(BATCH, inputs, SIZE, SIZE).to(memory_format=torch.channels_last)
        weight = random(outputs, 1 if conv.depthwise else inputs, *conv.kernel)
        shape = convolved(conv, x, weight).shape
        self.leaves = {
            "x": x,
            "weight": weight,
            "gain": 1 + 0.1 * random(outputs),
            "bias": random(outputs),
            "scale": torch.linspace(1, 0.1, outputs, dtype=torch.float64),
        }
        if residual:
            self.leaves["residual"] = random(*shape).to(memory_format=torch.channels_last)
        self.grad = random(*shape).to(memory_format=torch.channels_last)
        self.mean = torch.zeros(outputs, dtype=torch.float64)
        self.var = torch.ones(outputs, dtype=torch.float64)

    def to(self, dtype):
        """Leaves for a pass in ``dtype``, parameters in float32 at least."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        activations = ("x", "residual")
        return {
            name: tensor.to(dtype if name in activations else wide).requires_grad_()
            for name, tensor in self.leaves.items()
        }


def convolved(conv, x, weight):
    groups = x.shape[1] if conv.depthwise else 1
    return torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, groups)


def expected(conv, layer, act, place):
    """y, the gradients and the running statistics by PyTorch in float64."""
    leaves = layer.to(torch.float64)
    mean, var = layer.mean.clone(), layer.var.clone()
    y = norm_act_reference(
        convolved(conv, leaves["x"], leaves["weight"]),
        leaves["gain"],
        leaves["bias"],
        scale=leaves["scale"],
        residual=leaves.get("residual"),
        residual_place=place,
        act=act,
        running_mean=mean,
        running_var=var,
        training=True,
    )
    return [y, *torch.autograd.grad(y, list(leaves.values()), layer.grad), mean, var]


def computed(conv, layer, act, place, dtype):
    leaves = layer.to(dtype)
    wide = leaves["weight"].dtype
    mean, var = layer.mean.to(wide, copy=True), layer.var.to(wide, copy=True)
    norm = Norm(leaves["gain"], leaves["bias"], leaves["scale"], leaves.get("residual"), mean, var)
    options = Options(0.1, 1e-5, act, place == "before" and "residual" in leaves)
    y = conv_norm_act(leaves["x"], leaves["weight"], norm, conv, options)
    grads = torch.autograd.grad(y, list(leaves.values()), layer.grad.to(dtype))
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(g.dtype == leaf.dtype for g, leaf in zip(grads, leaves.values(), strict=True))
    return [y, *grads, mean, var]


def assert_close(results, references, tolerance):
    for number, (got, wanted) in enumerate(zip(results, references, strict=True)):
        assert got.shape == wanted.shape
        error = float((got.double() - wanted).detach().norm() / wanted.detach().norm())
        assert error <= tolerance, f"result {number} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_it_is_the_convolution_and_the_norm(name, dtype):
    conv = CONVOLUTIONS[name]
    layer = Layer(conv)
    results = computed(conv, layer, "relu6", "after", dtype)
    assert_close(results, expected(conv, layer, "relu6", "after"), TOLERANCE[dtype])


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("act", ["identity", "relu"])
@pytest.mark.parametrize("name", ["pointwise", "depthwise 3", "dense 3"])
def test_a_residual_joins_before_or_after_the_activation(name, act, place):
    conv = CONVOLUTIONS[name]
    layer = Layer(conv, residual=True)
    results = computed(conv, layer, act, place, torch.float64)
    assert_close(results, expected(conv, layer, act, place), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["pointwise", "depthwise 3 / 2", "dense 3", "dense 3 / 2 narrowed"]
)
def test_a_prefix_of_the_weights_gets_its_gradients_added(name, dtype):
    """As if the weights had been cut, and with what was in ``.grad`` before."""
    conv = CONVOLUTIONS[name]
    layer = Layer(conv, residual=True)
    outputs, inputs = layer.leaves["weight"].shape[:2]
    wide = Layer(conv, inputs=INPUTS + 5, outputs=OUTPUTS + 4, seed=1).to(dtype)
    parameters = [wide[key] for key in ("weight", "gain", "bias")]
    with torch.no_grad():
        wide["weight"][:outputs, :inputs] = layer.leaves["weight"]
        wide["gain"][:outputs] = layer.leaves["gain"]
        wide["bias"][:outputs] = layer.leaves["bias"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    leaves = layer.to(dtype)
    norm = Norm(wide["gain"], wide["bias"], leaves["scale"], leaves["residual"])
    options = Options(0.0, 1e-5, "relu", True)
    y = conv_norm_act(leaves["x"], wide["weight"], norm, conv, options, (outputs, inputs))
    y.backward(layer.grad.to(dtype))
    reference = expected(conv, layer, "relu", "before")
    parts = [prefix(p.grad, (outputs, inputs)[: p.ndim]) for p in parameters]
    got = [leaves["x"].grad, *(part - 1 for part in parts)]
    got += [leaves["scale"].grad, leaves["residual"].grad]
    assert_close([y, *got], reference[:-2], TOLERANCE[dtype])
    for part, parameter in zip(parts, parameters, strict=True):
        part.fill_(1)
        assert (parameter.grad == 1).all(), "nothing else is touched"


@pytest.mark.parametrize("name", ["pointwise", "depthwise 3", "dense 3"])
def test_frozen_weights_get_no_gradient_and_their_input_is_not_kept(name):
    conv = CONVOLUTIONS[name]
    layer = Layer(conv)
    leaves = layer.to(torch.float32)
    for key in ("weight", "gain", "bias"):
        leaves[key].requires_grad_(False)
    norm = Norm(leaves["gain"], leaves["bias"], leaves["scale"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = conv_norm_act(
            leaves["x"], leaves["weight"], norm, conv, Options(0, 1e-5, "relu", False)
        )
    assert sum(tensor.ndim == 4 and tensor.shape[0] == BATCH for tensor in saved) == 1
    y.backward(layer.grad.float())
    reference = expected(conv, layer, "relu", "after")
    assert_close(
        [y, leaves["x"].grad, leaves["scale"].grad],
        [reference[0], reference[1], reference[5]],
        2e-5,
    )
    assert all(leaves[key].grad is None for key in ("weight", "gain", "bias"))


def test_one_value_per_channel_is_refused_as_by_batch_norm():
    x = torch.randn(1, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    norm = Norm(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="2 or more values per channel"):
        conv_norm_act(x, torch.randn(4, 4, 1, 1), norm, POINTWISE, Options(0, 1e-5, "relu", False))


def test_it_compiles_without_a_graph_break():
    layer = Layer(POINTWISE)
    leaves = layer.to(torch.float32)

    def run(x, weight, gain, bias, scale):
        norm = Norm(gain, bias, scale)
        return conv_norm_act(x, weight, norm, POINTWISE, Options(0, 1e-5, "relu6", False))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        y = function(*leaves.values())
        results.append([y, *torch.autograd.grad(y, list(leaves.values()), layer.grad.float())])
    assert_close(results[1], [tensor.double() for tensor in results[0]], 1e-6)


@pytest.mark.parametrize("name", ["pointwise", "dense 3", "depthwise 3", "dense 3 / 2 narrowed"])
def test_saved_tensors_may_come_back_in_another_layout(name):
    """As from `save_on_cpu` with pinned memory."""
    conv = CONVOLUTIONS[name]
    layer = Layer(conv)

    def unpack(tensor):
        return tensor.clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        found = computed(conv, layer, "relu6", "after", torch.float32)
    assert_close(found, expected(conv, layer, "relu6", "after"), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["depthwise 3", "dense 3", "pointwise"])
def test_a_gradient_may_lie_as_it_likes(name, dtype, nodes):
    conv = CONVOLUTIONS[name]
    if (name, nodes) == ("pointwise", "Python"):
        pytest.skip("the op refuses it")
    found = []
    for layout in (torch.zeros_like, lambda weight: torch.zeros_like(weight.mT.contiguous()).mT):
        leaves = Layer(conv).to(dtype)
        weight = leaves["weight"].detach().requires_grad_()
        swapped = layout(weight.transpose(0, 1)).transpose(0, 1)
        weight.grad = swapped
        y = conv_norm_act(
            *(leaves["x"], weight, Norm(), conv, Options(0.1, 1e-5, "relu", False)),
            widths=tuple(weight.shape[:2]),
        )
        y.square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)


def test_an_image_smaller_than_a_window_is_refused():
    module = MarkovConv2d(8, 6, 3, stride=2, bias=False, chain=None, norm=nn.BatchNorm2d(6))
    x = torch.randn(4, 8, 2, 2).to(memory_format=torch.channels_last)
    with pytest.raises((ValueError, RuntimeError), match="kernel"):
        module(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_it_can_be_traced():
    """By the tracer of TensorBoard's graphs."""
    module = MarkovConv2d(8, 6, 1, bias=False, chain=None, norm=nn.BatchNorm2d(6), act=nn.ReLU())
    x = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    traced = torch.jit.trace(module, x, check_trace=False)
    torch.testing.assert_close(traced(x), module(x))


@pytest.mark.parametrize(
    "norm",
    [
        Norm(weight=torch.ones(3)),
        Norm(scale=torch.ones(3)),
        Norm(running_mean=torch.ones(3), running_var=torch.ones(3)),
        Norm(running_mean=torch.ones(OUTPUTS)),
        Norm(bias=torch.ones(OUTPUTS, dtype=torch.float64)),
    ],
    ids=["weight", "scale", "statistics", "one statistic", "dtype"],
)
def test_the_node_takes_no_vectors_that_do_not_fit(norm, nodes):
    if nodes == "Python":
        pytest.skip("of the C++ node")
    layer = Layer(POINTWISE).to(torch.float32)
    node = torch.ops.dmcp.conv_norm_act_node.default
    options = (*POINTWISE, *Options(0.1, 1e-5, "relu", False).numbers, None)
    assert node(layer["x"], layer["weight"], *norm, *options) is None
    assert node(layer["x"], layer["weight"], *Norm(), *options) is not None


def test_a_module_of_the_paper_is_one_operation(nodes):
    """conv, norm, activation and mask make one node of the autograd graph."""
    layer = MarkovConv2d(4, 8, 1, bias=False, norm=nn.BatchNorm2d(8), act=nn.ReLU6())
    x = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    name = "_ConvNormActBackward" if nodes == "Python" else "ConvNormAct"
    assert name in y.grad_fn.name()
