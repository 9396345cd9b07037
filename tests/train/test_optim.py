from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from dmcp.errors import ConfigError
from dmcp.train import Schedule, set_lr, sgd


def test_warms_up_linearly_then_follows_a_cosine():
    schedule = Schedule(peak=0.8, start=0.2, warmup=0.1, final=0.08)
    assert schedule.at(0) == pytest.approx(0.2)
    assert schedule.at(0.05) == pytest.approx(0.5)
    assert schedule.at(0.1) == pytest.approx(0.8)
    assert schedule.at(0.55) == pytest.approx(0.44)
    assert schedule.at(0.325) == pytest.approx(0.08 + 0.72 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.at(1) == pytest.approx(0.08)


def test_starts_at_the_peak_without_a_start():
    assert Schedule(0.5, warmup=0.5).at(0.25) == 0.5
    assert Schedule(0.5).at(0) == 0.5
    assert Schedule(0.5).at(1) == pytest.approx(0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak", 0.0),
        ("peak", float("nan")),
        ("peak", float("inf")),
        ("start", -0.1),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("final", -1.0),
        ("final", float("nan")),
    ],
)
def test_refuses_numbers_out_of_range(field: str, value: float):
    with pytest.raises(ConfigError, match=field):
        Schedule(**{"peak": 0.1, field: value})


@pytest.mark.parametrize("progress", [-0.01, 1.01, float("nan")])
def test_refuses_progress_outside_the_run(progress: float):
    with pytest.raises(ConfigError, match="progress"):
        Schedule(0.1).at(progress)


def test_decays_only_weights_of_more_than_one_axis(small_net):
    model = small_net()
    optimizer = sgd(model, Schedule(0.1), weight_decay=0.5)
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"] == 0.5
        for parameter in group["params"]
    }
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = [m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert decayed == {id(layer.weight) for layer in layers}
    assert held == {id(parameter) for parameter in model.parameters()}


def test_leaves_frozen_parameters_alone(small_net):
    model = small_net()
    model[0].weight.requires_grad_(False)
    optimizer = sgd(model, Schedule(0.1))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p is not model[0].weight}


def test_updates_by_nesterovs_rule():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = sgd(model, Schedule(0.1), momentum=0.9, weight_decay=0.01)
    weight, buffer = 1.0, 0.0
    for gradient in (1.0, -0.5, 2.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        slope = gradient + 0.01 * weight
        buffer = 0.9 * buffer + slope
        weight -= 0.1 * (slope + 0.9 * buffer)
        assert model.weight.item() == pytest.approx(weight, rel=1e-6)


def test_works_without_momentum():
    model = nn.Linear(1, 1, bias=False)
    optimizer = sgd(model, Schedule(0.5), momentum=0.0)
    before = model.weight.item()
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert model.weight.item() == pytest.approx(before - 0.5)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}])
def test_sgd_refuses_numbers_out_of_range(options: dict[str, float]):
    with pytest.raises(ConfigError, match=next(iter(options))):
        sgd(nn.Linear(1, 1), Schedule(0.1), **options)


def test_refuses_a_model_with_nothing_to_train():
    with pytest.raises(ConfigError, match="requires a gradient"):
        sgd(nn.ReLU(), Schedule(0.1))


def test_set_lr_reaches_every_group(small_net):
    optimizer = sgd(small_net(), Schedule(0.1))
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_state_round_trips_exactly(small_net, batch_of):
    def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        images, labels = batch_of(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_net()
        return model, sgd(model, Schedule(0.1), weight_decay=1e-3)

    model, optimizer = fresh()
    for step in range(3):
        update(model, optimizer, step)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    copy, copy_optimizer = fresh()
    model_state, optimizer_state = torch.load(file, weights_only=True)
    copy.load_state_dict(model_state)
    copy_optimizer.load_state_dict(optimizer_state)
    for step in range(3, 6):
        update(model, optimizer, step)
        update(copy, copy_optimizer, step)
    for ours, theirs in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
