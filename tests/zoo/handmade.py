"""Small hand-made networks, one awkward construct each."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass
class Network:
    """A network and one batch of its inputs.

    Attributes:
        model: the network.
        inputs: its positional inputs, two images each.
        least: the share of multiply–accumulates that must lie in layers whose cost a search can
            change.
        fixed: units that must stay unsearchable, because no smaller network is equal.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    least: float = 0.9
    fixed: tuple[str, ...] = ()


ZOO: dict[str, Callable[[], Network]] = {}
"""Networks that can be traced."""

REFUSED: dict[str, Callable[[], Network]] = {}
"""Networks whose control flow depends on values."""

IMAGES = (2, 3, 8, 8)


def zoo(
    *shapes: tuple[int, ...],
    least: float = 0.9,
    fixed: tuple[str, ...] = (),
    into: dict[str, Callable[[], Network]] = ZOO,
):
    """Register a class under its name; ``shapes`` are those of its inputs."""

    def register(kind):
        def make() -> Network:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                inputs = tuple(torch.randn(shape) for shape in shapes or (IMAGES,))
                return Network(kind(), inputs, least, fixed)

        assert kind.__name__ not in into, kind
        into[kind.__name__] = make
        return kind

    return register


class Conv(nn.Sequential):
    """Convolution, batch norm and (unless ``act`` is None) an activation."""

    def __init__(self, inputs, outputs, kernel=3, act=nn.ReLU, **options):
        options = {"padding": kernel // 2, "bias": False} | options
        super().__init__(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))
        if act is not None:
            self.append(act())


class Head(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


class Mapped(nn.Module):
    """Two convolutions with `between` in the middle: what most of these networks need."""

    def __init__(self, before=16, after=16, act=nn.ReLU):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, before, act=act)
        self.last, self.head = Conv(after, 12), Head(12)

    def between(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.head(self.last(self.between(self.body(self.stem(x)))))


# Plain chains and residual streams


@zoo()
class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(Conv(3, 8), Conv(8, 12), Head(12))


@zoo()
class WithoutNorm(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            Head(12),
        )


@zoo()
class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = Conv(3, 8), Conv(8, 6), Conv(6, 8, act=None)
        self.head = Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.second(self.first(x))))


@zoo()
class ProjectedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first = Conv(3, 8), Conv(8, 10, stride=2)
        self.second, self.skip = Conv(10, 12, act=None), Conv(8, 12, 1, act=None, stride=2)
        self.head = Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.second(self.first(x)) + self.skip(x)))


@zoo()
class Bottlenecks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.skip = Conv(3, 8), Conv(8, 24, 1, act=None)
        self.blocks = nn.ModuleList(
            nn.Sequential(Conv(c, 6, 1), Conv(6, 6), Conv(6, 24, 1, act=None)) for c in (8, 24, 24)
        )
        self.head = Head(24)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.skip(x) + self.blocks[0](x))
        for block in self.blocks[1:]:
            x = F.relu(x + block(x))
        return self.head(x)


@zoo()
class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm3, self.head = nn.BatchNorm2d(8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x)))


@zoo()
class BothEnds(nn.Module):
    """A convolution that reads and writes one unit."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = Conv(3, 8), Conv(8, 8, act=None), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.conv(x))


@zoo()
class RepVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.wide = Conv(3, 8), Conv(8, 8, act=None)
        self.narrow, self.norm = Conv(8, 8, 1, act=None), nn.BatchNorm2d(8)
        self.last, self.head = Conv(8, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(F.relu(self.wide(x) + self.narrow(x) + self.norm(x))))


@zoo()
class ScaledResidual(nn.Module):
    """A learned scalar, zero at first (ReZero)."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = Conv(3, 8), Conv(8, 6), Conv(6, 8, act=None)
        self.scale, self.head = nn.Parameter(torch.zeros(())), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.scale * self.second(self.first(x)))


