from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import dmcp
from dmcp import recipes
from dmcp.data import train_stream
from dmcp.errors import ConfigError, SamplingError
from dmcp.methods import DMCP, Lab
from dmcp.methods.contest import Contest
from dmcp.methods.dmcp import closest_expected_widths
from dmcp.search import Search
from dmcp.train import checkpoint

BATCH, STEPS = 32, 8
BOTH = {"large": "60%", "small": "25%"}


@pytest.fixture
def make(residual, few_digits):
    """A lab for a `Residual`: a search is eight steps, four of them of stage 1, a training four.
    Chains move fast, so that searches differ."""

    def make(budgets=BOTH, folder=None, seed=0, **search):
        recipe = recipes.get("digits")
        schedule = replace(recipe.search.arch_lr, peak=0.5, final=0.2)
        recipe = replace(
            recipe,
            search=replace(recipe.search, **{"start": 0.8, "arch_lr": schedule, **search}),
            batch_size=BATCH,
            search_epochs=2,
            retrain_epochs=1,
            groups=8,
            divisor=1,
        )
        bounds = {label: dmcp.Budget(macs=share) for label, share in budgets.items()}
        return Lab(
            residual,
            few_digits,
            bounds,
            recipe,
            seed=seed,
            folder=folder,
            shared=folder,
            checkpoint_every=1,
        )

    return make


def plain_search(lab, label, model, start=0):
    """`dmcp.Search` driven by hand."""
    options = lab.recipe.search
    search = Search(lab.net(model), lab.budgets[label], STEPS, options, seed=lab.seed)
    search.step_index = start
    stream = train_stream(
        lab.data.train, BATCH, lab.seed, STEPS, start, crop_scale=lab.recipe.crop_scale
    )
    for batch in stream:
        search.step(*batch)
    return search


def assert_same(found, other):
    assert found.widths == other.widths
    assert found.chains == other.chains
    state, wanted = found.network.state_dict(), other.network.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())


def assert_found_by(pruned, search):
    """That a structure, its chains and its weights are those of a search."""
    assert pruned.widths == closest_expected_widths(search.net, search.targets)
    assert pruned.chains == search.describe()
    whole, norm = search.net.graph.model, pruned.network.norm3
    assert len(norm.weight) == pruned.widths["last"]
    assert torch.equal(norm.weight, whole.norm3.weight[: pruned.widths["last"]])
    assert torch.equal(pruned.network.head.bias, whole.head.bias)


def images_of(spent):
    return spent.forward, spent.backward


def test_stage_1_is_charged_to_all_and_stage_2_to_each(make, tmp_path):
    lab = make(folder=tmp_path)
    found = DMCP().find(lab)
    assert list(found) == ["large", "small"]
    # The widest, the narrowest and two random networks; in stage 2 also the masked one.
    shared, own = 4 * BATCH * STEPS // 2, 5 * BATCH * STEPS // 2
    assert {label: images_of(spent) for label, spent in lab.spent.items()} == {
        None: (shared, shared),
        "large": (own, own),
        "small": (own, own),
    }
    assert images_of(lab.spent_on("small")) == (shared + own, shared + own)
    phases = {path.name for path in tmp_path.iterdir()}
    assert phases == {"warm-up.pt", "search-large.pt", "search-small.pt"}


def test_passes_follow_the_options(make):
    lab = make({"half": "50%"}, random_subnets=1, warmup=0.25)
    DMCP().find(lab)
    assert images_of(lab.spent[None]) == (3 * 2 * BATCH, 3 * 2 * BATCH)
    assert images_of(lab.spent["half"]) == (4 * 6 * BATCH, 4 * 6 * BATCH)


def assert_fills(lab, label, pruned, room):
    """That a structure lies inside its budget and not far below, and that the network has it."""
    assert list(pruned.widths) == [unit.name for unit in lab.graph.units]
    ratio = lab.targets[label].largest_ratio(torch.tensor([list(pruned.widths.values())]))
    assert 1 - room <= ratio.item() <= 1
    layers = {name: len(pruned.network.get_submodule(name).weight) for name in pruned.widths}
    assert layers == pruned.widths


