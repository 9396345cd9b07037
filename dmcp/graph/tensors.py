"""The parameters and buffers of a model by their names."""

from __future__ import annotations

from collections.abc import Container
from itertools import chain

from torch import Tensor, nn

from dmcp.errors import ConfigError


def unwrapped(name: str) -> str:
    """A qualified name as it would be without ``torch.compile``, in the model or around it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def known_as(name: str, known: Container[str]) -> str:
    """The name of a unit by the name of its module, which may be compiled; else the name itself."""
    plain = unwrapped(name)
    return plain if name not in known and plain in known else name


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its qualified name.

    Raises:
        ConfigError: it is gone.
    """
    owner, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError as error:
        raise ConfigError(f"{owner} is gone: trace the model again") from error
    for found, tensor in chain(module._parameters.items(), module._buffers.items()):
        if found == key and tensor is not None:
            return tensor
    raise ConfigError(f"{name} is gone: trace the model again")
