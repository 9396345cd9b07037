"""Checkpoint files: written whole or not at all, and read without running code."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmcp.errors import CheckpointError

_PLAIN = (bool, int, float, str, type(None))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` so that a kill at any moment leaves the old file or the new one.

    Args:
        path: the file; its folder is made if it is missing.
        state: tensors, numbers, strings, booleans and ``None`` in dicts, lists and tuples.

    Raises:
        CheckpointError: ``state`` holds anything else, which `load` would refuse.
    """
    _check_plain(state, "state")
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file: a kill at any moment leaves the old one or the new one, whole."""
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def partial_path(path: Path) -> Path:
    """Where `write_atomically` writes before it renames: a kill may leave this file behind."""
    # In the same folder, because a rename is atomic only inside one file system; and under one
    # name, so that the leftover of a kill is overwritten by the next save.
    return path.with_name(f".{path.name}.partial")


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, with every tensor on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not a checkpoint, or it holds
            objects other than tensors and plain data.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        # torch does not compare the check sums that it writes
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a checkpoint, or it is truncated") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the check sum of {damaged} is wrong")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, all with the same meaning here
        raise CheckpointError(
            f"{path} holds something other than tensors and plain data, or was not written by dmcp"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Tensor) or type(value) in _PLAIN:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
        return
    raise CheckpointError(
        f"{where} is a {type(value).__name__}; a checkpoint holds only tensors and plain data"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
