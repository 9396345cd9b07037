"""MobileNetV2 (Sandler et al., 2018) as the paper prunes it.

A block is `expand` (1x1), `depthwise` (3x3) and `project` (1x1), each with its batch norm; the only
block of `layer1` has no `expand`. The channel units are therefore `conv1` (with
`layer1.0.depthwise`), each `layer<i>.<j>.expand` (with the depthwise convolution after it),
`layer<i>.0.project` (the stream through stage i), and `conv_last`: 25 in all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError
from dmcp.models.common import check_options, initialise

# A network needs a positive width; anything smaller gives the same 8-channel layers.
_MIN_WIDTH = 1 / 64


class _Stage(NamedTuple):
    expansion: int
    channels: int
    blocks: int
    stride: int


_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
_STAGES = (
    _Stage(expansion=1, channels=16, blocks=1, stride=1),
    _Stage(expansion=6, channels=24, blocks=2, stride=2),
    _Stage(expansion=6, channels=32, blocks=3, stride=2),
    _Stage(expansion=6, channels=64, blocks=4, stride=2),
    _Stage(expansion=6, channels=96, blocks=3, stride=1),
    _Stage(expansion=6, channels=160, blocks=3, stride=2),
    _Stage(expansion=6, channels=320, blocks=1, stride=1),
)


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, or the next one if that loses over 10 %."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """One block: expand, filter depthwise, project.

    Whether there is a skip is the caller's decision, not a comparison of channel counts: a narrow
    network keeps the skips of the full one and gains none where its widths happen to coincide.

    Args:
        in_channels: channels of the input.
        hidden: channels between expansion and projection; equal to `in_channels` if not `expands`.
        out_channels: channels of the output.
        stride: stride of the depthwise convolution.
        expands: whether the block has the 1x1 expansion.
        skip: whether the input is added to the output.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        stride: int,
        expands: bool,
        skip: bool,
    ) -> None:
        super().__init__()
        self.expands = expands
        self.skip = skip
        if expands:
            self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
            self.expand_bn = nn.BatchNorm2d(hidden)
            self.expand_relu = nn.ReLU6(inplace=True)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(hidden)
        self.depthwise_relu = nn.ReLU6(inplace=True)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] to [N, C_out, H / stride, W / stride]."""
        hidden = self.expand_relu(self.expand_bn(self.expand(x))) if self.expands else x
        hidden = self.depthwise_relu(self.depthwise_bn(self.depthwise(hidden)))
        out: Tensor = self.project_bn(self.project(hidden))
        return x + out if self.skip else out


class MobileNetV2(nn.Module):
    """See `mobilenet_v2`, whose arguments these are.

    Raises:
        ConfigError: an argument is out of range.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    layer5: nn.Sequential
    layer6: nn.Sequential
    layer7: nn.Sequential

    def __init__(
        self,
        num_classes: int = 1000,
        width: float = 1.0,
        small_images: bool = False,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_options(num_classes, width, _MIN_WIDTH, in_channels)
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout}: a number in [0, 1) is needed")
        channels = round_channels(_STEM_CHANNELS * width)
        last = round_channels(_LAST_CHANNELS * max(width, 1.0))
        self.conv1 = nn.Conv2d(in_channels, channels, 3, 1 if small_images else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU6(inplace=True)
        for index, stage in enumerate(_STAGES, start=1):
            stride = 1 if small_images and index == 2 else stage.stride
            out_channels = round_channels(stage.channels * width)
            setattr(self, f"layer{index}", _make_layer(stage, channels, out_channels, stride))
            channels = out_channels
        self.conv_last = nn.Conv2d(channels, last, 1, bias=False)
        self.bn_last = nn.BatchNorm2d(last)
        self.relu_last = nn.ReLU6(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(last, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh weights for the widths the network has now: also after pruning."""
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """[N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.layer5(x)
        x = self.layer6(x)
        x = self.layer7(x)
        x = self.relu_last(self.bn_last(self.conv_last(x)))
        x = torch.flatten(self.avgpool(x), 1)
        logits: Tensor = self.fc(self.dropout(x))
        return logits


def _make_layer(stage: _Stage, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    blocks = []
    for index in range(stage.blocks):
        first = index == 0
        blocks.append(
            InvertedResidual(
                in_channels,
                stage.expansion * in_channels,
                out_channels,
                stride=stride if first else 1,
                expands=stage.expansion > 1,
                skip=not first,
            )
        )
        in_channels = out_channels
    return nn.Sequential(*blocks)


def mobilenet_v2(
    num_classes: int = 1000,
    width: float = 1.0,
    small_images: bool = False,
    in_channels: int = 3,
    dropout: float = 0.0,
) -> MobileNetV2:
    """MobileNetV2 with fresh weights.

    Args:
        num_classes: number of logits.
        width: multiplier of every layer's channels, each rounded to a multiple of 8; a block's
            hidden channels are 6 times its already rounded input. `conv_last` has 1280 channels up
            to width 1 and grows with it above. The paper searches in the network of width 1.5.
        small_images: for images of 8 to 64 pixels: the stem and the second stage keep the
            resolution, so that the network shrinks it by 8 instead of 32.
        in_channels: channels of the images.
        dropout: probability of dropping a feature before the classifier; the paper uses none.

    Raises:
        ConfigError: an argument is out of range.
    """
    return MobileNetV2(num_classes, width, small_images, in_channels, dropout)
