from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
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
def ranks(tmp_path_factory):
    """What two processes that talk through gloo ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in torchrun.items()}
        environment = {**os.environ, **variables, "MASTER_ADDR": "127.0.0.1"}
        processes.append(subprocess.Popen([sys.executable, PROGRAM, folder], env=environment))
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("options", list(search_ranks.OPTIONS))
def test_two_processes_search_as_one(ranks, options, monkeypatch):
    """Sandwich and architecture steps over the global batch, in float64."""
    markov = []
    draw = subnets.walk_chains
    monkeypatch.setattr(subnets, "walk_chains", lambda *a: markov.append(a) or draw(*a))
    alone = search_ranks.search(World.single(), options)
    assert len(markov) >= 3, "sub-networks were drawn from the chains"
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
    alone = search_ranks.search(World.single(), options)
    own = [rank[options]["metrics"] for rank in ranks]
    for step, expected in enumerate(alone["metrics"]):
        for name, value in expected.items():
            mean = sum(metrics[step][name] for metrics in own) / 2
            assert mean == pytest.approx(value, rel=1e-8), name
