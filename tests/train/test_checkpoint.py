from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dmcp.errors import CheckpointError
from dmcp.train import checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint" / "last.pt"


STATE = {
    "step": 3,
    "share": 0.1,
    "name": "a",
    "flag": True,
    "nothing": None,
    "list": [1, (2, torch.arange(1000.0))],
    "bits": torch.get_rng_state(),
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_round_trips_exactly(path: Path):
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["list"][1][1], torch.arange(1000.0))
    assert torch.equal(loaded["bits"], STATE["bits"])
    plain = {key: value for key, value in STATE.items() if key not in ("list", "bits")}
    assert {key: loaded[key] for key in plain} == plain


def test_leaves_nothing_else_in_the_folder(path: Path):
    checkpoint.save(path, STATE)
    checkpoint.save(path, STATE)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("foreign", [nn.ReLU(), np.float64(1.0), {1, 2}, Path("x")])
def test_refuses_to_save_what_could_not_be_loaded(path: Path, foreign: object):
    checkpoint.save(path, STATE)
    with pytest.raises(CheckpointError, match=r"state\['deep'\]\[0\] is a "):
        checkpoint.save(path, {"deep": [foreign]})
    assert checkpoint.load(path)["step"] == 3


def test_a_save_that_fails_leaves_the_old_file(path: Path):
    checkpoint.save(path, STATE)
    with pytest.raises(RuntimeError):
        checkpoint.save(path, {"broken": torch.empty(3, device="meta").as_subclass(Unsavable)})
    assert checkpoint.load(path)["step"] == 3
    assert os.listdir(path.parent) == [path.name]


class Unsavable(torch.Tensor):
    def __reduce_ex__(self, protocol: object) -> str:
        raise RuntimeError("cannot be pickled")


def test_refuses_a_missing_file(path: Path):
    assert "no checkpoint" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_refuses_a_truncated_file(path: Path, share: float):
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refusal(path)


def test_refuses_one_flipped_bit_in_a_tensor(path: Path):
    checkpoint.save(path, STATE)
    content = bytearray(path.read_bytes())
    position = content.index(torch.arange(1000.0).numpy().tobytes())
    content[position + 100] ^= 1
    path.write_bytes(bytes(content))
    assert "damaged" in refusal(path)


def test_refuses_random_bytes(path: Path):
    path.parent.mkdir()
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    refusal(path)


class Payload:
    """Unpickling one runs code."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


def test_runs_no_code_of_a_foreign_file(path: Path, tmp_path: Path):
    path.parent.mkdir()
    witness = tmp_path / "witness"
    torch.save({"state": Payload(witness)}, path)
    refusal(path)
    assert not witness.exists()


def test_refuses_a_state_that_is_not_one(path: Path):
    path.parent.mkdir()
    torch.save([1, 2], path)
    assert "list" in refusal(path)
