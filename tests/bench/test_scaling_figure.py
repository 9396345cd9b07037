"""The picture of how an iteration grows, from measurements written here."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from iteration import scaling_cases
from scaling_figure import fit


def measured(dtype, offset, slope):
    """What would be measured if time were linear in the batch and nothing else mattered."""
    return [
        {
            "against": against,
            "model": case.model,
            "size": case.size,
            "batch": case.batch,
            "dtype": dtype,
            "units": {"resnet18": 12, "resnet50": 37}.get(case.model, 25),
            "macs": 25_728_512,
            "seconds": (offset + slope * case.batch) / 1e3,
        }
        for against, case in scaling_cases([dtype])
    ]


def draw(root, environment, rows, tmp_path):
    numbers, figure = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    numbers.write_text(json.dumps({"scaling": rows}))
    files = ["--json", str(numbers), "--figure", str(figure)]
    command = [sys.executable, "bench/scaling_figure.py", *files]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done, figure


def test_the_line_is_fitted_to_the_batches():
    rows = [row for row in measured("float32", 120.0, 7.5) if row["against"] == "batch"]
    assert fit(rows) == pytest.approx((120.0, 7.5))


def test_the_picture_shows_every_panel_and_the_fits(root, environment, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [*measured("float32", 120.0, 7.5), *measured("bfloat16", 80.0, 4.0)]
    done, figure = draw(root, environment, rows, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "float32: 120 ms an iteration and 7.50 ms an image" in done.stdout
    shown = " ".join(ElementTree.fromstring(figure.read_text()).itertext())
    for label in (
        "images in a batch",
        "pixels of an image",
        "width of the network",
        "searchable units",
        "MobileNetV2-1.0, 16 images of 64 × 64 pixels",
        "128²",
        "ResNet-50",
        "25.7M MACs",
        "float32: 120 ms + 7.5 ms an image",
        "bfloat16: 80 ms + 4.0 ms an image",
    ):
        assert label in shown


def test_what_was_not_measured_is_not_drawn(root, environment, tmp_path):
    rows = [row for row in measured("float32", 120.0, 7.5) if row["against"] != "width"]
    done, figure = draw(root, environment, rows, tmp_path)
    assert done.returncode != 0
    assert "batch, size, width, units" in done.stderr
    assert not figure.exists()
