import itertools
from collections import Counter

import pytest
import torch

from dmcp.errors import ConfigError
from dmcp.methods.bernoulli import Bernoulli, SubsetSearch, random_subsets
from dmcp.search import Search
from dmcp.search.bernoulli_net import BernoulliNet

BOTH = [Bernoulli(), Bernoulli(subsets=True)]


@pytest.fixture
def net(traced):
    graph = traced("FunctionalReLU6").graph
    return BernoulliNet(graph.model, None, 4, 2, graph=graph)


def draws(net, share, count):
    """How often each subset of the groups of each unit was drawn."""
    generator = torch.Generator().manual_seed(0)
    found = {unit.name: Counter() for unit in net.graph.searchable}
    for kept in random_subsets(net, count, share, generator):
        for name, channels in kept.items():
            found[name][tuple(channels.tolist())] += 1
    return found


def subsets(chain):
    choices = [torch.tensor(groups) for groups in itertools.product([False, True], repeat=3)]
    return {tuple(chain.channels_of(groups).tolist()): groups for groups in choices}


def test_uniform_subsets_have_uniform_sizes(net):
    unit = net.graph.searchable[0]
    assert len(unit.choices) == 4
    found = draws(net, 1.0, 12_000)[unit.name]
    for kept, groups in subsets(net.chain(unit.name)).items():
        of_that_many = (1, 3, 3, 1)[int(groups.sum())]
        assert found[kept] == pytest.approx(12_000 / 4 / of_that_many, rel=0.1)


def test_other_subsets_follow_the_gates(net):
    unit = net.graph.searchable[0]
    p = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        net.chain(unit.name).alpha.copy_(p.logit())
    found = draws(net, 1e-9, 12_000)[unit.name]
    for kept, groups in subsets(net.chain(unit.name)).items():
        chance = torch.where(groups, p, 1 - p).prod().item()
        assert found[kept] == pytest.approx(12_000 * chance, abs=5 * (12_000 * chance) ** 0.5)


@pytest.mark.parametrize("share", [1.0, 1e-9])
def test_the_default_device_of_new_tensors_does_not_matter(net, share):
    found = draws(net, share, 20)
    with torch.device("meta"):
        assert draws(net, share, 20) == found


@pytest.mark.parametrize("method", BOTH)
def test_the_likeliest_groups_are_kept_inside_every_budget(make_lab, assert_fills, method):
    lab = make_lab()
    found = method.find(lab)
    assert_fills(lab, found)
    for pruned in found.values():
        for unit in lab.graph.searchable:
            kept, p = pruned.kept[unit.name], pruned.details["retain"][unit.name]
            assert len(kept) == pruned.widths[unit.name]
            assert kept[: unit.choices[0]].tolist() == [*range(unit.choices[0])]
            stays = [narrow in kept for narrow in unit.choices[:-1]]
            likely = sorted(range(len(p)), key=lambda group: -p[group])[: sum(stays)]
            assert {group for group, stay in enumerate(stays) if stay} == set(likely)


def test_the_network_has_the_weights_of_the_kept_channels(make_lab):
    lab = make_lab(("50%",))
    (pruned,) = Bernoulli(subsets=True).find(lab).values()
    first, second, *_ = (pruned.kept[unit.name] for unit in lab.graph.searchable)
    assert pruned.network[3].weight.shape == (len(second), len(first), 3, 3)
    assert any(len(kept) <= int(kept[-1]) for kept in pruned.kept.values())


@pytest.mark.parametrize("method", BOTH)
def test_only_subsets_leave_prefixes(make_lab, monkeypatch, method):
    lab, seen = make_lab(("50%",)), []
    real = BernoulliNet.at

    def noted(net, widths=None):
        seen.extend((widths or {}).values())
        return real(net, widths)

    monkeypatch.setattr(BernoulliNet, "at", noted)
    method.find(lab)
    assert any(isinstance(kept, torch.Tensor) for kept in seen) == method.subsets


@pytest.mark.parametrize(("method", "kind"), [(BOTH[0], Search), (BOTH[1], SubsetSearch)])
def test_a_killed_search_resumes_to_the_same_structure(
    make_lab, tmp_path, monkeypatch, killed, method, kind
):
    wanted = method.find(make_lab(("50%",)))["50%"]
    killed(monkeypatch, Search, "step", 14, lambda: method.find(make_lab(("50%",), tmp_path)))
    lab = make_lab(("50%",), tmp_path)
    got = method.find(lab)["50%"]
    assert got.widths == wanted.widths
    assert got.details == wanted.details
    for name, tensor in wanted.network.state_dict().items():
        assert torch.equal(got.network.state_dict()[name], tensor)
    assert type(method._search(lab, method._net(lab, lab.fresh()), "50%")) is kind


def test_prefixes_are_not_sampled_from_gates():
    with pytest.raises(ConfigError, match="sampling"):
        Bernoulli(sampling="markov")


def test_the_warm_up_may_be_a_pretraining(make_lab, assert_fills):
    lab = make_lab(("50%",))
    method = Bernoulli(warm_up="pretrained")
    assert method.uses_pretrained
    assert_fills(lab, method.find(lab))
