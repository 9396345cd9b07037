"""Files that appear whole, all of them or none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into ``folder`` at the end, if nothing was raised.

    They replace files of the same names. After an error, everything is as it was before.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Inside the folder, because a rename is atomic only inside one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as stage:
            yield Path(stage)
            files = [each for each in Path(stage).iterdir() if each.is_file()]
            for file in files:
                if (folder / file.name).is_dir():
                    raise IsADirectoryError(f"{folder / file.name} is a folder")
            # The code last: a kill in between leaves none that has no weights.
            for file in sorted(files, key=lambda file: file.suffix == ".py"):
                file.replace(folder / file.name)
    except BaseException:
        with suppress(OSError):  # another may have written there meanwhile
            for each in made:
                each.rmdir()
        raise