def test_structures_fill_their_budgets(make):
    lab = make()
    found = DMCP().find(lab)
    for label, pruned in found.items():
        assert_fills(lab, label, pruned, 0.1)
        (target,) = lab.targets[label].bounds
        assert pruned.chains["costs"]["macs"]["budget"] == target
        assert pruned.kept is None  # the first channels of each unit, as the search trains them
    assert found["large"].chains["retain"] != found["small"].chains["retain"]


def test_budgets_do_not_depend_on_each_other(make):
    together = DMCP().find(make())
    for label, share in BOTH.items():
        alone = DMCP().find(make({label: share}))
        assert_same(alone[label], together[label])


def test_a_search_is_that_of_the_library(make):
    lab = make()
    found = DMCP().find(lab)
    for label, pruned in found.items():
        assert_found_by(pruned, plain_search(lab, label, lab.fresh()))


def test_the_seed_decides(make):
    first, again, other = (DMCP().find(make(seed=seed))["small"] for seed in (0, 0, 1))
    assert_same(first, again)
    assert first.chains["retain"] != other.chains["retain"]


def test_finding_leaves_the_fresh_weights_alone(make):
    lab = make()
    before = copy.deepcopy(lab.graph.model.state_dict())
    DMCP().find(lab)
    state = lab.graph.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("step", [2, 6, 10], ids=["stage 1", "first budget", "second budget"])
def test_a_killed_search_resumes_to_the_same_bits(make, tmp_path, monkeypatch, killed, step):
    method, whole = DMCP(), make()
    wanted = method.find(whole)
    killed(monkeypatch, Search, "step", step, lambda: method.find(make(folder=tmp_path)))
    torch.rand(5)
    lab = make(folder=tmp_path)
    found = method.find(lab)
    for label in wanted:
        assert_same(found[label], wanted[label])
        assert images_of(lab.spent_on(label)) == images_of(whole.spent_on(label))


