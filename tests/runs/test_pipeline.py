from __future__ import annotations

import json
import math
import multiprocessing
import runpy
import shlex
import sys
import tarfile
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.utils.flop_counter import FlopCounterMode

import dmcp
from dmcp.errors import BudgetError, CheckpointError, ConfigError, DataError, DivergenceError
from dmcp.models import build
from dmcp.runs import Machine, RunFolder, TrainConfig, run_eval, run_search, run_train
from dmcp.search import Budget
from dmcp.structure import Structure
from dmcp.train import Schedule, World
from dmcp.train.checkpoint import load

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10.tar.xz"


def structure_of(row, folder):
    return folder.read_json("results.json")["widths"][row.network]


def rebuild(folder, row, size=8, **options):
    """The trained network from nothing but the files of the run."""
    safetensors = pytest.importorskip("safetensors.torch")
    options = {"num_classes": 10, "in_channels": 1, "width": 0.125, **options}
    model = build("resnet18", small_images=True, **options)
    example = torch.zeros(1, options["in_channels"], size, size)
    small = dmcp.extract(dmcp.trace(model, example), structure_of(row, folder))
    path = folder.path / "weights" / f"{row.network}.safetensors"
    small.load_state_dict(safetensors.load_file(path))
    return small.eval(), example


def counted(model, example):
    with FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


def records(folder, phase):
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["phase"] == phase]


def test_a_run_folder_holds_the_whole_run(finished):
    path = finished.folder.path
    assert finished.folder.config()["search_epochs"] == 2
    names = ["dense", "dmcp", "uniform"]
    assert [row.network for row in finished.rows] == names
    assert sorted(p.name for p in (path / "weights").iterdir()) == [
        f"{name}.safetensors" for name in names
    ]
    phases = {"search": 10, "dense": 5, "dmcp": 5, "uniform": 5}
    assert {p.stem for p in (path / "checkpoint").iterdir()} == set(phases)
    for phase, steps in phases.items():
        assert [record["step"] for record in records(finished.folder, phase)] == [
            *range(1, steps + 1)
        ]
        assert len(list((path / "tensorboard" / phase).iterdir())) == 1
        assert load(path / "checkpoint" / f"{phase}.pt")["state"]["step_index"] == steps
    assert not [p for p in path.rglob("*") if p.name.startswith(".")]
    table = json.loads((path / "results.json").read_text())["networks"]
    assert [row["top1"] for row in table] == [row.top1 for row in finished.rows]


def test_metrics_follow_the_two_stages(finished):
    search = records(finished.folder, "search")
    weights = {"phase", "step", "loss", "accuracy", "subnet_loss", "expected_macs"}
    assert all(set(record) == weights for record in search[:5])
    assert all(set(record) == weights | {"masked_loss", "budget_loss"} for record in search[5:])
    assert len({record["expected_macs"] for record in search[:5]}) == 1
    assert search[-1]["expected_macs"] != search[0]["expected_macs"]
    assert search[-1]["loss"] < search[0]["loss"]


