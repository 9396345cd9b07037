import pytest
import torch
import torch.nn.functional as F

# What f(0) = 0 and f(q v) = q f(v) for q >= 0 are, by mathematics.
FUNCTIONS = {
    "relu": (F.relu, True, True),
    "relu in place": (lambda x: F.relu(x, inplace=True), True, True),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), True, True),
    "abs": (torch.abs, True, True),
    "minus": (lambda x: -x, True, True),
    "twice": (lambda x: 2 * x, True, True),
    "half": (lambda x: x / 2, True, True),
    "clamp below by 0": (lambda x: x.clamp(min=0), True, True),
    "clamp above by 0": (lambda x: x.clamp(max=0), True, True),
    "relu6": (F.relu6, True, False),
    "relu6 in place": (lambda x: F.relu6(x, inplace=True), True, False),
    "hardtanh": (F.hardtanh, True, False),
    "hardswish": (F.hardswish, True, False),
    "silu": (F.silu, True, False),
    "gelu": (F.gelu, True, False),
    "gelu by tanh": (lambda x: F.gelu(x, approximate="tanh"), True, False),
    "elu": (F.elu, True, False),
    "selu": (F.selu, True, False),
    "mish": (F.mish, True, False),
    "tanh": (torch.tanh, True, False),
    "sin": (torch.sin, True, False),
    "hardshrink": (F.hardshrink, True, False),
    "square": (torch.square, True, False),
    "pow 2": (lambda x: x**2, True, False),
    "pow 1": (lambda x: x**1, True, True),
    "clamp around 0": (lambda x: x.clamp(-1, 1), True, False),
    "threshold": (lambda x: F.threshold(x, 1.0, 0.0), True, False),
    "sign": (torch.sign, True, False),
    "sigmoid": (torch.sigmoid, False, False),
    "sigmoid in place": (lambda x: x.sigmoid_(), False, False),
    "hardsigmoid": (F.hardsigmoid, False, False),
    "logsigmoid": (F.logsigmoid, False, False),
    "softplus": (F.softplus, False, False),
    "exp": (torch.exp, False, False),
    "cos": (torch.cos, False, False),
    "reciprocal": (torch.reciprocal, False, False),
    "pow 0": (lambda x: x**0, False, False),
    "plus 1": (lambda x: x + 1, False, False),
    "1 minus": (lambda x: 1 - x, False, False),
    "clamp above 0": (lambda x: x.clamp(1, 2), False, False),
    "threshold to 1": (lambda x: F.threshold(x, 0.5, 1.0), False, False),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_operator_itself_says_what_it_makes_of_zero_and_of_a_scale(follow, name):
    function, keeps_zero, homogeneous = FUNCTIONS[name]
    found = follow(function)
    assert found.axes == {1: found.channels}
    assert found.blocked == {}
    assert found.node.tainted is not keeps_zero
    assert found.node.kind == "activation"
    assert found.node.homogeneous is homogeneous


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_table_above_is_true(name):
    function, keeps_zero, homogeneous = FUNCTIONS[name]
    x = torch.tensor([-300.0, -2.0, -0.75, -0.25, 0.25, 0.75, 2.0, 300.0], dtype=torch.float64)
    assert (function(torch.zeros(1)) == 0).all().item() is keeps_zero
    assert torch.equal(function(x * 4), function(x.clone()) * 4) is homogeneous


def one(x):
    return x.sigmoid()


@pytest.mark.parametrize(
    ("function", "kind", "tainted"),
    [
        (lambda x: x * one(x), "product", False),
        (lambda x: one(x) * x, "product", False),
        (lambda x: x * x.mean((2, 3), keepdim=True), "product", False),
        (lambda x: one(x) * one(x), "product", True),
        (lambda x: x / (1 + one(x)), "product", False),
        (lambda x: one(x) / x, "product", True),
        (lambda x: x + F.relu(x), "join", False),
        (lambda x: torch.add(x, F.relu(x), alpha=2), "join", False),
        (lambda x: x + one(x), "join", True),
        (lambda x: x - one(x), "join", True),
        (lambda x: F.relu(x).add_(x), "join", False),
        (lambda x: torch.maximum(x, F.relu(x)), "join", False),
        (lambda x: torch.maximum(x, one(x)), "join", True),
        (lambda x: torch.where(x > 0, x, F.relu(x)), "join", False),
        (lambda x: torch.where(x > 0, x, one(x)), "join", True),
        (lambda x: torch.addcmul(x, one(x), x), "join", False),
        (lambda x: torch.lerp(x, F.relu(x), 0.5), "join", False),
        (lambda x: torch.lerp(x, one(x), 0.5), "join", True),
    ],
)
def test_several_operands_are_zero_if_those_that_matter_are(follow, function, kind, tainted):
    found = follow(function)
    assert (found.node.kind, found.node.tainted) == (kind, tainted)
    assert found.axes == {1: found.channels}
    assert found.blocked == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.detach(),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout2d(x, 0.5, training=False),
        lambda x: x.float(),
        lambda x: x.to(torch.float64),
        lambda x: x.type_as(torch.zeros(1)),
    ],
)
def test_copies_and_casts_are_the_same_channels(follow, function):
    found = follow(function)
    assert found.axes == {1: found.channels}
    assert found.blocked == {}
    assert not found.node.tainted


def test_a_masked_choice_of_a_constant_need_not_be_zero(follow):
    assert not follow(lambda x: x.masked_fill(x < 1, 0.0)).node.tainted
    assert follow(lambda x: x.masked_fill(x < 1, 1.0)).node.tainted


def test_operands_of_several_shapes_share_their_channels(follow):
    gated = follow(lambda x: x * x.mean((2, 3)).sigmoid().view(2, -1, 1, 1))
    assert gated.axes == {1: gated.channels}
    attended = follow(lambda x: x * x.amax(1, keepdim=True))
    assert attended.axes == {1: attended.channels}
    assert set(attended.blocked) == set(range(8))


def test_channels_that_meet_another_dimension_stay(follow):
    found = follow(lambda x: x + torch.ones(8, 1, 1))
    assert set(found.blocked) == set(range(8))
    assert "its channels meet a dimension whose size stays" in found.blocked[0]


def test_a_constant_of_one_number_meets_nothing(follow):
    found = follow(lambda x: x * torch.full((1, 1), 2.0))
    assert found.axes == {1: found.channels}
    assert found.blocked == {}


def test_the_halves_of_a_gated_linear_unit_go_together(follow):
    found = follow(lambda x: F.glu(x, 1))
    assert found.tied == {frozenset({n, n + 4}) for n in range(4)}
    assert found.axes == {1: found.channels[:4]}
    assert follow(lambda x: F.glu(x, 2)).tied == set()


@pytest.mark.parametrize(("like", "tainted"), [(torch.zeros_like, False), (torch.ones_like, True)])
def test_what_is_filled_like_it_has_its_channels(follow, like, tainted):
    found = follow(like)
    assert found.axes == {1: found.channels}
    assert found.node.tainted is tainted
