from __future__ import annotations

import copy
from dataclasses import replace

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


@pytest.mark.parametrize(("precision", "micro_batches"), [("float32", 1), ("float16", 3)])
def test_continues_with_the_same_bits(small_net, batch_of, tmp_path, precision, micro_batches):
    options = replace(OPTIONS, precision=precision, micro_batches=micro_batches)
    stage = Training(small_net(), options, steps=6)
    for step in range(3):
        stage.step(*batch_of(step))
    checkpoint.save(tmp_path / "a.pt", stage.state_dict())
    other = Training(small_net(seed=1), options, steps=6)
    other.load_state_dict(checkpoint.load(tmp_path / "a.pt"))
    for step in range(3, 6):
        assert torch.equal(stage.step(*batch_of(step))["loss"], other.step(*batch_of(step))["loss"])
    for ours, theirs in zip(
        stage.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert other.precision.state_dict() == stage.precision.state_dict()


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(small_net, batch_of, precision):
    full = Training(small_net(), OPTIONS, steps=1)
    half = Training(small_net(), replace(OPTIONS, precision=precision), steps=1)
    seen = []
    half.model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wanted, got = (stage.step(*batch_of(0, images=16))["loss"] for stage in (full, half))
    assert seen == [getattr(torch, precision)]
    assert got.item() == pytest.approx(wanted.item(), rel=0.02)
    assert not torch.equal(got, wanted)
    # The bias in front of a batch norm has no gradient but rounding; the scale does not matter.
    assert gradients(half.model).dtype == torch.float32
    assert F.cosine_similarity(gradients(half.model), gradients(full.model), dim=0) > 0.99


def test_parts_of_a_batch_add_up_to_its_gradients(small_net, batch_of):
    """A batch of two equal halves has the statistics of each, so that nothing may differ."""
    pixels, labels = batch_of(0)
    images, labels = torch.cat([pixels, pixels]).double(), torch.cat([labels, labels])
    whole, parts = (
        Training(small_net().double(), replace(OPTIONS, micro_batches=count), steps=1)
        for count in (1, 2)
    )
    seen = []
    parts.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    expected, metrics = whole.step(images, labels), parts.step(images, labels)
    assert seen == [8, 8]
    torch.testing.assert_close(metrics, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(parts.model), gradients(whole.model), rtol=1e-9, atol=1e-14
    )


def test_unequal_parts_count_by_their_images(small_net, batch_of):
    """Without batch statistics, any parts add up."""
    losses, found = [], []
    for count in (1, 3):
        model = small_net().double().train()
        for norm in (model[1], model[4], model[7]):
            norm.eval()
        stage = Training(model, replace(OPTIONS, micro_batches=count), steps=1)
        images, labels = batch_of(0)
        losses.append(stage.step(images.double(), labels))
        found.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)


def test_refuses_a_batch_too_small_for_its_parts(small_net, batch_of):
    stage = Training(small_net(), replace(OPTIONS, micro_batches=5), steps=1)
    with pytest.raises(ConfigError, match="micro_batches is 5: too many parts for a batch of 8"):
        stage.step(*batch_of(0))
    assert stage.step_index == 0


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
    half = Training(small_net(), replace(OPTIONS, precision="float16"), steps=4)
    with pytest.raises(CheckpointError, match="precision"):
        half.load_state_dict(stage.state_dict())


def test_refuses_options_out_of_range(small_net):
    with pytest.raises(ConfigError, match="label_smoothing"):
        TrainOptions(Schedule(0.1), label_smoothing=1.0)
    with pytest.raises(ConfigError, match=r"precision must be one of .* got 'half'"):
        TrainOptions(Schedule(0.1), precision="half")
    for count in (0, True, 1.5):
        with pytest.raises(ConfigError, match=f"micro_batches must be .* got {count}"):
            TrainOptions(Schedule(0.1), micro_batches=count)
    with pytest.raises(ConfigError, match="momentum"):
        Training(small_net(), TrainOptions(Schedule(0.1), momentum=1.5), steps=1)
    with pytest.raises(ConfigError, match="steps"):
        Training(small_net(), OPTIONS, steps=0)


def test_a_state_of_another_memory_format_continues_the_same(small_net, batch_of):
    """The fused optimiser walks over memory, so the momentum has to lie as the weights do."""
    stages = [
        Training(small_net().to(memory_format=layout), OPTIONS, steps=4)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    stages[0].step(*batch_of(0))
    stages[1].load_state_dict(copy.deepcopy(stages[0].state_dict()))
    for stage in stages:
        for step in (1, 2):
            stage.step(*batch_of(step))
    for one, other in zip(*(stage.model.parameters() for stage in stages), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
