"""Running the rules over one function of a tensor with channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from dmcp.graph.capture import capture
from dmcp.graph.tracer import Flow, Tracer


class Scaled(nn.Module):
    """``function`` of an image whose one channel is scaled by a parameter of several."""

    def __init__(self, function, size, dim, rank):
        super().__init__()
        self.scale = nn.Parameter(torch.ones([size if n == dim else 1 for n in range(rank)]))
        self.function = function

    def forward(self, x):
        return self.function(x * self.scale)


@dataclass
class Followed:
    """What the rules make of it.

    Attributes:
        node: the last call.
        axes: dimension of the output -> the label of each position.
        channels: the label of each channel of the input.
        blocked: channels that are never dropped -> why.
        tied: sets of channels that go together, of more than one.
    """

    node: Flow
    axes: dict[int, list[int]]
    channels: list[int]
    blocked: dict[int, str]
    tied: set[frozenset[int]]


def follow_function(function: Callable, shape=(2, 8, 4, 4), dim=1) -> Followed:
    model = Scaled(function, shape[dim], dim, len(shape))
    image = torch.ones([1 if n == dim else size for n, size in enumerate(shape)])
    tracer = Tracer(model, shape[0])
    tracer.run(capture(model, (image,), {}, training=False))
    (last,) = {tracer.nodes[-1].inputs[0]}
    classes = tracer.table.classes()
    reasons = tracer.table.reasons(classes)
    (axis,) = [axis for axis in tracer.tensors["scale"] if axis is not None]
    labels = classes[axis.slots].tolist()
    # Being the model's output is no news.
    blocked = {
        channel: reasons[label]
        for channel, label in enumerate(labels)
        if label in reasons and reasons[label] != "its channels are the model's outputs"
    }
    same = {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}
    node = tracer.nodes[last]
    return Followed(
        node,
        {place: classes[slots].tolist() for place, slots in node.axes},
        labels,
        blocked,
        {tie for tie in same if len(tie) > 1},
    )


@pytest.fixture
def follow() -> Callable[..., Followed]:
    """The rules over a function of an image [2, 8, 4, 4] with channels in dimension 1."""
    return follow_function
