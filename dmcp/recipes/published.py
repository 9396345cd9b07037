"""The paper's table of results on ImageNet, as data.

    dmcp = [row for row in PUBLISHED if row.network == "resnet50" and row.method == "dmcp"]

Accuracies and their differences are as printed, MACs too but for one misprint. Differences do not
compare: those of uniform and DMCP are to the paper's own full networks, most others to those of
their methods' own papers (`PublishedResult.base`). Some budgets of other methods are larger than
their own releases say. The notes tell.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedResult:
    """One row of the table.

    Attributes:
        network: name of the network, as `dmcp.models.build` takes it.
        method: name of the method, in small letters.
        macs: its MACs at 224².
        top1: accuracy in %.
        delta: the printed difference to a full network in points, None for the full network.
        distilled: whether in-place distillation trained the network (the starred rows).
        width: the multiplier of a uniform network.
        note: what is wrong or misleading in the row.
    """

    network: str
    method: str
    macs: int
    top1: float
    delta: float | None
    distilled: bool = False
    width: float | None = None
    note: str = ""

    @property
    def base(self) -> float:
        """Accuracy in % of the full network that the difference is to."""
        return round(self.top1 - (self.delta or 0.0), 1)


_OWN_BASE = "The difference is to the full network of the method's own paper."

PUBLISHED: tuple[PublishedResult, ...] = (
    PublishedResult("mobilenet_v2", "uniform", 300_000_000, 72.3, None, width=1.0),
    PublishedResult("mobilenet_v2", "uniform", 210_000_000, 70.1, -2.2, width=0.75),
    PublishedResult(
        "mobilenet_v2",
        "uniform",
        97_000_000,
        64.8,
        -7.5,
        width=0.5,
        note="Printed as 970M; the network of half the width has 97.1M MACs.",
    ),
    PublishedResult("mobilenet_v2", "uniform", 59_000_000, 60.1, -12.2, width=0.35),
    PublishedResult(
        "mobilenet_v2",
        "metapruning",
        217_000_000,
        71.2,
        -0.8,
        note=_OWN_BASE,
    ),
    PublishedResult(
        "mobilenet_v2",
        "metapruning",
        87_000_000,
        63.8,
        -8.2,
        note=_OWN_BASE,
    ),
    PublishedResult(
        "mobilenet_v2",
        "metapruning",
        43_000_000,
        58.3,
        -13.7,
        note=_OWN_BASE,
    ),
    PublishedResult(
        "mobilenet_v2",
        "amc",
        211_000_000,
        70.8,
        -1.0,
        note=_OWN_BASE,
    ),
    PublishedResult(
        "mobilenet_v2",
        "autoslim",
        300_000_000,
        74.2,
        2.4,
        distilled=True,
        note=f"AutoSlim's release says 305M MACs. {_OWN_BASE}",
    ),
    PublishedResult(
        "mobilenet_v2",
        "autoslim",
        211_000_000,
        73.0,
        1.2,
        distilled=True,
        note=f"AutoSlim's release says 207M MACs. {_OWN_BASE}",
    ),
    PublishedResult("mobilenet_v2", "dmcp", 300_000_000, 73.5, 1.2),
    PublishedResult(
        "mobilenet_v2",
        "dmcp",
        211_000_000,
        72.2,
        -0.1,
        note="70.1 is 2.3 lower by the supplement: 72.4. The released network has 71.6.",
    ),
    PublishedResult(
        "mobilenet_v2",
        "dmcp",
        97_000_000,
        67.0,
        -5.3,
        note="The structure printed in the supplement has more than 97M MACs.",
    ),
    PublishedResult(
        "mobilenet_v2", "dmcp", 87_000_000, 66.1, -6.2, note="The released network has 85.4M MACs."
    ),
    PublishedResult("mobilenet_v2", "dmcp", 59_000_000, 62.7, -9.6),
    PublishedResult("mobilenet_v2", "dmcp", 43_000_000, 59.1, -13.2),
    PublishedResult("mobilenet_v2", "dmcp", 300_000_000, 74.6, 2.3, distilled=True),
    PublishedResult("mobilenet_v2", "dmcp", 211_000_000, 73.5, 1.2, distilled=True),
    PublishedResult("resnet18", "uniform", 1_800_000_000, 70.1, None, width=1.0),
    PublishedResult(
        "resnet18",
        "fpgm",
        1_040_000_000,
        68.4,
        -1.9,
        note=f"Pruning 30 % of the filters gives 1.063G MACs. {_OWN_BASE}",
    ),
    PublishedResult(
        "resnet18",
        "dmcp",
        1_040_000_000,
        69.2,
        -0.9,
        note="The uniform network of 0.75 times the width has 1.043G MACs, and no row.",
    ),
    PublishedResult("resnet50", "uniform", 4_100_000_000, 76.6, None, width=1.0),
    PublishedResult(
        "resnet50",
        "uniform",
        3_000_000_000,
        75.3,
        -1.3,
        width=0.85,
        note="2.950G MACs with widths rounded down, 3.003G with multiples of 8.",
    ),
    PublishedResult("resnet50", "uniform", 2_300_000_000, 74.6, -2.0, width=0.75),
    PublishedResult("resnet50", "uniform", 1_100_000_000, 71.9, -4.7, width=0.5),
    PublishedResult("resnet50", "uniform", 278_000_000, 63.5, -13.1, width=0.25),
    PublishedResult(
        "resnet50",
        "fpgm",
        2_400_000_000,
        75.6,
        -0.6,
        note=_OWN_BASE,
    ),
    PublishedResult(
        "resnet50",
        "sfp",
        2_400_000_000,
        74.6,
        -2.0,
        note="To the full network of its own paper the difference is -1.5.",
    ),
    PublishedResult("resnet50", "metapruning", 3_000_000_000, 76.2, -0.4),
    PublishedResult(
        "resnet50",
        "metapruning",
        2_300_000_000,
        75.4,
        -1.2,
        note="MetaPruning's release says 2.0G MACs.",
    ),
    PublishedResult(
        "resnet50",
        "metapruning",
        1_100_000_000,
        73.4,
        -3.2,
        note="MetaPruning's release says 1.0G MACs.",
    ),
    PublishedResult("resnet50", "autoslim", 3_000_000_000, 76.0, -0.6, distilled=True),
    PublishedResult("resnet50", "autoslim", 2_000_000_000, 75.6, -1.0, distilled=True),
    PublishedResult(
        "resnet50",
        "autoslim",
        1_100_000_000,
        74.0,
        -2.6,
        distilled=True,
        note="AutoSlim's release says 1.0G MACs.",
    ),
    PublishedResult("resnet50", "dmcp", 2_800_000_000, 76.7, 0.1),
    PublishedResult("resnet50", "dmcp", 2_200_000_000, 76.2, -0.4),
    PublishedResult(
        "resnet50", "dmcp", 1_100_000_000, 74.0, -2.6, note="The released network has 74.1."
    ),
    PublishedResult(
        "resnet50",
        "dmcp",
        278_000_000,
        66.4,
        -10.0,
        note="66.4 is 10.2 below 76.6. The released network has 68.3 at 279M MACs.",
    ),
)
