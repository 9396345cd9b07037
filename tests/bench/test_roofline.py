"""The floor of an iteration: by hand on a tiny network, and against networks of those widths."""

from __future__ import annotations

import json
import random

import pytest
import roofline
import torch
from iteration import graph_of
from roofline import Pass, Peaks, floor, hold_against, measure_peaks, operations, plan
from torch import Tensor, nn

import dmcp

CPU = torch.device("cpu")
CASE = {"dtype": "float32", "batch": 2, "stage": 2}


class Tiny(nn.Module):
    """Images of 4x4 pixels; every kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn2(self.depthwise(self.relu1(self.bn1(self.conv1(images)))))
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.fixture(scope="module")
def graph():
    with torch.device("meta"):
        traced = dmcp.trace(Tiny(), torch.empty(2, 3, 4, 4))
    assert [(unit.name, unit.choices[0]) for unit in traced.searchable] == [("conv1", 1)]
    return traced


# Of the widest network: numbers of the images, and behind each of its layers, for two of them.
IMAGES, CONV1, DEPTHWISE, POOLED, LOGITS = (2 * n for n in (48, 128, 32, 8, 10))
WEIGHTS1, WEIGHTS2, WEIGHTS3 = 8 * 27, 8 * 9, 8 * 10
MACS1, MACS2, MACS3 = 2 * 16 * WEIGHTS1, 2 * 4 * WEIGHTS2, 2 * WEIGHTS3
FORWARD = [
    (MACS1, IMAGES + CONV1 + WEIGHTS1),
    (0, 3 * CONV1),
    (MACS2, CONV1 + DEPTHWISE + WEIGHTS2),
    (0, 3 * DEPTHWISE),
    (0, DEPTHWISE + POOLED),
    (MACS3, POOLED + LOGITS + WEIGHTS3),
]
INPUT_GRADIENTS = [
    (0, 5 * DEPTHWISE),
    (MACS2, CONV1 + DEPTHWISE + WEIGHTS2),
    (0, DEPTHWISE + POOLED),
    (MACS3, POOLED + LOGITS + WEIGHTS3),
]


def parts(graph, gradient, widths=None):
    full = graph.widths() | (widths or {})
    now = Pass([full[unit.name] for unit in graph.units], 2, 4, gradient)
    found = [part for one in operations(graph) for part in one.parts(now)]
    return sorted((part.macs, part.bytes) for part in found)


def in_bytes(numbers):
    return sorted((macs, 4 * count) for macs, count in numbers)


@pytest.mark.parametrize("accesses", [1, 2])
def test_a_training_pass_by_hand(graph, accesses):
    weight_gradients = [
        (MACS1, IMAGES + CONV1 + accesses * WEIGHTS1),
        (MACS2, CONV1 + DEPTHWISE + accesses * WEIGHTS2),
        (MACS3, POOLED + LOGITS + accesses * WEIGHTS3),
    ]
    expected = [*FORWARD, *INPUT_GRADIENTS, (0, 5 * CONV1), *weight_gradients]
    assert parts(graph, gradient=accesses) == in_bytes(expected)


def test_frozen_weights_leave_the_gradient_of_the_mask_to_the_stem(graph):
    assert parts(graph, 0) == in_bytes([*FORWARD, *INPUT_GRADIENTS, (0, 2 * CONV1)])


def test_bfloat16_halves_all_but_the_gradients_of_weights(graph):
    full = [unit.channels for unit in graph.units]
    moved = [
        sum(part.bytes for one in operations(graph) for part in one.parts(Pass(full, 2, size, 2)))
        for size in (4, 2)
    ]
    gradients = 2 * 4 * (WEIGHTS1 + WEIGHTS2 + WEIGHTS3)
    assert moved[0] - gradients == 2 * (moved[1] - gradients)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_floor_by_hand(graph, stage):
    """At one MAC and two bytes in a second; two random networks, of half the width and whole."""
    drawn = [{"conv1": 4, "fc": 10}, graph.widths()]
    found = floor(plan(CASE | {"stage": stage}, graph, operations(graph), drawn), Peaks(1, {1: 2}))

    def seconds(*arguments):
        return sum(max(macs, size / 2) for macs, size in parts(graph, *arguments))

    expected = {
        "widest": seconds(1),
        "narrowest": seconds(2, {"conv1": 1}),
        "random": seconds(2, {"conv1": 4}) + seconds(2),
        "update": 5 * 4 * (WEIGHTS1 + WEIGHTS2 + WEIGHTS3 + 4 * 8) / 2,
    }
    if stage == 2:
        expected["architecture"] = seconds(0)
    each = {name: one["floor_seconds"] for name, one in found["passes"].items()}
    assert each == pytest.approx(expected)
    assert found["floor_seconds"] == pytest.approx(sum(expected.values()))


def test_what_bounds_most_of_the_time(graph):
    passes = plan(CASE, graph, operations(graph), [graph.widths()])
    slow_products = floor(passes, Peaks(1.0, {1: 1e9}))
    slow_copies = floor(passes, Peaks(1e9, {1: 1.0}))
    assert (slow_products["bound"], slow_copies["bound"]) == ("operations", "bytes")
    assert slow_copies["floor_seconds"] == slow_copies["bytes"]
    assert slow_products["floor_seconds"] == pytest.approx(slow_products["macs"], rel=1e-3)
    assert slow_products["operations_share"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("model", ["mobilenet_v2-0.5", "resnet18"])
def test_a_sub_network_is_counted_as_the_network_of_its_widths(model):
    graph = graph_of(model, 32)
    draw = random.Random(0)
    widths = {unit.name: draw.choice(unit.choices) for unit in graph.units}
    with torch.device("meta"):
        alone = dmcp.trace(dmcp.extract(graph, widths), torch.empty(2, 3, 32, 32))
    assert parts(graph, 1, widths) == parts(alone, 1)
    products = [one for one in operations(alone) if isinstance(one, roofline.Product)]
    steps = [unit.channels // unit.step for unit in alone.units]
    assert sum(one.macs.at(steps) for one in products) == dmcp.cost(graph).of(widths)


def test_a_tensor_is_copied_as_fast_as_any_that_is_not_smaller():
    peaks = Peaks(1.0, {10: 4.0, 100: 8.0, 1000: 2.0})

    def speed(largest):
        return 1 / peaks.seconds(roofline.Part(0, 1, largest))[1]

    assert [speed(largest) for largest in (1, 11, 101, 5000)] == [8, 8, 2, 2]


def test_shares_are_taken_within_a_sweep(graph):
    drawn = [graph.widths()]
    fast, slow = (Peaks(1e9 / factor, {1: 1e9 / factor}) for factor in (1, 4))
    passes = plan(CASE, graph, operations(graph), drawn)
    least, most = (floor(passes, peaks)["floor_seconds"] for peaks in (fast, slow))
    rivals = {"ours": {"sweeps": [2 * least, 8 * least, 5 * least]}}
    case = CASE | {"rivals": rivals}
    hold_against(case, graph, [(drawn, fast), (drawn, slow), (drawn, fast)])
    assert most == pytest.approx(4 * least)
    assert rivals["ours"]["of_roofline"] == pytest.approx(0.5)
    assert case["roofline"]["floor_seconds"] == least
    json.dumps(case)


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.setattr(roofline, "SIDE", {"cpu": 64})
    monkeypatch.setattr(roofline, "COPIES", (1 << 10, 1 << 12))
    peaks = measure_peaks(CPU, "float32")
    assert list(peaks.bytes_per_second) == [1 << 10, 1 << 12]
    for speed in (peaks.macs_per_second, *peaks.bytes_per_second.values()):
        assert 1e3 < speed < 1e18
