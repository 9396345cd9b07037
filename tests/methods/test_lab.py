from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.data import ImageSet, open_data
from dmcp.errors import BudgetError, CheckpointError, ConfigError, DataError
from dmcp.methods import Lab, RandomSearch, Spent, get
from dmcp.methods import lab as lab_module
from dmcp.train import Training

BATCH = 32


def bounds(**shares):
    return {name: dmcp.Budget(macs=share) for name, share in shares.items()}


@pytest.fixture
def make(residual, few_digits):
    """A lab for a `Residual`, with four steps to an epoch; other options as asked."""

    def make(budgets=None, data=few_digits, graph=residual, batch_size=BATCH, **options):
        recipe = replace(
            recipes.get("digits"),
            batch_size=batch_size,
            search_epochs=2,
            retrain_epochs=1,
            groups=4,
            divisor=1,
        )
        return Lab(graph, data, budgets or bounds(half="50%", fifth="20%"), recipe, **options)

    return make


def images_of(spent):
    return spent.forward, spent.backward


class Counting:
    """A stage that does what it is told in every step."""

    def __init__(self, steps, work=lambda: None):
        self.steps, self.step_index, self.work = steps, 0, work

    def step(self, *batch):
        self.batch = batch
        self.work()
        self.step_index += 1
        return {"done": torch.tensor(float(self.step_index))}

    def state_dict(self):
        return {"step_index": self.step_index}

    def load_state_dict(self, state):
        self.step_index = state["step_index"]


def test_labs_need_held_out_images(make):
    with pytest.raises(DataError, match="holdout"):
        make(data=open_data("digits", holdout=0))


def test_labs_need_one_batch_of_images(make):
    assert make(batch_size=140).steps(3) == 3
    with pytest.raises(DataError, match="140 training images are fewer than one batch of 141"):
        make(batch_size=141)


def test_labs_need_budgets(residual, few_digits):
    with pytest.raises(ConfigError, match="budgets"):
        Lab(residual, few_digits, {}, recipes.get("digits"))


def test_budgets_that_cannot_be_compared_are_refused(make):
    with pytest.raises(ConfigError, match=r"same costs.*macs.*params"):
        make({"one": dmcp.Budget(macs="50%"), "other": dmcp.Budget(params="50%")})
    full = make().graph
    half = dmcp.Budget(macs="50%").of(full).bounds[0]
    with pytest.raises(ConfigError, match=r"differ.*share.*number"):
        make({"share": dmcp.Budget(macs="50%"), "number": dmcp.Budget(macs=half)})


def test_budgets_out_of_reach_are_refused(make):
    # A quarter of the channels of every unit is the least on this grid.
    with pytest.raises(BudgetError, match="below the narrowest"):
        make(bounds(half="50%", little="1%"))
    with pytest.raises(BudgetError, match="above the full"):
        make(bounds(half="50%", much="101%"))


def test_targets_fall_whatever_the_order_of_the_budgets(make):
    lab = make(bounds(a="30%", b="90%", c="50%", d="60%"))
    assert list(lab.targets) == list(lab.budgets) == ["b", "d", "c", "a"]
    full = dmcp.cost(lab.graph, "macs").of({})
    assert [each.bounds for each in lab.targets.values()] == [
        (full * percent // 100,) for percent in (90, 60, 50, 30)
    ]
    assert lab.budgets["a"] == dmcp.Budget(macs="30%")


def test_units_are_restricted_to_the_grid(make, residual):
    lab = make()
    assert {unit.name: unit.choices for unit in lab.graph.searchable} == {
        "stem": (2, 4, 6, 8),
        "first": (2, 4, 6, 8),
        "last": (3, 6, 9, 12),
    }
    assert lab.net(lab.fresh()).graph.units == lab.graph.units
    assert residual.units[0].choices == tuple(range(1, 9))  # of the graph that it was given


def test_fresh_networks_are_copies(make):
    lab = make()
    before = copy.deepcopy(lab.graph.model.state_dict())
    first, second = lab.fresh(), lab.fresh()
    lab.train(Training(first, lab.recipe.retrain, 2), "training")
    with torch.no_grad():
        lab.net(second).model.stem.weight.zero_()
    for network in (lab.graph.model, lab.fresh()):
        assert all(torch.equal(before[k], value) for k, value in network.state_dict().items())
    assert not torch.equal(first.stem.weight, before["stem.weight"])
    assert not second.stem.weight.any()


def test_held_out_images_come_once_and_unchanged(make, few_digits, monkeypatch):
    lab = make()
    wanted, labels = few_digits.holdout.batch(range(len(few_digits.holdout)))
    assert torch.equal(torch.cat([batch.labels for batch in lab.holdout()]), labels)
    first = list(lab.holdout())
    brightness = torch.cat([batch.images for batch in first]).mean((1, 2, 3))
    slope = torch.corrcoef(torch.stack([brightness, wanted.float().mean((1, 2, 3))]))[0, 1]
    assert slope == pytest.approx(1)
    # The same for sets that are too large to be kept, and in batches of about one size.
    monkeypatch.setattr(lab_module, "_CACHED_BYTES", 0)
    monkeypatch.setattr(lab_module, "_HOLDOUT_BATCH", 50)
    large = make()
    for _ in range(2):
        batches = list(large.holdout())
        sizes = [len(batch.labels) for batch in batches]
        assert max(sizes) <= 50
        assert max(sizes) - min(sizes) < len(sizes)
        assert torch.equal(
            torch.cat([batch.images for batch in batches]),
            torch.cat([batch.images for batch in first]),
        )


def test_batches_are_always_the_same_and_free(make):
    lab = make()
    first = list(lab.batches(6))
    torch.rand(7)
    again, other = list(lab.batches(6)), list(make(seed=1).batches(6))
    assert [len(batch.images) for batch in first] == [BATCH] * 6
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a.images, b.images) for a, b in zip(first, other, strict=True))
    assert lab.spent == {None: Spent()}


