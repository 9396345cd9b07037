from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dmcp
from dmcp.errors import ConfigError
from dmcp.methods.bn_gamma import PAPER, BNGamma, SparsityTraining, default_sparsity, mean_scales
from dmcp.methods.growth import ranked
from dmcp.search import Budget, Targets
from dmcp.train import Schedule, Training, TrainOptions, run

OPTIONS = TrainOptions(Schedule(0.1), momentum=0.9)


@pytest.mark.parametrize(("precision", "micro_batches"), [("float32", 2), ("float16", 1)])
def test_a_step_adds_the_sign_of_every_scale_to_its_gradient(
    residual_lab, precision, micro_batches
):
    lab = residual_lab
    options = replace(OPTIONS, precision=precision, micro_batches=micro_batches)
    start = torch.tensor([1, -1, 0, 0.5, -2, 3, 1, 1])
    models = [lab.fresh() for _ in range(2)]
    for model in models:
        torch.nn.init.ones_(model.norm.weight)
        model.norm1.weight.data.copy_(start)
    plain = Training(models[0], options, 1)
    sparse = SparsityTraining(models[1], options, 1, lab.graph, sparsity=0.5)
    batch = next(lab.batches(1))
    for stage in (plain, sparse):
        stage.step(*batch)
    without, with_penalty = ({n: p.detach() for n, p in m.named_parameters()} for m in models)
    for name, parameter in with_penalty.items():
        # Nesterov's first step is (1 + momentum) gradients.
        moved = 0.1 * 1.9 * 0.5 * (start.sign() if name == "norm1.weight" else 1)
        penalty = moved if name.startswith("norm") and name.endswith("weight") else 0
        torch.testing.assert_close(parameter, without[name] - penalty, rtol=1e-5, atol=1e-6)


def test_a_killed_training_continues_with_the_same_bits(residual_lab, tmp_path):
    lab = residual_lab
    checkpoint = tmp_path / "last.pt"

    def make():
        return SparsityTraining(lab.fresh(), OPTIONS, 6, lab.graph, sparsity=0.1)

    def stream(start):
        return list(lab.batches(6))[start:]

    def dies(start):
        yield from stream(start)[:3]
        raise KeyboardInterrupt

    whole, resumed = make(), make()
    run(whole, stream, phase="sparsity")
    with pytest.raises(KeyboardInterrupt):
        run(make(), dies, phase="sparsity", checkpoint=checkpoint, checkpoint_every=1)
    run(resumed, stream, phase="sparsity", checkpoint=checkpoint)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_the_default_takes_a_scale_down_by_one_and_a_half():
    options = TrainOptions(Schedule(0.2, start=0.1, warmup=0.5), momentum=0.5)
    for steps in (200, 2000):
        scale = torch.nn.Parameter(torch.tensor(1.6))
        sgd = torch.optim.SGD([scale], momentum=0.5)
        scale.grad = torch.tensor(default_sparsity(options, steps))
        for step in range(steps):
            sgd.param_groups[0]["lr"] = options.lr.at(step / steps)
            sgd.step()
        assert scale.item() == pytest.approx(0.1, abs=0.01)


def test_one_threshold_for_the_scales_of_all_units(residual):
    model = residual.model
    scales = {
        "norm1": [0.9, -0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        "norm3": [0.1, 0.7, 0.2, -0.6, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2],
        # of one stream, so that the mean counts
        "norm": [1.0, 0.0, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3],
        "norm2": [0.0, -1.0, 0.4, 0.4, 0.3, 0.3, 0.3, 0.3],
    }
    for name, values in scales.items():
        model.get_submodule(name).weight.data = torch.tensor(values)
    found = mean_scales(residual, model)
    assert found.keys() == {"stem", "first", "last"}
    torch.testing.assert_close(found["stem"], torch.tensor([0.5, 0.5, 0.4, 0.4] + [0.3] * 4))
    macs = dmcp.cost(residual, "macs")
    wanted = {"stem": 4, "first": 2, "last": 3, "head": 10}
    widths, kept = ranked(residual, Targets((macs,), (macs.of(wanted),)), found)
    assert widths == wanted  # 0.35 is the threshold
    assert {name: channels.tolist() for name, channels in kept.items()} == {
        "stem": [0, 1, 2, 3],
        "first": [0, 1],
        "last": [1, 3, 4],
    }


@pytest.mark.parametrize("method", [BNGamma(), PAPER])
def test_one_training_serves_all_budgets(residual_lab, check_found, method):
    lab = residual_lab
    found = method.find(lab)
    check_found(lab, found)
    assert not method.uses_pretrained
    assert lab.spent_on("half").backward == lab.spent_on("fifth").backward == 2 * 4 * 32


def test_a_unit_without_norms_takes_the_share_of_uniform(few_digits, residual_lab):
    class Mixed(torch.nn.Sequential):
        def __init__(self):
            super().__init__(
                torch.nn.Conv2d(1, 8, 3),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 8, 3),
                torch.nn.ReLU(),
                torch.nn.Conv2d(8, 8, 3),
                torch.nn.BatchNorm2d(8),
                torch.nn.ReLU(),
                torch.nn.Flatten(),
                torch.nn.Linear(32, 10),
            )

    graph = dmcp.trace(Mixed(), torch.zeros(2, 1, 8, 8))
    recipe = residual_lab.recipe
    lab = dmcp.methods.Lab(graph, few_digits, {"half": Budget(macs="50%")}, recipe)
    (pruned,) = BNGamma().find(lab).values()
    even = dmcp.methods.uniform_widths(lab.graph, lab.targets["half"])
    assert pruned.widths["3"] == even["3"] < 8
    assert mean_scales(lab.graph, graph.model).keys() == {"0", "5"}
    assert len(pruned.kept["3"]) == even["3"]


def test_refuses_a_sparsity_out_of_range():
    for sparsity in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=f"sparsity must be .* got {sparsity}"):
            BNGamma(sparsity)
