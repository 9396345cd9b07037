"""Networks from elsewhere, by name: torchvision's, timm's, and those of a file of the user's."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dmcp.errors import ConfigError, DmcpError, require

FORMS = "torchvision:<name>, timm:<name>, <file>.py:<function>"
"""How the names look that `from_elsewhere` knows."""


def is_file(name: str) -> bool:
    """Whether this is the name of a network in a file, whose code runs when it is built."""
    return _split(name)[0].endswith(".py")


def resolve(name: str) -> str:
    """The name with its file, if it has one, as an absolute path."""
    if not is_file(name):
        return name
    path, factory = _split(name)
    return f"{Path(path).resolve()}:{factory}"


def from_elsewhere(name: str, num_classes: int) -> nn.Module | None:
    """Build a network with fresh weights, in the way its own code draws them.

    Args:
        name: ``"torchvision:<name>"``, ``"timm:<name>"``, or ``"path/to/file.py:<function>"``: a
            function or class of that file, called with ``num_classes`` if it takes that and without
            arguments if not. Naming a file runs its code; the folder it lies in can be imported
            from, as if Python ran the file.
        num_classes: number of logits.

    Returns:
        The network, or None for a name of none of these forms.

    Raises:
        ConfigError: there is no such network, or its code fails or gives something else.
        MissingDependencyError: torchvision or timm is not installed.
    """
    if is_file(name):
        return _from_file(name, num_classes)
    source, _, model = name.partition(":")
    if source == "torchvision":
        return _from_torchvision(name, model, num_classes)
    if source == "timm":
        return _from_timm(name, model, num_classes)
    return None


def _split(name: str) -> tuple[str, str]:
    """``"net.py:factory"`` and ``"net.py"``, which lacks its factory, as a pair."""
    path, _, factory = name.rpartition(":")
    return (name, "") if name.endswith(".py") else (path, factory)


def _from_torchvision(name: str, model: str, num_classes: int) -> nn.Module:
    with _blaming(name):
        zoo = require("torchvision.models", "zoo", f"model {name!r}")
    _check_known(name, model, zoo.list_models())
    builder = zoo.get_model_builder(model)
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    # Detection and segmentation download a trained backbone unless told otherwise.
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    return _call(name, builder, options)


def _from_timm(name: str, model: str, num_classes: int) -> nn.Module:
    with _blaming(name):
        zoo = require("timm", "zoo", f"model {name!r}")
    # Its own names only: others (hf-hub:, local-dir:) fetch files.
    if not zoo.is_model(model):
        _check_known(name, model, zoo.list_models())
    return _call(name, zoo.create_model, {"pretrained": False, "num_classes": num_classes}, model)


def _check_known(name: str, model: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if model in names:
        return
    close = get_close_matches(model, names)
    hint = f"close to it are {', '.join(close)}" if close else f"it has {len(names)} others"
    raise ConfigError(f"unknown model {name!r}: {name.partition(':')[0]} has no such one; {hint}")


def _from_file(name: str, num_classes: int) -> nn.Module:
    path, function = Path(_split(name)[0]).resolve(), _split(name)[1]
    if not function:
        raise ConfigError(f"model {name!r} names no function of the file: {path}:<function>")
    if not path.is_file():
        raise ConfigError(f"model {name!r}: there is no file {path}")
    sys.path.insert(0, str(path.parent))
    try:
        factory = getattr(_import(name, path), function, None)
        if not callable(factory):
            found = "no such name" if factory is None else _kind(factory)
            raise ConfigError(
                f"model {name!r}: {function} must be a function, the file has {found}"
            )
        takes = _takes_num_classes(factory)
        return _call(name, factory, {"num_classes": num_classes} if takes else {})
    finally:
        sys.path.remove(str(path.parent))


def _import(name: str, path: Path) -> ModuleType:
    """The file as a module, executed once, under a name that no other module has."""
    title = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses look there for the module of their annotations
    try:
        with _blaming(name):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[title]
        raise
    return module


def _takes_num_classes(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some builtins have none
        return False
    named = parameters.get("num_classes")
    if named is not None and named.kind is not named.POSITIONAL_ONLY:
        return True
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _call(
    name: str, factory: Callable[..., Any], options: dict[str, Any], *arguments: Any
) -> nn.Module:
    with _blaming(name):
        model = factory(*arguments, **options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r}: it gives {_kind(model)}, not an nn.Module")
    return model


def _kind(value: object) -> str:
    return f"an object of type {type(value).__name__}"


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Report what the code of others raises as one line that says where."""
    try:
        yield
    except DmcpError:
        raise
    except Exception as error:
        message = (str(error).splitlines() or [""])[0]
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"model {name!r}: {type(error).__name__}: {message} ({last.filename}:{last.lineno})"
        ) from error
