from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dmcp
from dmcp.errors import CheckpointError, ConfigError
from dmcp.search.distilled import DistilledTraining
from dmcp.train import Schedule, Training, TrainOptions, recalibrate_batch_norm

OPTIONS = TrainOptions(Schedule(0.05, start=0.01, warmup=0.5), 0.8, 1e-2, label_smoothing=0.1)
STEPS = 4


def batch(step, example, images=16):
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(images, *example.inputs[0].shape[1:], generator=generator)
    labels = torch.randint(0, 5, (images,), generator=generator)
    return pixels.to(example.inputs[0].dtype), labels


def half(graph):
    return {unit.name: (unit.channels + 1) // 2 for unit in graph.searchable}


@pytest.fixture(params=["mobilenet_v2", "resnet18"])
def plain(request, traced):
    """A network in float64 that nothing has trained."""
    return traced(request.param).to(torch.float64)


@pytest.fixture
def stage(plain):
    """In float64, with the example it trains."""
    chosen = copy.deepcopy(plain)
    return fresh(chosen), chosen


def fresh(example, **options):
    """Trains the example itself."""
    net = dmcp.MarkovNet(example.model, groups=2, divisor=1, graph=example.graph)
    return DistilledTraining(net, half(net.graph), replace(OPTIONS, **options), STEPS)


def losses(example, widths, pixels, labels):
    """Both passes with plain modules; leaves the gradients on ``example.model``.

    In these networks a structure's tensors are leading blocks of the whole network's.
    """
    smoothing = OPTIONS.label_smoothing
    teacher = example.model(pixels)
    teacher_loss = F.cross_entropy(teacher, labels, label_smoothing=smoothing)
    teacher_loss.backward()
    small = dmcp.extract(example.graph, widths).train()
    log_p = small(pixels).log_softmax(1)
    q = teacher.detach().softmax(1)
    loss = (q * (q.log() - log_p)).sum(1).mean()
    loss.backward()
    whole = dict(example.model.named_parameters())
    for name, parameter in small.named_parameters():
        block = tuple(slice(0, size) for size in parameter.shape)
        whole[name].grad[block] += parameter.grad
    return loss.detach(), teacher_loss.detach()


def test_a_step_is_two_passes_and_one_update(stage, plain):
    """Against plain modules and SGD with Nesterov's rule written out."""
    stage, example = stage
    reference = plain
    reference.model.train()
    buffers = {name: None for name, _ in reference.model.named_parameters()}
    for step in range(STEPS):
        pixels, labels = batch(step, example)
        metrics = stage.step(pixels, labels)
        reference.model.zero_grad(set_to_none=True)
        loss, teacher_loss = losses(reference, stage.widths, pixels, labels)
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(metrics["teacher_loss"], teacher_loss, rtol=1e-9, atol=1e-12)
        lr = OPTIONS.lr.at(step / STEPS)
        with torch.no_grad():
            for name, parameter in reference.model.named_parameters():
                decay = OPTIONS.weight_decay if parameter.ndim > 1 else 0.0
                gradient = parameter.grad + decay * parameter
                old = buffers[name]
                buffers[name] = gradient if old is None else OPTIONS.momentum * old + gradient
                parameter -= lr * (gradient + OPTIONS.momentum * buffers[name])
    trained, expected = example.model.state_dict(), reference.model.state_dict()
    for name, tensor in trained.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text
        )


def test_metrics_are_those_of_the_structure(stage):
    stage, example = stage
    pixels, labels = batch(0, example)
    small = dmcp.extract(stage.net.graph, stage.widths).train()
    expected = (small(pixels).argmax(1) == labels).float().mean()
    metrics = stage.step(pixels, labels)
    assert set(metrics) == {"loss", "accuracy", "teacher_loss"}
    assert metrics["accuracy"] == expected
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert stage.net.training
    assert all(chain.width == chain.channels for chain in stage.net.chains.values())


def test_the_chains_are_left_alone(stage):
    stage, example = stage
    before = [alpha.clone() for alpha in stage.net.architecture_parameters()]
    stage.step(*batch(0, example))
    after = stage.net.architecture_parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(alpha.grad is None for alpha in after)


def test_parts_of_a_batch_add_up_to_its_gradients(plain):
    """A batch of two equal halves has the statistics of each, so that nothing may differ."""
    pixels, labels = batch(0, plain, images=8)
    pixels, labels = torch.cat([pixels, pixels]), torch.cat([labels, labels])
    whole, parts = fresh(copy.deepcopy(plain)), fresh(plain, micro_batches=2)
    seen = []
    parts.net.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    expected, metrics = whole.step(pixels, labels), parts.step(pixels, labels)
    assert seen == [8] * 4
    torch.testing.assert_close(metrics, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.gradients.flat, whole.gradients.flat, rtol=1e-7, atol=1e-10)


