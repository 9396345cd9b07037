from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

from dmcp.search import subnets
from dmcp.train import World

PROGRAM = Path(__file__).with_name("search_ranks.py")
_spec = importlib.util.spec_from_file_location("search_ranks", PROGRAM)
assert _spec is not None
assert _spec.loader is not None
search_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(search_ranks)


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory):
    """What two processes that talk through gloo ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(str(PROGRAM), folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@cache
def search_alone(options):
    """What one process ends with, and how often it drew sub-networks from the chains."""
    markov = []
    draw = subnets.walk_chains
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subnets, "walk_chains", lambda *a: markov.append(a) or draw(*a))
        return search_ranks.search(World.single(), options), len(markov)


@pytest.mark.parametrize("options", list(search_ranks.OPTIONS))
def test_two_processes_search_as_one(ranks, options):
    """Sandwich and architecture steps over the global batch, in float64."""
    alone, draws = search_alone(options)
    assert draws >= 3, "sub-networks were drawn from the chains"
    start = search_ranks.OPTIONS[options].start
    for found in (rank[options] for rank in ranks):
        assert found["net"].keys() == alone["net"].keys()
        for name, tensor in found["net"].items():
            torch.testing.assert_close(
                tensor, alone["net"][name], rtol=1e-10, atol=1e-10, msg=f"{name} differs"
            )
        assert torch.equal(found["generator"], alone["generator"])
        assert found["expected"] == alone["expected"]
        assert found["classes"] == alone["classes"]
    if start == 0.5:
        moved = [value for name, value in alone["net"].items() if name.endswith("alpha")]
        assert all((alpha != 0).all() for alpha in moved)


@pytest.mark.parametrize("options", list(search_ranks.OPTIONS))
def test_metrics_are_shares_of_the_global_ones(ranks, options):
    alone, _ = search_alone(options)
    own = [rank[options]["metrics"] for rank in ranks]
    for step, expected in enumerate(alone["metrics"]):
        for name, value in expected.items():
            mean = sum(metrics[step][name] for metrics in own) / 2
            assert mean == pytest.approx(value, rel=1e-8), name
