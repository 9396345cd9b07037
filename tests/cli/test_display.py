from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import dmcp
from dmcp.cli.display import (
    ProgressDisplay,
    searchable_share,
    short,
    short_choices,
    show_graph,
    show_rows,
    unit_shares,
)
from dmcp.runs import Row

ROWS = [
    Row("dense", 1_234_567, 89_000, 0.98765, None, 12.6),
    Row("dmcp", 617_283, 40_000, 0.97, 0.999, 3601.2),
    Row("[odd]", 1, 2, 0.0, 1.0, 0.0),
]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (2_740_000, "2.74M"), (4.09e9, "4.09G")],
)
def test_short(value, text):
    assert short(value) == text


def test_table_of_rows(capsys):
    show_rows(ROWS, as_json=False, quiet=False)
    shown = capsys.readouterr()
    assert shown.err == ""
    dense, dmcp_row, odd = (line for line in shown.out.splitlines() if "%" in line)
    assert [cell.strip() for cell in dense.split("│")[1:-1]] == [
        "dense",
        "1,234,567",
        "89,000",
        "98.77%",
        "–",
        "13",
    ]
    assert "DMCP (expected sampling)" in dmcp_row
    assert "99.90%" in dmcp_row
    assert "[odd]" in odd


def test_json_and_silence(capsys):
    show_rows(ROWS, as_json=True, quiet=False)
    networks = json.loads(capsys.readouterr().out)["networks"]
    assert [Row(**row) for row in networks] == ROWS
    show_rows(ROWS, as_json=False, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_progress_shows_the_loss_and_the_expected_cost(capsys):
    with ProgressDisplay() as display:
        display.begin("search", 4, {"macs": 273_000})
        display.step(1)
        display.record({"phase": "search", "step": 1, "loss": 2.0, "expected_macs": 286_000.0})
        display.step(4)
        display.record({"phase": "search", "step": 4, "loss": 1.25, "expected_macs": 274_000.0})
        display.begin("dmcp", 2, {})
        display.record({"phase": "dmcp", "step": 1, "loss": 0.5})
        display.step(2)
    shown = capsys.readouterr()
    assert shown.out == ""
    search, training = shown.err.splitlines()
    assert "search" in search
    assert "4/4" in search
    assert "loss 1.250  E[macs] 274K / 273K" in search
    assert "dmcp" in training
    assert "loss 0.500" in training


def test_progress_says_nothing_of_what_never_began(capsys):
    with ProgressDisplay():
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ((5,), "5"),
        ((8, 16, 24), "8 16 24"),
        ((1, 2, 3, 4), "1…4"),
        ((32, 64, 96, 128), "32…128 by 32"),
        ((8, 16, 24, 40), "8 16 24 40"),
    ],
)
def test_widths_in_few_words(choices, text):
    assert short_choices(choices) == text


@pytest.fixture
def graph():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    return dmcp.trace(model, torch.zeros(2, 3, 8, 8))


def cells(table):
    """The rows of a table without its frame."""
    lines = (line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line] for line in lines]


def test_units_with_reasons(graph, capsys):
    show_graph(graph)
    shown = capsys.readouterr().out
    first, *last = cells(shown)
    total = 36 * 8 * 27 + 16 * 5 * 72
    assert first == ["0", "8", "1…8", "2", "100.0%"]
    assert last[0][:2] == ["2", "5"]
    assert last[0][3:] == ["1", f"{16 * 5 * 72 / total:.1%}"]
    assert " ".join(row[2] for row in last) == graph.units[1].reason
    assert f"macs {total:,}" in shown
    assert "2 units, 1 searchable; 100.0% of the MACs in layers with a searchable unit" in shown
    assert f"proof: {graph.proof.structures} structures" in shown
    show_graph(replace(graph, proof=None), {"0": 3}, groups=True)
    shown = capsys.readouterr().out
    assert cells(shown)[0] == ["0", "8", "3", "1…8", "8", "2", "100.0%"]
    assert f"macs {total * 3 // 8:,}" in shown
    assert "proof" not in shown


def test_a_share_is_what_vanishes_with_the_unit():
    """Of a layer that reads two units, half; of MACs without a unit, nothing."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.last = (nn.Conv2d(c, 4, 1) for c in (3, 3, 8))

        def forward(self, x):
            return self.last(torch.cat([self.left(x), self.right(x)], 1))

    graph = dmcp.trace(Two(), torch.zeros(2, 3, 4, 4))
    assert unit_shares(graph) == {
        "left": (12 + 16) / 56,
        "right": (12 + 16) / 56,
        "last": 32 / 56,
    }
    assert searchable_share(graph) == 1
    whole = replace(graph, units=tuple(replace(u, searchable=False) for u in graph.units))
    assert searchable_share(whole) == 0
    assert searchable_share(replace(graph, layers=())) == 0
