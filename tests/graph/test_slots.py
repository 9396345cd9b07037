import numpy as np
import pytest

from dmcp.graph.slots import SlotTable


def test_slots_that_were_never_equated_stay_apart():
    table = SlotTable()
    assert table.new(3).tolist() == [0, 1, 2]
    assert table.new(2).tolist() == [3, 4]
    assert table.classes().tolist() == [0, 1, 2, 3, 4]


def test_a_class_is_named_by_its_smallest_slot():
    table = SlotTable()
    left, middle, right = table.new(2), table.new(2), table.new(2)
    table.equate(right, middle)
    table.equate(middle, left)
    assert table.classes().tolist() == [0, 1, 0, 1, 0, 1]


def test_a_long_chain_of_pairs_becomes_one_class():
    table = SlotTable()
    slots = table.new(1000)
    order = np.random.default_rng(0).permutation(999)
    for first in order:
        table.equate(slots[first : first + 1], slots[first + 1 : first + 2])
    assert (table.classes() == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_classes_are_the_connected_components(seed):
    rng = np.random.default_rng(seed)
    table = SlotTable()
    table.new(60)
    pairs = rng.integers(0, 60, (45, 2))
    table.equate(pairs[:, 0], pairs[:, 1])
    component = list(range(60))
    for left, right in pairs.tolist():
        old, new = component[left], component[right]
        component = [new if number == old else number for number in component]
    classes = table.classes()
    for i in range(60):
        members = [j for j in range(60) if component[j] == component[i]]
        assert classes[i] == min(members)
