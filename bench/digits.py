"""The digits table: DMCP against uniform widths over seeds, each retrained in the same way.

    python bench/digits.py --seeds 0 1 2 3 4 --budgets 50% 25%

Every cell is a `dmcp search` in a run folder of its own, so the command can be stopped, repeated
and split over processes by seed; it ends with the table and writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections import defaultdict
from pathlib import Path

import torch

import dmcp
from dmcp import recipes
from dmcp.runs import Machine, NetworkConfig, RunFolder, SearchConfig, run_search
from dmcp.train import World


def cell(budget: str, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """One search, and the networks it trained, by name."""
    recipe = recipes.get("digits")
    config = SearchConfig(
        network=NetworkConfig("mobilenet_v2", "digits", recipe.batch_size, seed=seed),
        budget=dmcp.Budget(macs=budget),
        search_epochs=recipe.search_epochs,
        retrain_epochs=recipe.retrain_epochs,
        search=recipe.search,
        train=recipe.retrain,
    )
    output = RunFolder(folder / f"{budget.rstrip('%')}-{seed}")
    rows = run_search(config, output, Machine(World.single(), checkpoint_every=1000))
    return {row.network: {"top1": row.top1, "macs": row.macs, "params": row.params} for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--budgets", nargs="+", default=["50%", "25%"])
    parser.add_argument("--folder", type=Path, default=Path("runs/digits"))
    parser.add_argument("--json", type=Path, help="where the table goes")
    arguments = parser.parse_args()

    table: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for network, values in cell(budget, seed, arguments.folder).items():
                table[budget][network].append(values)
    for budget, networks in table.items():
        for network, values in networks.items():
            top1 = [100 * value["top1"] for value in values]
            spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
            macs = statistics.mean(value["macs"] for value in values)
            params = statistics.mean(value["params"] for value in values)
            print(
                f"{budget:>5} {network:<8} top-1 {statistics.mean(top1):.2f} ± {spread:.2f}  "
                f"MACs {macs:,.0f}  params {params:,.0f}  {[round(t, 2) for t in top1]}"
            )
    if arguments.json:
        machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine()}
        result = {"seeds": arguments.seeds, **machine, "table": table}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
