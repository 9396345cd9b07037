"""The reader, on entries written here and on what pytest-benchmark writes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from table import print_table, render, render_iterations, summarise


def entry(rival, direction, seconds, *, sweep=0, case="8x4x4-relu", calls=1, **labels):
    labels = {"count": 1, "bytes": 0, "tensor_bytes": 0, **labels}
    info = {
        "op": "norm_act",
        "network": "resnet18",
        "case": case,
        "dtype": "float32",
        "rival": rival,
        "direction": direction,
        "sweep": sweep,
        "calls": calls,
        **labels,
    }
    return {
        "fullname": f"bench/test_norm_act.py::test_norm_act[{rival}]",
        "param": rival,
        "extra_info": info,
        "stats": {"median": seconds * calls},
    }


def report(*entries):
    return {
        "datetime": "2020-01-01T00:00:00",
        "commit_info": {"id": "abc"},
        "machine_info": {"dmcp": {"device": "cpu"}},
        "benchmarks": list(entries),
    }


def row(summary, rival, case="8x4x4-relu"):
    (found,) = (one for one in summary["rows"] if (one["rival"], one["case"]) == (rival, case))
    return found


def test_ratios_are_taken_within_a_sweep():
    seconds = {"ours": (1.0, 10.0, 1.1), "eager": (3.0, 30.0, 3.3)}
    entries = [
        entry(rival, "both", value, sweep=sweep)
        for rival, values in seconds.items()
        for sweep, value in enumerate(values)
    ]
    eager = row(summarise([report(*entries)]), "eager")["both"]
    assert eager["over_ours"] == pytest.approx(3.0)
    assert eager["seconds"] == 3.3


def test_a_round_of_many_calls_counts_as_many():
    summary = summarise([report(entry("ours", "fwd", 2e-6, calls=50))])
    assert row(summary, "ours")["fwd"]["seconds"] == pytest.approx(2e-6)


def test_bandwidth_is_held_against_a_copy():
    summary = summarise(
        [report(entry("ours", "both", 0.5, bytes=8e9), entry("copy", "both", 0.1, bytes=2e9))]
    )
    ours = row(summary, "ours")["both"]
    assert ours["bandwidth"] == pytest.approx(16e9)
    assert ours["of_copy"] == pytest.approx(0.8)
    assert ours["over_floor"] == pytest.approx(1.25)
    assert row(summary, "copy")["both"]["over_ours"] is None


def test_means_count_a_layer_as_often_as_it_occurs():
    summary = summarise(
        [
            report(
                entry("ours", "both", 1.0, count=3),
                entry("eager", "both", 2.0, count=3),
                entry("copy", "both", 1.0, count=3),
                entry("ours", "both", 1.0, case="8x2x2-relu"),
                entry("eager", "both", 8.0, case="8x2x2-relu"),
            )
        ]
    )
    ours, eager = summary["means"]
    assert (ours["rival"], eager["rival"]) == ("ours", "eager")
    assert eager["layers"] == 4
    assert eager["both"]["seconds"] == pytest.approx(14.0)
    assert eager["both"]["over_ours"] == pytest.approx((2**3 * 8) ** 0.25)


def test_means_of_bandwidth_leave_small_tensors_out():
    entries = []
    for case, size, share in (("a", 9e6, 0.9), ("b", 10e6, 0.4), ("c", 1e6, 0.1)):
        labels = {"case": case, "bytes": 1e9, "tensor_bytes": size}
        entries += [entry("copy", "both", share, **labels), entry("ours", "both", 1.0, **labels)]
    (mean,) = summarise([report(*entries)])["means"]
    assert mean["both"]["of_copy_large"] == pytest.approx(math.sqrt(0.9 * 0.4))
    assert mean["both"]["of_copy_large_least"] == pytest.approx(0.4)


def test_a_rival_that_was_not_measured_everywhere_is_still_shown(capsys):
    summary = summarise([report(entry("ours", "fwd", 1e-3), entry("eager", "bwd", 2e-3))])
    print_table(render(summary, title="the title"))
    shown = capsys.readouterr().out
    assert "the title" in shown
    assert "2.00 ms" in shown
    assert row(summary, "eager")["bwd"]["over_ours"] is None


def test_a_suite_without_labels_is_named_by_its_tests():
    bare = {
        "fullname": "bench/test_sampling.py::test_mean_and_variance",
        "param": None,
        "extra_info": {},
        "stats": {"median": 1.0},
    }
    summary = summarise([report(bare)])
    (found,) = summary["rows"]
    assert (found["op"], found["case"], found["rival"]) == ("sampling", "mean and variance", "ours")
    assert summary["means"] == []


def iteration_case(**roofline):
    row = {
        "seconds": 0.25,
        "over_ours": None,
        "images_per_second": 64.0,
        "calls": 1234,
        "host_reads": 0,
        "peak_bytes": 1e6,
        "kinds": {"whole layers": 0.9, "convolution": 0.0, "norm and activation": 0.0},
        "passes": {"widest": {"forward": 0.01, "backward": 0.02, "peak_bytes": 1e6}},
        **roofline,
    }
    label = {"model": "resnet18", "stage": 1, "batch": 4, "size": 32, "dtype": "float32"}
    return label | {"plain_peak_bytes": 2e6, "rivals": {"ours": row}}


def cells(table, header):
    (column,) = (one for one in table.columns if one.header == header)
    return list(column.cells)


def test_an_iteration_is_held_against_its_floor():
    case = iteration_case(of_roofline=0.375) | {"roofline": {"bound": "bytes"}}
    assert cells(render_iterations([case]), "of roofline") == ["38% (bytes)"]


def test_an_iteration_without_a_floor_is_still_shown():
    table = render_iterations([iteration_case()])
    assert cells(table, "of roofline") == [""]
    assert cells(table, "ms") == ["250"]


def test_reads_what_pytest_benchmark_writes(root, environment, tmp_path):
    measured, summary = tmp_path / "bench.json", tmp_path / "summary.json"
    suite = "-m pytest -q bench/test_retain.py --threads=1"
    command = [sys.executable, "-P", *suite.split(), f"--benchmark-json={measured}"]
    subprocess.run(command, cwd=root, env=environment, check=True)
    reader = [sys.executable, "bench/table.py", str(measured), "--json", str(summary)]
    shown = subprocess.run(reader, cwd=root, check=True, capture_output=True, text=True).stdout
    written = json.loads(summary.read_text())
    assert [one["rival"] for one in written["rows"]] == ["ours", "eager", "published"]
    assert all(one["both"]["seconds"] > 0 for one in written["rows"])
    (run,) = written["runs"]
    assert run["machine"]["threads"] == 1
    assert run["machine"]["malloc"]
    for word in ("25 chains", "published", "malloc", "threads 1"):
        assert word in shown
