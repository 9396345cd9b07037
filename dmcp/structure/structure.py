"""A pruned structure, in memory and as a file that travels."""

from __future__ import annotations

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.cost import cost
from dmcp.errors import StructureError
from dmcp.graph import ChannelGraph, ChannelUnit, check_widths, extract
from dmcp.structure.document import check_schema, parse_json, read_bytes, schema
from dmcp.structure.fingerprint import graph_hash
from dmcp.train.checkpoint import write_atomically

FORMAT = "dmcp-structure"
VERSION = 1
LARGEST_IMAGE = 2**28
"""Numbers: 1 GB, before the first layer."""

_ABOUT = ("model", "model_kwargs", "image", "classes", "budget", "provenance", "note")


def _nothing() -> Mapping[str, Any]:
    return MappingProxyType({})


class _Portable:
    """Pickled and copied by making it again, which its read-only mappings do not allow else."""

    def __reduce__(self) -> tuple[Any, ...]:
        values = (getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]
        return type(self), tuple(
            dict(value) if isinstance(value, MappingProxyType) else value for value in values
        )


@dataclass(frozen=True)
class Provenance(_Portable):
    """Where a structure was found, and what finding it has cost; None for what is not known.

    Attributes:
        versions: of the software, by its name.
        seed: of the search.
        commit: of the checkout that dmcp ran from.
        command: shell line that repeats the search.
        device: what it ran on.
        seconds: it took.
        images_forward, images_backward: images that went through a network, once for each.
    """

    versions: Mapping[str, str] = field(default_factory=_nothing)
    seed: int | None = None
    commit: str | None = None
    command: str | None = None
    device: str | None = None
    seconds: float | None = None
    images_forward: int | None = None
    images_backward: int | None = None

    def __post_init__(self) -> None:
        _freeze(self, "versions")