def test_tensorboard_holds_the_metrics(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = str(finished.folder.path / "tensorboard" / "search")
    events = accumulator.EventAccumulator(folder, {"histograms": 0, "images": 0, "scalars": 0})
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    expected = {r["step"]: r["loss"] for r in records(finished.folder, "search")}
    assert written == pytest.approx(expected)
    assert [event.step for event in events.Histograms("q/layer4.0.conv1")] == [*expected]
    assert [event.step for event in events.Images("expected_widths")] == [*expected]


def test_costs_are_those_of_the_saved_networks(finished):
    """By PyTorch's own counter, on what was rebuilt from widths and weights."""
    by_name = {row.network: row for row in finished.rows}
    full, example = rebuild(finished.folder, by_name["dense"])
    bound = counted(full, example) // 2
    for row in finished.rows:
        model, example = rebuild(finished.folder, row)
        assert counted(model, example) == row.macs
        assert sum(parameter.numel() for parameter in model.parameters()) == row.params
        if row.network != "dense":
            assert 0.97 * bound <= row.macs <= bound
    widths = json.loads((finished.folder.path / "widths.json").read_text())["widths"]
    assert widths == structure_of(by_name["dmcp"], finished.folder)


def test_widths_json_says_what_the_structure_is_and_where_it_is_from(finished):
    structure = Structure.load(finished.folder.path / "widths.json")
    dense, dmcp_row, _ = finished.rows
    assert structure.metrics == {"macs": dmcp_row.macs, "params": dmcp_row.params}
    assert structure.budget == {"macs": dense.macs // 2}
    model = build(structure.model, structure.classes, **structure.model_kwargs)
    graph = dmcp.trace(model, torch.zeros(1, *structure.image))
    assert structure.on(graph) == structure
    ledger = finished.folder.read_json("ledger.json")
    spent, found = ledger["phases"]["search"], structure.provenance
    for name in ("images_forward", "images_backward", "seconds"):
        assert getattr(found, name) == spent[name] > 0
    assert (found.seed, found.device) == (finished.config.network.seed, ledger["device"])
    assert found.versions == ledger["versions"]


def test_search_json_describes_the_chains(finished):
    found = finished.folder.read_json("search.json")
    widths = finished.folder.read_json("widths.json")["widths"]
    costs = found["costs"]["macs"]
    assert costs["budget"] == finished.rows[0].macs // 2
    assert finished.rows[1].macs / 2 < costs["expected"] < finished.rows[0].macs
    assert 0 < costs["deviation"] < costs["budget"]
    assert all(widths[unit] in choices for unit, choices in found["choices"].items())
    for unit, retain in found["retain"].items():
        assert len(retain) == len(found["choices"][unit]) - 1
        assert all(0 < q < 1 for q in retain)
        assert retain == sorted(retain, reverse=True)


def test_chains_are_recorded_on_their_way(finished):
    lines = (finished.folder.path / "chains.jsonl").read_text().splitlines()
    snapshots = [json.loads(line) for line in lines]
    assert [(each["phase"], each["step"]) for each in snapshots] == [
        ("search", step) for step in range(1, 11)
    ]
    found = finished.folder.read_json("search.json")["retain"]
    assert snapshots[-1]["retain"] == found
    assert [list(each["retain"]) for each in snapshots] == [list(found)] * 10
    start = finished.config.search.start
    for q in snapshots[4]["retain"].values():
        assert q == pytest.approx([start**k for k in range(1, len(q) + 1)])
    assert snapshots[5]["retain"] != snapshots[4]["retain"]


def test_the_ledger_says_what_the_run_has_cost(finished):
    """A step of the search takes its batch through four networks, and through a fifth after the
    warm-up."""
    ledger = finished.folder.read_json("ledger.json")
    images = {
        name: (phase["steps"], phase["images_forward"], phase["images_backward"])
        for name, phase in ledger["phases"].items()
    }
    searched = (10 * 4 + 5) * 256
    assert images == {
        "search": (10, searched, searched),
        **dict.fromkeys(("dense", "dmcp", "uniform"), (5, 5 * 256, 5 * 256)),
    }
    seconds = {name: phase["seconds"] for name, phase in ledger["phases"].items()}
    seconds["dmcp"] += seconds.pop("search")
    assert seconds == {row.network: row.seconds for row in finished.rows}
    (warning,) = ledger["warnings"]
    assert "above the budget at the end of the search" in warning
    assert ledger["versions"]["torch"] == torch.__version__
    assert ledger["command"] is None, "nobody typed one"


def test_eval_gives_the_same_numbers(finished, machine, contents):
    before = contents(finished.folder.path)
    assert run_eval(finished.folder, machine) == finished.rows
    assert run_eval(finished.folder, machine, "uniform") == finished.rows[2:]
    assert contents(finished.folder.path) == before


def test_eval_reads_the_weights(finished, machine, tmp_path):
    """Not the table: other weights, another accuracy."""
    folder = RunFolder(tmp_path)
    for name in ("config.json", "results.json"):
        (tmp_path / name).write_bytes((finished.folder.path / name).read_bytes())
    (tmp_path / "weights").mkdir()
    model, _ = rebuild(finished.folder, finished.rows[1])
    torch.nn.init.zeros_(model.fc.weight)
    torch.nn.init.zeros_(model.fc.bias)
    folder.write_weights("dmcp", model)
    (row,) = run_eval(folder, machine, "dmcp")
    assert row.top1 != finished.rows[1].top1


def test_eval_refuses_what_was_not_trained(finished, machine, tmp_path):
    with pytest.raises(CheckpointError, match="trained dense, dmcp, uniform, not 'pruned'"):
        run_eval(finished.folder, machine, "pruned")
    with pytest.raises(CheckpointError, match="not a finished run"):
        run_eval(RunFolder(tmp_path), machine)


def test_a_finished_run_is_only_read(finished, machine, contents):
    before = contents(finished.folder.path)
    assert run_search(finished.config, finished.folder, machine) == finished.rows
    assert contents(finished.folder.path) == before


def timeless(folder: RunFolder) -> Structure:
    """The structure in a folder, without what differs from run to run."""
    structure = Structure.load(folder.path / "widths.json")
    return replace(structure, provenance=replace(structure.provenance, seconds=None))


def test_the_same_search_twice_gives_the_same_bits(finished, machine, tmp_path):
    """Also where checkpoints and records are as rare as can be."""
    rare = replace(machine, checkpoint_every=1000, log_every=1000)
    again = RunFolder(tmp_path / "run")
    rows = run_search(finished.config, again, rare)
    assert [(row.network, row.top1) for row in rows] == [
        (row.network, row.top1) for row in finished.rows
    ]
    assert timeless(again) == timeless(finished.folder)
    for name in ("search.json", "weights/dense.safetensors"):
        assert (again.path / name).read_bytes() == (finished.folder.path / name).read_bytes()
    assert len(records(again, "search")) == 1


def test_the_seed_changes_the_search(finished, configure, machine, tmp_path):
    other = configure(network=replace(finished.config.network, seed=1), baselines=False)
    folder = RunFolder(tmp_path / "run")
    (row,) = run_search(other, folder, machine)
    assert row.network == "dmcp"
    assert folder.read_json("search.json") != finished.folder.read_json("search.json")


@pytest.mark.parametrize("retrain", ["inherit", "distil"])
def test_retrain_modes(configure, finished, machine, tmp_path, retrain):
    """Weights that were searched, or that share a step with the whole network's, know more after
    one epoch than fresh ones; each mode trains the structures it says it does."""
    folder = RunFolder(tmp_path / "run")
    rows = run_search(configure(retrain=retrain), folder, machine)
    assert [row.macs for row in rows] == [row.macs for row in finished.rows]
    for row in rows:
        model, example = rebuild(folder, row)
        assert counted(model, example) == row.macs
    assert [row.top1 for row in rows] != [row.top1 for row in finished.rows]
    assert run_eval(folder, machine) == rows
    first = {row.network: records(folder, row.network)[0] for row in rows}
    fresh = {row.network: records(finished.folder, row.network)[0] for row in rows}
    if retrain == "inherit":
        assert all(first[name]["loss"] < fresh[name]["loss"] for name in first)
    else:
        assert first["dense"] == fresh["dense"]
        assert {"teacher_loss"} == set(first["uniform"]) - set(fresh["uniform"])
        tracked = rebuild(folder, rows[1])[0].bn1.num_batches_tracked
        assert tracked == 5, "the statistics of the structure were measured on every batch"
        spent = folder.read_json("ledger.json")["phases"]["uniform"]
        assert (spent["images_forward"], spent["images_backward"]) == (15 * 256, 10 * 256)


def test_two_bounds_and_held_out_architecture_steps(configure, machine, tmp_path):
    network = replace(configure().network, holdout=0.3)
    budget = Budget(macs="80%", params="30%")
    folder = RunFolder(tmp_path / "run")
    rows = run_search(
        configure(network=network, budget=budget, arch_data="holdout"), folder, machine
    )
    dense, *pruned = rows
    for row in pruned:
        assert row.params <= 0.3 * dense.params
        assert row.macs <= 0.8 * dense.macs
        assert row.params >= 0.97 * 0.3 * dense.params or row.macs >= 0.97 * 0.8 * dense.macs
    costs = folder.read_json("search.json")["costs"]
    assert costs["params"]["budget"] == int(0.3 * dense.params)
    assert "expected_params" in records(folder, "search")[0]


def test_what_is_excluded_stays_whole_in_every_network(configure, machine, tmp_path):
    folder = RunFolder(tmp_path)
    config = configure(exclude=("conv1",), search_epochs=1)
    run_search(config, folder, machine)
    widths = folder.read_json("results.json")["widths"]
    assert {name: each["conv1"] for name, each in widths.items()} == dict.fromkeys(widths, 8)


def test_train_whole_and_with_widths(finished, network, configure, machine, tmp_path):
    options = configure().train
    whole = RunFolder(tmp_path / "whole")
    (row,) = run_train(TrainConfig(network, 1, options), whole, machine)
    assert (row.network, row.macs) == ("dense", finished.rows[0].macs)
    # the very training that the baseline of a search gets
    assert row.top1 == finished.rows[0].top1

    widths = finished.folder.read_json("widths.json")["widths"]
    pruned = RunFolder(tmp_path / "pruned")
    config = TrainConfig(network, 1, options, widths)
    (row,) = run_train(config, pruned, machine)
    assert (row.network, row.macs, row.top1) == ("pruned", *_numbers(finished.rows[1]))
    assert pruned.read_json("widths.json")["widths"] == widths
    assert run_train(config, pruned, machine) == run_eval(pruned, machine) == [row]


def _numbers(row):
    return row.macs, row.top1


@pytest.mark.parametrize("problem", ["batch", "budget", "holdout", "parts", "widths", "world"])
def test_nothing_is_written_for_what_cannot_run(configure, network, machine, tmp_path, problem):
    folder = RunFolder(tmp_path / "run")
    huge = replace(network, batch_size=5000)
    if problem == "batch":
        with pytest.raises(DataError, match="fewer than one batch of 5000"):
            run_search(configure(network=huge), folder, machine)
        with pytest.raises(DataError, match="fewer than one batch of 5000"):
            run_train(TrainConfig(huge, 1, configure().train), folder, machine)
    elif problem == "budget":
        with pytest.raises(BudgetError, match="above the full network's"):
            run_search(configure(budget=Budget(macs="200%")), folder, machine)
    elif problem == "holdout":
        network = replace(configure().network, holdout=0.1)
        with pytest.raises(DataError, match="fewer than one batch of 256"):
            run_search(configure(network=network, arch_data="holdout"), folder, machine)
    elif problem == "parts":
        train = replace(configure().train, micro_batches=129)
        with pytest.raises(ConfigError, match="too many parts for a batch of 256 images"):
            run_search(configure(train=train), folder, machine)
        two = replace(machine, world=World(0, 2, torch.device("cpu")))
        config = TrainConfig(network, 1, replace(train, micro_batches=65))
        with pytest.raises(ConfigError, match="too many parts for a batch of 128 images"):
            run_train(config, folder, two)
    elif problem == "widths":
        with pytest.raises(ConfigError, match="no unit is called 'conv9'"):
            run_train(TrainConfig(network, 1, configure().train, {"conv9": 3}), folder, machine)
    else:
        three = replace(machine, world=World(0, 3, torch.device("cpu")))
        config = TrainConfig(network, 1, configure().train)
        with pytest.raises(ConfigError, match="batch_size must be a multiple of world_size 3"):
            run_train(config, folder, three)
    assert not folder.path.exists()


@pytest.mark.parametrize(
    ("field", "value"), [("workers", -1), ("checkpoint_every", 0), ("log_every", 0)]
)
def test_a_machine_refuses(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be at least {value + 1}, got {value}"):
        Machine(World.single(), **{field: value})


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in tensors(item))
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in tensors(item))


@pytest.mark.parametrize(("phase", "peak"), [("search", 3e2), ("dense", 3e2), ("dense", 1e12)])
def test_divergence_is_never_saved(configure, machine, tmp_path, phase, peak):
    """The step that made a weight infinite may have had a finite loss."""
    hot = Schedule(peak=peak, start=0.01, warmup=0.5)
    options = configure()
    if phase == "search":
        config = configure(search=replace(options.search, lr=hot), search_epochs=4)
    else:
        config = configure(train=replace(options.train, lr=hot), retrain_epochs=4)
    folder = RunFolder(tmp_path / "run")
    often = replace(machine, checkpoint_every=1)
    with pytest.raises(DivergenceError, match=f"{phase} diverged") as caught:
        run_search(config, folder, often)
    assert "\n" not in str(caught.value)
    state = load(folder.checkpoint(phase))
    assert state["state"]["step_index"] >= 1
    for tensor in tensors(state["state"]):
        assert tensor.isfinite().all()
    for record in records(folder, phase):
        assert all(math.isfinite(value) for key, value in record.items() if key != "phase")
    assert not (folder.path / "results.json").exists()
    with pytest.raises(DivergenceError, match=f"{phase} diverged"):
        run_search(config, folder, often)


class Listener:
    """Follows a run as a display does."""

    def __init__(self):
        self.phases, self.steps, self.records = [], [], []

    def begin(self, phase, steps, batch_size, bounds):
        self.phases.append((phase, steps, batch_size, dict(bounds)))

    def step(self, done):
        self.steps.append(done)

    def record(self, record):
        self.records.append(record)


def test_a_watcher_sees_every_phase(configure, machine, tmp_path):
    listener = Listener()
    config = configure(search_epochs=1, baselines=False)
    run_search(config, RunFolder(tmp_path / "run"), replace(machine, watcher=listener))
    (search, steps, batch_size, bounds), dmcp_phase = listener.phases
    assert (search, steps, batch_size, set(bounds)) == ("search", 5, 256, {"macs"})
    assert dmcp_phase == ("dmcp", 5, 256, {})
    assert listener.steps == [0, 1, 2, 3, 4, 5] * 2
    chains = [record["step"] for record in listener.records if "retain" in record]
    metrics = [record["step"] for record in listener.records if "loss" in record]
    assert (chains, metrics) == ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5] * 2)


