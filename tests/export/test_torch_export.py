from __future__ import annotations

import io
import json
import zipfile

import pytest
import torch
from torch import nn

from dmcp import extract
from dmcp.errors import ConfigError, ExportError
from dmcp.export import TOLERANCE, TorchNetwork, to_torch
from dmcp.export.check import difference


def test_a_pruned_network(traced, random_widths, tmp_path, capfd):
    case = traced("Depthwise")
    small = extract(case.graph, random_widths(case.graph)).eval()
    path = tmp_path / "network.pt2"
    assert to_torch(small, case.inputs, path) <= TOLERANCE
    assert capfd.readouterr() == ("", "")
    batch = torch.randn(5, 3, 8, 8)
    assert difference(small(batch), TorchNetwork(path)(batch)) <= TOLERANCE


def test_it_holds_no_pickled_weights_and_no_example(traced, tmp_path):
    case = traced("WithoutNorm")
    to_torch(case.model, case.inputs, tmp_path / "network.pt2")
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        names = archive.namelist()
        (weights,) = (name for name in names if name.endswith("weights_config.json"))
        (inputs,) = (name for name in names if "sample_inputs" in name)
        entries = json.loads(archive.read(weights))["config"].values()
        (images,), _ = torch.load(io.BytesIO(archive.read(inputs)), weights_only=True)
    assert entries
    assert not any(entry["use_pickle"] for entry in entries)
    assert not images.any()


def test_what_is_no_program(tmp_path):
    (tmp_path / "network.pt2").write_text("nothing")
    with pytest.raises(ExportError, match=r"torch\.export cannot load"):
        TorchNetwork(tmp_path / "network.pt2")


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"path must be that of a \.pt2 file"):
        to_torch(nn.ReLU(), torch.randn(2, 3), tmp_path / "network.pt")