def test_pretrained_weights_may_take_the_place_of_stage_1(make, tmp_path):
    method, lab = DMCP(warm_up="pretrained"), make(folder=tmp_path)
    assert method.uses_pretrained
    assert not DMCP().uses_pretrained
    found = method.find(lab)
    for label, pruned in found.items():
        assert_found_by(pruned, plain_search(lab, label, lab.pretrained(), STEPS // 2))
        assert pruned.chains != plain_search(lab, label, lab.fresh(), STEPS // 2).describe()
    # Pretraining, one epoch of four steps, is all that serves both budgets.
    own = 5 * BATCH * STEPS // 2
    assert {label: images_of(spent) for label, spent in lab.spent.items()} == {
        None: (4 * BATCH, 4 * BATCH),
        "large": (own, own),
        "small": (own, own),
    }
    assert lab.pretraining == lab.spent[None]
    assert not (tmp_path / "warm-up.pt").exists()


SAMPLED = DMCP(sampling="markov", samples=4, tolerance=0.2)


def judged(folder, label):
    """The structures that were judged, with their accuracies."""
    state = checkpoint.load(folder / f"samples-{label}.pt")["state"]["stage"]
    return state["structures"], state["accuracies"]


def test_sampled_structures_are_judged_by_held_out_images(make, tmp_path):
    lab = make(folder=tmp_path)
    searched = DMCP().find(make())
    found = SAMPLED.find(lab)
    for label, pruned in found.items():
        assert_fills(lab, label, pruned, 0.2)
        structures, accuracies = judged(tmp_path, label)
        rows = torch.tensor([list(widths.values()) for widths in structures])
        assert 1 < len(rows.unique(dim=0)) == len(rows) <= 4
        ratios = lab.targets[label].largest_ratio(rows)
        assert ratios.min() >= 0.8
        assert ratios.max() <= 1
        assert len(set(accuracies)) > 1
        assert pruned.widths == structures[accuracies.index(max(accuracies))]
        # The search is the same as without sampling, and so are the weights.
        assert pruned.chains == searched[label].chains
        search = plain_search(lab, label, lab.fresh())
        for widths, accuracy in zip(structures, accuracies, strict=True):
            small = lab.extract(search.net.graph.model, widths)
            lab.calibrate(small)
            assert lab.accuracy(small) == accuracy
        lab.calibrate(pruned.network)
        assert lab.accuracy(pruned.network) == max(accuracies)


def test_judging_is_charged_to_the_budget(make, tmp_path):
    lab = make(folder=tmp_path)
    SAMPLED.find(lab)
    own = 5 * BATCH * STEPS // 2
    for label in BOTH:
        each = 16 * BATCH + len(lab.data.holdout)
        assert images_of(lab.spent[label]) == (own + each * len(judged(tmp_path, label)[0]), own)
    assert images_of(lab.spent[None]) == (4 * BATCH * STEPS // 2,) * 2


def test_killed_judging_resumes_to_the_same_structure(make, tmp_path, monkeypatch, killed):
    whole = make()
    wanted = SAMPLED.find(whole)
    killed(monkeypatch, Contest, "step", 2, lambda: SAMPLED.find(make(folder=tmp_path)))
    torch.rand(5)
    lab = make(folder=tmp_path)
    found = SAMPLED.find(lab)
    for label in wanted:
        assert_same(found[label], wanted[label])
        assert images_of(lab.spent_on(label)) == images_of(whole.spent_on(label))


def test_chains_that_end_far_from_the_budget_cannot_be_sampled(make):
    lab = make({"small": "25%"}, start=0.999)
    with pytest.raises(SamplingError, match="sampled structures"):
        DMCP(sampling="markov", tolerance=1e-6).find(lab)


@pytest.mark.parametrize("sampling", ["expected", "markov"])
def test_one_search_may_serve_all_budgets(make, tmp_path, sampling):
    method, lab = replace(SAMPLED, sampling=sampling, single_search=True), make(folder=tmp_path)
    found = method.find(lab)
    shared = (4 + 5) * BATCH * STEPS // 2
    assert images_of(lab.spent[None]) == (shared, shared)
    own = {label: spent for label, spent in lab.spent.items() if label is not None}
    assert all(spent.backward == 0 for spent in own.values())
    assert set(own) == (set(BOTH) if sampling == "markov" else set())
    assert {path.name for path in tmp_path.glob("search*")} == {"search.pt"}
    # It is the search at the largest budget.
    search = plain_search(lab, "large", lab.fresh())
    for label, pruned in found.items():
        targets = lab.targets[label]
        assert pruned.chains == search.describe(targets)
        assert pruned.chains["costs"]["macs"]["budget"] == targets.bounds[0]
        assert targets.met(torch.tensor([list(pruned.widths.values())]))
        if sampling == "expected":
            assert pruned.widths == closest_expected_widths(search.net, targets)
    assert found["large"].chains["retain"] == found["small"].chains["retain"]
    assert found["large"].widths != found["small"].widths


def test_with_one_budget_a_single_search_is_the_same(make):
    one = {"half": "50%"}
    single, usual = make(one), make(one)
    assert_same(DMCP(single_search=True).find(single)["half"], DMCP().find(usual)["half"])
    assert images_of(single.spent_on("half")) == images_of(usual.spent_on("half"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warm_up": "none"}, "'sandwich' or 'pretrained', got 'none'"),
        ({"sampling": "best"}, "'expected' or 'markov', got 'best'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"tolerance": 0.0}, r"tolerance must lie in \(0, 1\), got 0.0"),
        ({"tolerance": 1.0}, r"tolerance must lie in \(0, 1\), got 1.0"),
        ({"tolerance": float("nan")}, "tolerance"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DMCP(**options)
