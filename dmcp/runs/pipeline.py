"""The main job: search, extract, retrain, evaluate, resumable at every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from dmcp import models
from dmcp.cost import TABLE, LatencyTable
from dmcp.errors import CheckpointError, ConfigError
from dmcp.methods import uniform_widths
from dmcp.runs.config import NetworkConfig, SearchConfig, TrainConfig, to_json
from dmcp.runs.folder import RunFolder
from dmcp.runs.job import Job, Machine, Row, open_network_data
from dmcp.runs.ledger import Ledger
from dmcp.search import MarkovNet, Search
from dmcp.structure import Provenance, Structure
from dmcp.structure.importers import Importer
from dmcp.train import Training


def run_search(config: SearchConfig, folder: RunFolder, machine: Machine) -> list[Row]:
    """Search, extract, retrain and evaluate; continue where an earlier call was stopped.

    Returns:
        The rows of the table, which ``results.json`` holds too.

    Raises:
        DmcpError: the configuration, the data or the folder is not fit for it; nothing is written
            then.
        DataError: an image cannot be read; the run continues once it can.
        DivergenceError: a loss became NaN or infinite.
    """
    data = open_network_data(config.network)
    ledger = Ledger(folder, machine.world, machine.command)
    job = Job(config.network, data, folder, machine, config.exclude, ledger)
    model = job.build()
    grid = (config.groups, config.divisor, config.min_width)
    net = MarkovNet(model, None, *grid, graph=replace(job.graph, model=model))
    stage = Search(
        net,
        config.budget,
        job.steps(config.search_epochs),
        config.search,
        seed=config.network.seed,
        world=machine.world,
    )
    holdout = data.holdout if config.arch_data == "holdout" else None
    job.check_parts(config.search, config.train)
    table = config.budget.latency_table
    # The run's own: what is measured later differs, and the run would be of another configuration.
    needed = {TABLE: table.to_json()} if isinstance(table, LatencyTable) else None
    if job.open(to_json(config), holdout, needed):
        return _finished(folder)[0]
    with job.recorder() as recorder:
        search_seconds = job.run(stage, "search", net.model, recorder, holdout)
        widths = stage.expected_widths()
        structures = {"dmcp": widths}
        if config.baselines:
            structures["uniform"] = uniform_widths(job.graph, stage.targets)
            structures = {"dense": net.graph.widths(), **structures}
        if machine.world.is_main:
            budget = stage.targets.by_metric()
            about = {"budget": budget, "provenance": _provenance(job, "search"), **job.about()}
            Structure.of(job.graph, widths, **about).save(folder.path / "widths.json")
            folder.write_json("search.json", stage.describe())
        rows = []
        for name, structure in structures.items():
            spent = search_seconds if name == "dmcp" else 0.0
            row = job.retrain(name, structure, config, model, recorder)
            rows.append(replace(row, seconds=row.seconds + spent))
    job.finish(rows, structures)
    return rows


def run_train(
    config: TrainConfig,
    folder: RunFolder,
    machine: Machine,
    structure: Importer | None = None,
) -> list[Row]:
    """Train a network, whole or pruned to given widths, and evaluate it; resumable.

    Args:
        config: what is asked for.
        folder: of the run.
        machine: where it computes.
        structure: gives the structure for the traced network, instead of ``config.widths``.

    Raises:
        DmcpError: as for `run_search`.
    """
    data = open_network_data(config.network)
    ledger = Ledger(folder, machine.world, machine.command)
    job = Job(config.network, data, folder, machine, ledger=ledger)
    found = structure(job.graph) if structure else Structure.of(job.graph, config.widths or {})
    widths = dict(found.widths)
    if structure is not None:
        config = replace(config, widths=widths)
    steps = job.steps(config.epochs)
    job.check_parts(config.options)
    if job.open(to_json(config)):
        return _finished(folder)[0]
    with job.recorder() as recorder:
        name = "dense" if widths == job.graph.widths() else "pruned"
        if machine.world.is_main:
            replace(found, kept=None, **job.about()).save(folder.path / "widths.json")
        small = job.fresh(widths)
        job.check_macs(name, small, widths)
        stage = Training(small, config.options, steps, machine.world)
        seconds = job.run(stage, name, small, recorder)
        rows = [job.judge(name, small, widths, seconds)]
    job.finish(rows, {name: widths})
    return rows


def run_eval(
    folder: RunFolder, machine: Machine, network: str | None = None, model: str | None = None
) -> list[Row]:
    """Evaluate the trained networks of a finished run, or one of them, on its test images.

    Args:
        folder: the run.
        machine: where to compute.
        network: which of them, None for all.
        model: name of the model, needed where it is a function in a file: a run folder holds its
            name only, and no code runs because a folder says so.

    Raises:
        CheckpointError: the folder holds no such run or network.
        ConfigError: ``model`` is needed.
    """
    trained = Trained.open(folder, machine, network, model)
    evaluated = []
    for row in trained.rows:
        name, widths = row.network, trained.widths[row.network]
        small = trained.load(name)
        evaluated.append(trained.job.judge(name, small, widths, row.seconds, save=False))
    return evaluated


@dataclass(frozen=True)
class Trained:
    """The networks of a finished run.

    Attributes:
        job: the run's.
        rows: its table, of the networks that were asked for.
        widths: of each of its networks.
    """

    job: Job
    rows: list[Row]
    widths: dict[str, dict[str, int]]

    @classmethod
    def open(
        cls,
        folder: RunFolder,
        machine: Machine,
        network: str | None = None,
        model: str | None = None,
    ) -> Trained:
        """Read the table of a finished run; arguments and errors are those of `run_eval`."""
        rows, widths = _finished(folder)
        if network is not None and network not in widths:
            raise CheckpointError(f"{folder.path} trained {', '.join(widths)}, not {network!r}")
        try:
            settings = NetworkConfig(**folder.config()["network"])
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{folder.path / 'config.json'} is not that of a run") from None
        if model is not None:
            settings = replace(settings, model=model)
        elif models.is_file(settings.model):
            raise ConfigError(
                f"the model of {folder.path} is code in a file, which runs only if you name it: "
                f"model {settings.model!r}"
            )
        job = Job(settings, open_network_data(settings), folder, machine)
        return cls(job, [row for row in rows if network in (None, row.network)], widths)

    def load(self, network: str) -> nn.Module:
        """One of the networks with its trained weights.

        Raises:
            CheckpointError: its weights are missing or do not fit.
        """
        small = self.job.extract(self.job.graph.model, self.widths[network])
        self.job.folder.read_weights(network, small)
        return small


def _provenance(job: Job, phase: str) -> Provenance:
    """Where a structure was found: what the run's ledger says of a phase."""
    ledger = job.folder.read_json("ledger.json")
    spent = ledger["phases"][phase]
    return Provenance(
        versions=ledger["versions"],
        seed=job.network.seed,
        commit=ledger.get("commit"),
        command=ledger["command"],
        device=ledger["device"],
        seconds=spent["seconds"],
        images_forward=spent["images_forward"],
        images_backward=spent["images_backward"],
    )


def _finished(folder: RunFolder) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """The table of a finished run and the widths of every network in it."""
    results = folder.read_json("results.json")
    try:
        rows = [Row(**row) for row in results["networks"]]
        return rows, {row.network: results["widths"][row.network] for row in rows}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder.path / 'results.json'} is not that of a run") from None
