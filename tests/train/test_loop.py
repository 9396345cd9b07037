from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmcp.errors import CheckpointError, ConfigError, DataError, DivergenceError
from dmcp.train import Recorder, Schedule, Training, TrainOptions, World, checkpoint, run
from dmcp.train.loop import SNAPSHOTS
from dmcp.train.readback import Snapshot

OPTIONS = TrainOptions(Schedule(0.05))
Stream = Callable[[int], Iterable[tuple[Tensor, Tensor]]]


@pytest.fixture
def stage(small_net) -> Callable[..., Training]:
    return lambda steps=10, dropout=0.5: Training(small_net(dropout=dropout), OPTIONS, steps)


@pytest.fixture
def stream(batch_of) -> Callable[[int], Stream]:
    """``stream(end)`` ends after the batch of step ``end - 1``."""
    return lambda end=10: lambda start: (batch_of(step) for step in range(start, end))


def assert_same_bits(state: dict[str, Any], other: dict[str, Any]) -> None:
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def steps_recorded(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


def test_runs_every_step_on_its_batch(stage, stream, batch_of):
    ran, expected, steps = stage(), stage(), []
    torch.manual_seed(1)
    run(ran, stream(), phase="train", on_step=steps.append)
    torch.manual_seed(1)
    for step in range(10):
        expected.step(*batch_of(step))
    assert steps == list(range(11))
    assert_same_bits(ran.model.state_dict(), expected.model.state_dict())


def test_records_every_log_every_steps_and_the_last(stage, stream, tmp_path):
    with Recorder(tmp_path) as recorder:
        run(
            stage(dropout=0.0),
            stream(),
            phase="train",
            log_every=4,
            checkpoint=tmp_path / "last.pt",
            checkpoint_every=3,
            recorder=recorder,
        )
    assert steps_recorded(tmp_path) == [4, 8, 10]
    expected = stage(dropout=0.0)
    metrics = [expected.step(*batch) for batch in stream()(0)]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    values = {name: value.item() for name, value in metrics[-1].items()}
    assert last == {"phase": "train", "step": 10, **values}


@pytest.mark.parametrize("interrupted_at", [1, 4, 7, 9])
def test_continues_with_the_same_bits_and_records(stage, stream, tmp_path, interrupted_at):
    options = {"phase": "train", "checkpoint_every": 3, "log_every": 2}

    def run_in(folder: Path, end: int) -> Training:
        torch.manual_seed(7)
        resumed = stage()
        with Recorder(folder) as recorder:
            run(
                resumed,
                stream(end),
                checkpoint=folder / "last.pt",
                recorder=recorder,
                **options,
            )
        return resumed

    whole = run_in(tmp_path / "whole", 10)
    with pytest.raises(DataError, match=f"step {interrupted_at} of 10"):
        run_in(tmp_path / "broken", interrupted_at)
    resumed = run_in(tmp_path / "broken", 10)
    assert_same_bits(resumed.model.state_dict(), whole.model.state_dict())
    whole_text, text = ((tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "broken"))
    assert text == whole_text


def test_a_finished_run_is_only_read(stage, stream, tmp_path):
    def run_in(end: int) -> Training:
        ran = stage()
        with Recorder(tmp_path) as recorder:
            run(ran, stream(end), phase="train", checkpoint=tmp_path / "last.pt", recorder=recorder)
        return ran

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    first, written = run_in(10), contents()
    again = run_in(0)
    assert again.step_index == 10
    assert_same_bits(again.model.state_dict(), first.model.state_dict())
    assert contents() == written


class Counting:
    """A stage with a chain of one group, whose q falls from step to step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.step_index = 0

    def step(self) -> dict[str, Tensor]:
        self.step_index += 1
        return {"loss": torch.tensor(1.0)}

    def snapshot(self) -> Snapshot:
        return Snapshot({"unit": (1, 2)}, torch.tensor([1 / self.step_index]))

    def state_dict(self) -> dict[str, Any]:
        return {"step_index": self.step_index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_index = state["step_index"]


def count(folder: Path, steps: int, end: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """Run a `Counting`, or a part of it, and return the records heard on the way."""
    stage, heard = Counting(steps), []
    with Recorder(folder) as recorder:
        run(
            stage,
            lambda start: [()] * ((end or steps) - start),
            phase="search",
            recorder=recorder,
            snapshot=stage.snapshot,
            on_record=heard.append,
            **options,
        )
    return heard


@pytest.mark.parametrize(("steps", "taken"), [(7, [*range(1, 8)]), (401, [*range(3, 401, 3), 401])])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_takes_snapshots_evenly_whatever_is_logged(tmp_path, steps, taken, log_every):
    heard = count(tmp_path, steps, log_every=log_every)
    assert len(taken) <= SNAPSHOTS + 1
    lines = [json.loads(line) for line in (tmp_path / "chains.jsonl").open()]
    assert [line["step"] for line in lines] == taken
    assert [line["retain"]["unit"] for line in lines] == [
        pytest.approx([1 / step]) for step in taken
    ]
    assert [record for record in heard if "retain" in record] == lines


@pytest.mark.parametrize("interrupted_at", [2, 5, 8])
def test_a_resumed_run_takes_the_same_snapshots(tmp_path, interrupted_at):
    """Records of the steps before are heard again, so that whoever listens knows all of them."""
    options = {"log_every": 2, "checkpoint_every": 3}
    whole = count(tmp_path / "whole", 10, checkpoint=tmp_path / "whole.pt", **options)
    with pytest.raises(DataError):
        count(tmp_path / "cut", 10, interrupted_at, checkpoint=tmp_path / "cut.pt", **options)
    heard = count(tmp_path / "cut", 10, checkpoint=tmp_path / "cut.pt", **options)
    for name in ("metrics.jsonl", "chains.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert sorted(heard, key=str) == sorted(whole, key=str)


@pytest.mark.parametrize("poisoned", [4, 5, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_never_saves_a_diverged_state(stage, stream, tmp_path, poisoned, value):
    """Whether the bad step is between two checkpoints or on one, the last good one stays."""

    def poison(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(stream()(start), start + 1):
            yield (images * value if step == poisoned else images), labels

    with Recorder(tmp_path) as recorder, pytest.raises(DivergenceError, match=r"loss is .* step 6"):
        run(
            stage(),
            poison,
            phase="train",
            checkpoint=tmp_path / "last.pt",
            checkpoint_every=3,
            log_every=100,
            recorder=recorder,
        )
    saved = checkpoint.load(tmp_path / "last.pt")["state"]
    assert saved["step_index"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert (tmp_path / "metrics.jsonl").exists() is False


def test_notices_divergence_without_a_checkpoint_or_a_recorder(stage):
    def stream(start: int) -> Iterable[tuple[Tensor, Tensor]]:
        while True:
            yield torch.full((2, 3, 8, 8), float("nan")), torch.zeros(2, dtype=torch.int64)

    endless = stage()
    with pytest.raises(DivergenceError, match="train diverged"):
        run(endless, stream, phase="train", log_every=4)
    assert endless.step_index == 4


class OtherStage(Training):
    pass


def test_refuses_a_checkpoint_of_something_else(stage, stream, small_net, tmp_path):
    path = tmp_path / "last.pt"
    run(stage(), stream(), phase="train", checkpoint=path)

    def refusal(stage: Training, phase: str) -> str:
        before = [value.clone() for value in stage.model.state_dict().values()]
        with pytest.raises(CheckpointError) as caught:
            run(stage, stream(), phase=phase, checkpoint=path)
        after = stage.model.state_dict().values()
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        message = str(caught.value)
        assert str(path) in message
        assert "\n" not in message
        return message

    assert "'train' (Training), not of 'search'" in refusal(stage(), "search")
    other = OtherStage(small_net(), OPTIONS, 10)
    assert "(Training), not of 'train' (OtherStage)" in refusal(other, "train")
    assert "10 steps, not of 20" in refusal(stage(steps=20), "train")
    assert "another model" in refusal(Training(torch.nn.Conv2d(3, 4, 1), OPTIONS, 10), "train")
    checkpoint.save(path, {"weights": torch.zeros(3)})
    assert "not the checkpoint of a run" in refusal(stage(), "train")
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(stage(), "train")


@pytest.mark.parametrize("option", ["log_every", "checkpoint_every"])
def test_refuses_an_interval_that_is_not_positive(stage, stream, option):
    with pytest.raises(ConfigError, match=option):
        run(stage(), stream(), phase="train", **{option: 0})


class Drawing:
    """A stage that is nothing but its draws from the global generator of a device."""

    steps = 10

    def __init__(self, device: str) -> None:
        self.step_index = 0
        self.total = torch.zeros(3, device=device)

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.step_index += 1
        self.total = self.total + torch.rand_like(self.total)
        return {"loss": self.total.mean()}

    def state_dict(self) -> dict[str, Any]:
        return {"step_index": self.step_index, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_index = state["step_index"]
        self.total = state["total"].to(self.total.device)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_continues_the_generator_of_the_device(stream, tmp_path, device):
    def run_in(name: str, end: int) -> Tensor:
        torch.manual_seed(7)
        drawing = Drawing(device)
        path, world = tmp_path / name, World.single(device)
        run(drawing, stream(end), phase="x", checkpoint=path, checkpoint_every=3, world=world)
        return drawing.total

    whole = run_in("whole", 10)
    with pytest.raises(DataError):
        run_in("broken", 8)
    assert torch.equal(run_in("broken", 10), whole)


@pytest.mark.slow
def test_a_killed_run_continues_with_the_same_bits(launch, wait_until, tmp_path):
    program = str(Path(__file__).with_name("killable_run.py"))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = launch(program, whole, 0.0)
    file = killed / "last.pt"
    seen = None
    for _ in range(2):
        process = launch(program, killed, 0.03)
        # after a checkpoint of its own, so that the second kill follows a resume
        wait_until(
            process,
            lambda before=seen: file.exists() and file.stat().st_mtime_ns != before,
            poll=0.005,
        )
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (killed / "final.pt").exists()
        assert checkpoint.load(file)["state"]["step_index"] > 0
        seen = file.stat().st_mtime_ns
    # An interpreter of its own: nothing may depend on the hash seed or on addresses.
    subprocess.run([sys.executable, "-P", program, str(killed), "0"], check=True, timeout=120)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    assert_same_bits(
        torch.load(killed / "final.pt", weights_only=True),
        torch.load(whole / "final.pt", weights_only=True),
    )
    assert (killed / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