@zoo()
class LayerScale(nn.Module):
    """A raw parameter that scales the channels of a branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = Conv(3, 8), Conv(8, 6), Conv(6, 8, act=None)
        self.gamma, self.head = nn.Parameter(torch.zeros(8, 1, 1)), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.gamma * self.second(self.first(x)))


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.8) / 0.8


@zoo()
class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = Conv(3, 8), Conv(8, 6), Conv(6, 8, act=None)
        self.drop, self.head = DropPath(), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.drop(self.second(self.first(x)))))


# Kinds of convolution


@zoo()
class Grouped(nn.Sequential):
    def __init__(self):
        super().__init__(Conv(3, 16), Conv(16, 24, groups=4), Conv(24, 12, 1), Head(12))


@zoo()
class MixedGroups(nn.Sequential):
    def __init__(self):
        super().__init__(
            Conv(3, 16),
            Conv(16, 24, groups=2),
            Conv(24, 48, groups=8),
            Conv(48, 24, 1, groups=3),
            Head(24),
        )


@zoo()
class OneOutputPerGroup(nn.Sequential):
    """As many groups as outputs, but several inputs in each: not depthwise."""

    def __init__(self):
        super().__init__(Conv(3, 24), Conv(24, 6, groups=6), Conv(6, 12), Head(12))


@zoo()
class GroupedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = Conv(3, 16), Conv(16, 16, act=None, groups=4), Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.conv(x)))


@zoo()
class ResNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 16)
        self.branch = nn.Sequential(
            Conv(16, 24, 1), Conv(24, 24, groups=6), Conv(24, 16, 1, act=None)
        )
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(x + self.branch(x)))


@zoo()
class Depthwise(nn.Sequential):
    def __init__(self):
        super().__init__(Conv(3, 8), Conv(8, 8, groups=8), Conv(8, 12, 1), Head(12))


@zoo()
class DepthwiseMultiplier(nn.Sequential):
    def __init__(self):
        super().__init__(Conv(3, 6), Conv(6, 18, groups=6), Conv(18, 12, 1), Head(12))


@zoo(least=0.7)  # what the groups of the images cost stays
class DepthwiseOnImages(nn.Sequential):
    def __init__(self):
        super().__init__(Conv(3, 12, groups=3), Conv(12, 24, 1), Head(24))


@zoo()
class InvertedResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.expand = Conv(3, 8, act=nn.ReLU6), Conv(8, 24, 1, act=nn.ReLU6)
        self.depth = Conv(24, 24, act=nn.ReLU6, groups=24)
        self.project, self.head = Conv(24, 8, 1, act=None), Head(8)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.project(self.depth(self.expand(x))))


@zoo()
class Transposed(nn.Sequential):
    def __init__(self):
        super().__init__(
            Conv(3, 8, stride=2),
            nn.ConvTranspose2d(8, 12, 2, stride=2),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
            nn.BatchNorm2d(6),
            Conv(6, 10),
            Head(10),
        )


@zoo()
class TransposedGrouped(nn.Sequential):
    def __init__(self):
        super().__init__(
            Conv(3, 16),
            nn.ConvTranspose2d(16, 24, 2, stride=2, groups=4),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            Conv(24, 12, 1),
            Head(12),
        )


@zoo()
class TransposedDepthwise(nn.Sequential):
    """Also with two outputs per input."""

    def __init__(self):
        super().__init__(
            Conv(3, 8),
            nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 16, 3, padding=1, groups=8),
            Conv(16, 12, 1),
            Head(12),
        )


@zoo((2, 3, 24))
class OneDimension(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv1d(3, 8, 5, padding=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 12, 3, dilation=2),
            nn.ReLU(),
            nn.ConvTranspose1d(12, 6, 2, stride=2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )


@zoo((2, 3, 4, 8, 8))
class ThreeDimensions(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv3d(3, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 8, 3, padding=1, groups=8),
            nn.Conv3d(8, 12, (1, 3, 3)),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(12, 5),
        )


@zoo()
class SeparableIn2Plus1(nn.Sequential):
    """Different kernels per dimension, strides and dilation."""

    def __init__(self):
        super().__init__(
            Conv(3, 8, stride=2),
            nn.Conv2d(8, 12, (1, 5), padding=(0, 2), bias=False),
            nn.Conv2d(12, 10, (5, 1), padding=(2, 0), dilation=1),
            nn.ReLU(),
            Conv(10, 14, padding=2, dilation=2),
            Head(14),
        )


@zoo((2, 24))
class Perceptron(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(24, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Linear(16, 12, bias=False),
            nn.GELU(),
            nn.Linear(12, 5),
        )


class SamePaddingConv(nn.Conv2d):
    def forward(self, x):
        height, width = x.shape[-2:]
        stride, kernel = self.stride[0], self.kernel_size[0]
        down = max((-(height // -stride) - 1) * stride + kernel - height, 0)
        right = max((-(width // -stride) - 1) * stride + kernel - width, 0)
        x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@zoo()
class SamePadding(nn.Sequential):
    def __init__(self):
        super().__init__(
            SamePaddingConv(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            SamePaddingConv(8, 8, 3, groups=8),
            SamePaddingConv(8, 12, 1),
            nn.ReLU(),
            Head(12),
        )


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / (var + 1e-5).sqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


# What such a convolution reads stays whole: its weights are standardised over all inputs.
@zoo(fixed=("stem.0",))
class WeightStandardised(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = Conv(3, 8), StandardisedConv(8, 16, 3, padding=1)
        self.norm, self.last, self.head = nn.BatchNorm2d(16), Conv(16, 12), Head(12)

    def forward(self, x):
        return self.head(self.last(F.relu(self.norm(self.conv(self.stem(x))))))


class FunctionalConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / 5)
        self.offset = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.conv2d(x, self.kernels, self.offset, padding=1)


@zoo()
class RawConvolution(nn.Sequential):
    def __init__(self):
        super().__init__(
            FunctionalConv(3, 8), nn.ReLU(), FunctionalConv(8, 12), nn.ReLU(), Head(12)
        )


# The norm runs over all inputs: what the convolution reads stays whole.
@zoo(fixed=("stem.0",))
class WeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 8)
        self.conv = parametrizations.weight_norm(nn.Conv2d(8, 16, 3, padding=1))
        self.last, self.head = Conv(16, 12), Head(12)

    def forward(self, x):
        return self.head(self.last(F.relu(self.conv(self.stem(x)))))


# As above; the vectors behind the singular value make it hard to follow the outputs too.
@zoo(least=0.5, fixed=("stem.0",))
class SpectralNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 8)
        self.conv = parametrizations.spectral_norm(nn.Conv2d(8, 16, 3, padding=1))
        self.last, self.head = Conv(16, 12), Head(12)

    def forward(self, x):
        return self.head(self.last(F.relu(self.conv(self.stem(x)))))


# Norms


@zoo()
class NormWithoutAffine(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12, affine=False),
            nn.ReLU(),
            Head(12),
        )


@zoo()
class NormWithoutStatistics(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.ReLU(),
            Conv(8, 12),
            nn.BatchNorm2d(12, affine=False, track_running_stats=False),
            Head(12),
        )


@zoo()
class DenseBlock(nn.Module):
    """Several norms read growing concatenations of one stream."""

    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 8)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(8 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm, self.transition = nn.BatchNorm2d(20), Conv(20, 10, 1)
        self.head = Head(10)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.relu(self.norm(torch.cat(features, 1)))
        return self.head(F.avg_pool2d(self.transition(x), 2))


@zoo()
class GroupNorm(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 12, 3, padding=1),
            nn.GroupNorm(12, 12),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, padding=1),
            nn.ReLU(),
            nn.GroupNorm(2, 10, affine=False),
            Head(10),
        )


@zoo(fixed=("body",))
class GroupNormOverAll(nn.Module):
    """One group: its statistics run over all channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.last, self.head = nn.GroupNorm(1, 16), Conv(16, 12), Head(12)

    def forward(self, x):
        return self.head(self.last(F.relu(self.norm(self.body(self.stem(x))))))


