from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.train import (
    Training,
    World,
    init_from_env,
    recalibrate_batch_norm,
    restore_batch_norm,
    synchronise_batch_norm,
    synchronised_batch_norm,
)

PROGRAM = Path(__file__).with_name("two_ranks.py")
_spec = importlib.util.spec_from_file_location("two_ranks", PROGRAM)
assert _spec is not None
assert _spec.loader is not None
two_ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(two_ranks)

PAIR = World(0, 2, torch.device("cpu"))
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def folder(run_ranks: Callable[[str, object], None], tmp_path_factory: Any) -> Path:
    """The run of both ranks: two processes that talk through gloo."""
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(str(PROGRAM), folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [findings["rank"] for findings in found] == [0, 1]
    return found


def test_training_equals_one_process_on_the_global_batch(ranks):
    stage = Training(two_ranks.make_net(), two_ranks.OPTIONS, two_ranks.STEPS)
    losses = [stage.step(*two_ranks.global_batch(step))["loss"] for step in range(two_ranks.STEPS)]
    for findings in ranks:
        torch.testing.assert_close(findings["training"]["model"], stage.model.state_dict(), **CLOSE)
    averaged = (ranks[0]["training"]["losses"] + ranks[1]["training"]["losses"]) / 2
    torch.testing.assert_close(averaged, torch.stack(losses), **CLOSE)


def test_restoring_gives_the_plain_network(ranks):
    plain = [type(module).__name__ for module in two_ranks.make_net()]
    for findings in ranks:
        assert findings["training"]["classes"] == plain
        assert findings["training"]["attributes"] == []


def reference_batch_norm(images: int, affine: bool) -> dict[str, Tensor | None]:
    world = World.single()
    return two_ranks.batch_norm(world, [images], torch.float64, affine)


@pytest.mark.parametrize("case", ["equal", "unequal", "plain"])
def test_batch_norm_equals_that_of_the_global_batch(ranks, case):
    expected = reference_batch_norm(12, affine=case != "plain")
    first, second = (findings[case] for findings in ranks)
    for name in ("y", "grad_x"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), expected[name], **CLOSE)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(first[name], expected[name], **CLOSE)
        torch.testing.assert_close(second[name], expected[name], **CLOSE)
    for name in ("grad_weight", "grad_bias"):
        if case == "plain":
            assert first[name] is None
            continue
        # each rank has the part of its own shard
        torch.testing.assert_close(first[name] + second[name], expected[name], **CLOSE)


def test_batch_norm_keeps_half_precision_outside_and_float32_inside(ranks):
    rounded = (two_ranks.global_batch(0)[0] + 1000).bfloat16().float()
    for findings in ranks:
        found = findings["half"]
        assert found["y"].dtype == found["grad_x"].dtype == torch.bfloat16
        assert found["grad_weight"].dtype == found["running_mean"].dtype == torch.float32
        mean = 0.1 * rounded.mean((0, 2, 3))
        torch.testing.assert_close(found["running_mean"], mean, rtol=1e-6, atol=0)
    weight, bias = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.1, 0.2, 0.3])
    expected = F.batch_norm(rounded, None, None, weight, bias, training=True).bfloat16()
    y = torch.cat([findings["half"]["y"] for findings in ranks])
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-9)


def test_recalibration_measures_the_global_batches(ranks):
    model = two_ranks.make_net()
    recalibrate_batch_norm(model, (two_ranks.global_batch(step) for step in range(3)))
    for findings in ranks:
        found = findings["recalibration"]["model"]
        torch.testing.assert_close(found, model.state_dict(), **CLOSE)


def test_all_reduce_sum_is_differentiable(ranks):
    # losses 1 and 2 times |x_0 + x_1|^2, so every x gets (1 + 2) 2 (x_0 + x_1)
    total = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for findings in ranks:
        assert torch.equal(findings["collectives"]["total"], total)
        assert torch.equal(findings["collectives"]["grad"], 6 * total)


def test_gradients_are_averaged_in_one_call_per_dtype(ranks):
    shapes = [(2, 3), None, (2, 3), (4, 2, 3, 3), ()]
    for findings in ranks:
        averaged = findings["collectives"]["averaged"]
        for index, (gradient, shape) in enumerate(zip(averaged, shapes, strict=True)):
            if shape is None:
                assert gradient is None
                continue
            values = torch.arange(gradient.numel(), dtype=gradient.dtype)
            assert torch.equal(gradient, (values * 1.5 + index).view(shape))
        assert averaged[3].is_contiguous(memory_format=torch.channels_last)
        assert findings["collectives"]["calls"] == ["torch.float64", "torch.float32"]


