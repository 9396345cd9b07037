"""Pruned networks of torchvision, in the forms that leave PyTorch's own behind."""

from __future__ import annotations

import pytest
import torch

from dmcp import extract, trace
from dmcp.export import TOLERANCE, OnnxNetwork, load_python, to_onnx, to_python
from dmcp.export.check import difference

SHAPE = (3, 32, 32)


def mobilenet_v2(models):
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return models.MobileNetV2(num_classes=5, width_mult=0.5, inverted_residual_setting=stages)


def resnet10(models):
    return models.ResNet(models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)


def densenet(models):
    return models.DenseNet(8, (3, 2), 16, num_classes=5)


@pytest.fixture
def pruned(zoo, random_widths):
    def build(kind) -> torch.nn.Module:
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        graph = trace(kind(models), torch.randn(2, *SHAPE))
        small = extract(graph, random_widths(graph)).eval()
        for module in small.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return small

    return build


@pytest.mark.parametrize(("kind", "classes"), [(mobilenet_v2, 4), (resnet10, 3), (densenet, 6)])
def test_python(kind, classes, pruned, tmp_path):
    small, path, images = pruned(kind), tmp_path / "network.py", torch.randn(5, *SHAPE)
    assert to_python(small, images[:2], path) <= TOLERANCE
    network = load_python(path)
    assert list(network.state_dict()) == list(small.state_dict())
    with torch.no_grad():
        assert difference(small(images), network(images)) <= TOLERANCE
    source = path.read_text()
    assert "dmcp" not in source.replace("exported by dmcp", "")
    assert source.count("class ") == classes


def test_without_dmcp(pruned, tmp_path, elsewhere):
    small, images = pruned(densenet), torch.randn(5, *SHAPE)
    python, onnx = tmp_path / "export" / "network.py", tmp_path / "network.onnx"
    to_python(small, images[:2], python)
    to_onnx(small, images[:2], onnx)
    with torch.no_grad():
        expected = small(images)
    assert difference(expected, elsewhere(python, small, (images,))) <= TOLERANCE
    assert difference(expected, OnnxNetwork(onnx)(images)) <= TOLERANCE