@zoo()
class InstanceNorm(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.InstanceNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.InstanceNorm2d(12, affine=True),
            nn.ReLU(),
            nn.Conv2d(12, 10, 3, padding=1),
            nn.InstanceNorm2d(10, affine=True, track_running_stats=True),
            nn.ReLU(),
            Head(10),
        )


@zoo()
class HalfInstanceNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = Conv(3, 8), nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.last, self.head = Conv(16, 12), Head(12)

    def forward(self, x):
        left, right = self.conv(self.stem(x)).chunk(2, 1)
        return self.head(self.last(F.relu(torch.cat([self.norm(left), right], 1))))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.depth = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.project = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        y = self.norm(self.depth(x).permute(0, 2, 3, 1))
        y = self.gamma * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


@zoo(least=0.8, fixed=("stem",))  # layer norms keep the stream whole
class ConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.head = Head(8)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


@zoo(fixed=("body.0",))
class LocalResponse(Mapped):
    """Every channel is divided by its neighbours, which change."""

    def between(self, x):
        return F.local_response_norm(x, 5, alpha=0.5)


@zoo()
class Normalised(Mapped):
    """The length over all channels: a dropped one adds nothing to it."""

    def between(self, x):
        return F.normalize(x, dim=1)


# Gates


@zoo()
class SqueezeExciteConv(Mapped):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def between(self, x):
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return x * torch.sigmoid(self.excite(gate))


@zoo()
class SqueezeExciteLinear(Mapped):
    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(16, 4, bias=False), nn.ReLU(), nn.Linear(4, 16, bias=False), nn.Sigmoid()
        )

    def between(self, x):
        b, c, _, _ = x.shape
        y = F.adaptive_avg_pool2d(x, 1).view(b, c)
        return x * self.gate(y).view(b, c, 1, 1).expand_as(x)


# The small kernel slides over neighbouring channels, whose distance changes.
@zoo(fixed=("body.0",))
class EfficientChannelAttention(Mapped):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def between(self, x):
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * gate.sigmoid()[:, :, None, None]


@zoo()
class SpatialGate(Mapped):
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(16, 1, 3, padding=1)

    def between(self, x):
        return x * torch.sigmoid(self.gate(x))


@zoo(fixed=("body.0",))
class SpatialAttention(Mapped):
    """A gate from the mean and the maximum over all channels (CBAM)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 3, padding=1)

    def between(self, x):
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.gate(both))


@zoo()
class GatingProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.value, self.gate = Conv(3, 8), Conv(8, 16, act=None), Conv(8, 16, act=None)
        self.last, self.head = Conv(16, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(self.value(x) * torch.sigmoid(self.gate(x))))


@zoo()
class GatedByChunk(Mapped):
    def __init__(self):
        super().__init__(before=24, after=12, act=None)

    def between(self, x):
        value, gate = x.chunk(2, dim=1)
        return F.gelu(gate) * value


@zoo()
class GatedLinearUnit(Mapped):
    def __init__(self):
        super().__init__(before=24, after=12, act=None)

    def between(self, x):
        return F.glu(x, dim=1)


@zoo()
class SelectiveKernel(nn.Module):
    """A softmax over branches, not over channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 12), Conv(8, 12, 1)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.ModuleList(nn.Conv2d(4, 12, 1) for _ in range(2))
        self.last, self.head = Conv(12, 10), Head(10)

    def forward(self, x):
        x = self.stem(x)
        branches = torch.stack([self.left(x), self.right(x)], 1)
        gate = F.relu(self.squeeze(branches.sum(1).mean((2, 3), keepdim=True)))
        gates = torch.stack([excite(gate) for excite in self.excite], 1).softmax(1)
        return self.head(self.last((branches * gates).sum(1)))


@zoo()
class SplitAttention(nn.Module):
    """ResNeSt: the two halves of a grouped convolution compete."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = Conv(3, 8), Conv(8, 24, groups=2)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 24, 1)
        self.last, self.head = Conv(12, 10), Head(10)

    def forward(self, x):
        x = self.conv(self.stem(x))
        b, c, h, w = x.shape
        halves = x.reshape(b, 2, c // 2, h, w)
        gate = self.excite(F.relu(self.squeeze(halves.sum(1).mean((2, 3), keepdim=True))))
        gates = gate.reshape(b, 2, c // 2, 1, 1).softmax(1)
        return self.head(self.last((halves * gates).sum(1)))


@zoo(IMAGES, (2, 6))
class Modulated(nn.Module):
    """A second input scales and shifts the channels (FiLM)."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.condition = Conv(3, 8), Conv(8, 12, act=None), nn.Linear(6, 24)
        self.last, self.head = Conv(12, 10), Head(10)

    def forward(self, x, y):
        scale, shift = self.condition(y)[:, :, None, None].chunk(2, 1)
        return self.head(self.last(F.relu(self.conv(self.stem(x)) * scale + shift)))