def test_broadcast_gives_everyone_the_parameters_and_buffers_of_rank_0(ranks):
    expected = two_ranks.make_net(seed=0)
    expected[1].num_batches_tracked.fill_(5)
    for findings in ranks:
        for name, value in expected.state_dict().items():
            assert torch.equal(findings["collectives"]["broadcast"][name], value)


def test_all_gather_is_in_the_order_of_the_ranks(ranks):
    for findings in ranks:
        assert findings["collectives"]["gathered"].tolist() == [0, 2]


def test_a_run_continues_the_generators_of_every_rank(ranks):
    for findings in ranks:
        found = findings["loop"]
        assert found["interrupted"] == "DataError: the stream ended at step 3 of 6"
        for name, value in found["whole"].items():
            assert torch.equal(found["continued"][name], value)
            assert torch.equal(ranks[0]["loop"]["whole"][name], value)


def test_only_rank_0_writes(folder: Path, ranks):
    assert sorted(path.name for path in (folder / "whole").iterdir() if path.is_file()) == [
        "last.pt",
        "metrics.jsonl",
    ]
    texts = [(folder / name / "metrics.jsonl").read_text() for name in ("whole", "broken")]
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 3
    assert not (folder / "nowhere").exists()


def test_ranks_that_see_different_checkpoints_stop(ranks):
    for findings in ranks:
        assert "steps [6, 0]" in findings["disagreement"]
        assert findings["disagreement"].startswith("CheckpointError")


def test_divergence_of_one_rank_stops_all(ranks):
    for findings in ranks:
        assert findings["divergence"].startswith("DivergenceError: train diverged: loss is nan")


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_one_process_is_torchs(training: bool):
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    weight, bias = torch.rand(2, 3, dtype=torch.float64)
    running = torch.rand(2, 3, dtype=torch.float64)
    ours, theirs = running.clone(), running.clone()
    y = synchronised_batch_norm(x, weight, bias, *ours, training, 0.1, 1e-5, World.single())
    expected = F.batch_norm(x, *theirs, weight, bias, training, 0.1, 1e-5)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_synchronising_keeps_the_state_and_evaluates_as_before():
    model = two_ranks.make_net()
    images, _ = two_ranks.global_batch(0)
    model(images)
    model.eval()
    expected, state = model(images), copy.deepcopy(model.state_dict())
    synchronise_batch_norm(model, PAIR)
    synchronise_batch_norm(model, PAIR)
    assert type(model[1]).__name__ == "SyncBatchNorm2d"
    assert isinstance(model[1], nn.BatchNorm2d)
    assert torch.equal(model(images), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_world_of_one_changes_nothing():
    model = two_ranks.make_net()
    synchronise_batch_norm(model, World.single())
    assert type(model[1]) is nn.BatchNorm2d


class OwnBatchNorm(nn.BatchNorm2d):
    sync_world: World | None = None


def test_a_subclass_that_synchronises_itself_is_told_the_world():
    model = nn.Sequential(OwnBatchNorm(3))
    synchronise_batch_norm(model, PAIR)
    assert model[0].sync_world == PAIR
    assert type(model[0]) is OwnBatchNorm
    restore_batch_norm(model)
    assert model[0].sync_world is None


class SilentBatchNorm(nn.BatchNorm2d):
    pass


def test_refuses_a_batch_norm_it_cannot_synchronise():
    model = nn.Sequential(nn.BatchNorm2d(3), SilentBatchNorm(3))
    with pytest.raises(ConfigError, match="cannot synchronise 1, a SilentBatchNorm"):
        synchronise_batch_norm(model, PAIR)
    assert type(model[0]) is nn.BatchNorm2d


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_torchrun_there_is_one_process(no_torchrun):
    assert init_from_env("cpu") == World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a number .* got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "got 2 of 2"),
    ],
)
def test_refuses_a_broken_environment(no_torchrun, variables, message):
    for name, value in variables.items():
        no_torchrun.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_from_env("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_refuses_a_gpu_that_is_not_there(no_torchrun):
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        init_from_env("cuda")
