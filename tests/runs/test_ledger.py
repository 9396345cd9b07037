from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dmcp
from dmcp.methods import Spent
from dmcp.runs import RunFolder
from dmcp.runs.ledger import Ledger, commit
from dmcp.search import Budget, MarkovNet, Search, SearchOptions
from dmcp.search.distilled import DistilledTraining
from dmcp.train import Schedule, Training, TrainOptions, World

BATCH = 6
TRAIN = TrainOptions(Schedule(0.01))


def make_model() -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def make_net() -> MarkovNet:
    return MarkovNet(make_model(), torch.zeros(2, 3, 8, 8), groups=4, divisor=1)


def search(**options: object) -> tuple[Search, nn.Module]:
    net = make_net()
    return Search(net, Budget(macs="50%"), 5, SearchOptions(warmup=0.4, **options)), net


def training(micro_batches: int = 1) -> tuple[Training, nn.Module]:
    model = make_model()
    options = TrainOptions(Schedule(0.01), micro_batches=micro_batches)
    return Training(model, options, 5), model


def distilled() -> tuple[DistilledTraining, nn.Module]:
    net = make_net()
    return DistilledTraining(net, {"0": 4}, TRAIN, 5), net


def watch_images(network: nn.Module) -> Counter[str]:
    """Counts the images that go through a network from now on."""
    seen: Counter[str] = Counter()

    def count(_module: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        images = len(inputs[0])
        seen["forward"] += images
        logits.register_hook(lambda gradient: seen.update(backward=images))

    network.register_forward_hook(count)
    return seen


@pytest.mark.parametrize(
    "make",
    [
        search,
        lambda: search(random_subnets=0, distil=False),
        lambda: search(random_subnets=3, micro_batches=2),
        training,
        lambda: training(micro_batches=3),
        distilled,
    ],
)
def test_passes_are_those_that_images_make(make):
    stage, network = make()
    seen = watch_images(network)
    for step in range(1, stage.steps + 1):
        stage.step(torch.randn(BATCH, 3, 8, 8), torch.randint(4, (BATCH,)))
        expected = stage.passes * BATCH
        assert seen == {"forward": expected, "backward": expected}, step


def test_a_resumed_stage_has_made_the_passes_of_before():
    first, again = search()[0], search()[0]
    for _ in range(4):
        first.step(torch.randn(BATCH, 3, 8, 8), torch.randint(4, (BATCH,)))
    again.load_state_dict(first.state_dict())
    assert again.passes == first.passes > 0


def test_phases_are_kept_in_their_order(tmp_path):
    folder = RunFolder(tmp_path)
    ledger = Ledger(folder, World.single(), "dmcp train")
    ledger.begin()
    assert folder.read_json("ledger.json")["phases"] == {}
    ledger.record("search", 3, Spent(30, 20, 1.5), ["careful"])
    ledger.record("dense", 2, Spent(8, 8, 0.5))
    ledger.charge("dense", 4)
    written = folder.read_json("ledger.json")
    assert list(written["phases"].items()) == [
        ("search", {"steps": 3, "images_forward": 30, "images_backward": 20, "seconds": 1.5}),
        ("dense", {"steps": 2, "images_forward": 12, "images_backward": 8, "seconds": 0.5}),
    ]
    Ledger(folder, World.single()).begin()
    assert folder.read_json("ledger.json") == written, "a resumed run leaves it until it knows more"
    again = Ledger(folder, World.single())
    again.begin()
    again.record("search", 3, Spent(30, 20, 1.5))
    assert folder.read_json("ledger.json")["phases"] == written["phases"]
    assert written["warnings"] == ["careful"]
    assert written["command"] == "dmcp train"
    assert written["device"]
    assert set(written["versions"]) == {"dmcp", "torch", "python"}
    assert written["versions"]["dmcp"] == dmcp.__version__


def test_only_the_first_process_writes(tmp_path):
    Ledger(RunFolder(tmp_path / "run"), World(1, 2, torch.device("cpu"))).begin()
    assert not (tmp_path / "run").exists()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def package_in(tmp_path, monkeypatch) -> Path:
    """A folder that the package seems to have been imported from."""
    (tmp_path / "dmcp").mkdir()
    (tmp_path / "dmcp" / "__init__.py").touch()
    monkeypatch.setattr(dmcp, "__file__", str(tmp_path / "dmcp" / "__init__.py"))
    return tmp_path


def test_the_commit_is_that_of_the_checkout(package_in):
    git(package_in, "init")
    git(package_in, "add", ".")
    git(package_in, "commit", "-m", "first")
    git(package_in, "tag", "-a", "v1", "-m", "first")
    head = git(package_in, "rev-parse", "HEAD")
    assert commit.__wrapped__() == head
    (package_in / "dmcp" / "__init__.py").write_text("changed")
    assert commit.__wrapped__() == f"{head}-dirty"


def test_no_git_is_called_where_there_is_no_checkout(package_in, monkeypatch):
    def refuse(*_arguments, **_options):
        raise AssertionError("called")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert commit.__wrapped__() is None


@pytest.mark.parametrize("how", ["no git", "no repository", "no commit"])
def test_a_commit_that_cannot_be_told_is_none(package_in, monkeypatch, how):
    if how == "no commit":
        git(package_in, "init")
    else:
        (package_in / ".git").mkdir()
    if how == "no git":
        monkeypatch.setenv("PATH", str(package_in))
    assert commit.__wrapped__() is None