# Concatenations, splits and slices


@zoo()
class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 6), Conv(8, 4)
        self.last, self.head = Conv(21, 10), Head(10)

    def forward(self, x):
        stem = self.stem(x)
        parts = [self.right(stem), x, stem, self.left(stem)]
        return self.head(self.last(torch.cat(parts, 1)))


@zoo()
class ConcatAdd(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 6), Conv(8, 10)
        self.wide, self.last, self.head = Conv(8, 16), Conv(16, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        both = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(self.last(both + self.wide(x)))


@zoo()
class Interleaved(nn.Module):
    """Every channel of both convolutions carries every second one of their sum."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = Conv(3, 8), Conv(3, 4), Conv(12, 6)
        self.head = Head(6)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        both = torch.cat([left, right], 1) + torch.cat([right, left], 1)
        return self.head(self.last(both))


@zoo()
class ConcatTwice(Mapped):
    def __init__(self):
        super().__init__(before=10, after=20)

    def between(self, x):
        return torch.cat([x, x], 1)


@zoo()
class ConcatenatedReLU(Mapped):
    def __init__(self):
        super().__init__(before=10, after=20, act=None)

    def between(self, x):
        return F.relu(torch.cat([x, -x], 1))


@zoo()
class CoordConv(Mapped):
    def __init__(self):
        super().__init__(before=16, after=18)

    def between(self, x):
        b, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(b, 1, h, w)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(b, 1, h, w)
        return torch.cat([x, rows, columns], 1)


@zoo(least=0.4, fixed=("body.0",))
class SplitSizes(Mapped):
    """Hard-coded sizes: the channels that are split stay, and what is added to a part."""

    def __init__(self):
        super().__init__(before=64, after=24)
        self.middle = Conv(40, 24)

    def between(self, x):
        left, right = x.split([24, 40], dim=1)
        return left + self.middle(right)


@zoo(fixed=("open.0",))
class SplitNumber(nn.Module):
    """Hard-coded as well (Res2Net's hierarchy): only the last part may shrink."""

    def __init__(self):
        super().__init__()
        self.stem, self.open = Conv(3, 8), Conv(8, 24, 1)
        self.convs = nn.ModuleList(Conv(8, 8) for _ in range(2))
        self.close, self.head = Conv(24, 12, 1), Head(12)

    def forward(self, x):
        first, second, third = self.open(self.stem(x)).split(8, 1)
        second = self.convs[0](second)
        third = self.convs[1](third + second)
        return self.head(self.close(torch.cat([first, second, third], 1)))


class CrossStage(nn.Module):
    """YOLO's C2f neck."""

    def __init__(self, shortcut):
        super().__init__()
        self.shortcut = shortcut
        self.stem, self.open = Conv(3, 8), Conv(8, 24, 1)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(12, 6), Conv(6, 12)) for _ in range(2))
        self.close, self.head = Conv(48, 16, 1), Head(16)

    def forward(self, x):
        parts = list(self.open(self.stem(x)).chunk(2, 1))
        for block in self.blocks:
            y = block(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        return self.head(self.close(torch.cat(parts, 1)))


@zoo()
class CrossStageAdding(CrossStage):
    def __init__(self):
        super().__init__(shortcut=True)


@zoo()
class CrossStagePlain(CrossStage):
    def __init__(self):
        super().__init__(shortcut=False)


@zoo()
class SliceHalves(Mapped):
    """A hard-coded slice stays, the open-ended one after it need not."""

    def __init__(self):
        super().__init__(before=40, after=28)
        self.small = Conv(16, 4)

    def between(self, x):
        return torch.cat([self.small(x[:, :16]), x[:, 16:]], 1)


@zoo()
class StridedSlice(Mapped):
    def __init__(self):
        super().__init__(before=24, after=12)

    def between(self, x):
        return x[:, ::2] + x[:, 1::2]


@zoo()
class SelectChannel(Mapped):
    """One channel, by its number, gates all of them."""

    def between(self, x):
        return x * torch.sigmoid(x[:, 5].unsqueeze(1))


@zoo()
class UnevenChunks(Mapped):
    """Seven, seven and six channels."""

    def __init__(self):
        super().__init__(before=20, after=20)

    def between(self, x):
        first, second, third = x.chunk(3, 1)
        return torch.cat([third, first, second], 1)


class PadShortcut(nn.Module):
    """The ResNet of CIFAR, option A: zeros around the channels of the stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = Conv(3, 8), Conv(8, 12, stride=2)
        self.second, self.head = Conv(12, 16, act=None), Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.second(self.first(x)) + self.shortcut(x[:, :, ::2, ::2])))


@zoo()
class PadAround(PadShortcut):
    def shortcut(self, x):
        return F.pad(x, (0, 0, 0, 0, 4, 4))


@zoo()
class PadBehind(PadShortcut):
    def shortcut(self, x):
        return torch.cat([x, torch.zeros_like(x)], 1)


@zoo()
class OctaveConv(nn.Module):
    """Two streams of different resolution that exchange channels."""

    def __init__(self):
        super().__init__()
        self.high, self.low = Conv(3, 12), Conv(3, 6)
        self.high_high, self.high_low = Conv(12, 10, act=None), Conv(12, 7, act=None)
        self.low_high, self.low_low = Conv(6, 10, act=None), Conv(6, 7, act=None)
        self.head = Head(17)

    def forward(self, x):
        high, low = self.high(x), self.low(F.avg_pool2d(x, 2))
        more = F.interpolate(self.low_high(low), scale_factor=2.0)
        both = self.high_low(F.avg_pool2d(high, 2)) + self.low_low(low)
        high, low = F.relu(self.high_high(high) + more), F.relu(both)
        return self.head(torch.cat([F.max_pool2d(high, 2), low], 1))


# Shapes


@zoo()
class ViewFlatten(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 12), nn.Linear(48, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.body(self.stem(x)), 2)
        return self.head(x.view(x.size(0), -1))


@zoo(fixed=("body.0",))
class HardView(nn.Module):
    """A hard-coded size keeps the last features whole."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 12), nn.Linear(48, 5)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.body(self.stem(x)), 2)
        return self.head(x.view(-1, 48))


@zoo()
class FlattenedMap(nn.Sequential):
    def __init__(self):
        super().__init__(
            Conv(3, 8),
            Conv(8, 6, stride=4),
            nn.Flatten(),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 5),
        )


