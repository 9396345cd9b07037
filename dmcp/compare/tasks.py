"""The parts of a comparison, each with a file that says that it is done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from dmcp import methods
from dmcp.compare.config import CompareConfig, Track
from dmcp.cost import cost
from dmcp.errors import CheckpointError
from dmcp.methods import Lab, Pruned, Spent
from dmcp.recipes import Recipe
from dmcp.report import DENSE
from dmcp.runs import Machine, RunFolder
from dmcp.runs.job import Job, open_network_data
from dmcp.runs.ledger import commit
from dmcp.search import Budget
from dmcp.structure import Provenance, Structure, installed
from dmcp.train import Training, World

_RESULT = "result.json"


class Task(Protocol):
    """One part of a comparison, done by one process at a time."""

    @property
    def seed(self) -> int:
        """The seed it is for."""

    def folder(self, root: Path) -> Path:
        """Where its result is, below the folder of the comparison."""

    def is_done(self, config: CompareConfig, root: Path) -> bool:
        """Whether its result is there."""

    def do(self, bench: Bench) -> None:
        """Make it, from where an earlier process was stopped."""


@dataclass(frozen=True)
class Place:
    """Where tasks compute.

    Attributes:
        folder: of the comparison.
        device: "cpu" or a CUDA device.
        threads: of PyTorch, in each process.
        workers: processes that decode images, for each process.
        checkpoint_every: steps between checkpoints.
    """

    folder: Path
    device: str
    threads: int
    workers: int = 0
    checkpoint_every: int = 100


@dataclass(frozen=True)
class Bench:
    """One seed of a comparison: its network, its images, and what tasks do with them."""

    config: CompareConfig
    place: Place
    seed: int

    @cached_property
    def job(self) -> Job:
        """The network of this seed, traced once for all tasks of a process."""
        network = replace(self.config.network, seed=self.seed)
        machine = Machine(
            World.single(self.place.device), self.place.workers, self.place.checkpoint_every
        )
        folder = RunFolder(self.place.folder)
        data = open_network_data(network)
        return Job(network, data, folder, machine, tuple(self.config.exclude))

    @property
    def recipe(self) -> Recipe:
        return replace(self.config.recipe, batch_size=self.config.network.batch_size)

    def lab(self, folder: Path) -> Lab:
        """The lab of a method that keeps its checkpoints in a folder."""
        return Lab(
            self.job.graph,
            self.job.data,
            {budget: Budget(macs=budget) for budget in self.config.budgets},
            self.recipe,
            seed=self.seed,
            folder=folder / "checkpoint",
            shared=_shared(self.place.folder, self.seed),
            checkpoint_every=self.place.checkpoint_every,
            workers=self.place.workers,
        )

    def train(
        self, track: Track, widths: Mapping[str, int], folder: Path, inherited: nn.Module | None
    ) -> None:
        """Train a structure in a track and write what came of it.

        Args:
            track: how.
            widths: of the structure.
            folder: where its checkpoint and result go.
            inherited: the network to fine-tune, None to begin with fresh weights.
        """
        job = self.job.at(RunFolder(folder))
        steps = job.steps(self.recipe.retrain_epochs)
        job.check_macs(folder.name, job.extract(job.graph.model, widths), widths)
        if track == "C":
            small, seconds = job.distil("train", widths, self.recipe.retrain, steps)
        else:
            options = self.recipe.retrain if inherited is None else self.recipe.finetune
            small = job.fresh(widths) if inherited is None else inherited
            stage = Training(small, options, steps, job.machine.world)
            seconds = job.run(stage, "train", small)
        self.write(job.folder, small, widths, seconds)

    def write(
        self, folder: RunFolder, small: nn.Module, widths: Mapping[str, int], seconds: float
    ) -> None:
        """Evaluate a trained network on the test images, and keep it instead of its checkpoint."""
        result = self.job.evaluate(small)
        folder.write_weights("network", small)
        row = {
            "top1": result.top1,
            "top5": result.top5,
            "macs": cost(self.job.graph, "macs").of(widths),
            "params": cost(self.job.graph, "params").of(widths),
            "seconds": seconds,
            "widths": dict(widths),
        }
        folder.write_json(_RESULT, row)
        shutil.rmtree(folder.path / "checkpoint", ignore_errors=True)


@dataclass(frozen=True)
class Pretrain:
    """Train the whole network: the table's dense row, and what many methods start from."""

    seed: int

    def folder(self, root: Path) -> Path:
        return root / "trainings" / f"{DENSE}-{self.seed}"

    def has_result(self, root: Path) -> bool:
        """Whether the network was judged."""
        return (self.folder(root) / _RESULT).exists()

    def is_done(self, config: CompareConfig, root: Path) -> bool:
        if not self.has_result(root):
            return False
        if (_shared(root, self.seed) / "pretrained.pt").exists():
            return True
        finds = (Find(method, self.seed) for method in config.methods)
        return all(find.is_done(config, root) for find in finds if find.needs_pretrained(config))

    def do(self, bench: Bench) -> None:
        lab = bench.lab(_shared(bench.place.folder, self.seed))
        folder = RunFolder(self.folder(bench.place.folder))
        model = lab.pretrained()
        seconds = lab.spent[None].seconds
        bench.write(folder, model, bench.job.graph.widths(), seconds)


def _shared(root: Path, seed: int) -> Path:
    """What all methods of a seed use."""
    return root / "shared" / str(seed)


