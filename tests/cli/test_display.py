from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
import time
import warnings
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
from dmcp.errors import SearchWarning
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


def record(step, **metrics):
    return {"phase": "search", "step": step, "accuracy": 0.5, **metrics}


def test_progress_shows_what_matters(capsys):
    with ProgressDisplay() as display:
        display.begin("search", 4, 64, {"macs": 273_000})
        display.step(0)
        display.step(1)
        display.record(record(1, loss=2.0, expected_macs=286_000.0))
        display.step(4)
        display.record({"phase": "search", "step": 4, "retain": {"a": [0.99, 0.5], "b": [0.5]}})
        display.record(record(4, loss=1.25, expected_macs=274_000.0))
        display.begin("dmcp", 2, 64, {})
        display.step(0)
        display.record({**record(1, loss=0.5), "accuracy": 0.875})
        display.step(2)
    shown = capsys.readouterr()
    assert shown.out == ""
    search, training = shown.err.splitlines()
    assert "search" in search
    assert "4/4" in search
    assert re.search(
        r"\d[KMG]? img/s E\[macs\] 274K / 273K  loss 1.250  acc 50.0%  decided 33%", search
    )
    assert "dmcp" in training
    assert "loss 0.500  acc 87.5%" in training
    assert "E[" not in training + "decided"


def test_progress_writes_few_lines_where_there_is_no_terminal(capsys):
    with ProgressDisplay() as display:
        display.begin("train", 500, 64, {})
        for step in range(501):
            display.step(step)
            display.record(record(step, loss=1.0))
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr().err.count("\n") == 1


def test_the_speed_is_that_of_this_process(capsys):
    """Steps that were done before a restart took no time now."""
    with ProgressDisplay() as display:
        display.begin("train", 10**9, 1, {})
        for done in (10**9 - 2, 10**9 - 1, 10**9):
            display.step(done)
            time.sleep(0.01)
    (speed,) = re.findall(r"([\d.]+) img/s", capsys.readouterr().err)
    assert float(speed) <= 100


def test_a_terminal_of_80_columns_is_not_broken():
    """Rich draws on a pseudo-terminal; what has no room is cut, and every bar stays one line."""
    main_end, other_end = os.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    program = (
        "from dmcp.cli.display import ProgressDisplay\n"
        "with ProgressDisplay() as display:\n"
        "    display.begin('search', 336, 64, {'macs': 273_000})\n"
        "    display.step(0)\n"
        "    display.step(120)\n"
        "    display.record({'step': 120, 'retain': {'a': [0.5]}})\n"
        "    display.record({'step': 120, 'loss': 1.25, 'accuracy': 0.5, 'expected_macs': 3e5})\n"
    )
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-c", program]
    subprocess.run(command, stderr=other_end, env=environment, check=True, timeout=60)
    os.close(other_end)
    shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(main_end, 1 << 16).decode())
    os.close(main_end)
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert all(line.lstrip().startswith("search ") for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert "E[macs] 300K / 273K  loss 1.2" in lines[-1]


def test_a_search_warning_is_one_line(capsys):
    with ProgressDisplay() as display:
        display.begin("search", 4, 64, {})
        for _ in range(2):  # whoever warns does it once
            warnings.warn("[a] " + "long " * 40, SearchWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="other"):
            warnings.warn("other", UserWarning, stacklevel=1)
        before = warnings.showwarning
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first == second == "warning: [a] " + "long " * 40
    assert warnings.showwarning is not before


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
