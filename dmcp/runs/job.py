"""What the phases of a run share: the network, its data, and how they are trained and judged."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmcp import models
from dmcp.cost import cost, measured_macs
from dmcp.data import Batch, DataSource, ImageSet, eval_batches, open_data, train_stream
from dmcp.errors import ConfigError, DataError, DmcpError
from dmcp.graph import ChannelGraph, extract, trace
from dmcp.methods import Spent
from dmcp.runs.config import NetworkConfig, SearchConfig
from dmcp.runs.folder import RunFolder
from dmcp.runs.ledger import Ledger
from dmcp.search import MarkovNet, Search, SearchOptions, SearchWatch
from dmcp.search.distilled import DistilledTraining
from dmcp.train import (
    Evaluation,
    Recorder,
    Training,
    TrainOptions,
    World,
    evaluate,
    recalibrate_batch_norm,
    restore_batch_norm,
    run,
    synchronise_batch_norm,
)
from dmcp.train.distributed import barrier
from dmcp.train.parts import split_batch
from dmcp.train.recorder import Record

SMALL_IMAGES = 64
"""Up to this side, in pixels, networks take their variant for small images."""

_RECALIBRATION_BATCHES = 32


class Watcher(Protocol):
    """Who follows a run: a progress display."""

    def begin(self, phase: str, steps: int, batch_size: int, bounds: Mapping[str, float]) -> None:
        """A phase of so many steps begins; ``bounds`` are those of a search, by metric."""

    def step(self, done: int) -> None:
        """So many steps of the phase are done."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Metrics or chains were read back: what `dmcp.train.Recorder` records. After a restart
        first what is left of the steps before it."""


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes; nothing here changes what it is about.

    Attributes:
        world: the processes.
        workers: processes that decode images.
        checkpoint_every, log_every: in steps.
        watcher: who follows the run, on the main process.
        command: the shell line that repeats the run, for its ledger.
    """

    world: World
    workers: int = 0
    checkpoint_every: int = 100
    log_every: int = 10
    watcher: Watcher | None = None
    command: str | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("workers", self.workers, 0),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("log_every", self.log_every, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class Row:
    """One line of the table at the end.

    Attributes:
        network: ``"dense"``, ``"dmcp"``, ``"uniform"`` or ``"pruned"``.
        macs, params: of the network that was trained, see `dmcp.cost`.
        top1, top5: on the test images; top5 is None where there are at most five classes.
        seconds: spent on its training and, for DMCP, on the search, over all restarts.
    """

    network: str
    macs: int
    params: int
    top1: float
    top5: float | None
    seconds: float


def open_network_data(network: NetworkConfig) -> DataSource:
    data = open_data(network.data, network.image_size, network.holdout, network.seed)
    if not len(data.test):
        raise DataError(
            f"data {network.data!r} has no test images: add test/<class>/ or val/<class>/"
        )
    return data


def build_network(
    name: str, options: Mapping[str, float], channels: int, image_size: int, num_classes: int
) -> nn.Module:
    """A network by name, for images of this size if it is one of the package's own."""
    return models.build(name, num_classes, **network_options(name, options, channels, image_size))


def network_options(
    name: str, options: Mapping[str, float], channels: int, image_size: int
) -> dict[str, float]:
    """The keyword arguments of `build_network`'s network beside the number of classes."""
    if name not in models.names():
        return dict(options)
    return {"in_channels": channels, "small_images": image_size <= SMALL_IMAGES, **options}


def _check_logits(name: str, model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Refuse a network from elsewhere that does not fit the data."""
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model)(images)  # a copy, whose running statistics may move
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"model {name!r} refuses images {list(images.shape[1:])}: {reason}"
        ) from error
    found = list(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
    if found != [num_classes]:
        raise ConfigError(
            f"model {name!r} must give {num_classes} logits, the classes of the data, got {found}"
        )


@dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    Attributes:
        network: what is trained, on what.
        data: its images.
        folder: of the run.
        machine: where it computes.
        exclude: units that are left alone, see `dmcp.trace`.
        ledger: where it is recorded what the phases cost.
    """

    network: NetworkConfig
    data: DataSource
    folder: RunFolder
    machine: Machine
    exclude: Sequence[str] = ()
    ledger: Ledger | None = None

    def build(self) -> nn.Module:
        """The whole network with fresh weights."""
        torch.manual_seed(self.network.seed)
        model = build_network(
            self.network.model,
            self.network.model_options,
            self.data.channels,
            self.data.image_size,
            self.data.num_classes,
        )
        model = self._place(model)
        if self.network.model not in models.names():
            _check_logits(self.network.model, model, self.example(), self.data.num_classes)
        return model

    def about(self) -> dict[str, Any]:
        """The network as a `dmcp.Structure` names it: without the folder of a model's file, so that
        it means the same elsewhere."""
        name, data = self.network.model, self.data
        options = network_options(name, self.network.model_options, data.channels, data.image_size)
        return {
            "model": Path(name).name if models.is_file(name) else name,
            "model_kwargs": options,
            "image": (data.channels, data.image_size, data.image_size),
            "classes": data.num_classes,
        }

    def fresh(self, widths: Mapping[str, int]) -> nn.Module:
        """The network of these widths with fresh weights, drawn for these widths."""
        small = self.extract(self.graph.model, widths)
        torch.manual_seed(self.network.seed)
        models.reinitialise(small)
        return small

    def extract(self, model: nn.Module, widths: Mapping[str, int]) -> nn.Module:
        """The network of these widths with the weights of ``model``."""
        return self._place(extract(replace(self.graph, model=model), widths))

    @cached_property
    def graph(self) -> ChannelGraph:
        """The channels of the whole network, traced once: every `build` has the same."""
        return trace(self.build(), self.example(), exclude=self.exclude)

    def at(self, folder: RunFolder) -> Job:
        """The same in another folder."""
        moved = replace(self, folder=folder)
        vars(moved)["graph"] = self.graph  # which is not to be traced again
        return moved

    def example(self) -> Tensor:
        size = self.data.image_size
        return torch.zeros(2, self.data.channels, size, size, device=self.machine.world.device)

    def steps(self, epochs: int) -> int:
        per_epoch = len(self.data.train) // self.network.batch_size
        if not per_epoch:
            raise DataError(
                f"{len(self.data.train)} training images are fewer than one batch of "
                f"{self.network.batch_size}"
            )
        return epochs * per_epoch

    def open(
        self,
        config: dict[str, Any],
        holdout: ImageSet | None = None,
        needed: Mapping[str, dict[str, Any]] | None = None,
    ) -> bool:
        """Take the run folder, see `RunFolder.open`, the main process first; returns whether the
        run is finished."""
        self._stream(1, 0, holdout).close()  # refuses a batch size that fits not, before it writes
        world = self.machine.world
        if world.is_main:
            self.folder.open(config, needed)
        barrier(world)
        if not world.is_main:
            self.folder.open(config, needed, write=False)
        finished = (self.folder.path / "results.json").exists()
        if self.ledger is not None and not finished:
            self.ledger.begin()
        return finished

    def check_parts(self, *stages: SearchOptions | TrainOptions) -> None:
        """Refuse parts of a batch that are too small, before anything is written."""
        share = torch.empty(self.network.batch_size // self.machine.world.size)
        for options in stages:
            split_batch(share, share, options.micro_batches)

    def recorder(self) -> contextlib.AbstractContextManager[Recorder | None]:
        """The main process's recorder, None in the others."""
        if not self.machine.world.is_main:
            return contextlib.nullcontext()
        return Recorder(self.folder.path, self.folder.config())

    def run(
        self,
        stage: Search | Training | DistilledTraining,
        phase: str,
        model: nn.Module,
        recorder: Recorder | None = None,
        holdout: ImageSet | None = None,
    ) -> float:
        """Drive a stage to its end; returns its seconds."""
        machine = self.machine
        if self.network.sync_bn:
            synchronise_batch_norm(model, machine.world)
        search = stage if isinstance(stage, Search) else None
        watch = SearchWatch(search) if search else None
        if machine.watcher:
            bounds = search.targets.by_metric() if search else {}
            machine.watcher.begin(phase, stage.steps, self.network.batch_size, bounds)

        def hear(record: Record) -> None:
            for follower in (machine.watcher, watch):
                if follower is not None:
                    follower.record(record)

        seconds = run(
            stage,
            lambda start: self._stream(stage.steps, start, holdout),
            phase=phase,
            checkpoint=self.folder.checkpoint(phase),
            checkpoint_every=machine.checkpoint_every,
            log_every=machine.log_every,
            recorder=recorder,
            snapshot=search.snapshot if search else None,
            on_step=machine.watcher.step if machine.watcher else None,
            on_record=hear,
            world=machine.world,
        )
        if self.ledger is not None:
            images = stage.passes * self.network.batch_size
            warned = watch.warned.values() if watch else ()
            spent = Spent(images, images, seconds)
            self.ledger.record(phase, stage.step_index, spent, warned)
        restore_batch_norm(model)
        return seconds

    def retrain(
        self,
        name: str,
        widths: Mapping[str, int],
        config: SearchConfig,
        searched: nn.Module,
        recorder: Recorder | None,
    ) -> Row:
        """Train one structure in the way the run asks for, and evaluate it."""
        steps, world = self.steps(config.retrain_epochs), self.machine.world
        self.check_macs(name, self.extract(searched, widths), widths)
        if config.retrain == "distil" and name != "dense":
            small, seconds = self.distil(name, widths, config.train, steps, recorder)
            return self.judge(name, small, widths, seconds)
        if config.retrain == "inherit":
            small = self.extract(searched, widths)
        else:
            small = self.fresh(widths)
        stage = Training(small, config.train, steps, world)
        seconds = self.run(stage, name, small, recorder)
        return self.judge(name, small, widths, seconds)

    def check_macs(self, name: str, small: nn.Module, widths: Mapping[str, int]) -> None:
        """Hold the graph's MACs against a count of the network as it runs, before training it."""
        macs = cost(self.graph, "macs").of(widths)
        counted = measured_macs(small, self.example())
        if counted != macs:
            raise DmcpError(f"{name}: {macs:,} MACs by the graph, {counted:,} by running it")

    def judge(
        self,
        name: str,
        small: nn.Module,
        widths: Mapping[str, int],
        seconds: float,
        *,
        save: bool = True,
    ) -> Row:
        """Evaluate a trained network on the test images, and save it."""
        if save and self.machine.world.is_main:
            self.folder.write_weights(name, small)
        macs, params = (cost(self.graph, metric).of(widths) for metric in ("macs", "params"))
        result = self.evaluate(small)
        return Row(name, macs, params, result.top1, result.top5, seconds)

    def finish(self, rows: list[Row], structures: Mapping[str, Mapping[str, int]]) -> None:
        """Write the table, and the widths of every network in it."""
        if self.machine.world.is_main:
            networks = [asdict(row) for row in rows]
            self.folder.write_json("results.json", {"networks": networks, "widths": structures})

    def distil(
        self,
        name: str,
        widths: Mapping[str, int],
        options: TrainOptions,
        steps: int,
        recorder: Recorder | None = None,
    ) -> tuple[nn.Module, float]:
        """Train one structure inside the whole network, taught by it: the structure, seconds."""
        model = self.build()
        # Two groups, so that every unit of at least two channels has a chain to take its width.
        graph = replace(self.graph, model=model)
        net = MarkovNet(model, groups=2, divisor=1, graph=graph)
        stage = DistilledTraining(net, widths, options, steps, self.machine.world)
        seconds = self.run(stage, name, net.model, recorder)
        small = self._place(extract(net.graph, widths))
        # Every process sees whole batches here, so that all get the statistics of one process.
        whole = replace(self.machine.world, rank=0, size=1)
        batches = min(steps, _RECALIBRATION_BATCHES)
        recalibrate_batch_norm(small, self._batches(self.data.train, batches, 0, whole))
        if self.ledger is not None:
            images = batches * self.network.batch_size
            self.ledger.charge(name, images * self.machine.world.size)
        return small, seconds

    def _stream(
        self, steps: int, start: int, holdout: ImageSet | None
    ) -> Generator[tuple[Tensor, ...], None, None]:
        sets = [self.data.train] if holdout is None else [self.data.train, holdout]
        # Outside the generator, so that what they refuse is refused now.
        parts = [self._batches(images, steps, start, self.machine.world) for images in sets]

        def stream() -> Generator[tuple[Tensor, ...], None, None]:
            try:
                for batches in zip(*parts, strict=True):
                    yield tuple(tensor for batch in batches for tensor in batch)
            finally:
                for part in parts:
                    part.close()

        return stream()

    def _batches(
        self, images: ImageSet, steps: int, start: int, world: World
    ) -> Generator[Batch, None, None]:
        return train_stream(
            images,
            self.network.batch_size,
            seed=self.network.seed,
            steps=steps,
            start_step=start,
            world_rank=world.rank,
            world_size=world.size,
            workers=self.machine.workers,
            device=world.device,
            crop_scale=self.network.crop_scale,
        )

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Accuracy and loss on the test images."""
        batches = eval_batches(
            self.data.test, self.network.batch_size, self.machine.workers, self.machine.world.device
        )
        return evaluate(model, batches)

    def _place(self, model: nn.Module) -> nn.Module:
        # Depthwise and pointwise convolutions are several times faster in this format on CPUs.
        model.to(self.machine.world.device)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