@zoo()
class PermutedLinear(nn.Module):
    """Linear layers over the channels of every pixel, then a flatten with channels last."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = Conv(3, 8), nn.Linear(8, 12), nn.Linear(48, 5)

    def forward(self, x):
        x = F.relu(self.mix(self.stem(x).permute(0, 2, 3, 1)))
        x = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        return self.last(x.reshape(x.shape[0], -1))


@zoo()
class Unflattened(nn.Sequential):
    """A linear layer whose outputs become maps: the unflatten's sizes are hard-coded."""

    def __init__(self):
        super().__init__(
            Conv(3, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 48),
            nn.Unflatten(1, (12, 2, 2)),
            Conv(12, 10),
            Head(10),
        )


@zoo()
class ShuffleByViews(Mapped):
    def __init__(self):
        super().__init__(before=24, after=24)
        self.grouped = Conv(24, 24, groups=3)

    def between(self, x):
        x = self.grouped(x)
        b, c, h, w = x.shape
        return x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)


@zoo()
class ShuffleModule(Mapped):
    def __init__(self):
        super().__init__(before=27, after=27)
        self.shuffle, self.grouped = nn.ChannelShuffle(3), Conv(27, 27, groups=3)

    def between(self, x):
        return self.grouped(self.shuffle(x))


@zoo()
class ShuffleNetUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 16)
        self.branches = nn.ModuleList(
            nn.Sequential(Conv(8, 8, 1), Conv(8, 8, act=None, groups=8), Conv(8, 8, 1))
            for _ in range(2)
        )
        self.last, self.head = Conv(16, 12, 1), Head(12)

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            left, right = x.chunk(2, dim=1)
            x = torch.cat([left, branch(right)], 1)
            b, c, h, w = x.size()
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        return self.head(self.last(x))


@zoo()
class PixelShuffle(Mapped):
    def __init__(self):
        super().__init__(before=24, after=6)

    def between(self, x):
        return F.pixel_shuffle(x, 2)


@zoo()
class PixelUnshuffle(Mapped):
    def __init__(self):
        super().__init__(before=6, after=24)

    def between(self, x):
        return F.pixel_unshuffle(x, 2)


