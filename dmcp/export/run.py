"""Exporting a network of a finished run, and measuring what pruning gained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.export.onnx import OnnxNetwork, to_onnx
from dmcp.export.python import load_python, to_python
from dmcp.export.torch_export import TorchNetwork, to_torch
from dmcp.latency import Timing, side_by_side
from dmcp.runs import Machine, RunFolder
from dmcp.runs.pipeline import Trained
from dmcp.train import World

_MAIN = "dmcp"
_ROUNDS = 31


@dataclass(frozen=True)
class Form:
    """A form that networks are exported to: how it is written, how it is run, its file's name."""

    write: Callable[[nn.Module, Tensor, Path], float]
    run: Callable[[Path], Callable[..., object]]
    suffix: str


FORMS = {
    "onnx": Form(to_onnx, OnnxNetwork, ".onnx"),
    "torch": Form(to_torch, TorchNetwork, ".pt2"),
    "python": Form(to_python, load_python, ".py"),
}


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        network: its name in the run.
        form: of `FORMS`.
        files: with their sizes in bytes.
        difference: the largest one to the network in PyTorch, relative to the largest output.
        batch: images in a batch whose latency was measured.
        latency_ms: in this form on the CPU, of the exported network.
        full_latency_ms: of the network before pruning.
    """

    network: str
    form: str
    files: dict[str, int]
    difference: float
    batch: int
    latency_ms: Timing
    full_latency_ms: Timing


def export_run(
    folder: RunFolder,
    form: str,
    *,
    network: str | None = None,
    output: Path | None = None,
    model: str | None = None,
    batch: int = 1,
) -> Exported:
    """Export a trained network of a finished run, and measure it against the one before pruning.

    Args:
        folder: the run.
        form: one of `FORMS`.
        network: which of its networks; by default the one that DMCP found, or the only one.
        output: folder for the files, ``export/`` in the run by default.
        model: name of the model, needed where it is a function in a file, see `run_eval`.
        batch: images in a batch whose latency is measured.

    Raises:
        CheckpointError: the folder holds no such run or network.
        ConfigError: an option is out of range, or ``model`` is needed.
        ExportError: the network has no such form; nothing is written then.
        MissingDependencyError: a package that the form needs is not installed.
    """
    if form not in FORMS:
        raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    trained = Trained.open(folder, Machine(World.single("cpu")), network, model)
    name = network or (_MAIN if _MAIN in trained.widths else next(iter(trained.widths)))
    kind, job = FORMS[form], trained.job
    small, size = trained.load(name), job.data.image_size
    images = torch.randn(
        2, job.data.channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    target = output or folder.path / "export"
    # Not by its own name alone: a file dmcp.py would hide the package from its neighbours.
    path = target / f"{name}_network{kind.suffix}"
    with tempfile.TemporaryDirectory() as folder_of_full:
        full = Path(folder_of_full) / path.name
        kind.write(job.graph.model, images, full)
        difference = kind.write(small, images, path)
        full_ms, own_ms = _latencies([kind.run(full), kind.run(path)], images, batch)
        names = sorted(each.name for each in full.parent.iterdir())
    files = {str(target / each): (target / each).stat().st_size for each in names}
    return Exported(name, form, files, difference, batch, own_ms, full_ms)


@torch.inference_mode()
def _latencies(networks: list[Callable[..., object]], images: Tensor, batch: int) -> list[Timing]:
    inputs = images[:1].expand(batch, -1, -1, -1).contiguous()
    return side_by_side([partial(each, inputs) for each in networks], rounds=_ROUNDS, warmup=3)
