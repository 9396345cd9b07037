from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import dmcp
from dmcp.cli.display import ProgressDisplay, short, show_graph, show_rows
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


def test_units_with_reasons(capsys):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    graph = dmcp.trace(model, torch.zeros(1, 3, 8, 8))
    show_graph(graph, {"0": 1.0, "2": 0.25}, {"macs": 1_000_000}, as_json=False)
    table = capsys.readouterr().out
    assert "macs 1,000,000" in table
    assert "1 2 3 4 5 6 7 8" in table
    assert "25.0%" in table
    assert "outputs" in table
