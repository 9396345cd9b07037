from __future__ import annotations

import json

import pytest

from dmcp.cli import main
from dmcp.cli.compare import show_comparison, show_published
from dmcp.compare import Comparison, Row
from dmcp.report import DENSE

ARGUMENTS = [
    *("compare", "--model", "resnet18", "--width", "0.125", "--divisor", "2"),
    *("--methods", "uniform", "--budgets", "50%, 30%", "--seeds", "0"),
    *("--search-epochs", "1", "--retrain-epochs", "1", "--batch-size", "256"),
]


def test_prints_a_table_and_continues_a_finished_folder(tmp_path, capsys):
    output = ["--output", str(tmp_path / "run")]
    assert main([*ARGUMENTS, *output, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(row["method"], row["budget"]) for row in printed["rows"]] == [
        (DENSE, None),
        ("uniform", "50%"),
        ("uniform", "30%"),
    ]
    assert main([*ARGUMENTS, *output]) == 0
    shown = capsys.readouterr().out
    assert "Track A" in shown
    for row in printed["rows"]:
        assert f"{100 * row['top1']:.2f}" in shown
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic'"),
        (["--seeds", "0,one"], "--seeds must be numbers, got '0,one'"),
        (["--track", "A,D"], "tracks must be among A, B, C, got 'D'"),
        (["--budgets", "lots"], "got 'lots'"),
        (["--methods", "all", "--comparison", "magic"], "unknown comparison 'magic'"),
        (["--holdout", "0"], "holdout must be above 0"),
        (["--comparison", "gates"], "--methods and --comparison exclude each other"),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--micro-batches", "200"], "micro_batches"),
        (["--budgets", "50%,50.0%"], "budgets must differ"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert main([*ARGUMENTS, "--output", str(output), *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not output.exists()


def test_is_not_for_torchrun(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*ARGUMENTS, "--output", str(tmp_path / "run")]) == 2
    assert "--jobs" in capsys.readouterr().err


def row(method, track, budget, **changes):
    values = {
        "seeds": 3,
        "top1": 0.9753,
        "top1_deviation": 0.0041,
        "macs": 1_080_000.0,
        "params": 290_000.0,
        "latency_ms": 2.5,
        "forward": 10_000.0,
        "backward": 9_000.0,
        "search_seconds": 61.0,
    }
    return Row(method, track, budget, **(values | changes))


def test_the_paper_stands_beside_its_own_networks(capsys):
    rows = [
        row("dmcp", "A", "50%", macs=210e6, top1=0.71),
        row("dmcp", "C", "50%", macs=210e6, top1=0.73),
        row("dmcp", "A", "10%", macs=1e6),
    ]
    show_published(rows, "mobilenet_v2")
    printed = capsys.readouterr().out
    shown = [line for line in printed.splitlines() if "| dmcp" in line]
    scratch = [line for line in shown if " A " in line]
    assert any("dmcp" in line and "72.2" in line for line in scratch)
    assert any("uniform" in line and "70.1" in line for line in scratch)
    assert not any("73.5" in line for line in scratch)  # the starred row
    assert any("73.5" in line for line in shown if " C " in line)
    assert "| 1M " not in printed
    show_published(rows, "resnet18")
    assert capsys.readouterr().out == ""


def test_tracks_are_never_mixed_and_what_is_missing_is_said(capsys):
    rows = [
        row(DENSE, None, None),
        row("dmcp", "A", "50%"),
        row("dmcp", "C", "50%", top1=0.5, seeds=1, top1_deviation=0.0),
    ]
    show_comparison(Comparison(rows, [], {}, left=2, device="cpu", threads=1))
    printed = capsys.readouterr()
    first, second = printed.out.split("Track C")
    assert first.count("dmcp") == second.count("dmcp") == 1
    assert first.count(DENSE) == second.count(DENSE) == 1  # belongs to both
    assert "97.53 ± 0.41" in first
    assert " 50.00 |" in second  # one seed has no deviation
    assert "±" not in second.split("dmcp")[1].splitlines()[0]
    assert "2 tasks are left" in printed.err