@dataclass(frozen=True)
class Find:
    """Let a method find its structures, for all budgets."""

    method: str
    seed: int

    def folder(self, root: Path) -> Path:
        return root / "methods" / f"{self.method}-{self.seed}"

    def needs_pretrained(self, config: CompareConfig) -> bool:
        """Whether it starts from what `Pretrain` makes."""
        return "B" in config.tracks or methods.get(self.method, config.preset).uses_pretrained

    def has_structures(self, root: Path) -> bool:
        """Whether structures were found; track B needs their weights as well."""
        return (self.folder(root) / "found.json").exists()

    def is_done(self, config: CompareConfig, root: Path) -> bool:
        if not self.has_structures(root):
            return False
        weights = self.folder(root) / "weights"
        return "B" not in config.tracks or all(
            (weights / f"{budget}.safetensors").exists()
            or Retrain(self.method, self.seed, budget, "B").has_result(root)
            for budget in config.budgets
        )

    def found(self, root: Path) -> dict[str, Any]:
        """Budget -> ``widths``, ``kept`` channels where the method picks them, what was ``spent``,
        what the network that weights are inherited from has cost beside that, and ``details``."""
        return RunFolder(self.folder(root)).read_json("found.json")

    def do(self, bench: Bench) -> None:
        folder = RunFolder(self.folder(bench.place.folder))
        lab = bench.lab(folder.path)
        pruned = methods.get(self.method, bench.config.preset).find(lab)
        found = {budget: _record(lab, budget, each) for budget, each in pruned.items()}
        if self.has_structures(bench.place.folder):
            _check_same(folder.path, self.found(bench.place.folder), found)
        for budget, each in pruned.items():
            if each.chains is not None:
                folder.write_json(f"search-{budget}.json", dict(each.chains))
            if "B" in bench.config.tracks:
                folder.write_weights(budget, _inherited(lab, each, found[budget]))
            structure = _structure(bench.job, lab, budget, each)
            structure.save(folder.path / f"widths-{budget}.json")
        folder.write_json("found.json", found)


@dataclass(frozen=True)
class Retrain:
    """Train the structure that a method found for one budget, in one track."""

    method: str
    seed: int
    budget: str
    track: Track

    @property
    def origin(self) -> Find:
        """Where the structure comes from."""
        return Find(self.method, self.seed)

    def folder(self, root: Path) -> Path:
        """Where its result is: in tracks A and C structures that are the same share one."""
        name = f"{self.method}-{self.budget}"
        if self.track != "B":
            widths = self.origin.found(root)[self.budget]["widths"]
            name = hashlib.sha256(json.dumps(widths, sort_keys=True).encode()).hexdigest()[:12]
        return root / "trainings" / f"{self.track}-{self.seed}-{name}"

    def has_result(self, root: Path) -> bool:
        """Whether the network was trained and judged."""
        return self.origin.has_structures(root) and (self.folder(root) / _RESULT).exists()

    def is_done(self, config: CompareConfig, root: Path) -> bool:
        return self.has_result(root)

    def result(self, root: Path) -> dict[str, Any]:
        """What `Bench.write` wrote."""
        return RunFolder(self.folder(root)).read_json(_RESULT)

    def do(self, bench: Bench) -> None:
        root = bench.place.folder
        widths = self.origin.found(root)[self.budget]["widths"]
        inherited = None
        if self.track == "B":
            inherited = bench.job.fresh(widths)
            RunFolder(self.origin.folder(root)).read_weights(self.budget, inherited)
        bench.train(self.track, widths, self.folder(root), inherited)


_benches: dict[str, Bench] = {}


def bench_of(config: CompareConfig, place: Place, seed: int) -> Bench:
    """The bench of a seed, which this process keeps, as tracing a network takes a while."""
    bench = Bench(config, place, seed)
    return _benches.setdefault(repr(bench), bench)


def do(task: Task, config: CompareConfig, place: Place) -> None:
    """Do a task in this process."""
    torch.set_num_threads(place.threads)
    task.do(bench_of(config, place, task.seed))


def _record(lab: Lab, budget: str, pruned: Pruned) -> dict[str, Any]:
    kept = None
    if pruned.kept is not None:
        kept = {name: channels.tolist() for name, channels in pruned.kept.items()}
    return {
        "widths": dict(pruned.widths),
        "kept": kept,
        "spent": asdict(lab.spent_on(budget)),
        "inherited": asdict(Spent()),
        "details": dict(pruned.details),
    }


def _structure(job: Job, lab: Lab, budget: str, pruned: Pruned) -> Structure:
    """What a method found for a budget, as a file that `dmcp train` takes."""
    spent = lab.spent_on(budget)
    provenance = Provenance(
        versions=installed(),
        seed=job.network.seed,
        commit=commit(),
        seconds=spent.seconds,
        images_forward=spent.forward,
        images_backward=spent.backward,
    )
    return Structure.of(
        job.graph,
        None if pruned.kept else pruned.widths,
        kept=pruned.kept,
        budget=lab.targets[budget].by_metric(),
        provenance=provenance,
        **job.about(),
    )


def _inherited(lab: Lab, pruned: Pruned, record: dict[str, Any]) -> nn.Module:
    """The pruned network as it is before fine-tuning."""
    if pruned.network is not None:
        lab.calibrate(pruned.network)
        return pruned.network
    model = lab.pretrained()
    record["inherited"] = asdict(lab.pretraining)
    return lab.inherit(model, pruned.widths)


def _check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """What was trained belongs to the structures that were found first."""
    for budget, record in now.items():
        if before[budget]["widths"] != record["widths"]:
            raise CheckpointError(
                f"{folder}: the search for {budget} was done again, for its weights, and found "
                "another structure, on another machine perhaps: begin a new folder"
            )
