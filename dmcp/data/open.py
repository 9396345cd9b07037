"""From a name to a data set."""

from __future__ import annotations

from pathlib import Path

from dmcp.data.digits import open_digits
from dmcp.data.folder import open_folder
from dmcp.data.images import MAX_SIZE, MIN_SIZE, DataSource
from dmcp.errors import DataError


def open_data(
    name: str, image_size: int | None = None, holdout: float = 0.1, seed: int = 0
) -> DataSource:
    """Open a data set.

    Args:
        name: ``"digits"`` (scikit-learn's 1797 real 8x8 digits, one channel, a fixed 80/20 split)
            or a folder with ``train/<class>/*`` and, if there is one, ``test/<class>/*`` or else
            ``val/<class>/*``, JPEG or PNG.
        image_size: side of the images a network gets, 8 to 1024 pixels. By default 8 for digits;
            for a folder the shorter side of its first image if that is at most 64, else 224.
        holdout: share of every class's training images to keep aside, in [0, 1).
        seed: decides which images are held out.

    Raises:
        DataError: the name is unknown, an argument is out of range, or the folder is malformed.
        MissingDependencyError: scikit-learn (digits) or Pillow (folders) is not installed.
    """
    if image_size is not None and not MIN_SIZE <= image_size <= MAX_SIZE:
        raise DataError(f"image_size must be {MIN_SIZE} to {MAX_SIZE} pixels, got {image_size}")
    if not 0 <= holdout < 1:
        raise DataError(f"holdout must be at least 0 and below 1, got {holdout}")
    if name == "digits":
        return open_digits(image_size, holdout, seed)
    folder = Path(name)
    if not folder.exists():
        raise DataError(f"unknown data {name!r}: neither 'digits' nor a folder that exists")
    if not folder.is_dir():
        raise DataError(f"data {name!r} is a file, not a folder: unpack it first")
    return open_folder(folder, image_size, holdout, seed)
