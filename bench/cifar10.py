"""CIFAR-10: all methods under one protocol, in runs of a few minutes on machines that keep nothing.

    python bench/cifar10.py --archive cifar10.tar.xz --model mobilenet_v2 --state state.tar
    python bench/cifar10.py --archive cifar10.tar.xz --per-class 40 --state state.tar \
        --search-epochs 1 --retrain-epochs 1 --width 0.35 --seeds 0

Unpacks the images, takes up what `state` holds of an earlier call, runs `dmcp compare`, and writes
`state` again: the results of finished tasks alone, a few hundred kilobytes, no weights and no
checkpoints. A task that was under way begins anew in the next call, and so does the whole network
that a search still needs; keep what a call must finish below its minutes. Other options go to
`dmcp compare`, which prints the table; results.json beside `state` is what it found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

METHODS = "uniform,random,autoslim,fpgm,sfp,bernoulli,dmcp"
_HEAVY = {".pt", ".safetensors", ".png", ".svg"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, required=True, help="train/<class>/*.jpg, test/…")
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--track", default="A")
    parser.add_argument("--minutes", type=float, default=8, help="of the comparison, at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--per-class", type=int, help="images of each class, for a small trial")
    parser.add_argument("--state", type=Path, required=True, help="tar file, read and written")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "comparison"
        if arguments.state.exists():
            with tarfile.open(arguments.state) as tar:
                tar.extractall(output, filter="data")
        data = Path(folder) / "cifar10"
        unpack(arguments.archive, data, arguments.per_class)
        code = subprocess.call(
            [
                *(sys.executable, "-m", "dmcp", "compare"),
                # Names, not paths: a folder is taken up only by the same command.
                *("--data", data.name, "--holdout", "0.1", "--output", output.name),
                *("--model", arguments.model, "--methods", arguments.methods),
                *("--track", arguments.track, "--budgets", "50%,25%"),
                *("--minutes", str(arguments.minutes), "--jobs", str(arguments.jobs)),
                *more,
            ],
            cwd=folder,
        )
        if output.exists():
            keep(output, arguments.state)
    return code


def unpack(archive: Path, folder: Path, per_class: int | None) -> None:
    """The images, or the first of every class of either part."""
    seen: Counter[str] = Counter()

    def wanted(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        for entry in tar:
            if entry.isfile():
                place = os.path.dirname(entry.name)
                seen[place] += 1
                if per_class is None or seen[place] <= per_class:
                    yield entry

    with tarfile.open(archive) as tar:
        for entry in wanted(tar):
            tar.extract(entry, folder, filter="data")
    inner = [path for path in folder.iterdir() if path.is_dir()]
    if len(inner) == 1:  # the archive has a folder of its own
        for path in inner[0].iterdir():
            shutil.move(path, folder)
        inner[0].rmdir()


def keep(output: Path, state: Path) -> None:
    """The results of finished tasks, and the table beside them."""
    partial = state.with_name(f"{state.name}.partial")
    with tarfile.open(partial, "w") as tar:
        for path in sorted(output.rglob("*")):
            if path.is_file() and path.name[0] != "." and path.suffix not in _HEAVY:
                tar.add(path, path.relative_to(output))
    partial.replace(state)
    if (results := output / "results.json").exists():
        shutil.copy(results, state.with_name("results.json"))


if __name__ == "__main__":
    raise SystemExit(main())
