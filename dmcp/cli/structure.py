"""What ``--widths`` names: a published structure, or a file of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dmcp import models
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.structure import Structure, structures
from dmcp.structure.importers import Importer, open_structure

FORMS = (
    "widths.json of a run, a published structure's name, or a file of DMCP's code (.npy), MMRazor, "
    "AutoSlim or Torch-Pruning"
)

_OPTIONS = {"width", "in_channels", "small_images"}
"""Of the package's own networks; images decide the last two."""

_WIDEST = 16
"""Times; as far as a file's word is taken before its network is built."""


def structure_of(
    widths: str | None, options: dict[str, Any]
) -> tuple[Importer | None, dict[str, Any]]:
    """What gives the structure for a traced network, and the options with the network it prunes.

    The options get ``image`` and ``classes`` as well where the structure names them.

    Raises:
        ConfigError: there is no such structure, or it prunes another network than is asked for.
    """
    if widths is None:
        return None, options
    opened = structures[widths] if widths in structures else _open(widths)
    if not isinstance(opened, Structure):
        return opened, options
    return _on(widths, opened), {**options, **_pruned(widths, opened, options)}


def _open(widths: str) -> Structure | Importer:
    path = Path(widths)
    if not path.exists() and "#" not in widths:
        raise ConfigError(
            f"--widths must be a widths.json or one of {', '.join(structures)}, "
            f"got {widths!r}: there is no such file"
        )
    return open_structure(path)


def _on(widths: str, structure: Structure) -> Importer:
    """`Structure.on`, which refuses the variant of the network that is for other images."""

    def on(graph: ChannelGraph) -> Structure:
        if structure.model in models.names():
            _check_variant(widths, structure.model_kwargs, graph.model.get_submodule("conv1"))
        return structure.on(graph)

    return on


def _check_variant(widths: str, options: Mapping[str, Any], stem: nn.Module) -> None:
    """Hold the options that images decide against the network: strides are in no graph's hash."""
    assert isinstance(stem, nn.Conv2d)
    built = {"in_channels": stem.in_channels, "small_images": stem.stride == (1, 1)}
    for name, value in built.items():
        if options.get(name, value) != value:
            raise ConfigError(
                f"structure {widths!r} prunes a network whose {name} is {options[name]!r}, but the "
                f"images make it {value!r}: see --data and --size"
            )


def _pruned(widths: str, structure: Structure, options: dict[str, Any]) -> dict[str, Any]:
    """The options that a structure decides."""
    model = structure.model
    images = {"image": structure.image, "classes": structure.classes}
    if model is None:
        return images
    if models.is_file(model):
        if options["model"] is None:
            raise ConfigError(
                f"structure {widths!r} prunes a network in a file, {model}: name it with --model"
            )
        return images
    own = model in models.names()
    others = structure.model_kwargs.keys() - (_OPTIONS if own else set())
    if others:
        raise ConfigError(
            f"structure {widths!r} prunes {model!r} with model.options that no command builds it "
            f"with: {', '.join(sorted(others))}"
        )
    width = structure.model_kwargs.get("width", 1.0 if own else None)
    if isinstance(width, str | bool) or (width or 0) > _WIDEST:
        raise ConfigError(
            f"structure {widths!r}: model.options.width must be a number of at most {_WIDEST}, "
            f"got {width!r}"
        )
    for name, value in {"model": model, "width": width}.items():
        if options[name] not in (None, value):
            raise ConfigError(
                f"--{name} is {options[name]!r}, but structure {widths!r} prunes a network whose "
                f"{name} is {value!r}"
            )
    return {"model": model, "width": width, **images}
