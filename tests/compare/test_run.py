from __future__ import annotations

import fcntl
import json
import multiprocessing
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import dmcp
from dmcp.compare import Place, draw_comparison, run_compare
from dmcp.compare.schedule import tasks_of
from dmcp.compare.tasks import Find, Pretrain, Retrain, do
from dmcp.errors import BudgetError, CheckpointError, ConfigError
from dmcp.models import build
from dmcp.report import DENSE
from dmcp.structure import Structure


@pytest.fixture(scope="module")
def graph():
    """Of the network that is compared."""
    model = build("resnet18", 10, in_channels=1, small_images=True, width=0.125)
    return dmcp.trace(model, torch.zeros(2, 1, 8, 8))


def test_every_track_gives_a_network_of_the_found_widths_inside_the_budget(config, place, graph):
    config = replace(config, methods=("uniform", "dmcp"), tracks=("A", "B", "C"))
    result = run_compare(config, place)
    assert result.left == 0
    assert result.failed == {}
    assert [(row.track, row.method) for row in result.rows] == [
        (None, DENSE),
        *((track, method) for track in "ABC" for method in ("uniform", "dmcp")),
    ]
    macs = dmcp.cost(graph, "macs")
    for record in result.records[1:]:
        small = dmcp.extract(graph, record.widths)
        assert record.macs == macs.of(record.widths) <= macs.of({}) // 2
        assert record.macs >= 0.97 * macs.of({}) // 2
        found = json.loads((place.folder / f"methods/{record.method}-0/found.json").read_text())
        assert record.widths == found["50%"]["widths"]
        file = place.folder / f"methods/{record.method}-0/widths-50%.json"
        structure = Structure.load(file).on(graph)
        assert structure.widths == record.widths
        assert structure.metrics["macs"] == record.macs
        task = Retrain(record.method, 0, "50%", record.track)
        weights = safetensors.torch.load_file(
            task.folder(place.folder) / "weights" / "network.safetensors"
        )
        assert {k: v.shape for k, v in weights.items()} == {
            k: v.shape for k, v in small.state_dict().items()
        }
        assert sum(p.numel() for p in small.parameters()) == record.params
    assert json.loads((place.folder / "results.json").read_text())["left"] == 0
    files = draw_comparison(result, place.folder / "report")
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in ("front", "widths-50%") for kind in ("png", "svg")
    }
    assert all(file.stat().st_size > 1000 for file in files)


def test_equal_structures_are_trained_once(config, place):
    result = run_compare(config, place)  # L1 keeps uniform's shares
    uniform, l1 = result.records[1:]
    assert uniform.widths == l1.widths
    assert uniform.top1 == l1.top1
    trained = [path.name for path in (place.folder / "trainings").iterdir()]
    assert len(trained) == 2  # the dense network and one structure


def test_what_is_done_is_not_done_again_and_more_may_be_added(config, place):
    run_compare(config, place)
    files = {path: path.stat().st_mtime_ns for path in place.folder.rglob("result.json")}
    result = run_compare(replace(config, methods=("uniform", "l1"), seeds=(0, 1)), place)
    assert {row.seeds for row in result.rows} == {2}
    for path, written in files.items():
        assert path.stat().st_mtime_ns == written


def test_processes_give_what_one_process_gives(config, place, fork_server, tmp_path, monkeypatch):
    alone = run_compare(config, place)
    other = Place(tmp_path / "processes", "cpu", threads=1)

    def context(method):
        assert method == "spawn"
        return fork_server

    # Soon; the test of how processes end has them as they are.
    monkeypatch.setattr(multiprocessing, "get_context", context)
    several = run_compare(config, other, jobs=2)
    assert [r.top1 for r in several.records] == [r.top1 for r in alone.records]
    assert [r.widths for r in several.records] == [r.widths for r in alone.records]


def test_a_comparison_whose_time_is_over_says_what_is_left_and_continues(config, place):
    config = replace(config, methods=("uniform",))
    result = run_compare(config, place, seconds=0.01)
    assert (result.left, result.rows, result.failed) == (3, [], {})
    assert run_compare(config, place).left == 0


_KILLED = """
import sys, pickle
from dmcp.compare import run_compare
if __name__ == "__main__":
    config, place = pickle.load(open(sys.argv[1], "rb"))
    run_compare(config, place, jobs=int(sys.argv[2]))
"""


@pytest.fixture
def start(launch, tmp_path):
    """Begins a comparison in a process of its own."""

    def begin(config, place, jobs):
        program, arguments = tmp_path / "killed.py", tmp_path / "arguments"
        program.write_text(_KILLED)
        arguments.write_bytes(pickle.dumps((config, place)))
        return launch(str(program), arguments, jobs)

    return begin