def gradients(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_as_near_float32_as_in_plain_pytorch(traced, precision):
    chosen, plain = traced("resnet18"), traced("resnet18")
    plain.model.train()
    full, stage = fresh(traced("resnet18")), fresh(chosen, precision=precision)
    seen = []
    stage.net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    wanted, got = (each.step(*batch(0, chosen)) for each in (full, stage))
    assert seen == [getattr(torch, precision)] * 2
    for name in ("loss", "teacher_loss"):
        assert float(got[name]) == pytest.approx(float(wanted[name]), rel=0.05), name
    with torch.autocast("cpu", getattr(torch, precision)):
        losses(plain, stage.widths, *batch(0, chosen))
    gradient, reference = gradients(stage.net.model), gradients(full.net.model)
    assert gradient.dtype == torch.float32
    cosine = F.cosine_similarity(gradient, reference, dim=0)
    allowed = F.cosine_similarity(gradients(plain.model), reference, dim=0)
    assert allowed > 0.9
    assert 1 - cosine < 1.5 * (1 - allowed) + 1e-4


def test_the_state_of_the_loss_scale_is_kept(traced):
    chosen = traced("resnet18")
    stage, other = (fresh(traced("resnet18"), precision="float16") for _ in range(2))
    stage.step(*batch(0, chosen))
    other.load_state_dict(stage.state_dict())
    assert other.precision.state_dict() == stage.precision.state_dict()
    stage.step(*batch(1, chosen))
    other.step(*batch(1, chosen))
    assert other.precision.state_dict() == stage.precision.state_dict()
    with pytest.raises(CheckpointError, match="precision"):
        other.load_state_dict(fresh(chosen).state_dict())


def test_refuses_a_batch_too_small_for_its_parts(traced):
    chosen = traced("resnet18")
    stage = fresh(chosen, micro_batches=5)
    with pytest.raises(ConfigError, match="micro_batches is 5: too many parts for a batch of 8"):
        stage.step(*batch(0, chosen, images=8))
    assert stage.step_index == 0


def test_continues_with_the_same_bits(stage, plain):
    whole, example = stage
    begun, resumed = fresh(copy.deepcopy(plain)), fresh(plain)
    for step in range(2):
        whole.step(*batch(step, example))
        begun.step(*batch(step, example))
    state = copy.deepcopy(begun.state_dict())
    resumed.load_state_dict(state)
    assert resumed.step_index == 2
    for step in range(2, STEPS):
        whole.step(*batch(step, example))
        resumed.step(*batch(step, example))
    expected = whole.net.state_dict()
    for name, tensor in resumed.net.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    # the state that was loaded is still that of step 2
    for key, value in state["optimizer"]["state"].items():
        old = begun.optimizer.state_dict()["state"][key]["momentum_buffer"]
        assert torch.equal(value["momentum_buffer"], old)


def test_refuses_the_state_of_something_else(stage):
    stage, example = stage
    state = stage.state_dict()
    training = Training(copy.deepcopy(example.model), OPTIONS, STEPS)
    other = {**stage.widths, next(iter(stage.widths)): 1}
    for change, named in (
        (training.state_dict(), "stage"),
        ({**state, "steps": 9}, "steps is 9, this training's is 4"),
        ({**state, "widths": other}, "widths"),
        ({key: value for key, value in state.items() if key != "net"}, "another network"),
        ({**state, "net": {}}, "another network"),
    ):
        with pytest.raises(CheckpointError, match=named):
            stage.load_state_dict(change)
    assert stage.step_index == 0


def test_refuses_widths_that_the_net_cannot_take(traced):
    """Else the step would train one structure, and extraction give another."""
    chosen = traced("mobilenet_v2")
    net = dmcp.MarkovNet(chosen.model, groups=10, divisor=8, graph=chosen.graph)
    with pytest.raises(ConfigError, match=r"widths\['conv1'\].*no narrower width lies on its grid"):
        DistilledTraining(net, {"conv1": 5}, OPTIONS, STEPS)
    with pytest.raises(ConfigError, match="no unit is called 'conv9'"):
        DistilledTraining(net, {"conv9": 5}, OPTIONS, STEPS)


def test_extraction_and_recalibration_give_the_trained_structure(stage):
    """With its own statistics the extracted network computes, in evaluation, what the structure
    computed in training on that batch."""
    stage, example = stage
    for step in range(STEPS):
        stage.step(*batch(step, example))
    pixels, labels = batch(9, example)
    with torch.no_grad(), stage.net.at(stage.widths):
        expected = stage.net(pixels)
    small = dmcp.extract(stage.net.graph, stage.widths)
    recalibrate_batch_norm(small, [(pixels, labels)])
    unbias(small, pixels)
    with torch.no_grad():
        again = small.eval()(pixels)
    torch.testing.assert_close(again, expected, rtol=1e-9, atol=1e-11)


def unbias(model, pixels):
    """Divide running variances by n / (n - 1): a batch is normalised by its biased variance."""
    counts = {}
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, _: counts.update({module: inputs[0].numel()})
        )
        for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model.eval()(pixels)
    for hook in hooks:
        hook.remove()
    for module, numbers in counts.items():
        n = numbers // module.num_features
        module.running_var *= (n - 1) / n