@zoo()
class PixelShuffleByViews(Mapped):
    def __init__(self):
        super().__init__(before=24, after=6)

    def between(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        return x.reshape(b, c // 4, 2 * h, 2 * w)


@zoo()
class DepthToSpace(Mapped):
    """As TensorFlow orders it: the channel of the result runs fastest."""

    def __init__(self):
        super().__init__(before=24, after=6)

    def between(self, x):
        b, c, h, w = x.shape
        x = x.view(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return x.reshape(b, c // 4, 2 * h, 2 * w)


@zoo()
class Focus(Mapped):
    """Space to depth by strided slices."""

    def __init__(self):
        super().__init__(before=6, after=24)

    def between(self, x):
        corners = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return torch.cat(corners, 1)


@zoo()
class PatchMerging(nn.Module):
    """Swin's: four neighbours side by side, channels last, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.merge, self.head = Conv(3, 8), nn.Linear(32, 12, bias=False), Head(12)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.head(F.relu(self.merge(torch.cat(corners, -1)).permute(0, 3, 1, 2)))


@zoo()
class Unfolded(Mapped):
    """im2col: nine values of every channel side by side."""

    def __init__(self):
        super().__init__(before=8, after=72)

    def between(self, x):
        b, _, h, w = x.shape
        return F.unfold(x, 3, padding=1).view(b, -1, h, w)


@zoo()
class StackView(nn.Module):
    """The channels of two convolutions take turns."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 10), Conv(8, 10)
        self.last, self.head = Conv(20, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        both = torch.stack([self.left(x), self.right(x)], 2).view(b, -1, h, w)
        return self.head(self.last(both))


@zoo()
class RepeatInterleave(Mapped):
    def __init__(self):
        super().__init__(before=8, after=16)

    def between(self, x):
        return x.repeat_interleave(2, dim=1)


@zoo()
class Repeat(Mapped):
    def __init__(self):
        super().__init__(before=8, after=16)

    def between(self, x):
        return x.repeat(1, 2, 1, 1)


@zoo()
class RollChannels(Mapped):
    """The last channel becomes the first."""

    def between(self, x):
        return x.roll(1, dims=1)


@zoo()
class FlipChannels(Mapped):
    def between(self, x):
        return x.flip(1)


@zoo()
class IndexChannels(Mapped):
    """Channels by their numbers, which a smaller network does not have."""

    def __init__(self):
        super().__init__(before=16, after=8)

    def between(self, x):
        return x[:, [14, 2, 3, 9, 0, 5, 11, 7]]


@zoo()
class Maxout(Mapped):
    def __init__(self):
        super().__init__(before=24, after=12, act=None)

    def between(self, x):
        b, c, h, w = x.shape
        return x.view(b, c // 2, 2, h, w).amax(2)


# Resolution


@zoo()
class Poolings(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.last = Conv(3, 8), nn.BatchNorm2d(8), Conv(8, 12)
        self.pools = nn.ModuleList(
            (
                nn.MaxPool2d(3, 2, ceil_mode=True),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                nn.LPPool2d(2, 2),
                nn.AdaptiveMaxPool2d(4),
                nn.AdaptiveAvgPool2d((4, 4)),
            )
        )
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.last(self.norm(sum(pool(x) for pool in self.pools)))
        return self.head(torch.cat([x.mean((2, 3)), x.flatten(2).amax(-1)], 1))


@zoo()
class Interpolations(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.last = Conv(3, 8), Conv(8, 12), Conv(12, 10)
        self.up, self.head = nn.Upsample(scale_factor=2, mode="nearest"), Head(10)

    def forward(self, x):
        x = self.up(self.body(self.stem(x)))
        x = F.interpolate(x, size=(6, 6), mode="bilinear", align_corners=False)
        return self.head(F.interpolate(self.last(x), size=8, mode="bicubic"))


@zoo()
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Conv(3, 8), Conv(8, 12), Conv(12, 16)
        self.up1, self.up2 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.join1, self.join2, self.out = Conv(24, 12), Conv(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        first = self.first(x)
        second = self.second(F.max_pool2d(first, 2))
        x = self.up1(self.third(F.max_pool2d(second, 2)))
        x = self.up2(self.join1(torch.cat([second, x], 1)))
        return self.out(self.join2(torch.cat([first, x], 1)))


@zoo()
class FeaturePyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList((Conv(3, 8), Conv(8, 12, stride=2), Conv(12, 16, stride=2)))
        self.laterals = nn.ModuleList(nn.Conv2d(c, 10, 1) for c in (8, 12, 16))
        self.outputs = nn.ModuleList(nn.Conv2d(10, 6, 3, padding=1) for _ in range(3))

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        for i in (1, 0):
            larger = F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
            levels[i] = levels[i] + larger
        return tuple(output(level) for output, level in zip(self.outputs, levels, strict=True))


@zoo()
class WeightedFusion(nn.Module):
    """BiFPN: learned weights of the inputs, normalised."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 12), Conv(8, 12, stride=2)
        self.weights, self.last, self.head = nn.Parameter(torch.ones(2)), Conv(12, 10), Head(10)

    def forward(self, x):
        x = self.stem(x)
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        right = F.interpolate(self.right(x), scale_factor=2)
        return self.head(self.last(weights[0] * self.left(x) + weights[1] * right))


@zoo()
class FullyConvolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8, stride=2), Conv(8, 16, stride=2)
        self.head = nn.Sequential(Conv(16, 6), nn.Dropout(0.1), nn.Conv2d(6, 4, 1))

    def forward(self, x):
        size = x.shape[-2:]
        x = self.head(self.body(self.stem(x)))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@zoo()
class AtrousPyramid(nn.Module):
    """DeepLab's head: dilated branches, and one of a single pixel."""

    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 16)
        self.branches = nn.ModuleList(
            (Conv(16, 6, 1), Conv(16, 6, dilation=2, padding=2), Conv(16, 6, dilation=3, padding=3))
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), Conv(16, 6, 1))
        self.project = nn.Sequential(Conv(24, 10, 1), nn.Dropout(0.5), nn.Conv2d(10, 4, 1))

    def forward(self, x):
        x = self.stem(x)
        pooled = F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear")
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))


# Well-known blocks


@zoo()
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 16)
        self.one, self.three = Conv(16, 6, 1), nn.Sequential(Conv(16, 4, 1), Conv(4, 8))
        self.five = nn.Sequential(Conv(16, 3, 1), Conv(3, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Conv(16, 5, 1))
        self.last, self.head = Conv(23, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(
            self.last(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1))
        )


@zoo()
class Ghost(Mapped):
    """Half of the channels are cheap copies of the others; the slice keeps all of them."""

    def __init__(self):
        super().__init__(before=8, after=12)
        self.primary, self.cheap, self.outputs = Conv(8, 6, 1), Conv(6, 6, groups=6), 12

    def between(self, x):
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.outputs]


@zoo()
class Fire(Mapped):
    def __init__(self):
        super().__init__(before=16, after=16)
        self.squeeze, self.one, self.three = Conv(16, 6, 1), Conv(6, 8, 1), Conv(6, 8)

    def between(self, x):
        x = self.squeeze(x)
        return torch.cat([self.one(x), self.three(x)], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, squeezed, gate):
        super().__init__()
        self.squeeze, self.excite = (
            nn.Conv2d(channels, squeezed, 1),
            nn.Conv2d(squeezed, channels, 1),
        )
        self.gate = gate()

    def forward(self, x):
        y = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)), inplace=True)
        return x * self.gate(self.excite(y))


@zoo()
class MobileNetV3(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Conv(3, 8, act=nn.Hardswish)
        self.branch = nn.Sequential(
            Conv(8, 24, 1, act=nn.Hardswish),
            Conv(24, 24, 5, act=nn.Hardswish, groups=24),
            SqueezeExcite(24, 8, nn.Hardsigmoid),
            Conv(24, 8, 1, act=None),
        )
        self.last, self.head = Conv(8, 12, 1, act=nn.Hardswish), Head(12)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(x + self.branch(x)))


@zoo()
class RegNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.skip = Conv(3, 8), Conv(8, 16, 1, act=None, stride=2)
        self.branch = nn.Sequential(
            Conv(8, 16, 1),
            Conv(16, 16, stride=2, groups=4),
            SqueezeExcite(16, 4, nn.Sigmoid),
            Conv(16, 16, 1, act=None),
        )
        self.head = Head(16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.skip(x) + self.branch(x)))


