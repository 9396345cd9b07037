from __future__ import annotations

from dmcp.report import Beside, beside_published


def test_rows_of_the_same_network_within_three_percent() -> None:
    record = {"network": "mobilenet_v2", "method": "dmcp", "macs": 210_900_000, "top1": 0.715}
    rows = beside_published([record])
    found = [(r.published.method, r.published.distilled, r.published.top1) for r in rows]  # type: ignore[union-attr]
    assert found == [
        ("dmcp", False, 72.2),
        ("dmcp", True, 73.5),
        ("uniform", False, 70.1),
        ("metapruning", False, 71.2),
        ("amc", False, 70.8),
        ("autoslim", True, 73.0),
    ]
    assert {(r.network, r.method, r.macs, r.top1) for r in rows} == {
        ("mobilenet_v2", "dmcp", 210_900_000, 71.5)
    }


def test_the_nearest_of_several() -> None:
    record = {"network": "resnet50", "method": "dmcp", "macs": 2_270_000_000, "top1": 0.7}
    published = {row.published.method: row.published.macs for row in beside_published([record])}  # type: ignore[union-attr]
    assert published == {"uniform": 2_300_000_000, "metapruning": 2_300_000_000}
    near = beside_published([record | {"macs": 2_250_000_000}])
    assert {r.published.method for r in near} == {"dmcp", "uniform", "metapruning"}  # type: ignore[union-attr]
    assert near[0].published.macs == 2_200_000_000  # type: ignore[union-attr]


def test_what_the_paper_does_not_have() -> None:
    other = {"network": "vgg", "method": "dmcp", "macs": 300_000_000, "top1": 0.5}
    small = {"network": "resnet18", "method": "l1", "macs": 5_000_000, "top1": 0.25}
    assert beside_published([other, small]) == [
        Beside("vgg", "dmcp", 300_000_000, 50.0, None),
        Beside("resnet18", "l1", 5_000_000, 25.0, None),
    ]
