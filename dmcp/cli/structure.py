"""What ``--widths`` names: a published structure, or a file of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmcp import models
from dmcp.errors import ConfigError
from dmcp.graph import ChannelGraph
from dmcp.structure import Structure, structures
from dmcp.structure.importers import Importer, open_structure

FORMS = (
    "widths.json of a run, a published structure's name, or a file of DMCP's code (.npy), MMRazor, "
    "AutoSlim or Torch-Pruning"
)

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
    """`Structure.on`, for a network that the images did not make another one than is pruned.

    Strides and the channels of images need not show in the graph's hash.
    """

    def on(graph: ChannelGraph) -> Structure:
        stem = graph.model.conv1 if structure.model in models.names() else None
        built = stem and {"small_images": stem.stride == (1, 1), "in_channels": stem.in_channels}
        for name, value in (built or {}).items():
            said = structure.model_kwargs.get(name, value)
            if said != value:
                raise ConfigError(
                    f"structure {widths!r} prunes a network whose {name} is {said!r}, but the "
                    f"images make it {value!r}: see --data and --size"
                )
        return structure.on(graph)

    return on


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
    width = structure.model_kwargs.get("width", 1.0 if model in models.names() else None)
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