@pytest.fixture
def torchrun(fork_server, monkeypatch, tmp_path):
    """Runs ``dmcp`` as ``torchrun --nproc-per-node=2`` does, in processes that start soon; what
    both print."""

    def run(command):
        logs = tmp_path / "logs"
        config = LaunchConfig(
            *(1, 1, 2),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method=fork_server.get_start_method(),
            logs_specs=DefaultLogsSpecs(str(logs), redirects=Std.ALL),
        )
        monkeypatch.setattr(sys, "argv", ["dmcp", *command])  # the processes take it over
        monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # else it would be left behind
        others = set(multiprocessing.active_children())
        agent = elastic_launch(config, runpy.run_module)
        # A thread of its own, as in the main one it would change how signals are handled; of this
        # pool, as its threads are daemons: nothing waits for an agent that hangs.
        with ThreadPool(1) as thread:
            ended = thread.apply_async(agent, ("dmcp", None, "__main__"))
            try:
                ended.get(timeout=300)
            finally:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.kill()
                ended.wait(timeout=30)  # the agent sees that its workers have ended
        streams = (sorted(logs.rglob(f"{stream}.log")) for stream in ("stdout", "stderr"))
        return ["".join(path.read_text() for path in paths) for paths in streams]

    return run


def test_two_processes(finished, contents, torchrun, tmp_path):
    """Under torchrun: one of the processes writes, and what a kill left does not disturb."""
    folder = RunFolder(tmp_path / "run")
    folder.open({**finished.folder.config(), "network": _synchronised(finished)})
    (folder.path / "metrics.jsonl").write_text('{"phase": "sear')
    command = shlex.split(
        "search --model resnet18 --width 0.125 --batch-size 256 --divisor 1 --budget 50% "
        "--search-epochs 2 --retrain-epochs 1 --sync-bn --json --log-every 1 --device cpu --output"
    )
    command.append(str(folder.path))
    printed, errors = torchrun(command)
    (line,) = printed.splitlines()
    assert json.loads(line)["networks"] == folder.read_json("results.json")["networks"]
    for phase, steps in {"search": 10, "dense": 5, "dmcp": 5, "uniform": 5}.items():
        assert [r["step"] for r in records(folder, phase)] == [*range(1, steps + 1)]
        assert len(list((folder.path / "tensorboard" / phase).iterdir())) == 1
    assert set(contents(folder.path)) - set(contents(finished.folder.path)) == {
        str(p.relative_to(folder.path)) for p in (folder.path / "tensorboard").rglob("events*")
    }
    assert "budget" not in errors, "warnings are not for whom reads JSON"
    ledger = folder.read_json("ledger.json")
    assert "above the budget" in ledger["warnings"][0]
    assert shlex.split(ledger["command"]) == [
        *("torchrun", "--nproc-per-node=2", "-m", "dmcp"),
        *command,
    ]
    assert ledger["device"].startswith("2 × ")
    assert ledger["phases"]["search"]["images_forward"] == (10 * 4 + 5) * 256
    rows = run_eval(folder, Machine(World.single()))
    assert [row.network for row in rows] == ["dense", "dmcp", "uniform"]
    for row, saved in zip(rows, folder.read_json("results.json")["networks"], strict=True):
        assert (row.macs, row.top1, row.top5) == (saved["macs"], saved["top1"], saved["top5"])
    bound = rows[0].macs // 2
    assert all(0.97 * bound <= row.macs <= bound for row in rows[1:])


