"""Image folders: ``train/<class>/*`` and ``test/<class>/*`` or ``val/<class>/*``, JPEG or PNG."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmcp.data.images import MIN_SIZE, DataSource, ImageFormat, ImageSet
from dmcp.data.split import stratified_split
from dmcp.errors import DataError, require

SUFFIXES = (".jpg", ".jpeg", ".png")
SMALL_SIZE = 64  # up to here images are used as they are; above, training crops at random
DEFAULT_LARGE_SIZE = 224
# Means and deviations of ImageNet's training set, which published networks and recipes assume.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def open_folder(folder: Path, image_size: int | None, holdout: float, seed: int) -> DataSource:
    """An image folder as a `DataSource`; see `dmcp.data.open_data`."""
    if not (folder / "train").is_dir():
        raise DataError(f"no folder train/ in {str(folder)!r}: expected train/<class>/<images>")
    classes = _class_names(folder / "train")
    if len(classes) < 2:
        raise DataError(
            f"{str(folder / 'train')!r} has {len(classes)} class folders: at least 2 are needed"
        )
    paths, labels = _list_images(folder / "train", classes)
    size = image_size or _natural_size(paths[0])
    format = ImageFormat(size, MEAN, STD, photos=True)
    # The usual 256 pixels for 224: evaluation cuts off a border, training crops from all of it.
    short_side = size if size <= SMALL_SIZE else round(size * 8 / 7)

    train, held_out = stratified_split(labels, holdout, seed, classes)
    files = _pack(paths)
    return DataSource(
        str(folder),
        FolderImages(files[train.numpy()], labels[train], format, short_side, short_side),
        FolderImages(files[held_out.numpy()], labels[held_out], format, short_side, size),
        _open_test(folder, classes, format, short_side),
        tuple(classes),
    )


class FolderImages(ImageSet):
    """Image files, decoded when asked for.

    Args:
        files: paths as bytes, one NumPy array [N] (see `_pack`).
        labels: class indices, int64 [N].
        format: how the images become a network's input.
        short_side: what an image's shorter side is resized to, in pixels.
        crop: the side of the square cut from its centre, at most ``short_side``.
    """

    def __init__(
        self,
        files: np.ndarray[Any, Any],
        labels: Tensor,
        format: ImageFormat,
        short_side: int,
        crop: int,
    ) -> None:
        super().__init__(labels, format)
        self.files = files
        self.short_side = short_side
        self.crop = crop

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Decode one image.

        Raises:
            DataError: the file cannot be read, is no image, or has more than 8 bits a channel.
        """
        path = os.fsdecode(self.files[index])
        return decode(path, self.short_side, self.crop), int(self.labels[index])


def decode(path: str, short_side: int, crop: int) -> Tensor:
    """Read an image, resize its shorter side, cut the centre square.

    Returns:
        uint8 [3, crop, crop], RGB.

    Raises:
        DataError: the file cannot be read, is no image, or has more than 8 bits a channel.
    """
    with _opened(path) as image:
        # The decoder shrinks large JPEGs by powers of two; the resize keeps a factor of 2 at least.
        image.draft("RGB", (2 * short_side, 2 * short_side))
        if image.mode[0] in "IF":  # Pillow would clip 16 bits to 8 and go on
            raise DataError(f"{path!r} has more than 8 bits a channel (mode {image.mode})")
        rgb = image.convert("RGB")
    side = min(rgb.size) * crop / short_side
    # Whole pixels: an image that already has its size is not interpolated.
    left, top = ((length - side) // 2 for length in rgb.size)
    box = (left, top, left + side, top + side)
    square = rgb.resize((crop, crop), _pillow().Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _open_test(
    folder: Path, classes: Sequence[str], format: ImageFormat, short_side: int
) -> FolderImages:
    for part in (folder / "test", folder / "val"):
        names = _class_names(part) if part.is_dir() else []
        if not names:
            continue  # absent, or unlabelled as ImageNet's own test images are
        unknown = sorted(set(names) - set(classes))
        if unknown:
            raise DataError(f"{str(part)!r} has class {unknown[0]!r}, which train/ has not")
        paths, labels = _list_images(part, classes, missing_ok=True)
        return FolderImages(_pack(paths), labels, format, short_side, format.size)
    return FolderImages(
        _pack([]), torch.empty(0, dtype=torch.int64), format, short_side, format.size
    )


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )


def _list_images(
    folder: Path, classes: Sequence[str], missing_ok: bool = False
) -> tuple[list[str], Tensor]:
    """Paths of the images, by class and then by name, and their labels [N]."""
    paths: list[str] = []
    counts = []
    for name in classes:
        found = _image_files(folder / name)
        if not found and not missing_ok:
            raise DataError(f"no images ({', '.join(SUFFIXES)}) in {str(folder / name)!r}")
        paths += found
        counts.append(len(found))
    if not paths:
        raise DataError(f"no images ({', '.join(SUFFIXES)}) in the classes of {str(folder)!r}")
    return paths, torch.arange(len(classes)).repeat_interleave(torch.tensor(counts))


def _image_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if entry.name[0] != "." and entry.name.lower().endswith(SUFFIXES) and entry.is_file()
    )


def _pack(paths: Sequence[str]) -> np.ndarray[Any, Any]:
    """Paths as one array of bytes: workers forked from a long list would copy every page of it."""
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def _natural_size(path: str) -> int:
    with _opened(path) as image:
        short_side: int = min(image.size)
    return max(short_side, MIN_SIZE) if short_side <= SMALL_SIZE else DEFAULT_LARGE_SIZE


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A Pillow image; whatever Pillow raises on a bad file becomes one DataError."""
    pillow = _pillow()
    try:
        with pillow.open(path) as image:
            yield image
    except (OSError, SyntaxError, EOFError, struct.error, pillow.DecompressionBombError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"cannot read image {path!r}: {reason}") from error


def _pillow() -> ModuleType:
    return require("PIL.Image", "cli", "reading image files")
