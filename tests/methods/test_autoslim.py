from dataclasses import replace

import pytest
import torch
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.data.images import DataSource, ImageFormat, MemoryImages
from dmcp.errors import CheckpointError
from dmcp.methods import Lab
from dmcp.methods.autoslim import AutoSlim, Slimming, sandwich_training
from dmcp.methods.dmcp import WarmUp


class TwoUnits(nn.Sequential):
    """Tells bright from dark images by channels 2 and 3 of the first unit and 0 and 1 of the
    second; nothing reads the others. Dropout and running statistics would spoil all of it."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.9),
            nn.Linear(4, 2),
        )
        with torch.no_grad():
            self[0].weight.copy_(torch.tensor([0.0, 0, 1, 1]).view(4, 1, 1, 1))
            self[3].weight.zero_()[:2, 2:] = 1
            self[9].weight.copy_(torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0]]))
            self[9].bias.copy_(torch.tensor([0.5, 0.0]))
            self[1].running_mean.fill_(100)


def two_unit_lab(*budgets):
    labels = torch.arange(64) % 2
    images = (labels * 200).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
    part = MemoryImages(images, labels, ImageFormat(8, (0.4,), (0.4,), photos=False))
    data = DataSource("brightness", part, part, part, ("dark", "bright"))
    recipe = replace(recipes.get("digits"), groups=2, divisor=1)
    graph = dmcp.trace(TwoUnits(), torch.zeros(2, 1, 8, 8))
    return Lab(graph, data, {b: dmcp.Budget(macs=b) for b in budgets}, recipe)


def slim(lab):
    """The MACs of widths 4, 2 are 60 % of all, those of 2, 2 are 30 %."""
    slimming = Slimming(lab, lab.net(lab.graph.model))
    errors = []
    while slimming.step_index < slimming.steps:
        errors.append(slimming.step()["error"].item())
    return slimming, errors


def widths(slimming, label):
    return [slimming.found[label][unit.name] for unit in slimming.lab.graph.searchable]


def test_the_group_goes_that_is_missed_least():
    lab = two_unit_lab("70%", "55%")
    before = [buffer.clone() for buffer in lab.graph.model.buffers()]
    slimming, errors = slim(lab)
    # The first unit's group saves more MACs, but everything depends on it.
    assert errors == [0.0, 0.5]
    assert widths(slimming, "70%") == [4, 2]
    assert widths(slimming, "55%") == [2, 2]
    assert all(map(torch.equal, before, slimming.net.model.buffers()))
    assert all(module.training for module in slimming.net.modules())
    # two candidates, then one
    assert lab.spent[None].forward == 3 * 64


def test_the_first_of_equals_goes():
    lab = two_unit_lab("55%")
    with torch.no_grad():
        lab.graph.model[9].weight.zero_()
    slimming, errors = slim(lab)
    assert errors == [0.5]
    assert widths(slimming, "55%") == [2, 4]


def test_a_budget_of_everything_takes_nothing():
    slimming, errors = slim(two_unit_lab("100%"))
    assert errors == []
    assert widths(slimming, "100%") == [4, 4]


def test_a_checkpoint_of_other_budgets_is_refused():
    slimming, _ = slim(two_unit_lab("70%", "55%"))
    lab = two_unit_lab("55%")
    with pytest.raises(CheckpointError, match="other budgets"):
        Slimming(lab, lab.net(lab.graph.model)).load_state_dict(slimming.state_dict())


def test_the_supernet_never_trains_an_alpha(make_lab):
    lab = make_lab(("50%",))
    net = lab.net(lab.fresh())
    supernet = sandwich_training(lab, net)
    assert supernet.steps == lab.steps(lab.recipe.search_epochs)
    start = [alpha.detach().clone() for alpha in net.architecture_parameters()]
    weight = net.model[0].weight.detach().clone()
    lab.train(supernet, "supernet")
    assert supernet.step_index == supernet.steps
    assert all(map(torch.equal, start, net.architecture_parameters()))
    assert not torch.equal(net.model[0].weight, weight)
    # the schedule has run its course, but for the step that is never taken
    lr = float(supernet.search.optimizer.param_groups[0]["lr"])
    steps, schedule = supernet.steps, lab.recipe.search.lr
    assert lr == pytest.approx(schedule.at((steps - 1) / (steps + 1)))
    assert lr - schedule.final < 0.05 * schedule.peak


def test_one_pass_serves_all_budgets(make_lab, assert_fills):
    lab = make_lab()
    found = AutoSlim().find(lab)
    assert_fills(lab, found)
    for label, pruned in found.items():
        slimmed = pruned.details["slimmed"]
        assert all(slimmed[name] <= width for name, width in pruned.widths.items())
        assert lab.spent_on(label).forward == lab.spent[None].forward
    larger, smaller = (pruned.details["slimmed"] for pruned in found.values())
    assert all(smaller[name] <= width for name, width in larger.items())
    assert smaller != larger


@pytest.mark.parametrize(("stage", "calls"), [(WarmUp, 7), (Slimming, 3)])
def test_a_killed_search_resumes_to_the_same_structure(
    make_lab, tmp_path, monkeypatch, killed, stage, calls
):
    whole = make_lab()
    wanted = AutoSlim().find(whole)
    killed(monkeypatch, stage, "step", calls, lambda: AutoSlim().find(make_lab(folder=tmp_path)))
    lab = make_lab(folder=tmp_path)
    got = AutoSlim().find(lab)
    assert {k: p.widths for k, p in got.items()} == {k: p.widths for k, p in wanted.items()}
    assert {k: p.details for k, p in got.items()} == {k: p.details for k, p in wanted.items()}
    assert lab.spent[None].forward == whole.spent[None].forward
