import pytest
import torch

from dmcp.errors import CheckpointError, ConfigError
from dmcp.methods.random_search import Contest, RandomSearch, random_structures
from dmcp.search import Budget, MarkovNet


@pytest.fixture
def graph(traced):
    graph = traced("resnet18").graph
    return MarkovNet(graph.model, None, 10, 1, graph=graph).graph


def structures(graph, count=20, least_share=0.3, seed=0, budget="50%"):
    generator = torch.Generator().manual_seed(seed)
    targets = Budget(macs=budget).of(graph)
    return random_structures(graph, targets, count, least_share, generator), targets


def test_structures_are_different_and_fill_the_budget(graph):
    for budget in ("20%", "50%", "80%"):
        found, targets = structures(graph, budget=budget)
        rows = torch.tensor([list(widths.values()) for widths in found])
        assert len(rows.unique(dim=0)) == len(found) == 20
        ratios = targets.largest_ratio(rows)
        assert ratios.max() <= 1
        assert ratios.min() >= 0.98


def test_structures_depend_on_the_seed_alone(graph):
    first, _ = structures(graph)
    assert structures(graph)[0] == first
    assert structures(graph, count=5)[0] == first[:5]
    assert structures(graph, seed=1)[0] != first


def test_the_default_device_of_new_tensors_does_not_matter(graph):
    first, _ = structures(graph, count=3)
    with torch.device("meta"):
        assert structures(graph, count=3)[0] == first


def test_shares_are_in_the_ratio_drawn(traced):
    graph = traced("resnet18").graph  # with every width, so that no grid blurs them
    drawn = torch.rand(len(graph.units), generator=torch.Generator().manual_seed(0))
    shares = 0.5 + 0.5 * drawn.double()
    (widths,), _ = structures(graph, 1, 0.5, budget="20%")
    scales = torch.tensor(
        [
            widths[unit.name] / unit.channels / share.item()
            for unit, share in zip(graph.units, shares, strict=True)
            if unit.searchable and unit.channels >= 32
        ]
    )
    assert scales.max() / scales.min() < 1.2


def test_there_may_be_fewer(graph):
    found, _ = structures(graph, least_share=1.0)
    assert len(found) == 1


def test_the_best_structure_wins(make_lab, assert_fills):
    lab = make_lab()
    method = RandomSearch(samples=4)
    assert method.uses_pretrained
    found = method.find(lab)
    assert_fills(lab, found)
    model = lab.pretrained()
    for label, pruned in found.items():
        candidates, accuracies = pruned.details["structures"], pruned.details["accuracies"]
        assert len(candidates) == len(accuracies) == 4
        assert pruned.widths == candidates[accuracies.index(max(accuracies))]
        judged = [lab.accuracy(lab.inherit(model, widths)) for widths in candidates]
        assert accuracies == judged
        assert lab.accuracy(pruned.network) == max(accuracies)
        assert lab.spent_on(label).forward > lab.spent[None].forward


def test_a_killed_search_resumes_to_the_same_structure(make_lab, tmp_path, monkeypatch, killed):
    method = RandomSearch(samples=4)
    whole = make_lab(("50%",))
    wanted = method.find(whole)["50%"]
    killed(monkeypatch, Contest, "step", 2, lambda: method.find(make_lab(("50%",), tmp_path)))
    lab = make_lab(("50%",), tmp_path)
    judged = []
    real = Contest.step
    monkeypatch.setattr(Contest, "step", lambda contest: judged.append(0) or real(contest))
    got = method.find(lab)["50%"]
    assert len(judged) == 2
    assert (got.widths, got.details) == (wanted.widths, wanted.details)
    assert lab.spent_on("50%").forward == whole.spent_on("50%").forward


def test_a_checkpoint_of_other_structures_is_refused(make_lab):
    lab = make_lab(("50%",))
    contest = Contest(lab, lab.fresh(), [{"a": 1}])
    with pytest.raises(CheckpointError, match="other structures"):
        contest.load_state_dict({"structures": [{"a": 2}], "accuracies": [0.5]})


@pytest.mark.parametrize("options", [{"samples": 0}, {"least_share": 0.0}, {"least_share": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        RandomSearch(**options)
