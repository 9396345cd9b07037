from __future__ import annotations

import pytest
import torch
from torch import nn

from dmcp import extract
from dmcp.errors import ConfigError, ExportError, TraceError
from dmcp.export import TOLERANCE, OnnxNetwork, to_onnx
from dmcp.export.check import difference


def test_a_pruned_network(traced, random_widths, tensors, tmp_path, capfd):
    case = traced("SeveralInputs")
    small = extract(case.graph, random_widths(case.graph)).train()
    path = tmp_path / "export" / "network.onnx"
    assert to_onnx(small, case.inputs, path) <= TOLERANCE
    assert small.training, "the network itself is not changed"
    assert capfd.readouterr() == ("", "")
    assert [each.name for each in path.parent.iterdir()] == ["network.onnx"]
    network = OnnxNetwork(path)
    for size in (1, 7):
        batch = [torch.randn(size, *x.shape[1:]) for x in case.inputs]
        with torch.no_grad():
            expected, found = tensors(small.eval()(*batch)), tensors(network(*batch))
        assert max(map(difference, expected, found)) <= TOLERANCE


class Wrong(nn.Module):
    """Noise: no two runs agree."""

    def forward(self, x):
        return x + torch.rand_like(x)


def test_nothing_is_left_of_a_form_that_differs(tmp_path, written):
    path = tmp_path / "network.onnx"
    path.write_text("earlier")
    with pytest.raises(ExportError, match=r"the ONNX form differs from the network by \d\.\de"):
        to_onnx(Wrong(), torch.randn(2, 3), path)
    assert written(tmp_path) == {"network.onnx"}
    assert path.read_text() == "earlier"


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3)


def test_a_fixed_batch_size_is_refused(tmp_path, written):
    with pytest.raises(TraceError, match="FixedBatch works for batches of 2 only"):
        to_onnx(FixedBatch(), torch.randn(2, 3), tmp_path / "network.onnx")
    assert not written(tmp_path)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.tensor(1.0), r"must hold tensors with a batch dimension, got \[\]"),
        ((), "must hold tensors of one batch size, got none"),
        ((torch.ones(2, 1), torch.ones(3, 1)), r"of one batch size, got \[2, 3\]"),
        (["image"], "must hold tensors with a batch dimension, got str"),
    ],
)
def test_what_is_no_batch_is_refused(example, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        to_onnx(nn.ReLU(), example, tmp_path / "network.onnx")


def test_what_is_no_onnx_file(tmp_path):
    (tmp_path / "network.onnx").write_text("nothing")
    with pytest.raises(ExportError, match="ONNX Runtime cannot run"):
        OnnxNetwork(tmp_path / "network.onnx")