# Modules and parameters that are used more than once, or never


@zoo()
class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = Conv(3, 8), Conv(8, 8), Conv(8, 12)
        self.head = Head(12)

    def forward(self, x):
        x = F.max_pool2d(self.block(self.stem(x)), 2)
        return self.head(self.last(self.block(x)))


@zoo()
class SharedHead(nn.Module):
    """One head reads two maps; its norms are not shared."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Conv(3, 8), Conv(8, 12, stride=2)
        self.laterals = nn.ModuleList((Conv(8, 10, 1), Conv(12, 10, 1)))
        self.tower = nn.Conv2d(10, 14, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(14) for _ in range(2))
        self.out = nn.Conv2d(14, 4, 1)

    def forward(self, x):
        first = self.first(x)
        maps = zip(self.laterals, (first, self.second(first)), self.norms, strict=True)
        return [self.out(F.relu(norm(self.tower(lateral(x))))) for lateral, x, norm in maps]


@zoo()
class TiedParameter(nn.Module):
    """Two convolutions, one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = Conv(3, 8), Conv(8, 12)
        self.first, self.second = Conv(8, 8), Conv(8, 8)
        self.second[0].weight = self.first[0].weight
        self.head = Head(12)

    def forward(self, x):
        return self.head(self.last(self.second(self.first(self.stem(x)))))


@zoo((2, 24))
class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.offset = nn.Linear(24, 16), nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t(), self.offset)


@zoo()
class UnusedParameters(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 12), Head(12)
        self.unused, self.extra = nn.Conv2d(8, 8, 1), nn.Parameter(torch.zeros(7))

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


@zoo()
class AuxiliaryHead(nn.Module):
    """In training there is a second output."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 12), Head(12)
        self.auxiliary = nn.Sequential(Conv(8, 6), Head(6))

    def forward(self, x):
        x = self.stem(x)
        logits = self.head(self.body(x))
        return (logits, self.auxiliary(x)) if self.training else logits


@zoo()
class BufferScale(Mapped):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 16, 1, 1))

    def between(self, x):
        return x * self.scale


@zoo()
class PositionalEmbedding(Mapped):
    """A learned map is added to the features."""

    def __init__(self):
        super().__init__(act=None)
        self.position = nn.Parameter(torch.zeros(1, 16, 8, 8))

    def between(self, x):
        return F.gelu(x + self.position)


# Products of tensors, attention, recurrence


@zoo()
class EinsumChannels(Mapped):
    def __init__(self):
        super().__init__(before=16, after=10)
        self.kernel = nn.Parameter(torch.randn(10, 16) / 4)

    def between(self, x):
        return F.relu(torch.einsum("nchw,oc->nohw", x, self.kernel))


@zoo()
class BilinearPooling(nn.Module):
    """The last layer reads every pair of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = Conv(3, 8), Conv(8, 6), Conv(8, 7)
        self.head = nn.Linear(42, 5)

    def forward(self, x):
        x = self.stem(x)
        left, right = self.left(x).flatten(2), self.right(x).flatten(2)
        return self.head((left @ right.transpose(1, 2)).flatten(1))


