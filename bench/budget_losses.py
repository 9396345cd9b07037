"""How closely each budget loss lands on the budget: a small network on real digits.

    python bench/budget_losses.py --json bench/results/budget_losses.json

Prints E[MACs] / budget at the end of a short search, and its mean distance from 1 over the last
quarter of the architecture steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from torch import nn

import dmcp
from dmcp.data import open_data, train_stream

STEPS, BATCH = 240, 64
LOSSES = {
    "augmented_lagrangian": {"budget_weight": 10.0},
    "augmented_lagrangian, weak": {"budget_loss": "augmented_lagrangian", "budget_weight": 1.0},
    "log_l1": {"budget_weight": 0.1},
    "log_l1, dead zone": {"budget_loss": "log_l1", "budget_weight": 0.1, "tolerance": 0.05},
    "l1": {"budget_weight": 1.0},
    "l2": {"budget_weight": 10.0},
    "l2, weak": {"budget_loss": "l2", "budget_weight": 1.0},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def land(loss: str, budget: str, start: float, anneal: float) -> tuple[float, float]:
    """(E / budget at the end, mean |E / budget - 1| over the last quarter of the α steps)."""
    options = {"budget_loss": loss, **LOSSES[loss]}
    net = dmcp.MarkovNet(network(), torch.zeros(2, 1, 8, 8))
    search = dmcp.Search(
        net,
        dmcp.Budget(macs=budget),
        STEPS,
        dmcp.SearchOptions(warmup=0.3, start=start, anneal=anneal, **options),  # type: ignore[arg-type]
    )
    ratios = []
    for batch in train_stream(open_data("digits").train, BATCH, 0, STEPS, augment=False):
        expected = search.step(*batch)["expected_macs"]
        ratios.append(float(expected) / search.targets.bounds[0])
    last = ratios[-(STEPS - search.warmup_steps) // 4 :]
    return ratios[-1], sum(abs(ratio - 1) for ratio in last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the table goes")
    arguments = parser.parse_args()
    rows = []
    for budget, (start, anneal) in itertools.product(("50%", "25%"), ((0.98, 0.7), (0.5, 0.0))):
        for loss in LOSSES:
            end, distance = land(loss, budget, start, anneal)
            rows.append([budget, start, anneal, loss, end, distance])
            print(
                f"{budget} start {start} anneal {anneal}  {loss:<26} ends at {end:.3f}  "
                f"mean distance {distance:.3f}",
                flush=True,
            )
    if arguments.json:
        names = ["budget", "start", "anneal", "loss", "end", "mean distance"]
        arguments.json.write_text(json.dumps({"columns": names, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
