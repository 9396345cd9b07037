"""Rivals of a whole iteration: they compute the same, and everything asked for is measured."""

from __future__ import annotations

import copy
import io
import json

import iteration
import iteration_rivals
import pytest
import torch
from dispatch import Calls
from iteration import Case
from iteration_rivals import RIVALS
from rich.console import Console
from table import render_iterations

CPU = torch.device("cpu")
CASE = Case("mobilenet_v2-0.25", size=64, batch=4, dtype="float32", stage=2)
RIVALS_TRIED = ("ours", "published", "eager")  # torch.compile takes minutes


@pytest.fixture(scope="module")
def compared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iteration, "WARM_UP", 0)
        patch.setattr(iteration, "ITERATIONS", 1)
        return iteration.compare(CASE, RIVALS_TRIED, sweeps=1, device=CPU)


@pytest.fixture(scope="module")
def gate():
    return iteration.gate_of(CASE.model, CASE.size, CASE.batch, CPU)


@pytest.mark.parametrize("name", ["published", "eager"])
def test_rivals_have_the_same_mathematics(compared, name):
    errors = compared["rivals"][name]["errors"]["float64"]
    assert list(errors) == ["widest", "narrowest", "architecture"]
    assert max(errors.values()) <= 1e-6


def test_everything_is_measured(compared):
    json.dumps(compared)
    assert list(compared["rivals"]) == list(RIVALS_TRIED)
    assert compared["plain_peak_bytes"] > 0
    for row in compared["rivals"].values():
        assert row["seconds"] > 0
        assert row["over_ours"] > 0
        assert list(row["passes"]) == ["widest", "narrowest", "architecture"]
        assert sum(row["kinds"].values()) == pytest.approx(1)
        assert row["kinds"]["convolution"] > 0
        assert row["peak_bytes"] >= row["passes"]["widest"]["peak_bytes"] / 2


def test_the_published_way_asks_most_of_the_host(compared):
    rows = compared["rivals"]
    assert rows["published"]["host_reads"] > 30
    assert rows["published"]["calls"] > rows["ours"]["calls"]


def test_the_table_shows_every_rival(compared):
    shown = io.StringIO()
    Console(file=shown, width=220).print(render_iterations([compared]))
    for word in (*RIVALS_TRIED, "mobilenet_v2-0.25", "architecture"):
        assert word in shown.getvalue()


def test_a_rival_that_computes_something_else_is_refused(gate, monkeypatch):
    class Careless(iteration_rivals.Eager):
        """Forgets the masks of the norms."""

        def _place_mask(self, module, unit):
            if not isinstance(module, torch.nn.BatchNorm2d):
                super()._place_mask(module, unit)

    monkeypatch.setitem(RIVALS, "careless", Careless)
    rival = Careless(copy.deepcopy(gate.model), gate.graph, 2)
    with pytest.raises(AssertionError, match=r"careless, .*: the architecture pass is off"):
        gate.check("careless", rival)


@pytest.mark.parametrize("name", ["published", "eager"])
def test_rivals_take_the_widths_that_ours_has_drawn(gate, name):
    ours, rival = (RIVALS[n](copy.deepcopy(gate.model), gate.graph, 2) for n in ("ours", name))
    ours.begin(0)
    ours.step(gate.images, gate.labels)
    taken = []
    rival._set_widths = lambda widths, wrapped=rival._set_widths: (
        taken.append(widths),
        wrapped(widths),
    )
    rival.begin(0, ours.drawn)
    rival.step(gate.images, gate.labels)
    assert len(ours.drawn) == 2
    assert taken[2:6:2] == ours.drawn


@pytest.mark.parametrize("name", ["published", "eager"])
def test_rivals_draw_from_their_chains(gate, name):
    rival = RIVALS[name](copy.deepcopy(gate.model), gate.graph, 2)
    rival.begin(0)
    drawn = [rival._chain() for _ in range(64)]
    # A chain of transition probabilities 0.9 keeps all of its groups that often.
    for unit in gate.graph.searchable:
        whole = sum(widths[unit.name] == unit.channels for widths in drawn) / len(drawn)
        expected = 0.9 ** (len(unit.choices) - 1)
        assert abs(whole - expected) < 5 * (expected * (1 - expected) / len(drawn)) ** 0.5
        assert {widths[unit.name] for widths in drawn} <= set(unit.choices)


def test_cuda_graphs_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["iteration.py", "--rivals", "graphs", "--threads", "1"])
    with pytest.raises(SystemExit):
        iteration.main()
    assert "the rival graphs needs --device cuda" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_ask_least_of_the_host(monkeypatch):
    monkeypatch.setattr(iteration, "WARM_UP", 1)
    monkeypatch.setattr(iteration, "ITERATIONS", 1)
    found = iteration.compare(CASE, ("ours", "graphs"), sweeps=1, device=torch.device("cuda", 0))
    ours, graphs = (found["rivals"][name] for name in ("ours", "graphs"))
    assert graphs["calls"] < 0.7 * ours["calls"]
    assert graphs["passes"] == {}


def test_scaling_changes_one_thing_at_a_time():
    cases = dict.fromkeys(case for _, case in iteration.scaling_cases(["float32"]))
    assert {case.batch for case in cases} == {4, 8, 16, 32}
    assert {case.size for case in cases} == {32, 64, 96, 128}


# --- Counting -------------------------------------------------------------------------------------


def test_calls_count_forward_and_backward():
    x = torch.randn(4, requires_grad=True)
    with Calls() as calls:
        (x * x).sum().backward()
    assert calls.names["aten::mul"] == 3
    assert calls.names["aten::sum"] == 1
    assert calls.total == calls.names.total()
    assert not calls.host_reads


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: torch.equal(x, x + 1), "equal"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_calls_count_what_the_host_waits_for(read, name):
    with Calls() as calls:
        read(torch.randn(4))
    assert calls.host_reads == {f"aten::{name}": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_count_copies_to_the_host():
    x = torch.randn(4, device="cuda")
    with Calls() as calls:
        x.cpu()
        torch.empty(4).copy_(x)
        x.to(torch.float64)
    assert calls.host_reads.total() == 2