@dataclass(frozen=True)
class Structure(_Portable):
    """How many channels each unit of a network keeps, and where that is from.

        structure = Structure.of(graph, search.expected_widths(), model="resnet18")
        structure.save("widths.json")
        small = Structure.load("widths.json").extract(graph)

    Attributes:
        widths: unit name -> channels it keeps; units left out stay whole.
        kept: unit name -> indices of these channels as `dmcp.extract` takes them, ascending, where
            they are no prefixes; None where they are. Units left out stay whole.
        model: name of the network that is pruned, as `dmcp.models.build` takes it.
        model_kwargs: its arguments beside ``num_classes``.
        image: (channels, height, width) of the images it is for.
        classes: ``num_classes``.
        graph_hash: of the traced network, see `dmcp.structure.graph_hash`.
        channels: unit name -> full width, of every unit of it.
        budget: what the structure was allowed to cost: metric -> bound.
        metrics: what it costs: metric -> cost, see `dmcp.cost`.
        provenance: where it was found.
        note: for people.

    Raises:
        StructureError: a field is not as `schema` says, or they contradict each other.
    """

    widths: Mapping[str, int]
    kept: Mapping[str, Sequence[int]] | None = None
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=_nothing)
    image: tuple[int, int, int] | None = None
    classes: int | None = None
    graph_hash: str | None = None
    channels: Mapping[str, int] = field(default_factory=_nothing)
    budget: Mapping[str, float] = field(default_factory=_nothing)
    metrics: Mapping[str, float] = field(default_factory=_nothing)
    provenance: Provenance = field(default_factory=Provenance)
    note: str = ""

    def __post_init__(self) -> None:
        if self.kept is not None:
            kept = {name: tuple(_integers(name, each)) for name, each in self.kept.items()}
            object.__setattr__(self, "kept", MappingProxyType(kept) if kept else None)
        if self.image is not None:
            object.__setattr__(self, "image", tuple(map(_plain, self.image)))
        object.__setattr__(self, "classes", _plain(self.classes))
        _freeze(self, "widths", "model_kwargs", "channels", "budget", "metrics")
        document = self.to_json()
        document.pop("kept", None)  # integers: a network says which
        check_schema(document, schema())
        if math.prod(self.image or ()) > LARGEST_IMAGE:
            raise StructureError(
                f"model['image'] must have at most {LARGEST_IMAGE:,} numbers, got {self.image}"
            )
        _check_ascent(self.kept or {}, self.widths)
        for name, width in self.widths.items() if self.channels else ():
            if name not in self.channels:
                raise StructureError(f"widths[{name!r}]: graph.channels has no such unit")
            if width > (full := self.channels[name]):
                raise StructureError(f"widths[{name!r}] must lie in 1..{full}, got {width}")

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        widths: Mapping[str, int] | None = None,
        *,
        kept: Mapping[str, Tensor | Sequence[int]] | None = None,
        **about: Any,
    ) -> Structure:
        """The structure of a traced network, with its hash and its costs.

        Args:
            graph: what `dmcp.trace` returned.
            widths: as for `dmcp.extract`.
            kept: instead of ``widths``, as for `dmcp.extract`.
            **about: further attributes; ``provenance`` has this machine's versions by default.

        Raises:
            ConfigError: the network cannot take that structure.
        """
        if (widths is None) == (kept is None):
            raise StructureError("give either widths or kept")
        rows = None
        if kept is not None:
            rows = {name: sorted(set(_integers(name, each))) for name, each in kept.items()}
            widths = {name: len(indices) for name, indices in rows.items()}
        full = check_widths(graph.units, widths or {})
        metrics = {metric: cost(graph, metric).of(full) for metric in ("macs", "params")}
        structure = cls(
            **{
                "widths": full,
                "kept": rows,
                "graph_hash": graph_hash(graph),
                "channels": graph.widths(),
                "metrics": metrics,
                "provenance": Provenance(versions=installed()),
                **about,
            }
        )
        structure._check_kept(graph.units)
        return structure

    def check(self, graph: ChannelGraph) -> dict[str, int]:
        """Hold the structure against a traced network.

        Returns:
            The width of every unit.

        Raises:
            ConfigError: it is of another network; the message names the units that differ.
        """
        if self.graph_hash is not None and self.graph_hash != (found := graph_hash(graph)):
            raise StructureError(
                f"the structure is of another network: {_difference(self.channels, graph.widths())}"
                f" (its graph is {self.graph_hash}, this network's {found})"
            )
        widths = check_widths(graph.units, self.widths)
        self._check_kept(graph.units)
        return widths

    def on(self, graph: ChannelGraph) -> Structure:
        """The same with the width of every unit, the hash and the costs of this very network.

        Raises:
            ConfigError: as `check`.
        """
        widths = self.check(graph)
        whole = Structure.of(graph, None if self.kept else widths, kept=self.kept)
        return replace(whole, **{name: getattr(self, name) for name in _ABOUT})

    def extract(self, graph: ChannelGraph) -> nn.Module:
        """The plain network of this structure, with the traced model's current weights.

        Raises:
            ConfigError: as `check`.
        """
        widths = self.check(graph)
        return extract(graph, None if self.kept else widths, kept=self.kept)

    def save(self, path: str | Path) -> None:
        """Write the file, or replace it at once: a kill leaves the old one or the new one.

        Raises:
            StructureError: the attributes hold what `load` would refuse.
        """
        path = Path(path)
        text = json.dumps(self.to_json(), indent=2)
        # Lists of numbers on one line each; no string holds a line break as such.
        text = re.sub(
            r"\[\n[\d\s,]*\]", lambda found: "[" + " ".join(found[0][1:-1].split()) + "]", text
        )
        self.from_json(parse_json(text.encode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> Structure:
        """Read what `save` wrote, or a mere ``{"widths": {…}}``. No code runs.

        Raises:
            StructureError: the file is missing or malformed; the message names the field.
        """
        data = read_bytes(Path(path))
        try:
            return cls.from_json(parse_json(data))
        except StructureError as error:
            raise StructureError(f"{path}: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """As JSON data that `schema` describes."""
        model = {
            "name": self.model,
            "options": dict(self.model_kwargs),
            "image": None if self.image is None else list(self.image),
            "classes": self.classes,
        }
        known = {each.name: getattr(self.provenance, each.name) for each in fields(Provenance)}
        return {
            "format": FORMAT,
            "version": VERSION,
            **_given(
                model=_given(**model),
                graph=_given(hash=self.graph_hash, channels=dict(self.channels)),
            ),
            "widths": dict(self.widths),
            **_given(
                kept=self.kept and {name: list(indices) for name, indices in self.kept.items()},
                budget=dict(self.budget),
                metrics=dict(self.metrics),
                provenance=_given(**{**known, "versions": dict(self.provenance.versions)}),
                note=self.note or None,
            ),
        }

    @classmethod
    def from_json(cls, data: Any) -> Structure:
        """The structure of parsed JSON data.

        Raises:
            StructureError: the data are not as `schema` says, or contradict themselves.
        """
        if isinstance(data, dict) and data.keys() == {"widths"}:
            data = {"format": FORMAT, "version": VERSION, **data}
        check_schema(data, schema())
        model, graph = data.get("model", {}), data.get("graph", {})
        image = model.get("image")
        return cls(
            widths=data["widths"],
            kept=data.get("kept"),
            model=model.get("name"),
            model_kwargs=model.get("options", {}),
            image=None if image is None else (image[0], image[1], image[2]),
            classes=model.get("classes"),
            graph_hash=graph.get("hash"),
            channels=graph.get("channels", {}),
            budget=data.get("budget", {}),
            metrics=data.get("metrics", {}),
            provenance=Provenance(**data.get("provenance", {})),
            note=data.get("note", ""),
        )

    def _check_kept(self, units: Sequence[ChannelUnit]) -> None:
        """Refuse indices that a unit does not have or cannot keep alone."""
        if self.kept is None:
            return
        for unit in units:
            width = self.widths.get(unit.name, unit.channels)
            indices = self.kept.get(unit.name, range(unit.channels))
            steps = {index // unit.step for index in indices}
            if len(indices) != width:
                raise StructureError(f"kept[{unit.name!r}] is missing, for its width is {width}")
            if not 0 <= indices[0] <= indices[-1] < unit.channels:
                raise StructureError(
                    f"kept[{unit.name!r}]: indices must lie in 0..{unit.channels - 1}"
                )
            if len(indices) != unit.step * len(steps):
                raise StructureError(
                    f"kept[{unit.name!r}]: {unit.step} consecutive channels are kept or dropped "
                    "together"
                )


def installed() -> dict[str, str]:
    """Versions of what a structure is found with here."""
    from dmcp import __version__  # which imports this module

    versions = {"dmcp": __version__, "torch": torch.__version__}
    return {**versions, "python": platform.python_version()}


def _freeze(owner: object, *names: str) -> None:
    for name in names:
        values = {key: _plain(value) for key, value in getattr(owner, name).items()}
        object.__setattr__(owner, name, MappingProxyType(values))


def _plain(value: Any) -> Any:
    """Python's own number instead of NumPy's or PyTorch's."""
    return value.item() if getattr(value, "shape", None) == () else value


def _given(**values: Any) -> dict[str, Any]:
    """Those that say something."""
    return {name: value for name, value in values.items() if value not in (None, {})}


def _integers(name: str, indices: Tensor | Sequence[int]) -> list[int]:
    try:
        found = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # of what are no numbers, or none that fit
        found = torch.tensor(0, device="cpu")
    whole = not (found.is_floating_point() or found.is_complex()) and found.dtype != torch.bool
    if found.ndim != 1 or (len(found) and not whole):
        raise StructureError(f"kept[{name!r}] must be a list of channel indices")
    return found.tolist()


def _check_ascent(kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> None:
    for name, indices in kept.items():
        if list(indices) != sorted(set(indices)):
            raise StructureError(f"kept[{name!r}] must ascend")
        if widths.get(name) != len(indices):
            said = f"widths has {widths[name]}" if name in widths else "widths has no such unit"
            raise StructureError(f"kept[{name!r}] has {len(indices)} channels, {said}")


def _difference(theirs: Mapping[str, int], ours: Mapping[str, int]) -> str:
    """Which units a structure's network has, and this one has otherwise or not at all."""
    both = [name for name in theirs if name in ours]
    parts = {
        "missing here": [name for name in theirs if name not in ours],
        "unknown to it": [name for name in ours if name not in theirs],
        "of other width": [
            f"{name} ({theirs[name]}, here {ours[name]})"
            for name in both
            if theirs[name] != ours[name]
        ],
    }
    said = [f"{what}: {_few(names)}" for what, names in parts.items() if names]
    return "; ".join(said) or "the same units, but tied or shaped in another way"


def _few(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
