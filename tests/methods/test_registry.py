from __future__ import annotations

from dataclasses import fields

import pytest

from dmcp.errors import ConfigError
from dmcp.methods import COMPARISONS, DMCP, PRESETS, comparison, get, names

TABLES = (
    "uniform",
    "dmcp",
    "bernoulli",
    "bernoulli-subsets",
    "autoslim",
    "metapruning",
    "amc",
    "fpgm",
    "sfp",
    "random",
    "l1",
    "bn_gamma",
    "group_norm",
)
VARIANTS = ("dmcp-pretrained", "dmcp-sampled", "dmcp-single-search")


def test_names_leave_variants_out_unless_asked():
    assert names() == TABLES
    with_variants = names(variants=True)
    assert len(with_variants) == len(TABLES) + len(VARIANTS)
    assert set(with_variants) == {*TABLES, *VARIANTS}


@pytest.mark.parametrize("preset", ["short", "paper"])
@pytest.mark.parametrize("name", names(variants=True))
def test_every_name_gives_a_method(name, preset):
    method = get(name, preset)
    assert callable(method.find)
    assert isinstance(method.uses_pretrained, bool)
    assert type(method) is type(get(name))


def test_the_short_preset_is_the_default():
    for name in names(variants=True):
        assert get(name) == get(name, "short")
    assert get("amc") != get("amc", "paper")


def test_methods_have_their_own_class_or_options():
    methods = [get(name) for name in names(variants=True)]
    for number, method in enumerate(methods):
        assert method not in methods[:number]


def test_variants_differ_from_dmcp_in_one_option():
    options = {
        "dmcp-pretrained": {"warm_up": "pretrained"},
        "dmcp-sampled": {"sampling": "markov"},
        "dmcp-single-search": {"single_search": True},
    }
    assert options.keys() == set(VARIANTS)
    for name, changed in options.items():
        method = get(name)
        assert {
            field.name: getattr(method, field.name)
            for field in fields(DMCP)
            if getattr(method, field.name) != field.default
        } == changed


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("amc", {"episodes": 800, "warm_up": 100, "replay": 100, "batches": 60}),
        ("amc", {"noise": 0.5, "noise_decay": 0.95, "positions": 10}),
        ("metapruning", {"population": 50, "generations": 20, "hidden": 64, "parents": 10}),
        ("metapruning", {"mutation": 0.1}),
        ("random", {"samples": 1000, "least_share": 0.3}),
        ("bn_gamma", {"sparsity": 1e-5}),
    ],
)
def test_paper_presets_hold_the_published_values(name, published):
    method = get(name, "paper")
    assert {option: getattr(method, option) for option in published} == published


def test_presets_are_the_same_where_nothing_was_published():
    own = {"amc", "metapruning", "random", "bn_gamma"}
    assert {
        name for name in names(variants=True) if get(name, "paper") != get(name, "short")
    } == own


def test_comparisons_hold_dmcp_against_known_methods():
    assert set(COMPARISONS) == {"warm-up", "gates", "sampling", "budgets"}
    for name, compared in COMPARISONS.items():
        assert comparison(name) == compared
        assert compared[0] == "dmcp"
        assert 1 < len(set(compared)) == len(compared)
        assert set(compared) <= set(names(variants=True))
    assert {name for compared in COMPARISONS.values() for name in compared} >= set(VARIANTS)


def test_unknown_names_are_refused_with_the_accepted_ones():
    with pytest.raises(ConfigError, match="'dmpc'") as refused:
        get("dmpc")
    assert all(name in str(refused.value) for name in (*TABLES, *VARIANTS))
    with pytest.raises(ConfigError, match="'long'") as refused:
        get("dmcp", "long")
    assert all(preset in str(refused.value) for preset in PRESETS)
    with pytest.raises(ConfigError, match="'warmup'") as refused:
        comparison("warmup")
    assert all(name in str(refused.value) for name in COMPARISONS)
