"""The command that exports a network of a run, and what a person sees of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from dmcp.cli.options import output_options
from dmcp.export.run import FORMS, Exported, export_run
from dmcp.latency import Timing
from dmcp.runs import RunFolder


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", type=click.Choice(list(FORMS)), required=True, help="The form.")
@click.option("--network", help="dmcp, uniform, dense or pruned.  [dmcp, or the only one]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [export/ in the run]")
@click.option("--model", help="Of the run, if it is <file>.py:<function>: no run folder runs code.")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Images to time it with.")
@output_options
def export(
    run: Path,
    form: str,
    network: str | None,
    output: Path | None,
    model: str | None,
    batch: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a network of a finished run in a form that needs no dmcp.

    ONNX, torch.export, or a Python file of plain PyTorch with its weights beside it; for batches of
    any size. It is run and compared with the network before it counts as written, and its latency
    on the CPU is measured against the network before pruning, in the same form.
    """
    exported = export_run(
        RunFolder(run), form, network=network, output=output, model=model, batch=batch
    )
    if as_json:
        print(json.dumps(asdict(exported)))
    elif not quiet:
        show_exported(exported)


def show_exported(exported: Exported) -> None:
    """Print the files on stdout, one a line, and what was measured."""
    for file, size in exported.files.items():
        print(f"{file}  {size / 1e6:.2f} MB")
    print(f"largest difference to PyTorch: {exported.difference:.1e} of the largest output")
    before, after = exported.full_latency_ms, exported.latency_ms
    images = "1 image" if exported.batch == 1 else f"{exported.batch} images"
    print(
        f"latency of {images} on the CPU: {_timing(before)} before pruning, {_timing(after)} after "
        f"({before.median / after.median:.2f} × as fast)"
    )


def _timing(timing: Timing) -> str:
    return f"{timing.median:.2f} ms ({timing.low:.2f}–{timing.high:.2f})"
