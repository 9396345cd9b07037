import math

import pytest
import torch

from dmcp.errors import ConfigError
from dmcp.search import BudgetLoss

NAMES = ["log_l1", "l1", "l2", "augmented_lagrangian"]


def value_and_gradient(loss, *ratios):
    r = torch.tensor(ratios, dtype=torch.float64, requires_grad=True)
    value = loss(r)
    value.backward()
    return value.item(), r.grad.tolist()


@pytest.mark.parametrize(
    ("name", "tolerance", "ratio", "value", "gradient"),
    [
        ("log_l1", 0.0, 0.6, 0.1 * math.log(0.4), -0.1 / 0.4),
        ("log_l1", 0.0, 1.5, 0.1 * math.log(0.5), 0.1 / 0.5),
        # The published code: E < 0.95 T, the dead zone, and E >= T measured against 0.95 T.
        ("log_l1", 0.05, 0.6, 0.1 * math.log(0.4), -0.1 / 0.4),
        ("log_l1", 0.05, 0.94, 0.1 * math.log(0.06), -0.1 / 0.06),
        ("log_l1", 0.05, 0.96, 0.0, 0.0),
        ("log_l1", 0.05, 0.9999, 0.0, 0.0),
        ("log_l1", 0.05, 1.0, 0.1 * math.log(0.05), 0.1 / 0.05),
        ("log_l1", 0.05, 1.5, 0.1 * math.log(0.55), 0.1 / 0.55),
        ("l1", 0.0, 0.6, 0.04, -0.1),
        ("l1", 0.0, 1.5, 0.05, 0.1),
        ("l2", 0.0, 0.6, 0.016, -0.08),
        ("l2", 0.0, 1.5, 0.025, 0.1),
        ("augmented_lagrangian", 0.0, 0.6, 0.5 * 0.1 * 0.16, -0.1 * 0.4),
        ("augmented_lagrangian", 0.0, 1.5, 0.5 * 0.1 * 0.25, 0.1 * 0.5),
    ],
)
def test_values_and_gradients_by_hand(name, tolerance, ratio, value, gradient):
    got_value, (got_gradient,) = value_and_gradient(BudgetLoss(name, 0.1, tolerance), ratio)
    assert got_value == pytest.approx(value, rel=1e-12, abs=1e-15)
    assert got_gradient == pytest.approx(gradient, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("expected", [100.0, 180.0, 199.0, 230.0, 1000.0])
def test_log_l1_has_the_published_gradient_in_macs(expected):
    target, weight = 200.0, 0.1
    cost = torch.tensor([expected], dtype=torch.float64, requires_grad=True)
    BudgetLoss("log_l1", weight, tolerance=0.05)(cost / target).backward()
    if expected < 0.95 * target:
        published = -weight / (target - expected)
    elif expected < target:
        published = 0
    else:
        published = weight / (expected - 0.95 * target)
    assert cost.grad.item() == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_finite_at_the_budget(name, tolerance):
    for ratio in (1.0, 1 - 1e-16, 1 + 1e-15, 1 - tolerance, 0.0, 1e6):
        value, (gradient,) = value_and_gradient(BudgetLoss(name, 0.1, tolerance), ratio)
        assert math.isfinite(value)
        assert math.isfinite(gradient)


@pytest.mark.parametrize("name", ["log_l1", "l1", "l2"])
def test_several_bounds_add_up(name):
    loss = BudgetLoss(name, 0.3, bounds=2)
    both, gradients = value_and_gradient(loss, 0.7, 1.4)
    first, second = (value_and_gradient(BudgetLoss(name, 0.3), r) for r in (0.7, 1.4))
    assert both == pytest.approx(first[0] + second[0], rel=1e-12)
    assert gradients == pytest.approx(first[1] + second[1], rel=1e-12)


def test_multipliers_follow_the_violation():
    """By 2 % of the weight per step, a far one by no more; a slack one stays at 0."""
    loss = BudgetLoss("augmented_lagrangian", 2.0, bounds=2)
    loss.update(torch.tensor([1.5, 0.5], dtype=torch.float64))
    assert loss.multipliers.tolist() == pytest.approx([0.004, 0.0])
    value, gradients = value_and_gradient(loss, 1.25, 0.5)
    assert value == pytest.approx((0.504**2 - 0.004**2) / 4)
    assert gradients == pytest.approx([0.504, 0.0])
    loss.update(torch.tensor([0.25, 1.05], dtype=torch.float64))
    assert loss.multipliers.tolist() == pytest.approx([0.0, 0.002])


def test_the_augmented_lagrangian_meets_both_bounds():
    """The point nearest to (3, 1, 4) where x0 + x1 <= 2 and x1 + x2 <= 3."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    wish = torch.tensor([3.0, 1.0, 4.0], dtype=torch.float64)
    loss = BudgetLoss("augmented_lagrangian", 5.0, bounds=2)
    optimizer = torch.optim.SGD([x], lr=0.1)
    for _ in range(4000):
        optimizer.zero_grad()
        ratios = torch.stack([(x[0] + x[1]) / 2, (x[1] + x[2]) / 3])
        (0.5 * (x - wish).square().sum() + loss(ratios)).backward()
        optimizer.step()
        loss.update(ratios)
    # Both bounds active leaves (2 - y, y, 3 - y), nearest to the wish at y = -1/3.
    assert x.tolist() == pytest.approx([7 / 3, -1 / 3, 10 / 3], abs=1e-6)
    assert loss.multipliers.tolist() == pytest.approx([4 / 3, 2.0], abs=1e-5)


def test_the_tightest_bound_also_pulls_up():
    loss = BudgetLoss("augmented_lagrangian", 1.0, bounds=2)
    loss.update(torch.tensor([0.9, 0.5], dtype=torch.float64))
    assert loss.multipliers.tolist() == pytest.approx([-0.002, 0.0])
    value, gradients = value_and_gradient(loss, 0.8, 0.5)
    assert gradients == pytest.approx([-0.202, 0.0])
    assert value == pytest.approx((0.202**2 - 0.002**2) / 2)


def test_the_state_makes_a_round_trip():
    loss = BudgetLoss("augmented_lagrangian", 2.0, bounds=2)
    loss.update(torch.tensor([1.5, 1.1], dtype=torch.float64))
    other = BudgetLoss("augmented_lagrangian", 2.0, bounds=2)
    other.load_state_dict(loss.state_dict())
    ratios = torch.tensor([1.2, 0.7], dtype=torch.float64)
    other.update(ratios)
    loss.update(ratios)
    assert torch.equal(loss.multipliers, other.multipliers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("l3", 0.1), r"budget_loss must be one of \[.*'log_l1'.*\], got 'l3'"),
        (("l1", 0.0), "budget_weight must be positive, got 0.0"),
        (("l1", -1), "budget_weight must be positive"),
        (("l1", float("nan")), "budget_weight must be positive"),
        (("log_l1", 0.1, 1.0), r"tolerance must lie in \[0, 1\), got 1.0"),
        (("log_l1", 0.1, -0.1), r"tolerance must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BudgetLoss(*arguments)
