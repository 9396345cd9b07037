"""The main job: search, extract, retrain, evaluate, resumable at every step."""

from __future__ import annotations

from dataclasses import replace

from dmcp import models
from dmcp.errors import CheckpointError, ConfigError
from dmcp.graph import check_widths, trace
from dmcp.methods import uniform_widths
from dmcp.runs.config import NetworkConfig, SearchConfig, TrainConfig, to_json
from dmcp.runs.folder import RunFolder
from dmcp.runs.job import Job, Machine, Row, open_network_data
from dmcp.search import MarkovNet, Search
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
    job = Job(config.network, data, folder, machine)
    model = job.build()
    graph = trace(model, job.example(), exclude=config.exclude)
    grid = (config.groups, config.divisor, config.min_width)
    net = MarkovNet(model, None, *grid, graph=graph)
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
    if job.open(to_json(config), holdout):
        return _finished(folder)[0]
    with job.recorder() as recorder:
        search_seconds = job.run(stage, "search", net.model, recorder, holdout)
        widths = stage.expected_widths()
        structures = {"dmcp": widths}
        if config.baselines:
            structures["uniform"] = uniform_widths(job.graph, stage.targets)
            structures = {"dense": net.graph.widths(), **structures}
        if machine.world.is_main:
            folder.write_json("widths.json", {"widths": widths})
            folder.write_json("search.json", stage.describe())
        rows = []
        for name, structure in structures.items():
            spent = search_seconds if name == "dmcp" else 0.0
            row = job.retrain(name, structure, config, model, recorder)
            rows.append(replace(row, seconds=row.seconds + spent))
    job.finish(rows, structures)
    return rows


def run_train(config: TrainConfig, folder: RunFolder, machine: Machine) -> list[Row]:
    """Train a network, whole or pruned to given widths, and evaluate it; resumable.

    Raises:
        DmcpError: as for `run_search`.
    """
    data = open_network_data(config.network)
    job = Job(config.network, data, folder, machine)
    widths = check_widths(job.graph.units, config.widths or {})
    steps = job.steps(config.epochs)
    job.check_parts(config.options)
    if job.open(to_json(config)):
        return _finished(folder)[0]
    with job.recorder() as recorder:
        name = "dense" if widths == job.graph.widths() else "pruned"
        if machine.world.is_main:
            folder.write_json("widths.json", {"widths": widths})
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
    rows, structures = _finished(folder)
    trained = {row.network: row.seconds for row in rows}
    if network is not None and network not in trained:
        raise CheckpointError(f"{folder.path} trained {', '.join(trained)}, not {network!r}")
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
    evaluated = []
    for name in [network] if network else trained:
        small = job.extract(job.graph.model, structures[name])
        folder.read_weights(name, small)
        evaluated.append(job.judge(name, small, structures[name], trained[name], save=False))
    return evaluated


def _finished(folder: RunFolder) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """The table of a finished run and the widths of every network in it."""
    results = folder.read_json("results.json")
    try:
        rows = [Row(**row) for row in results["networks"]]
        return rows, {row.network: results["widths"][row.network] for row in rows}
    except (KeyError, TypeError):
        raise CheckpointError(f"{folder.path / 'results.json'} is not that of a run") from None
