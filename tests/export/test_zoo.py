"""Pruned networks of torchvision, in the forms that leave PyTorch's own behind."""

from __future__ import annotations

import pytest
import torch

from dmcp import extract, trace
from dmcp.export import TOLERANCE, OnnxNetwork, to_onnx, to_python
from dmcp.export.check import difference


def mobilenet_v2(models):
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return models.MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=stages)


def resnet18(models):
    return models.resnet18(num_classes=5)


def densenet(models):
    return models.DenseNet(8, (3, 2), 16, num_classes=5)


@pytest.mark.parametrize("build", [mobilenet_v2, resnet18, densenet])
def test_a_pruned_network(build, zoo, random_widths, tmp_path, elsewhere):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    graph = trace(build(models), images)
    small = extract(graph, random_widths(graph)).eval()
    for module in small.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    python, onnx = tmp_path / "export" / "network.py", tmp_path / "network.onnx"
    assert to_python(small, images, python) <= TOLERANCE
    assert to_onnx(small, images, onnx) <= TOLERANCE
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = small(images)
    assert difference(expected, elsewhere(python, small, (images,))) <= TOLERANCE
    assert difference(expected, OnnxNetwork(onnx)(images)) <= TOLERANCE
    source = python.read_text()
    assert "dmcp" not in source.replace("exported by dmcp", "")
    assert (
        source.count("class ") == {"mobilenet_v2": 4, "resnet18": 3, "densenet": 6}[build.__name__]
    )
