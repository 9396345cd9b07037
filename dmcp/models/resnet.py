"""ResNet-18 and ResNet-50 (He et al., 2016) as the paper prunes them.

ResNet-50 is the variant with the stride in the 3x3 convolution ("v1.5"). A block runs its branch
first and its projection second, so a residual stream is named after the last convolution of its
first block. The channel units are `conv1`, the inner convolutions of each block, and one stream for
each stage: `layer<i>.0.conv3` in ResNet-50 (37 units in all) and `layer<i>.0.conv2` in ResNet-18
(12 units), whose first stage has no projection and is part of `conv1`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmcp.models.common import check_options, initialise

_STEM_CHANNELS = 64
_STAGE_CHANNELS = (64, 128, 256, 512)
# The narrowest width at which int() leaves every layer a channel.
_MIN_WIDTH = 1 / _STEM_CHANNELS


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip, which is a projection if `projects`."""

    expansion = 1

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, projects: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride) if projects else None
        self.relu2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] to [N, C_out, H / stride, W / stride]."""
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu2(out + skip)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions and a skip, which is a projection if `projects`."""

    expansion = 4

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, projects: bool = False
    ) -> None:
        super().__init__()
        inner = out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride) if projects else None
        self.relu3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] to [N, C_out, H / stride, W / stride]."""
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        skip = x if self.downsample is None else self.downsample(x)
        out = self.relu3(out + skip)
        return out


class ResNet(nn.Module):
    """Four stages of `block`; see `resnet18` and `resnet50` for the other arguments.

    Args:
        block: the kind of block.
        blocks: number of blocks of each of the four stages.

    Raises:
        ConfigError: an argument is out of range.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int = 1000,
        width: float = 1.0,
        small_images: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_options(num_classes, width, _MIN_WIDTH, in_channels)
        channels = int(_STEM_CHANNELS * width)
        if small_images:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, 1, 1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        for index, (stage, count) in enumerate(zip(_STAGE_CHANNELS, blocks, strict=True), start=1):
            out_channels = int(stage * block.expansion * width)
            stride = 1 if index == 1 else 2
            layer = _make_layer(block, count, channels, out_channels, stride)
            setattr(self, f"layer{index}", layer)
            channels = out_channels
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.initialise()

    def initialise(self) -> None:
        """Draw fresh weights for the widths the network has now: also after pruning."""
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """[N, in_channels, H, W] to logits [N, num_classes]."""
        x = self.maxpool(self.relu1(self.bn1(self.conv1(images))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def _make_layer(
    block: type[BasicBlock] | type[Bottleneck],
    count: int,
    in_channels: int,
    out_channels: int,
    stride: int,
) -> nn.Sequential:
    # From the configuration, not from channel counts, so that every width has the same skips.
    projects = stride > 1 or block.expansion > 1
    first = block(in_channels, out_channels, stride, projects)
    return nn.Sequential(first, *(block(out_channels, out_channels) for _ in range(count - 1)))


def resnet18(
    num_classes: int = 1000, width: float = 1.0, small_images: bool = False, in_channels: int = 3
) -> ResNet:
    """ResNet-18 with fresh weights.

    Args:
        num_classes: number of logits.
        width: multiplier of every layer's channels, rounded down; at least 1/64.
        small_images: for images of 8 to 64 pixels: a 3x3 stem with stride 1 and no max-pooling, so
            that the network shrinks the resolution by 8 instead of 32.
        in_channels: channels of the images.

    Raises:
        ConfigError: an argument is out of range.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes, width, small_images, in_channels)


def resnet50(
    num_classes: int = 1000, width: float = 1.0, small_images: bool = False, in_channels: int = 3
) -> ResNet:
    """ResNet-50 with the stride in the 3x3 convolutions, with fresh weights.

    Args:
        num_classes: number of logits.
        width: multiplier of every layer's channels, rounded down; at least 1/64.
        small_images: for images of 8 to 64 pixels: a 3x3 stem with stride 1 and no max-pooling, so
            that the network shrinks the resolution by 8 instead of 32.
        in_channels: channels of the images.

    Raises:
        ConfigError: an argument is out of range.
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width, small_images, in_channels)
