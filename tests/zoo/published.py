"""Published networks of torchvision and timm, with random weights and small images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from handmade import Network
from torch import nn

PUBLISHED: dict[str, Callable[[], Network]] = {}
"""Networks of both packages; building one fails with ImportError where its package is missing."""

_KEPT: list[torch.library.Library] = []


def torchvision_module(name: str) -> Any:
    """A module of torchvision. A PyTorch without CUDA lacks two operators that torchvision of the
    package index declares the gradients of: they are declared here, and never run."""
    if not hasattr(torch.ops.torchvision, "nms"):
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _KEPT[-1].define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    return importlib.import_module(name)


def _images(size: int, *, frames: int = 0) -> tuple[torch.Tensor]:
    shape = (2, 3, frames, size, size) if frames else (2, 3, size, size)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)),)


def _register(
    name: str, build: Callable[[], nn.Module], size: int, least: float, frames: int = 0
) -> None:
    def make() -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return Network(build(), _images(size, frames=frames), least)

    PUBLISHED[name] = make


def _torchvision(
    name: str,
    size: int = 64,
    least: float = 0.9,
    *,
    where: str = "",
    part: str = "",
    frames: int = 0,
    **options: Any,
) -> None:
    def build() -> nn.Module:
        models = torchvision_module(f"torchvision.models{where}")
        model = getattr(models, name)(weights=None, **options)
        return model.get_submodule(part)

    _register(f"torchvision/{name}", build, size, least, frames)


def _timm(name: str, size: int = 64, least: float = 0.9, **options: Any) -> None:
    def build() -> nn.Module:
        torchvision_module("torchvision")  # which timm imports
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    _register(f"timm/{name}", build, size, least)


# Classification

_torchvision("alexnet", num_classes=10)
_torchvision("vgg11_bn", 32, num_classes=10)
_torchvision("resnet18")
_torchvision("resnet50")
_torchvision("resnext50_32x4d")
_torchvision("wide_resnet50_2")
_torchvision("densenet121")
_torchvision("googlenet", init_weights=False)
_torchvision("inception_v3", 96, init_weights=False, aux_logits=False)
_torchvision("mobilenet_v2")
_torchvision("mobilenet_v3_large")
_torchvision("mobilenet_v3_small")
_torchvision("mnasnet1_0")
_torchvision("shufflenet_v2_x1_0")
_torchvision("squeezenet1_1")
_torchvision("efficientnet_b0")
_torchvision("efficientnet_v2_s")
_torchvision("regnet_x_400mf")
_torchvision("regnet_y_400mf")
_torchvision("convnext_tiny")
# The stream ends in layer norms, and queries, keys and values keep their sizes.
_torchvision("vit_b_16", 32, 0.6, image_size=32, num_classes=10)
# Small maps are padded to whole windows of attention.
_torchvision("swin_t", 64, 0.25)

# Segmentation, detection, video

_torchvision("fcn_resnet50", where=".segmentation", weights_backbone=None)
_torchvision("deeplabv3_resnet50", where=".segmentation", weights_backbone=None)
_torchvision("deeplabv3_mobilenet_v3_large", where=".segmentation", weights_backbone=None)
_torchvision("lraspp_mobilenet_v3_large", where=".segmentation", weights_backbone=None)
_torchvision("fasterrcnn_resnet50_fpn", where=".detection", part="backbone", weights_backbone=None)
_torchvision(
    "ssdlite320_mobilenet_v3_large",
    96,
    where=".detection",
    part="backbone",
    weights_backbone=None,
)
_torchvision("r3d_18", 32, where=".video", frames=4)


def _pyramid() -> nn.Module:
    utilities = torchvision_module("torchvision.models.detection.backbone_utils")
    return utilities.resnet_fpn_backbone(backbone_name="resnet18", weights=None)


_register("torchvision/resnet18_fpn", _pyramid, 64, 0.9)


def _maxvit() -> nn.Module:
    # The published size is bound to images of 224 pixels.
    return torchvision_module("torchvision.models.maxvit").MaxVit(
        input_size=(64, 64),
        stem_channels=32,
        partition_size=2,
        block_channels=[32, 64, 128, 256],
        block_layers=[1, 1, 1, 1],
        head_dim=16,
        stochastic_depth_prob=0.2,
        num_classes=10,
    )


_register("torchvision/maxvit", _maxvit, 64, 0.8)

# Families of timm

_timm("resnetv2_50")
_timm("seresnet50")
_timm("ecaresnet26t", least=0.8)  # gates over neighbouring channels keep the streams
_timm("res2net50_26w_4s", least=0.8)  # hard-coded splits keep the branches
_timm("resnest14d")
_timm("hrnet_w18_small")
_timm("dla34")
_timm("ese_vovnet19b_slim")
_timm("ghostnet_100")
_timm("mobileone_s0")
_timm("repvgg_a0")
_timm("regnetz_005")
_timm("eca_nfnet_l0", least=0.0)  # weights standardised over their inputs keep these
_timm("tf_efficientnetv2_b0")
_timm("mixnet_s", least=0.5)  # hard-coded splits between kernel sizes
_timm("tf_efficientnet_lite0")
_timm("mobilenetv4_conv_small")
_timm("convnextv2_atto", least=0.0)  # both the stream and what is inside is normed as a whole
_timm("edgenext_xx_small", least=0.7)  # layer norms, attention
_timm("fastvit_t8")
_timm("inception_next_atto", least=0.8)  # hard-coded splits of the stream
_timm("darknet53")
_timm("cspresnet50")
_timm("selecsls42b")
_timm("xception41", 96)
_timm("tinynet_e")
_timm("lcnet_050")
_timm("rexnet_100", least=0.8)  # hard-coded slices of the stream
_timm("hardcorenas_a")
_timm("legacy_seresnet18")
_timm("dpn48b", least=0.3)  # hard-coded slices of the stream
_timm("repghostnet_100")
_timm("efficientvit_b0", least=0.5)  # attention keeps its sizes
_timm("mnasnet_small")
_timm("skresnet18")
_timm("vgg11_bn", 32)

FAST = frozenset(
    {
        "torchvision/resnet18",
        "torchvision/mobilenet_v2",
        "torchvision/shufflenet_v2_x1_0",
        "torchvision/squeezenet1_1",
        "torchvision/lraspp_mobilenet_v3_large",
        "torchvision/resnet18_fpn",
        "timm/lcnet_050",
        "timm/legacy_seresnet18",
    }
)
"""Small ones, a construct each: these are checked every time."""