@zoo()
class NonLocal(nn.Module):
    """Attention between pixels: queries and keys shrink together, the values with the output."""

    def __init__(self):
        super().__init__()
        self.stem, self.query, self.key = Conv(3, 16), nn.Conv2d(16, 6, 1), nn.Conv2d(16, 6, 1)
        self.value, self.out = nn.Conv2d(16, 8, 1), Conv(8, 16, 1, act=None)
        self.last, self.head = Conv(16, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        b, _, h, w = x.shape
        query, key = self.query(x).view(b, -1, h * w), self.key(x).view(b, -1, h * w)
        value = self.value(x).view(b, -1, h * w)
        attention = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        y = torch.bmm(value, attention.transpose(1, 2)).view(b, -1, h, w)
        return self.head(self.last(x + self.out(y)))


# The attention's own sizes are built in, and so are those of the stream that enters it.
@zoo(least=0.6)
class MultiheadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.embed = Conv(3, 8), nn.Conv2d(8, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.expand, self.project = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(self.stem(x)).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.project(F.gelu(self.expand(x)))
        return self.head(x.mean(1))


# Queries, keys and values are views of one layer's outputs, as many as the stream has channels.
@zoo(least=0.6)
class FusedAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.embed = Conv(3, 8), nn.Conv2d(8, 16, 2, stride=2)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.expand, self.project = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(self.stem(x)).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        query, key, value = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        x = x + self.project(F.gelu(self.expand(x)))
        return self.head(x.mean(1))


# Layer norms and the attention keep the stream; the positions are no channels.
@zoo(least=0.4)
class VisionTransformer(nn.Module):
    """A class token, and positions learned for an odd number of tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.position = nn.Parameter(torch.zeros(1, 17, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.expand, self.project = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.project(F.gelu(self.expand(self.norm2(x))))
        return self.head(x[:, 0])


# A recurrent layer keeps its sizes, and those of what it reads.
@zoo(fixed=("body.0",))
class LSTMHead(nn.Module):
    recurrent = nn.LSTM

    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, 12)
        self.recur, self.head = self.recurrent(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, x):
        x = self.body(self.stem(x)).mean(2).transpose(1, 2)
        return self.head(self.recur(x)[0][:, -1])


@zoo(fixed=("body.0",))
class GRUHead(LSTMHead):
    recurrent = nn.GRU


# Operators in place, dropout, activations


@zoo()
class Dropouts(nn.Sequential):
    def __init__(self):
        super().__init__(
            Conv(3, 8),
            nn.Dropout2d(0.2),
            Conv(8, 12),
            nn.Dropout(0.1, inplace=True),
            nn.AlphaDropout(0.1),
            nn.FeatureAlphaDropout(0.1),
            Head(12),
        )


@zoo()
class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8, act=None), Conv(8, 8, act=None)
        self.scale, self.last, self.head = nn.Parameter(torch.ones(1)), Conv(8, 12), Head(12)

    def forward(self, x):
        x = self.stem(x).relu_()
        y = self.body(x)
        y += x
        y *= self.scale
        F.hardtanh(y, 0, 6, inplace=True)
        return self.head(self.last(y.mul_(0.5).clamp_(max=2)))


@zoo()
class InPlaceSlice(Mapped):
    """A constant is written over the first channels: they stay."""

    def between(self, x):
        x = x.clone()
        x[:, :4] += 1
        x[:, 4:8] = 0
        return x


@zoo()
class Activations(nn.Module):
    """Each maps zero to zero."""

    def __init__(self):
        super().__init__()
        kinds = (nn.ELU, nn.SELU, nn.CELU, nn.Tanh, nn.Mish, nn.SiLU, nn.Softsign, nn.Hardswish)
        self.stem = Conv(3, 8)
        self.convs = nn.ModuleList(Conv(8, 8, 1, act=kind) for kind in kinds)
        self.last, self.head = Conv(8, 12), Head(12)

    def forward(self, x):
        x = self.stem(x)
        for conv in self.convs:
            x = conv(x)
        x = torch.where(x > 0, x, 0.1 * x.square()) + x.abs() - x.clamp(-1, 1)
        return self.head(self.last(torch.maximum(x, x.sin())))


@zoo()
class PReLUs(nn.Sequential):
    """One weight per channel, then one for all."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.PReLU(8),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.PReLU(),
            Head(12),
        )


@zoo(fixed=("body.0",))
class SigmoidBetween(Mapped):
    """A dropped channel would have been one half."""

    def between(self, x):
        return x.sigmoid()


@zoo(fixed=("body.0",))
class ConstantAdded(Mapped):
    def between(self, x):
        return 0.3 - x * 2


@zoo(fixed=("body.0",))
class ClampedAbove(Mapped):
    """A dropped channel would have been a tenth."""

    def between(self, x):
        return x.clamp(min=0.1)


@zoo(fixed=("body.0",))
class SoftmaxChannels(Mapped):
    def between(self, x):
        return x * x.softmax(1)


@zoo(fixed=("body.0",))
class MeanChannels(Mapped):
    def between(self, x):
        return x - x.mean(1, keepdim=True)


@zoo(fixed=("body.0",))
class MaxChannels(Mapped):
    """Without an activation: a dropped channel would have counted as zero."""

    def __init__(self):
        super().__init__(act=None)

    def between(self, x):
        return x * torch.tanh(x.amax(1, keepdim=True))


@zoo(fixed=("body.0",))
class CumulatedChannels(Mapped):
    """Dropped channels would have repeated the sum before them."""

    def between(self, x):
        return x.cumsum(1)


@zoo(fixed=("body.0",))
class ChannelOrder(Mapped):
    """The largest channel's number is part of the result."""

    def between(self, x):
        return x * x.argmax(1, keepdim=True)


@zoo(fixed=("body.0",))
class GlobalResponse(Mapped):
    """ConvNeXt V2's norm: divided by the mean over channels."""

    def between(self, x):
        length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return x + x * (length / (length.mean(1, keepdim=True) + 1e-6))


# Inputs and outputs


@zoo(IMAGES, (2, 2, 8, 8))
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Conv(3, 8), Conv(2, 8)
        self.last, self.head = Conv(8, 12), Head(12)

    def forward(self, x, y):
        return self.head(self.last(self.left(x) + self.right(y)))


@zoo()
class TwoOutputs(nn.Module):
    """The features are an output: they stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 12), Head(12)

    def forward(self, x):
        x = self.body(self.stem(x))
        return self.head(x), x


@zoo()
class DictOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, 12)
        self.mask, self.head = nn.Conv2d(12, 1, 1), Head(12)

    def forward(self, x):
        x = self.body(self.stem(x))
        return {"logits": self.head(x), "more": {"mask": self.mask(x)}}


Detected = namedtuple("Detected", "boxes scores")


@zoo()
class NamedOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, 12)
        self.boxes, self.scores = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.body(self.stem(x))
        return Detected(self.boxes(x).flatten(2), [self.scores(x).sigmoid()])


@zoo()
class ConcatOutput(nn.Module):
    """The whole output is a concatenation: detection maps of two levels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, 12, stride=2)
        self.first, self.second = nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        maps = [self.first(x), self.second(self.body(x))]
        return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


@zoo()
class CosineClassifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Conv(3, 8), Conv(8, 12)
        self.classes = nn.Parameter(torch.randn(5, 12))

    def forward(self, x):
        x = self.body(self.stem(x)).mean((2, 3))
        return 4 * F.linear(F.normalize(x), self.classes)


@zoo(into=REFUSED)
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        if x.mean() > 0:
            x = self.body(x)
        return self.head(x)


@zoo(into=REFUSED)
class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = Conv(3, 8), Conv(8, 8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        for _ in range(int(x.amax().item())):
            x = self.body(x)
        return self.head(x)
