from __future__ import annotations

import pytest
import torch

from dmcp.data.split import stratified_split
from dmcp.errors import DataError

LABELS = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)[torch.randperm(73)]
CLASSES = ("a", "b", "c")


def test_takes_the_same_share_of_every_class() -> None:
    _, taken = stratified_split(LABELS, 0.2, 0, CLASSES)
    assert LABELS[taken].bincount().tolist() == [10, 4, 1]


@pytest.mark.parametrize("fraction", [0, 0.01, 0.1, 0.5, 0.99])
def test_sides_are_disjoint_and_cover(fraction: float) -> None:
    rest, taken = stratified_split(LABELS, fraction, 0, CLASSES)
    assert torch.equal(torch.cat([rest, taken]).sort().values, torch.arange(73))
    assert LABELS[rest].bincount(minlength=3).min() >= 1


@pytest.mark.parametrize("fraction", [0, 0.2])
def test_the_default_device_of_new_tensors_does_not_matter(fraction: float) -> None:
    sides = stratified_split(LABELS, fraction, 0, CLASSES)
    with torch.device("meta"):
        others = stratified_split(LABELS, fraction, 0, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(sides, others, strict=True))


def test_the_seed_decides() -> None:
    taken = stratified_split(LABELS, 0.2, 3, CLASSES)[1]
    assert torch.equal(taken, stratified_split(LABELS, 0.2, 3, CLASSES)[1])
    assert not torch.equal(taken, stratified_split(LABELS, 0.2, 4, CLASSES)[1])


def test_a_class_of_one_image_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="class 'b' has too few training images"):
        stratified_split(torch.tensor([0, 0, 1]), 0.1, 0, ("a", "b"))
