from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dmcp
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.models import build
from dmcp.structure import Structure, structures

EVERY = pytest.mark.parametrize("name", structures)


@cache
def _trace(model: str, width: float) -> ChannelGraph:
    with torch.device("meta"):  # shapes are enough
        network, images = build(model, width=width), torch.zeros(2, 3, 224, 224)
    return dmcp.trace(network, images)


def graph_of(structure: Structure) -> ChannelGraph:
    return _trace(structure.model, **structure.model_kwargs)


def macs(structure: Structure, **changed: int) -> int:
    return dmcp.cost(graph_of(structure), "macs").of({**structure.widths, **changed})


def grid(channels: int, max_width: float) -> range:
    """The widths of a unit in the paper's search, smallest first (supplement, section B.2)."""
    size = int(0.1 * channels / max_width)
    groups = int((max_width - 0.1) / 0.1 + 1e-4)
    return range(channels - groups * size, channels + 1, size)


def units_off_the_grid(structure: Structure, max_width: float) -> int:
    full = graph_of(structure).widths()
    return sum(width not in grid(full[unit], max_width) for unit, width in structure.widths.items())


@EVERY
def test_the_widths_are_those_of_every_searchable_unit(name: str) -> None:
    structure = structures[name]
    full = {unit.name: unit.channels for unit in graph_of(structure).units if unit.searchable}

    assert structure.widths.keys() == full.keys()
    assert all(1 <= width <= full[unit] for unit, width in structure.widths.items())


@pytest.mark.parametrize(
    ("name", "expected_macs", "expected_params"),
    [
        ("resnet50-2.8G", 2_832_777_865, 19_374_447),
        ("resnet50-2.2G", 2_194_130_032, 21_968_906),
        ("mobilenet_v2-300M", 300_000_177, 5_231_944),
        ("mobilenet_v2-210M", 209_995_327, 3_204_004),
        ("mobilenet_v2-97M", 113_013_034, 2_516_371),
        ("mobilenet_v2-97M-repaired", 97_595_822, 1_851_976),
        ("mobilenet_v2-87M", 85_424_809, 2_185_121),
        ("mobilenet_v2-59M", 58_753_779, 1_550_968),
    ],
)
def test_counts_of_the_extracted_network(
    name: str, expected_macs: int, expected_params: int
) -> None:
    structure = structures[name]
    graph = graph_of(structure)
    small = dmcp.extract(graph, structure.widths)

    assert macs(structure) == expected_macs
    assert dmcp.cost(graph, "params").of(structure.widths) == expected_params
    assert sum(parameter.numel() for parameter in small.parameters()) == expected_params
    with FlopCounterMode(display=False) as counter:
        small.eval()(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() // 2 == expected_macs


@pytest.mark.parametrize(
    ("name", "body", "slope"),
    [
        ("mobilenet_v2-300M", 261.164, 21_433),
        ("mobilenet_v2-210M", 195.216, 13_838),
        ("mobilenet_v2-97M", 99.691, 10_408),
        ("mobilenet_v2-59M", 52.238, 7_272),
    ],
)
def test_macs_of_table_8_without_its_missing_conv_last(name: str, body: float, slope: int) -> None:
    structure = structures[name]
    per_channel = macs(structure, conv_last=2) - macs(structure, conv_last=1)

    assert per_channel == slope
    assert round((macs(structure, conv_last=1) - per_channel) / 1e6, 3) == body


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("mobilenet_v2-300M", 300e6),
        ("mobilenet_v2-210M", 210e6),
        ("mobilenet_v2-97M-repaired", 97e6),
        ("mobilenet_v2-59M", 59e6),
    ],
)
def test_the_chosen_conv_last_meets_the_budget(name: str, budget: float) -> None:
    assert macs(structures[name]) == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize(
    ("name", "max_width"),
    [
        ("mobilenet_v2-97M", 1.0),
        ("mobilenet_v2-97M-repaired", 1.0),
        ("mobilenet_v2-59M", 1.5),
        ("mobilenet_v2-87M", 1.5),
        ("resnet50-2.2G", 1.0),
    ],
)
def test_sampled_structures_lie_on_the_papers_grid(name: str, max_width: float) -> None:
    """A slip in transcribing a number would take it off the grid."""
    assert units_off_the_grid(structures[name], max_width) == 0


@pytest.mark.parametrize(
    ("name", "max_width"),
    [("mobilenet_v2-300M", 1.5), ("mobilenet_v2-210M", 1.5), ("resnet50-2.8G", 1.0)],
)
def test_expected_structures_do_not_lie_on_the_grid(name: str, max_width: float) -> None:
    structure = structures[name]

    assert units_off_the_grid(structure, max_width) > len(structure.widths) / 2


def test_the_97m_repair_changes_one_block_and_conv_last() -> None:
    printed = structures["mobilenet_v2-97M"].widths
    repaired = structures["mobilenet_v2-97M-repaired"].widths

    changed = {unit for unit in printed if printed[unit] != repaired[unit]}
    assert changed == {"layer5.2.expand", "conv_last"}
    assert repaired["layer5.2.expand"] == repaired["layer5.1.expand"]


@EVERY
def test_structures_are_immutable(name: str) -> None:
    structure = structures[name]

    with pytest.raises(FrozenInstanceError):
        structure.model = "resnet18"  # type: ignore[misc]
    with pytest.raises(TypeError):
        structure.widths["conv1"] = 1  # type: ignore[index]


def test_they_are_a_read_only_mapping() -> None:
    assert dmcp.structures is structures
    assert dmcp.structures["resnet50-2.8G"].model == "resnet50"
    assert len(structures) == len(set(structures)) == 8
    assert "resnet50-1G" not in structures
    assert structures.get("resnet50-1G") is None
    with pytest.raises(TypeError):
        structures["resnet50-1G"] = structures["resnet50-2.8G"]  # type: ignore[index]


@pytest.mark.parametrize("kind", [ConfigError, KeyError])
def test_an_unknown_structure_is_answered_with_the_known_ones(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"'resnet50-1G'.*resnet50-2\.8G.*mobilenet_v2-59M") as raised:
        structures["resnet50-1G"]
    assert str(raised.value).startswith("unknown structure 'resnet50-1G': the structures are ")


@EVERY
def test_the_note_says_what_the_structure_costs(name: str) -> None:
    structure = structures[name]
    (said,) = re.findall(r": ([\d.]+)M MACs", structure.note)

    decimals = len(said.partition(".")[2])
    assert f"{macs(structure) / 1e6:.{decimals}f}" == said


@pytest.mark.parametrize(
    ("name", "erratum"),
    [
        ("mobilenet_v2-300M", {"conv_last": 1812}),
        ("mobilenet_v2-210M", {"conv_last": 1068}),
        ("mobilenet_v2-97M-repaired", {"conv_last": 768, "layer5.2.expand": 177}),
        ("mobilenet_v2-59M", {"conv_last": 896, "layer2.0.project": 12}),
    ],
)
def test_the_note_names_every_repair(name: str, erratum: dict[str, int]) -> None:
    structure = structures[name]

    for unit, width in erratum.items():
        assert structure.widths[unit] == width
        assert re.search(rf"\b{width}\b", structure.note)
