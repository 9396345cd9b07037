"""What a search with chains that were made up says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmcp
from dmcp.report import Chains, write_page


@pytest.fixture(scope="session")
def description() -> dict[str, Any]:
    """`Search.describe` with α drawn at random around a certain value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dmcp.models.build("mobilenet_v2", num_classes=10, width=0.25, small_images=True)
    net = dmcp.MarkovNet(model, torch.zeros(2, 3, 16, 16), groups=6, divisor=1)
    search = dmcp.Search(net, dmcp.Budget(macs="33%"), steps=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.copy_(1 + torch.randn(alpha.shape, generator=generator))
    return search.describe()


@pytest.fixture(scope="session")
def chains(description: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Chains:
    path = tmp_path_factory.mktemp("chains") / "search.json"
    path.write_text(json.dumps(description))
    return Chains.read(path)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes JSON into a folder of the test's own."""

    def into(name: str, data: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return path

    return into


NASTY = '<b id="x">&amp; $y$'
"""A name that is markup, and a formula, to who does not mind it."""

_STEPS = 40


def _search(macs: float) -> dict[str, Any]:
    """`Search.describe` of three units and a head."""
    rng = np.random.default_rng(0)
    units = {"stem": 16, NASTY: 32, "layers.3.block.0.conv2": 64, "head": 10}
    choices = {name: list(range(4, full + 1, 4)) for name, full in list(units.items())[:3]}
    coefficients = np.triu(rng.integers(1, 50, (5, 5))).astype(float)
    retain = {name: (0.9 ** np.arange(1, len(grid))).tolist() for name, grid in choices.items()}
    cost = {"budget": macs, "expected": macs, "deviation": macs / 5}
    cost["coefficients"] = coefficients.tolist()  # type: ignore[assignment]
    return {"costs": {"macs": cost}, "units": units, "choices": choices, "retain": retain}


def _lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write_run(
    path: Path, seed: int = 0, budget: str = "50%", top1: float = 0.9, *, whole: bool = True
) -> Path:
    """The folder of a run, with everything in it or with its result only."""
    path.mkdir(parents=True)
    found = _search(80_000)
    network = {"model": f"net{NASTY}", "data": "digits", "batch_size": 64, "seed": seed}
    config = {"format": 1, "kind": "search", "network": network, "groups": 10, "divisor": 4}
    config["budget"] = {"macs": budget, "params": 90_000, "memory": None}
    (path / "config.json").write_text(json.dumps({**config, "search_epochs": 4}))
    row = {"params": 20_000, "top5": None, "seconds": 12.3}
    dense = {**row, "network": "dense", "macs": 160_000, "top1": 0.95}
    dmcp = {**row, "network": "dmcp", "macs": 80_000, "top1": top1}
    widths = {name: grid[1] for name, grid in found["choices"].items()}
    results = {"networks": [dense, dmcp], "widths": {"dense": found["units"], "dmcp": widths}}
    (path / "results.json").write_text(json.dumps(results))
    if not whole:
        return path
    (path / "search.json").write_text(json.dumps(found))
    searched = [
        {"phase": "search", "step": step, "loss": 2 / step, "accuracy": 0.5, "subnet_loss": 0.1}
        | {"expected_macs": 160_000 - 2_000 * step, "expected_params": 99_000.0}
        for step in range(1, _STEPS + 1)
    ]
    trained = [{"phase": "dmcp", "step": step, "loss": 1.0} for step in range(1, 11)]
    (path / "metrics.jsonl").write_text(_lines([*searched, *trained]))
    chains = [
        {
            "phase": "search",
            "step": step,
            "retain": {
                u: (np.array(q) ** (step / _STEPS)).tolist() for u, q in found["retain"].items()
            },
        }
        for step in range(2, _STEPS + 1, 2)
    ]
    (path / "chains.jsonl").write_text(_lines(chains))
    spent = {"steps": 40, "images_forward": 12_800, "images_backward": 10_240, "seconds": 12.34}
    ledger = {"phases": {"search": spent, "dmcp": spent}, "device": f"cpu {NASTY}", "warnings": []}
    ledger |= {"versions": {"torch": "2.13"}, "command": f"dmcp search --model 'net{NASTY}'"}
    (path / "ledger.json").write_text(json.dumps(ledger))
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; not to be written to."""
    return write_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="session")
def report(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of a report on a run, another seed of it, and another budget."""
    root = run_folder.parent
    others = [
        write_run(root / "second", seed=1, top1=0.88, whole=False),
        write_run(root / "quarter", budget="25%", top1=0.8, whole=False),
    ]
    return write_page([run_folder, *others], tmp_path_factory.mktemp("report"))
