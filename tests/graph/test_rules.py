import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.graph.rules import UnsupportedError, Value, reshape_slots


class Calls(nn.Module):
    def __init__(self, function, features=8):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(features, 4)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def pooled(function):
    return lambda x: function(x).mean((2, 3))


FUNCTIONS = {
    "relu": pooled(F.relu),
    "relu in place": pooled(lambda x: F.relu(x, inplace=True)),
    "relu6": pooled(F.relu6),
    "relu6 in place": pooled(lambda x: F.relu6(x, inplace=True)),
    "leaky relu": pooled(lambda x: F.leaky_relu(x, negative_slope=0.2)),
    "hardtanh": pooled(lambda x: F.hardtanh(x, max_val=2.0)),
    "silu": pooled(F.silu),
    "hardswish": pooled(F.hardswish),
    "gelu": pooled(lambda x: F.gelu(x, approximate="tanh")),
    "elu": pooled(lambda x: F.elu(x, alpha=0.5)),
    "mish": pooled(F.mish),
    "tanh": pooled(torch.tanh),
    "dropout": pooled(lambda x: F.dropout(x, 0.5, training=False)),
    "max pool": pooled(lambda x: F.max_pool2d(x, 3, 2, padding=1)),
    "average pool": pooled(lambda x: F.avg_pool2d(x, 2)),
    "nearest": pooled(lambda x: F.interpolate(x, scale_factor=2)),
    "bilinear": pooled(lambda x: F.interpolate(x, size=(5, 5), mode="bilinear")),
    "mean with dtype": lambda x: x.mean((2, 3), dtype=torch.float64),
    "mean keeping dimensions": lambda x: x.mean((2, 3), keepdim=True).squeeze((2, 3)),
    "mean of one dimension": lambda x: x.mean(-1).mean(-1),
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), start_dim=1),
    "view": lambda x: F.adaptive_avg_pool2d(x, 1).view(len(x), -1),
    "reshape": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(len(x), -1),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "unsqueeze": lambda x: x.mean((2, 3)).unsqueeze(2).flatten(1),
    "add": pooled(lambda x: torch.add(x, F.relu(x), alpha=2)),
    "add in place": pooled(lambda x: F.relu(x).add_(x)),
    "add to a pooled map": pooled(lambda x: x + F.adaptive_avg_pool2d(x, 1)),
    "subtract": pooled(lambda x: F.relu(x) - x),
    "concatenate in space": pooled(lambda x: torch.cat([x, F.relu(x)], dim=-1)),
    "rows as channels and back": lambda x: x.flatten(0, 1).mean((1, 2)).view(2, 8),
}
REFUSED = {"rows as channels and back"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_operator_passes_the_channels_on(name):
    """Dropping channels before the operator equals zeroing them, in the traced model."""
    torch.manual_seed(0)
    model = Calls(FUNCTIONS[name]).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if name in REFUSED:
        with pytest.raises(dmcp.errors.TraceError):
            dmcp.trace(model, images)
        return
    graph = dmcp.trace(model, images)
    assert [unit.name for unit in graph.searchable] == ["first"]
    small = dmcp.extract(graph, kept={"first": [6, 1, 3]})
    dropped = [0, 2, 4, 5, 7]
    with torch.no_grad():
        model.first.weight[dropped] = 0
        model.first.bias[dropped] = 0
    torch.testing.assert_close(small(images), model(images), rtol=1e-12, atol=1e-13)


def test_a_convolution_with_named_padding_is_understood():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = dmcp.trace(model, torch.zeros(1, 3, 8, 8))
    assert dmcp.extract(graph, {"0": 3})(torch.zeros(1, 3, 8, 8)).shape == (1, 2, 8, 8)


def test_a_linear_layer_over_space_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 2))
    with pytest.raises(dmcp.errors.TraceError, match="it mixes dimension 3, channels lie on 1"):
        dmcp.trace(model, torch.zeros(2, 3, 8, 8))


def value(*shape):
    return Value(shape, 1, np.arange(shape[1]), 0)


@pytest.mark.parametrize(
    ("old", "new", "axis", "slots"),
    [
        ((2, 3, 2, 2), (2, 12), 1, [0] * 4 + [1] * 4 + [2] * 4),
        ((2, 3, 1, 1), (2, 3), 1, [0, 1, 2]),
        ((2, 3), (2, 3, 1, 1), 1, [0, 1, 2]),
        ((2, 3, 4, 4), (2, 3, 16), 1, [0, 1, 2]),
        ((1, 3, 2, 2), (1, 12), 1, [0] * 4 + [1] * 4 + [2] * 4),
        ((2, 3, 2), (6, 2), 0, [0, 1, 2, 0, 1, 2]),
        ((2, 1, 2, 2), (2, 4), 1, [0] * 4),
        ((2, 3, 1, 1), (2, 1, 3), 2, [0, 1, 2]),
    ],
)
def test_reshaping_moves_the_channels(old, new, axis, slots):
    found_axis, found = reshape_slots(value(*old), new)
    assert (found_axis, found.tolist()) == (axis, slots)


@pytest.mark.parametrize(("old", "new"), [((2, 4, 2), (2, 2, 4)), ((2, 4), (2, 2, 2))])
def test_reshaping_that_splits_the_channels_is_refused(old, new):
    with pytest.raises(UnsupportedError, match="splits the channels"):
        reshape_slots(value(*old), new)