def _synchronised(finished):
    return {**finished.folder.config()["network"], "sync_bn": True}


def check_image_folder(data, configure, machine, tmp_path, classes):
    network = replace(
        configure().network, data=str(data), batch_size=16, holdout=0.2, image_size=16
    )
    folder = RunFolder(tmp_path / "run")
    config = configure(network=network, search_epochs=1, arch_data="holdout")
    rows = run_search(config, folder, replace(machine, workers=1))
    assert [row.top5 for row in rows] == [None] * 3
    for row in rows:
        model, example = rebuild(folder, row, 16, num_classes=classes, in_channels=3)
        assert counted(model, example) == row.macs
        assert 0 <= row.top1 <= 1
    assert run_eval(folder, machine) == rows


def test_an_image_folder(configure, machine, tmp_path):
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for number, (part, count) in enumerate((("train", 42), ("test", 10))):
        for label, name in enumerate(("cat", "dog", "emu")):
            path = tmp_path / "data" / part / name
            path.mkdir(parents=True)
            for index in range(count):
                size = (12 + index % 7, 16 + label + number, 3)
                pixels = torch.randint(0, 256, size, generator=generator).byte()
                image.fromarray(pixels.numpy()).save(path / f"{index}.png")
    check_image_folder(tmp_path / "data", configure, machine, tmp_path, 3)


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no {CIFAR}")
def test_real_photographs(configure, machine, tmp_path):
    """A few dozen images of two classes of CIFAR-10."""
    wanted = {
        f"{part}/{name}/{index:04}.jpg"
        for part, count in (("train", 60), ("test", 20))
        for name in ("cat", "dog")
        for index in range(count)
    }
    with tarfile.open(CIFAR) as archive:
        for member in archive:
            if member.name in wanted:
                archive.extract(member, tmp_path / "data", filter="data")
    assert len(list((tmp_path / "data").rglob("*.jpg"))) == len(wanted)
    check_image_folder(tmp_path / "data", configure, machine, tmp_path, 2)
