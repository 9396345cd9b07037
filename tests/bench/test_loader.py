"""What a stream's consumer waits for is told from what it does itself."""

from __future__ import annotations

import json
import sys
import time

import loader
import pytest
import torch

from dmcp.data import ImageFormat, ImageSet

CPU = torch.device("cpu")


class SlowImages(ImageSet):
    """Each takes a while to read."""

    def __init__(self, seconds):
        super().__init__(torch.zeros(8, dtype=torch.int64), ImageFormat(8, (0.5,), (0.5,), False))
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return torch.zeros(1, 8, 8, dtype=torch.uint8), 0


def test_what_is_late_is_waited_for_and_a_step_is_not():
    steps = []

    def step():
        steps.append(None)
        time.sleep(0.03)

    seen = loader.deliver(SlowImages(0.005), 4, 3, 0, CPU, step)
    assert len(steps) == loader.WARM_UP + 3
    assert seen["wait"] >= 4 * 0.005
    assert seen["longest_wait"] >= seen["wait"]
    assert seen["step"] >= 0.03
    assert seen["starved"] == pytest.approx(seen["wait"] / (seen["wait"] + seen["step"]))
    assert seen["images_per_second"] == pytest.approx(4 / (seen["wait"] + seen["step"]))


@pytest.mark.parametrize("data", [None, "digits"])
def test_the_script_writes_what_it_shows(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "RANDOM_IMAGES", 8)
    output = tmp_path / "loader.json"
    options = {"batch": 8, "size": 16, "batches": 2, "step-ms": 1, "json": output}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    source = [] if data is None else ["--data", data]
    command = ["loader.py", *source, "--workers", "0", "1", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    loader.main()
    result = json.loads(output.read_text())
    assert result["data"] == (data or "random JPEGs")
    assert [row["workers"] for row in result["rows"]] == [None, 0, 1]
    shown = capsys.readouterr().out
    for row in result["rows"]:
        assert row["alone"]["images_per_second"] > 0
        assert 0 < row["with_step"]["starved"] < 1
        assert f"{row['with_step']['starved']:.1%}" in shown
