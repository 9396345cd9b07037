"""Which runs stand together, and under which names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dmcp.report import Run
from dmcp.report.tables import families


def finished(path: Path, top1: float = 0.7, **config: Any) -> Run:
    """A run that pruned to 211M MACs; without a config if none is given."""
    path.mkdir(parents=True)
    row = {"network": "dmcp", "macs": 211_000_000, "params": 2, "top1": top1, "top5": None}
    (path / "results.json").write_text(json.dumps({"networks": [{**row, "seconds": 1.0}]}))
    (path / "search.json").touch()
    if config:
        (path / "config.json").write_text(json.dumps({"budget": {"macs": "70%"}, **config}))
    return Run.read(path)


def network(seed: int) -> dict[str, Any]:
    return {"model": "mobilenet_v2", "data": "images", "seed": seed}


def test_runs_of_unknown_networks_stand_alone(tmp_path: Path) -> None:
    runs = [finished(tmp_path / name) for name in ("first", "second")]
    assert [len(family.rows) for family in families(runs)] == [1, 1]


def test_other_settings_in_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / name / "run", network=network(0), search_epochs=epochs)
        for epochs, name in enumerate(("here", "there"), start=1)
    ]
    (family,) = families(runs)
    assert {row["method"] for row in family.rows} == {f"dmcp · {run.path}" for run in runs}


def test_seeds_are_one_line_beside_the_paper(tmp_path: Path) -> None:
    runs = [
        finished(tmp_path / str(seed), top1=top1, network=network(seed))
        for seed, top1 in enumerate((0.70, 0.71))
    ]
    (family,) = families(runs)
    assert family.repeated
    (table,) = family.published()
    own = [row for row in table.rows if row[3] == "dmcp"]
    assert own == [["dmcp", "211,000,000", "70.50", "dmcp", "211,000,000", "72.2"]]