class Dropping(nn.Module):
    """A network that draws from torch's global generator when it is trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, stride=2)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture(scope="module")
def traced_dropping():
    torch.manual_seed(0)
    return dmcp.trace(Dropping(), torch.zeros(2, 1, 8, 8))


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_labs_of_one_seed_pretrain_to_the_same_bits(make, traced_dropping):
    pretrained = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 1)):
        torch.manual_seed(global_seed)
        pretrained.append(make(graph=traced_dropping, seed=seed).pretrained())
    assert same_weights(pretrained[0], pretrained[1])
    assert not same_weights(pretrained[0], pretrained[2])
    assert not same_weights(pretrained[0], traced_dropping.model)


def test_pretrained_networks_are_copies_of_one(make):
    lab = make()
    first = lab.pretrained()
    nn.init.zeros_(first.stem.weight)
    assert lab.pretrained().stem.weight.any()


def test_pretraining_is_made_once_for_a_folder(make, traced_dropping, tmp_path, monkeypatch):
    wanted = make(graph=traced_dropping).pretrained()
    steps, real = [], Training.step

    def counted(stage, *batch):
        steps.append(stage.step_index)
        return real(stage, *batch)

    monkeypatch.setattr(Training, "step", counted)
    networks = []
    for name in ("one", "two"):
        lab = make(graph=traced_dropping, shared=tmp_path / "shared", folder=tmp_path / name)
        assert lab.pretraining == Spent()
        networks += [lab.pretrained(), lab.pretrained()]
        # To each lab in full, and once.
        assert images_of(lab.pretraining) == (4 * BATCH, 4 * BATCH)
        assert lab.pretraining.seconds > 0
        assert lab.spent == {None: lab.pretraining}
        assert lab.spent_on("half") == lab.spent_on("fifth") == lab.pretraining
        torch.rand(3)
    assert steps == [0, 1, 2, 3]
    assert all(same_weights(network, wanted) for network in networks)
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["pretrained.pt"]
    assert not (tmp_path / "one").exists()


def test_killed_pretraining_resumes_to_the_same_bits(
    make, traced_dropping, tmp_path, monkeypatch, killed
):
    options = {"graph": traced_dropping, "shared": tmp_path, "checkpoint_every": 1}
    whole = make(graph=traced_dropping)
    killed(monkeypatch, Training, "step", 2, lambda: make(**options).pretrained())
    torch.rand(5)
    lab = make(**options)
    assert same_weights(lab.pretrained(), whole.pretrained())
    assert images_of(lab.spent[None]) == images_of(whole.spent[None]) == (4 * BATCH, 4 * BATCH)


@pytest.mark.parametrize("passes", [1, 3])
def test_training_is_charged_for_every_pass_of_every_image(make, passes):
    lab, stage = make(), Counting(5)
    lab.train(stage, "counting", passes=passes, budget="half")
    assert stage.step_index == 5
    assert [len(tensor) for tensor in stage.batch] == [BATCH, BATCH]
    assert images_of(lab.spent["half"]) == (5 * passes * BATCH, 5 * passes * BATCH)
    assert images_of(lab.spent_on("half")) == (5 * passes * BATCH, 5 * passes * BATCH)
    assert images_of(lab.spent_on("fifth")) == (0, 0)
    assert lab.spent["half"].seconds > 0


def test_what_serves_all_budgets_is_charged_to_each(make):
    lab = make()
    lab.train(Counting(2), "all")
    lab.train(Counting(3), "one", budget="half")
    lab.train(Counting(4), "two", budget="half")
    assert images_of(lab.spent[None]) == (2 * BATCH, 2 * BATCH)
    assert images_of(lab.spent_on("half")) == (9 * BATCH, 9 * BATCH)
    assert images_of(lab.spent_on("fifth")) == (2 * BATCH, 2 * BATCH)
    sums = lab.spent[None].seconds + lab.spent["half"].seconds
    assert lab.spent_on("half").seconds == pytest.approx(sums)
    assert images_of(lab.spent[None]) == (2 * BATCH, 2 * BATCH)  # asking adds nothing


def test_rounds_cost_nothing_but_what_they_ask_for(make):
    lab, stage = make(), Counting(3)
    lab.run(stage, "rounds", budget="half")
    assert stage.step_index == 3
    assert stage.batch == ()
    assert images_of(lab.spent["half"]) == (0, 0)


def use_the_lab(lab):
    """One of each thing that is charged; returns the images forward and backward."""
    model = lab.fresh()
    lab.calibrate(model, 3)
    lab.accuracy(model)
    lab.charge(7, 5)
    return 3 * BATCH + len(lab.data.holdout) + 7, 5


@pytest.mark.parametrize("label", ["fifth", None])
def test_what_a_stage_asks_for_goes_to_its_budget(make, label):
    lab, used = make(), []
    lab.run(Counting(2, lambda: used.append(use_the_lab(lab))), "rounds", budget=label)
    lab.train(Counting(1, lambda: used.append(use_the_lab(lab))), "training", budget=label)
    forward, backward = (sum(column) for column in zip(*used, strict=True))
    assert images_of(lab.spent[label]) == (forward + BATCH, backward + BATCH)
    others = {None, "half", "fifth"} - {label}
    assert all(images_of(lab.spent.get(other, Spent())) == (0, 0) for other in others)


def test_what_is_asked_for_between_stages_serves_all(make):
    lab = make()
    lab.run(Counting(1), "rounds", budget="half")
    used = use_the_lab(lab)
    assert images_of(lab.spent[None]) == used
    assert images_of(lab.spent["half"]) == (0, 0)
    assert images_of(lab.spent_on("half")) == used


def test_pretraining_inside_a_stage_serves_all(make):
    lab = make()

    def work():
        lab.pretrained()
        lab.charge(7)

    lab.run(Counting(2, work), "rounds", budget="half")
    assert images_of(lab.spent[None]) == (4 * BATCH, 4 * BATCH)
    assert images_of(lab.spent["half"]) == (14, 0)


def test_a_stage_inside_another_is_charged_on_its_own(make):
    lab = make()

    def work():
        lab.run(Counting(1, lambda: lab.charge(5)), "inner", budget="fifth")
        lab.charge(7)

    lab.run(Counting(1, work), "outer", budget="half")
    lab.charge(11)
    charged = {label: images_of(spent) for label, spent in lab.spent.items()}
    assert charged == {None: (11, 0), "half": (7, 0), "fifth": (5, 0)}


@pytest.mark.parametrize("drive", ["run", "train"])
def test_nothing_is_charged_twice_after_a_kill(make, tmp_path, monkeypatch, killed, drive):
    def find(lab):
        stage = Counting(6, lambda: use_the_lab(lab))
        getattr(lab, drive)(stage, "first", budget="half")
        getattr(lab, drive)(Counting(2), "second")
        return lab

    whole = find(make())
    options = {"folder": tmp_path, "checkpoint_every": 3}
    # In the fifth step, at the last of its five charges; what was kept is the fourth or the third.
    killed(monkeypatch, Lab, "charge", 5 * 5 - 1, lambda: find(make(**options)))
    killed(monkeypatch, Counting, "step", 0, lambda: find(make(**options)))
    resumed = find(make(**options))
    assert resumed.spent.keys() == whole.spent.keys() == {None, "half"}
    for label in whole.spent:
        assert images_of(resumed.spent[label]) == images_of(whole.spent[label])
    again = find(make(**options))  # everything is done: the same is charged
    assert all(
        images_of(again.spent[label]) == images_of(whole.spent[label]) for label in again.spent
    )


def test_phases_of_budgets_have_checkpoints_of_their_own(make, tmp_path):
    lab = make(folder=tmp_path / "folder", shared=tmp_path / "shared")
    for label in (None, "half", "fifth"):
        lab.train(Counting(1), "phase", budget=label)
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    assert names == {"phase.pt", "phase-half.pt", "phase-fifth.pt"}
    assert not (tmp_path / "shared").exists()


def test_checkpoints_without_charges_are_refused(make, tmp_path):
    stage, path = Counting(1), tmp_path / "phase.pt"
    make(folder=tmp_path).run(stage, "phase")
    saved = torch.load(path)
    saved["state"] = saved["state"]["stage"]
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match="phase of a method"):
        make(folder=tmp_path).run(Counting(1), "phase")


def test_calibration_costs_what_the_norms_need(make):
    lab = make()
    lab.calibrate(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    assert lab.spent == {None: Spent()}
    model = lab.fresh()
    lab.calibrate(model, 5)
    assert lab.spent == {None: Spent(forward=5 * BATCH)}
    images = [batch.images for batch in lab.batches(5)]
    means = torch.stack([model.stem(batch).mean((0, 2, 3)) for batch in images])
    torch.testing.assert_close(model.norm.running_mean, means.mean(0))
    lab.calibrate(model)
    assert lab.spent == {None: Spent(forward=(5 + 16) * BATCH)}


def test_accuracy_is_of_the_held_out_images(make, few_digits):
    lab, model = make(), make().fresh()
    nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(F.one_hot(torch.tensor(3), 10))
    model.train()
    share = (few_digits.holdout.labels == 3).double().mean().item()
    assert 0.05 < share < 0.2
    assert lab.accuracy(model) == pytest.approx(share)
    assert model.training
    assert lab.spent == {None: Spent(forward=len(few_digits.holdout))}


def test_inherited_filters_have_the_largest_norms(make):
    lab = make()
    model = lab.fresh()
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])  # the first is the smallest
    with torch.no_grad():
        for layer in (model.stem, model.second, model.first):
            norms = layer.weight.abs().sum((1, 2, 3))
            layer.weight *= ((order.argsort() + 1) / norms)[:, None, None, None]
    before = copy.deepcopy(model.state_dict())
    widths = {"stem": 4, "first": 2, "last": 12, "head": 10}
    small = lab.inherit(model, widths)
    assert dmcp.trace(small, torch.zeros(2, 1, 8, 8)).widths() == widths
    stem, first = order[-4:].sort().values, order[-2:].sort().values
    assert torch.equal(small.stem.weight, before["stem.weight"][stem])
    assert torch.equal(small.stem.bias, before["stem.bias"][stem])
    assert torch.equal(small.first.weight, before["first.weight"][first][:, stem])
    assert torch.equal(small.second.weight, before["second.weight"][stem][:, first])
    assert torch.equal(small.head.weight, before["head.weight"])
    # Calibrated, and the whole network is as it was.
    assert small.norm.num_batches_tracked == 16
    assert lab.spent == {None: Spent(forward=16 * BATCH)}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_stream_is_inherited_by_the_norms_of_all_its_producers(make):
    lab = make()
    model = lab.fresh()
    with torch.no_grad():
        for layer, norms in ((model.stem, [8, 7, 6, 5, 4, 3, 2, 1]), (model.second, [0.1] * 8)):
            norms = torch.tensor(norms, dtype=torch.float32)
            norms[7] = 4.0 + 9.0 * (layer is model.second)
            layer.weight.copy_(norms[:, None, None, None].expand_as(layer.weight))
    small = lab.inherit(model, {"stem": 2, "first": 8, "last": 12, "head": 10})
    assert small.stem.weight[:, 0, 0, 0].tolist() == [8, 4]  # 7 has the largest sum by far


class Untouchable(ImageSet):
    """Images that nobody may look at."""

    def __init__(self):
        pass

    def __getattribute__(self, name):
        raise AssertionError(f"{name} of the test images was asked for")


@pytest.mark.parametrize(
    "method",
    [
        *(get(name) for name in ("uniform", "l1", "group_norm", "bn_gamma", "dmcp", "autoslim")),
        RandomSearch(samples=2),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_never_see_test_images(make, few_digits, method):
    test = Untouchable()
    with pytest.raises(AssertionError):
        len(test)
    lab = make(data=replace(few_digits, test=test))
    found = method.find(lab)
    assert list(found) == ["half", "fifth"]
    for label, pruned in found.items():
        widths = torch.tensor([list(pruned.widths.values())])
        assert lab.targets[label].met(widths)
    costs = [dmcp.cost(lab.graph, "macs").of(pruned.widths) for pruned in found.values()]
    assert all(larger > smaller for larger, smaller in pairwise(costs))
