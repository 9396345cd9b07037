from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.data import open_data
from dmcp.errors import CheckpointError, ConfigError
from dmcp.methods import Lab
from dmcp.methods.metapruning import Evolution, MetaPruning, PruningNet, RandomWidths
from dmcp.search import Targets
from dmcp.train.loss import cross_entropy

SHORT = MetaPruning(hidden=4, population=4, generations=3, parents=2, batches=1)


def make_model(norms=False):
    """Three units of 8; 576 u0 + 64 u0 u1 + 64 u1 u2 + 10 u2 MACs on 8x8 images."""

    def after(channels):
        return nn.BatchNorm2d(channels) if norms else nn.Identity()

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        after(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        after(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, bias=False),
        after(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def make_net(model, images=None, divisor=2, groups=4):
    torch.manual_seed(0)
    images = torch.zeros(2, 1, 8, 8) if images is None else images
    net = dmcp.MarkovNet(model, images, groups=groups, divisor=divisor)
    return PruningNet(net, 4, torch.Generator().manual_seed(0))


def make_lab(model, budgets=("40%",), **options):
    """Digits, four widths for each unit: 2, 4, 6 and 8 of 8 channels."""
    recipe = replace(recipes.get("digits"), groups=4, divisor=2, search_epochs=1)
    shares = {share: dmcp.Budget(macs=share) for share in budgets}
    graph = dmcp.trace(model, torch.zeros(2, 1, 8, 8))
    return Lab(
        graph, open_data("digits", None, 0.1, 0), shares, recipe, checkpoint_every=1, **options
    )


def by_hand(model, weights, images, c0, c1, c2):
    """The sub-network of these widths with prefixes of the generated weights."""
    x = F.conv2d(images, weights["0"][:c0], model[0].bias[:c0], padding=1)
    x = F.conv2d(x.relu(), weights["3"][:c1, :c0], model[3].bias[:c1])
    x = F.conv2d(x.relu(), weights["6"][:c2, :c1])
    return F.linear(x.relu().mean((2, 3)), model[-1].weight[:, :c2], model[-1].bias)


def test_a_structure_computes_with_prefixes_of_what_is_generated_for_it():
    model = make_model()
    net, images = make_net(model), torch.randn(3, 1, 8, 8)
    net.widths = dict(zip(net.widths, (4, 6, 2, 10), strict=True))
    weights = net.weights(net.widths)
    assert {name: w.shape for name, w in weights.items()} == {
        "0": (8, 1, 3, 3),
        "3": (8, 8, 1, 1),
        "6": (8, 8, 1, 1),
    }
    expected = by_hand(model, weights, images, 4, 6, 2)
    torch.testing.assert_close(net(images), expected)
    small = dmcp.extract(replace(net.net.graph, model=net.plain(net.widths)), net.widths)
    torch.testing.assert_close(small(images), expected)


def test_a_generator_sees_the_shares_of_its_inputs_and_outputs():
    net = make_net(make_model())
    weights = net.weights(dict(zip(net.widths, (4, 6, 2, 10), strict=True)))
    for name, make, shares in zip(
        net.generated, net.generators, [(1, 0.5), (0.5, 0.75), (0.75, 0.25)], strict=True
    ):
        torch.testing.assert_close(weights[name], make(torch.tensor(shares, dtype=torch.float32)))
    other = net.weights(dict(zip(net.widths, (4, 8, 2, 10), strict=True)))
    assert torch.equal(other["0"], weights["0"])
    assert not torch.equal(other["3"], weights["3"])


def test_the_share_of_an_axis_counts_all_of_its_units(traced):
    case = traced("Concat")
    net = make_net(case.model, case.inputs[0], divisor=1)
    widths = net.net.graph.widths()
    number = net.generated.index("last.0")  # reads 4 of right, 8 of stem, 6 of left and 3 images
    narrow = widths | {"stem.0": 2, "right.0": 3, "last.0": 5}
    expected = net.generators[number](torch.tensor([(2 + 6 + 3 + 3) / 21, 5 / 9]))
    torch.testing.assert_close(net.weights(narrow)["last.0"], expected)


def test_generators_start_at_the_weights_of_the_network():
    model = make_model()
    net = make_net(model)
    for name, make in zip(net.generated, net.generators, strict=True):
        fresh = model.get_submodule(name).weight
        with torch.no_grad():
            make.encode.weight.zero_()
            make.encode.bias.zero_()
            assert torch.equal(make(torch.ones(2)), fresh)
        scale = make.decode.weight.square().sum(1).mean().sqrt()
        assert 0.5 < scale / fresh.square().mean().sqrt() < 2


def test_gradients_reach_generators_and_classifier_alone():
    net = make_net(make_model(norms=True))
    net.widths = dict(zip(net.widths, (4, 6, 2, 10), strict=True))
    net.train()
    labels = torch.tensor([1, 2, 3, 4])
    cross_entropy(net(torch.randn(4, 1, 8, 8)), labels, 0.1).backward()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    biases = {"net.model.0.bias", "net.model.3.bias"}
    classifier = {"net.model.11.weight", "net.model.11.bias"}
    generators = {f"generators.{name}" for name, _ in net.generators.named_parameters()}
    assert trained == biases | classifier | generators
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
    # [C_out, C_in, 1, 1] lies channels last: the gradient is that of the used prefix.
    gradient = net.generators[1].decode.bias.grad.view(8, 8)
    assert (gradient[:6, :4] != 0).all()
    assert not gradient[6:].any()
    assert not gradient[:, 4:].any()


def test_batch_norms_scale_nothing():
    model = make_model(norms=True)
    nn.init.uniform_(model[1].weight)
    nn.init.uniform_(model[1].bias)
    net = make_net(model)
    assert torch.equal(net.net.model[1].weight, torch.ones(8))
    assert not net.net.model[1].bias.any()


def test_every_step_trains_another_structure():
    lab = make_lab(make_model(norms=True))
    net = PruningNet(lab.net(lab.fresh()), 4, lab.generator())
    training = RandomWidths(net, lab.recipe.retrain, 20, lab.generator())
    seen = []
    for images, labels in lab.batches(20):
        training.step(images, labels)
        seen.append(tuple(net.widths.values()))
    assert len(set(seen)) > 12  # of 64
    assert {widths[0] for widths in seen} == {2, 4, 6, 8}
    assert {widths[3] for widths in seen} == {10}


def make_evolution(options=SHORT, bound=5152, judge=lambda widths: sum(widths.values()) / 100):
    graph = dmcp.MarkovNet(make_model(), torch.zeros(2, 1, 8, 8), groups=4, divisor=2).graph
    targets = Targets((dmcp.cost(graph, "macs"),), (bound,))
    return Evolution(options, graph, targets, judge, torch.Generator().manual_seed(0))


def test_mutants_and_children_by_hand():
    evolution = make_evolution(replace(SHORT, mutation=1.0))
    parent, other = (2, 4, 6, 10), (8, 8, 8, 10)
    mutant = evolution.mutant(parent)
    assert all(a != b for a, b in zip(mutant[:3], parent[:3], strict=True))
    assert set(mutant[:3]) <= {2, 4, 6, 8}
    assert mutant[3] == 10  # the classifier has no choice
    children = {evolution.child(parent, other) for _ in range(100)}
    assert children == {(a, b, c, 10) for a in (2, 8) for b in (4, 8) for c in (6, 8)}
    still = make_evolution(replace(SHORT, mutation=0.0))
    assert still.mutant(parent) == parent


def test_the_default_device_of_new_tensors_does_not_matter():
    def structures():
        evolution, parent = make_evolution(), (4, 2, 2, 10)
        fitted = evolution.fitted(parent)
        return fitted, evolution.mutant(parent), evolution.child(parent, fitted), evolution.random()

    found = structures()
    with torch.device("meta"):
        assert structures() == found


def test_what_exceeds_the_budget_is_rejected_and_what_is_too_cheap_grows():
    evolution = make_evolution()
    assert evolution.fitted((8, 2, 2, 10)) is None  # 5908 of 5152
    assert evolution.fitted((6, 2, 6, 10)) == (6, 2, 6, 10)  # 5052: 98 %, and no group fits
    # 2708, then the second unit and the third, which are furthest behind, as long as it fits
    grown = make_evolution(bound=4960).fitted((4, 2, 2, 10))
    assert grown == (4, 4, 6, 10)  # 2304 + 1024 + 1536 + 60 = 4924; (4, 6, 6) costs 6204
    # With 4 % of the budget left the first unit gives up a group: 1152 + 768 + 3072 + 80 = 5072
    assert evolution.fitted((4, 2, 2, 10)) == (2, 6, 8, 10)


def test_generations_hold_new_structures_inside_the_budget():
    evolution = make_evolution(replace(SHORT, tolerance=0.4), bound=9000)
    counts = [0]
    for generation in (1, 2):
        evolution.step()
        counts.append(len(evolution.judged))
        assert counts[-2] < counts[-1] <= 4 * generation  # so small a grid has few that fit
    structures = torch.tensor(list(evolution.judged))
    targets = evolution._targets
    assert targets.met(structures).all()
    wider = structures[:, None] + 2 * torch.eye(4, dtype=torch.int64)[:3]
    legal = (wider <= 8)[..., :3].all(2)
    fits = targets.met(wider.flatten(0, 1)).view(legal.shape) & legal
    close = targets.largest_ratio(structures) >= 0.6
    assert not (fits.any(1) & ~close).any()
    best, accuracy = evolution.best()
    assert accuracy == max(evolution.judged.values()) == sum(best.values()) / 100


def test_evolution_finds_what_random_structures_do_not():
    """The judge likes the first unit narrow and the others wide."""

    def judge(widths):
        first, *others, _ = widths.values()
        return (sum(others) - first) / 16

    options = replace(SHORT, population=6, generations=6)
    evolution = make_evolution(options, bound=6600, judge=judge)
    while evolution.step_index < evolution.steps:
        evolution.step()
    # (2, 8, 8): 1152 + 1024 + 4096 + 80 = 6352
    assert tuple(evolution.best()[0].values()) == (2, 8, 8, 10)


def test_ends_when_all_structures_have_been_seen():
    evolution = make_evolution(replace(SHORT, generations=2), bound=1700)
    for _ in range(2):
        evolution.step()
    assert list(evolution.judged) == [(2, 2, 2, 10)]


def test_meets_every_budget():
    lab = make_lab(make_model(norms=True), budgets=("40%", "70%"))
    found = SHORT.find(lab)
    assert set(found) == {"40%", "70%"}
    for label, pruned in found.items():
        widths = torch.tensor([[pruned.widths[unit.name] for unit in lab.graph.units]])
        assert lab.targets[label].met(widths)
        assert lab.targets[label].largest_ratio(widths) > 0.75  # two channels are a lot here
        assert pruned.network is None
        assert 0 < pruned.details["accuracy"] <= 1
    trained = lab.steps(1) * lab.recipe.batch_size
    assert lab.spent[None].forward == lab.spent[None].backward == trained
    judged = len(lab.data.holdout) + lab.recipe.batch_size
    assert lab.spent["70%"].forward % judged == 0
    assert 1 <= lab.spent["70%"].forward // judged <= 3 * SHORT.population


@pytest.mark.parametrize("where", ["training", "evolution"])
def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, where):
    torch.manual_seed(0)
    model = make_model(norms=True)
    expected = SHORT.find(make_lab(model))["40%"]

    stage = {"training": RandomWidths, "evolution": Evolution}[where]
    step, done = stage.step, []

    def fail_once(self, *batch):
        done.append(self.step_index)
        if len(done) == 2:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(stage, "step", fail_once)
    with pytest.raises(KeyboardInterrupt):
        SHORT.find(make_lab(model, folder=tmp_path))
    resumed = SHORT.find(make_lab(model, folder=tmp_path))["40%"]
    assert done[:4] == [0, 1, 1, 2]
    assert resumed == expected


def test_refuses_the_state_of_something_else():
    evolution = make_evolution()
    evolution.step()
    state = evolution.state_dict()
    with pytest.raises(CheckpointError, match="3 generations, not of 4"):
        make_evolution(replace(SHORT, generations=4)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="not the state"):
        evolution.load_state_dict({"steps": 3})


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"parents": 0}, {"mutation": 1.5}])
def test_refuses_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MetaPruning(**wrong)
