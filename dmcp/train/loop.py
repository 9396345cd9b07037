"""The one training loop: search and (re)training are stages that it drives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dmcp.errors import CheckpointError, ConfigError, DataError, DivergenceError
from dmcp.train import checkpoint as checkpoint_file
from dmcp.train.distributed import World, all_gather, all_reduce_sum, barrier
from dmcp.train.readback import Snapshot
from dmcp.train.recorder import Record, Recorder

SNAPSHOTS = 200
"""Of the chains of a stage, at most: enough to see them move, and files that stay small."""


class Stage(Protocol):
    """Something that learns step by step.

    Its state holds tensors and plain data only; after ``load_state_dict`` the next step gives the
    same bits as if the run had never stopped. A stage owns every generator it uses, apart from
    torch's global ones, which the loop keeps.
    """

    @property
    def steps(self) -> int:
        """How many there are."""

    @property
    def step_index(self) -> int:
        """How many are done."""

    @property
    def step(self) -> Callable[..., Mapping[str, Tensor]]:
        """One update from what the stream gives, usually images and labels; returns 0-d detached
        metrics on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave."""


def run(
    stage: Stage,
    stream_from: Callable[[int], Iterable[tuple[Tensor, ...]]],
    *,
    phase: str,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 10,
    recorder: Recorder | None = None,
    snapshot: Callable[[], Snapshot] | None = None,
    on_step: Callable[[int], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
    world: World | None = None,
) -> float:
    """Run ``stage`` to its last step, from ``checkpoint`` if that file exists.

    A run that was killed at any moment and started again gives the same bits as one that was
    not. Metrics are averaged over the processes. They are read back, in one transfer, and checked
    every ``log_every`` steps, before every checkpoint and at the end. All processes call this with
    the same arguments and read the checkpoint; only rank 0 writes.

    Args:
        stage: what to run.
        stream_from: gives the batches (images, labels) from a step on, on the stage's device. They
            depend on nothing but the step, and drawing them moves none of torch's global generators
            (a ``DataLoader`` does unless it is given a generator of its own).
        phase: the name of the stage in the records and the checkpoint, e.g. ``"search"``.
        checkpoint: the file to resume from and to save to; ``None`` saves nothing.
        checkpoint_every: steps between checkpoints; one is saved at the end in any case.
        log_every: steps between records.
        recorder: where records go.
        snapshot: takes a picture of the stage's chains, without waiting for the device. It is
            called every ``steps / 200`` steps and at the end; what it gives is recorded later,
            where the loop waits anyway.
        on_step: called with the number of steps done, at the start and after each step; must not
            read from the device.
        on_record: called with every record, where there is a recorder; first with those that it
            has kept of the steps before.
        world: the processes of the run.

    Returns:
        Seconds spent on the stage, over all restarts up to the checkpoints they resumed from.

    Raises:
        ConfigError: ``checkpoint_every`` or ``log_every`` is not positive.
        CheckpointError: the checkpoint is corrupt or of something else.
        DataError: the stream ended before the last step.
        DivergenceError: a metric is not finite. Nothing is saved with it: the last checkpoint is
            of a step whose metrics were finite.
    """
    for name, every in (("checkpoint_every", checkpoint_every), ("log_every", log_every)):
        if every < 1:
            raise ConfigError(f"{name} must be positive, got {every}")
    world = world or World.single()
    seconds = 0.0
    if checkpoint is not None:
        seconds = _resume(stage, phase, checkpoint, world)
    if not world.is_main:
        recorder = None
    hear = on_record or (lambda record: None)
    if recorder is not None:
        for record in recorder.begin(phase, stage.step_index):
            hear(record)
    if on_step is not None:
        on_step(stage.step_index)
    if stage.step_index >= stage.steps:
        return seconds

    if recorder is None:
        snapshot = None
    snapshot_every = math.ceil(stage.steps / SNAPSHOTS)
    snapshots: list[tuple[int, Snapshot]] = []
    begun = time.perf_counter() - seconds
    stream = iter(stream_from(stage.step_index))
    while stage.step_index < stage.steps:
        batch = next(stream, None)
        if batch is None:
            raise DataError(f"the stream ended at step {stage.step_index} of {stage.steps}")
        metrics = stage.step(*batch)
        step = stage.step_index
        if on_step is not None:
            on_step(step)
        at_end = step >= stage.steps
        if snapshot is not None and (at_end or step % snapshot_every == 0):
            snapshots.append((step, snapshot()))
        logs = at_end or step % log_every == 0
        saves = checkpoint is not None and (at_end or step % checkpoint_every == 0)
        if not (logs or saves):
            continue
        values = _read_back(metrics, world)
        _check_finite(values, phase, step)
        if recorder is not None:
            for taken_at, chains in snapshots:
                hear(recorder.chains(phase, taken_at, chains))
            snapshots.clear()
            if logs:
                hear(recorder.record(phase, step, values))
        # After the record: a kill between the two repeats the record, and loses none.
        if saves and checkpoint is not None:
            _check_finite_state(stage.state_dict(), phase, step, world)
            _save(stage, phase, checkpoint, world, time.perf_counter() - begun)
    barrier(world)
    return time.perf_counter() - begun


def _read_back(metrics: Mapping[str, Tensor], world: World) -> dict[str, float]:
    """The metrics averaged over the processes; one transfer for all of them."""
    stacked = torch.stack([value.to(world.device, torch.float64) for value in metrics.values()])
    means = all_reduce_sum(stacked, world) / world.size
    return dict(zip(metrics, means.tolist(), strict=True))


def _check_finite(values: Mapping[str, float], phase: str, step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergenceError(
                f"{phase} diverged: {name} is {value} at step {step}; a lower learning rate or a "
                "longer warm-up may help"
            )


def _check_finite_state(state: dict[str, Any], phase: str, step: int, world: World) -> None:
    """The metrics are of before the last update, which may have overflowed a weight."""
    # An optimiser keeps some of its state on the CPU, whatever the device of its parameters.
    flags = [tensor.isfinite().all().to(world.device) for tensor in _float_tensors(state)]
    if not flags:  # a stage that only counts
        return
    bad = (~torch.stack(flags)).any().to(torch.float64)
    if float(all_reduce_sum(bad, world)):
        raise DivergenceError(
            f"{phase} diverged: a weight is not finite after step {step}; a lower learning rate or "
            "a longer warm-up may help"
        )


def _float_tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor) and state.is_floating_point():
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _float_tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _float_tensors(value)


def _save(stage: Stage, phase: str, path: Path, world: World, seconds: float) -> None:
    rng = _gather_rng(world)
    if world.is_main:
        state = {
            "phase": phase,
            "stage": type(stage).__name__,
            "state": stage.state_dict(),
            "rng": rng,
            "seconds": seconds,
        }
        checkpoint_file.save(path, state)


def _resume(stage: Stage, phase: str, path: Path, world: World) -> float:
    """Load ``path`` if it exists; returns the seconds the stage has taken."""
    seconds = 0.0
    if path.exists():
        saved = checkpoint_file.load(path)
        if not {"phase", "stage", "state", "rng", "seconds"} <= saved.keys():
            raise CheckpointError(f"{path} is not the checkpoint of a run")
        held, wanted = (saved["phase"], saved["stage"]), (phase, type(stage).__name__)
        if held != wanted:
            raise CheckpointError(
                f"{path} is of phase {held[0]!r} ({held[1]}), not of {wanted[0]!r} ({wanted[1]})"
            )
        try:
            stage.load_state_dict(saved["state"])
        except CheckpointError as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from error
        _restore_rng(saved["rng"], world)
        seconds = float(saved["seconds"])
    step = torch.tensor(stage.step_index, device=world.device)
    found = all_gather(step, world).tolist()
    if len(set(found)) > 1:
        raise CheckpointError(f"the processes see different checkpoints at {path}: steps {found}")
    return seconds


def _gather_rng(world: World) -> dict[str, Tensor]:
    """The global generators of every process: device type -> uint8 [size, bytes] on the CPU."""
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return {name: all_gather(state.to(world.device), world).cpu() for name, state in states.items()}


def _restore_rng(states: Mapping[str, Tensor], world: World) -> None:
    """Set this process's global generators; those that the saving run had none for are left."""
    if world.rank >= len(states["cpu"]):
        return
    # Clones, because torch reads a state from the start of its storage, whatever the view.
    torch.set_rng_state(states["cpu"][world.rank].clone())
    if world.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][world.rank].clone(), world.device)
