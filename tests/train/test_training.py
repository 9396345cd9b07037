from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dmcp.errors import CheckpointError, ConfigError
from dmcp.train import Schedule, Training, TrainOptions, checkpoint

OPTIONS = TrainOptions(lr=Schedule(0.1, start=0.05, warmup=0.2), weight_decay=1e-3)


def test_a_step_is_one_sgd_update_at_the_scheduled_rate(small_net, batch_of):
    stage, model = Training(small_net(), OPTIONS, steps=5), small_net()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-3},
            {"params": [p for p in model.parameters() if p.ndim == 1]},
        ],
        momentum=0.9,
        nesterov=True,
    )
    for step in range(5):
        images, labels = batch_of(step)
        metrics = stage.step(images, labels)
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS.lr.at(step / 5)
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["accuracy"].item() == (logits.argmax(1) == labels).float().mean().item()
        assert not metrics["loss"].requires_grad
        assert stage.step_index == step + 1
    # The fused optimiser rounds in another order.
    for ours, theirs in zip(stage.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_learns(small_net, batch_of):
    stage = Training(small_net(), TrainOptions(Schedule(0.1), label_smoothing=0.0), steps=60)
    losses = [stage.step(*batch_of(0, images=16))["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]


def test_trains_a_model_that_came_in_eval_mode(small_net, batch_of):
    stage = Training(small_net().eval(), OPTIONS, steps=1)
    stage.step(*batch_of(0))
    assert stage.model[1].num_batches_tracked.item() == 1


def test_keeps_a_frozen_batch_norm_frozen(small_net, batch_of):
    stage = Training(small_net().train(), OPTIONS, steps=1)
    stage.model[1].eval()
    stage.step(*batch_of(0))
    assert stage.model[1].num_batches_tracked.item() == 0
    assert stage.model[4].num_batches_tracked.item() == 1


def test_continues_with_the_same_bits(small_net, batch_of, tmp_path):
    stage = Training(small_net(), OPTIONS, steps=6)
    for step in range(3):
        stage.step(*batch_of(step))
    checkpoint.save(tmp_path / "a.pt", stage.state_dict())
    other = Training(small_net(seed=1), OPTIONS, steps=6)
    other.load_state_dict(checkpoint.load(tmp_path / "a.pt"))
    for step in range(3, 6):
        assert torch.equal(stage.step(*batch_of(step))["loss"], other.step(*batch_of(step))["loss"])
    for ours, theirs in zip(
        stage.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_loaded_state_is_not_shared(small_net, batch_of):
    stage, other = (Training(small_net(), OPTIONS, steps=4) for _ in range(2))
    stage.step(*batch_of(0))
    other.load_state_dict(stage.state_dict())
    momentum = stage.optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    other.step(*batch_of(1))
    assert torch.equal(stage.optimizer.state_dict()["state"][0]["momentum_buffer"], momentum)


def test_refuses_the_state_of_something_else(small_net):
    stage = Training(small_net(), OPTIONS, steps=4)
    smaller = torch.nn.Conv2d(3, 4, 1)
    with pytest.raises(CheckpointError, match="another model"):
        stage.load_state_dict(Training(smaller, OPTIONS, steps=4).state_dict())
    with pytest.raises(CheckpointError, match="5 steps, not of 4"):
        stage.load_state_dict(Training(small_net(), OPTIONS, steps=5).state_dict())
    with pytest.raises(CheckpointError, match="not the state of a Training"):
        stage.load_state_dict({"alphas": torch.zeros(3)})


def test_refuses_options_out_of_range(small_net):
    with pytest.raises(ConfigError, match="label_smoothing"):
        TrainOptions(Schedule(0.1), label_smoothing=1.0)
    with pytest.raises(ConfigError, match="momentum"):
        Training(small_net(), TrainOptions(Schedule(0.1), momentum=1.5), steps=1)
    with pytest.raises(ConfigError, match="steps"):
        Training(small_net(), OPTIONS, steps=0)