def test_a_comparison_that_was_killed_continues_with_the_same_numbers(
    config, place, start, wait_until, tmp_path
):
    recipe = replace(config.recipe, retrain_epochs=6)
    config = replace(config, methods=("uniform",), recipe=recipe)
    whole = run_compare(config, place)
    killed = Place(tmp_path / "killed", "cpu", threads=1, checkpoint_every=2)
    process = start(config, killed, 1)
    checkpoint = killed.folder / "trainings"
    wait_until(process, lambda: list(checkpoint.glob("A-*/checkpoint/train.pt")), poll=0.05)
    process.kill()
    process.join()
    assert list(checkpoint.glob("A-*/checkpoint/train.pt")), "it was over before it was killed"
    result = run_compare(config, killed)
    assert [r.top1 for r in result.records] == [r.top1 for r in whole.records]
    assert [r.widths for r in result.records] == [r.widths for r in whole.records]
    assert not list(checkpoint.glob("*/checkpoint"))


def test_processes_end_with_the_one_that_began_them(config, place, start, wait_until):
    recipe = replace(config.recipe, retrain_epochs=1000)
    process = start(replace(config, recipe=recipe), replace(place, checkpoint_every=2), 2)
    pretrained = place.folder / "shared" / "0" / "pretrained.pt"
    wait_until(process, pretrained.exists, poll=0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    assert workers
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker goes on writing to the folder"
        time.sleep(0.05)


def test_a_folder_is_for_one_process_at_a_time(config, place):
    run_compare(replace(config, methods=("uniform",)), place, seconds=0.01)
    with (place.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="in use by another process"):
            run_compare(config, place)


def test_track_b_may_be_added_and_charges_the_network_that_weights_come_from(config, place):
    config = replace(config, methods=("uniform",))
    run_compare(config, place)
    both = replace(config, tracks=("A", "B"))
    # What track A has is done, though the weights for B are not there yet.
    assert [type(task) for task in tasks_of(both) if not task.is_done(both, place.folder)] == [
        Find,
        Retrain,
    ]
    _, scratch, tuned = run_compare(both, place).records
    assert scratch.widths == tuned.widths
    assert (scratch.forward, scratch.backward) == (0, 0)
    steps = 1293 // config.network.batch_size  # the digits that are not held out, one epoch
    assert tuned.backward == steps * config.network.batch_size
    # Where a result is there, the weights that it began with are not needed again.
    shutil.rmtree(place.folder / "methods" / "uniform-0" / "weights")
    assert all(task.is_done(both, place.folder) for task in tasks_of(both))


def test_the_pretrained_network_is_made_again_only_for_those_that_need_it(config, place):
    config = replace(config, methods=("l1",))
    run_compare(config, place)
    (place.folder / "shared" / "0" / "pretrained.pt").unlink()
    assert Pretrain(0).is_done(config, place.folder)
    assert not Pretrain(0).is_done(replace(config, methods=("l1", "group_norm")), place.folder)


def test_another_error_ends_its_own_task_alone(config, place, capfd):
    broken = place.folder / "methods" / "uniform-0"
    run_compare(replace(config, methods=("uniform",)), place, seconds=0.01)
    broken.parent.mkdir()
    broken.write_text("a file where a folder is to be")
    result = run_compare(config, place)
    (reason,) = result.failed.values()
    assert "Error: " in reason
    assert str(broken) in reason
    assert "Traceback" in capfd.readouterr().err
    assert [row.method for row in result.rows] == [DENSE, "l1"]


def test_a_folder_of_another_comparison_is_refused(config, place):
    place.folder.mkdir()
    (place.folder / "config.json").write_text(
        json.dumps({"format": 1, **replace(config, budgets=("40%",)).identity()})
    )
    with pytest.raises(CheckpointError, match="another configuration: budgets"):
        run_compare(config, place)


def test_a_budget_out_of_reach_is_refused_before_anything_is_written(config, place):
    with pytest.raises(BudgetError, match="below the narrowest"):
        run_compare(replace(config, budgets=("50%", "0.1%")), place)
    assert not place.folder.exists()


def test_a_task_that_fails_says_why_and_leaves_what_needs_it(config, place):
    broken = place.folder / "shared" / "0" / "pretrained.pt"
    run_compare(replace(config, methods=("uniform",)), place, seconds=0.01)  # begins the folder
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"nothing")
    result = run_compare(config, place)
    assert list(result.failed) == ["train the whole network, seed 0"]
    assert str(broken) in result.failed["train the whole network, seed 0"]
    assert result.left == 2  # L1 starts from that network
    assert [row.method for row in result.rows] == ["uniform"]
    broken.unlink()
    assert run_compare(config, place).left == 0


@pytest.mark.parametrize(("name", "value"), [("jobs", 0), ("seconds", 0.0)])
def test_refuses(config, place, name, value):
    with pytest.raises(ConfigError, match=name):
        run_compare(config, place, **{name: value})
    assert not place.folder.exists()


def test_tasks_say_what_they_need_and_when_they_are_done(config, place):
    tasks = tasks_of(config)
    assert tasks == [
        Pretrain(0),
        Find("uniform", 0),
        Find("l1", 0),
        Retrain("uniform", 0, "50%", "A"),
        Retrain("l1", 0, "50%", "A"),
    ]
    find = tasks[1]
    assert not find.is_done(config, place.folder)
    do(find, config, place)
    assert find.is_done(config, place.folder)
    # Track B needs the weights too, which were not asked for.
    assert not find.is_done(replace(config, tracks=("B",)), place.folder)
    assert find.found(place.folder)["50%"]["spent"] == {"forward": 0, "backward": 0, "seconds": 0.0}
