"""From the labels of single channels to units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dmcp.graph.channel_graph import ChannelGraph, LayerCall, ModuleAxes, ModuleSize, Node
from dmcp.graph.slots import Slots
from dmcp.graph.tensors import tensor_of, unwrapped
from dmcp.graph.tracer import Flow, Tracer
from dmcp.graph.units import FIXED, AxisMap, ChannelUnit, Member


@dataclass
class _Unit:
    """A unit in the making: its classes of slots in order, ``step`` channels each."""

    name: str
    step: int
    classes: list[int]


class Partition:
    """The classes of a finished trace, grouped into units.

    Two classes belong together if they appear the same number of times on the same axes; the order
    inside a unit is that of the first axis that produces it.
    """

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.classes = tracer.table.classes()
        self.reasons = tracer.table.reasons(self.classes)
        self.unit_of = np.full(tracer.table.count, FIXED, dtype=np.int64)
        self.index_of = np.zeros(tracer.table.count, dtype=np.int64)
        self.units: list[_Unit] = []
        self._maps: dict[int, AxisMap] = {}
        self._group()

    def _group(self) -> None:
        signature = self._signatures()
        numbers: dict[tuple[int, ...], int] = {}
        taken: set[str] = set()
        for slots, module in self.tracer.table.producers():
            labels, first, counts = np.unique(
                self.classes[slots], return_index=True, return_counts=True
            )
            for place in np.argsort(first):
                label = int(labels[place])
                if self.unit_of[label] != FIXED:
                    continue
                key = tuple(signature[label].tolist())
                number = numbers.setdefault(key, len(self.units))
                if number == len(self.units):
                    name = _unique(unwrapped(module) or module, taken)
                    self.units.append(_Unit(name, int(counts[place]), []))
                unit = self.units[number]
                self.unit_of[label], self.index_of[label] = number, len(unit.classes)
                unit.classes.append(label)

    def _signatures(self) -> NDArray[np.uint64]:
        """Where each class appears, and how often, as a hash of two words."""
        tracer = self.tracer
        random = np.random.default_rng(0)
        axes: dict[int, Slots] = {}
        for tensor in tracer.tensors.values():
            axes.update((id(a.slots), a.slots) for a in tensor if a is not None)
        for call in tracer.counted:
            axes.update((id(slots), slots) for slots in (*call.axes, *call.outputs))
        axes.update((id(size.slots), size.slots) for size in tracer.sizes)
        signature = np.zeros((tracer.table.count, 2), dtype=np.uint64)
        for slots in axes.values():
            key = random.integers(2**64, size=2, dtype=np.uint64)
            np.add.at(signature, self.classes[slots], key)
        blocked = np.fromiter(self.reasons, dtype=np.int64, count=len(self.reasons))
        signature[blocked] += random.integers(2**64, size=2, dtype=np.uint64)
        return signature

    def map(self, slots: Slots) -> AxisMap:
        """What each position of an axis carries."""
        found = self._maps.get(id(slots))
        if found is None:
            labels = self.classes[slots]
            unit, index = self.unit_of[labels], self.index_of[labels]
            found = AxisMap(torch.from_numpy(unit), torch.from_numpy(index))
            self._maps[id(slots)] = found
        return found

    def graph(self) -> ChannelGraph:
        tracer = self.tracer
        tensors = {
            name: tuple(self._shrinking(axis.slots) if axis else None for axis in axes)
            for name, axes in tracer.tensors.items()
        }
        # Modules whose tensors other code reads too are more than their operator.
        others = {id(tensor_of(tracer.model, n)) for n in tracer.uses - tracer.own if n}
        shared = {
            name
            for name in tracer.visits
            if any(id(t) in others for t in tracer.model.get_submodule(name).parameters())
        }
        modules = {}
        for name, visit in tracer.visits.items():
            if name in shared:
                continue
            inputs = self._shrinking(visit.inputs) if visit.inputs is not None else None
            modules[name] = ModuleAxes(visit.kind, inputs, self.map(visit.outputs))  # type: ignore[arg-type]
        layers = tuple(
            LayerCall(
                call.module,
                call.factor,
                tuple(map(self.map, call.axes)),
                call.numbers,
                tuple(map(self.map, call.outputs)),
            )
            for call in tracer.counted
        )
        sizes = tuple(
            ModuleSize(size.module, size.attribute, self.map(size.slots), size.per, size.place)
            for size in tracer.sizes
        )
        consumed = frozenset(tracer.consumed - tracer.produced)
        units = self._channel_units(tensors, consumed)
        nodes = tuple(map(self._node, tracer.nodes))
        return ChannelGraph(tracer.model, units, tensors, consumed, sizes, modules, layers, nodes)

    def _node(self, flow: Flow) -> Node:
        axes = ((dim, self._shrinking(slots)) for dim, slots in flow.axes)
        return Node(
            flow.kind,
            flow.module,
            flow.inputs,
            flow.homogeneous,
            flow.operator,
            tuple((dim, axis) for dim, axis in axes if axis is not None),
            flow.parameters,
            flow.tainted,
            flow.computed,
            flow.call,
        )

    def _shrinking(self, slots: Slots) -> AxisMap | None:
        axis = self.map(slots)
        return axis if bool((axis.unit != FIXED).any()) else None

    def _channel_units(
        self,
        tensors: dict[str, tuple[AxisMap | None, ...]],
        consumed: frozenset[tuple[str, int]],
    ) -> tuple[ChannelUnit, ...]:
        members: list[dict[tuple[str, str, bytes], Member]] = [{} for _ in self.units]
        for name, axes in tensors.items():
            module, _, key = name.rpartition(".")
            for dim, axis in enumerate(axes):
                if axis is None:
                    continue
                role = "in" if (name, dim) in consumed else "out"
                for number in axis.unit.unique().tolist():
                    if number == FIXED:
                        continue
                    channels = _rows(axis, number)
                    place = (module, role, channels.numpy().tobytes())
                    known = members[number].get(place)
                    places = (*(known.tensors if known else ()), (key, dim))
                    members[number][place] = Member(module, role, channels, places)  # type: ignore[arg-type]
        return tuple(
            self._channel_unit(unit, tuple(found.values()))
            for unit, found in zip(self.units, members, strict=True)
        )

    def _channel_unit(self, unit: _Unit, members: tuple[Member, ...]) -> ChannelUnit:
        reason = next((self.reasons[c] for c in unit.classes if c in self.reasons), "")
        channels = len(unit.classes) * unit.step
        if len(unit.classes) == 1:
            reason = reason or f"its {channels} channels could only go all together"
        choices = tuple(range(unit.step, channels + 1, unit.step))
        if reason:
            choices = (channels,)
        return ChannelUnit(unit.name, channels, choices, not reason, reason, members, unit.step)


def _unique(name: str, taken: set[str]) -> str:
    """``name``, or ``name#1``, ``name#2`` … for further units of the same producer."""
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    taken.add(free)
    return free


def _rows(axis: AxisMap, number: int) -> Tensor:
    """[n] or [n, k]: the positions of each step of a unit on an axis."""
    positions = (axis.unit == number).nonzero().flatten()
    order = axis.index[positions].argsort(stable=True)
    size = len(axis.index[positions].unique())
    return positions[order].reshape(size, -1).squeeze(1)


def tie(tracer: Tracer, groups: Sequence[Sequence[_Unit]]) -> None:
    """Give the units of each group one width: their classes go together in their order."""
    for first, *others in groups:
        for other in others:
            tracer.table.equate(np.array(first.classes), np.array(other.classes))
