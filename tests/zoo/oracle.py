"""What a smaller network must equal: the whole one with its dropped channels zeroed.

Nothing here looks at how `dmcp` extracts: only at ``unit.members`` (which channels of which modules
a unit decides) and at what PyTorch's own modules store where.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves, tree_map_only


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and buffer, in place, numbers that hide nothing: no zero scales, no
    fresh statistics. Signals keep about their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        last = name.rpartition(".")[2]
        if tensor.ndim > 1:
            tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
        elif "bias" in last or "mean" in last:
            tensor.normal_(0, 0.3, generator=generator)
        else:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model


@torch.no_grad()
def zeroed(graph, dropped: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy of the traced model in which dropped channels are zero.

    Args:
        graph: what ``dmcp.trace`` returned.
        dropped: unit name -> the channels to drop, in whole steps.
    """
    model = copy.deepcopy(graph.model)
    for unit in graph.units:
        rows = _rows(unit, dropped.get(unit.name, ()))
        for member in unit.members:
            if member.role == "out" and len(rows):
                # What a parametrisation holds belongs to the layer around it.
                layer = member.module.partition("parametrizations.")[0].rstrip(".")
                channels = member.channels[rows].flatten()
                for tensor, dim in _stored(model.get_submodule(layer), member.tensors):
                    tensor.index_fill_(dim, channels, 0)
    return model


def _rows(unit, dropped: Sequence[int]) -> Tensor:
    """The rows of a member's channels that hold these channels of the unit."""
    mask = torch.zeros(unit.channels, dtype=torch.bool)
    mask[torch.as_tensor(dropped, dtype=torch.long)] = True
    steps = mask.view(-1, unit.step)
    assert torch.equal(steps.all(1), steps.any(1)), f"{unit.name}: a part of a step is dropped"
    return steps.all(1).nonzero().flatten()


def _stored(module: nn.Module, named: Sequence[tuple[str, int]]) -> Iterator[tuple[Tensor, int]]:
    """Where a module stores what its output channels are made of, as (tensor, dimension).

    Args:
        module: the module.
        named: (name, dimension) as the member has them: only for raw parameters, and where groups
            number the outputs of a transposed convolution anew.
    """
    if isinstance(module, nn.PReLU):
        return  # zero stays zero, whatever its weight
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        # A bias holds all outputs, the weight those of one group, or the groups where one of their
        # sides is a single channel.
        whole = 1 in (module.in_channels // module.groups, module.out_channels // module.groups)
        allowed = {("weight", 0 if whole else 1), ("bias", 0)}
        assert set(named) <= allowed, named
        yield from ((getattr(module, name), dim) for name, dim in named)
    elif isinstance(module, (_ConvNd, nn.Linear)):
        yield _weight(module), int(isinstance(module, _ConvTransposeNd))
        if module.bias is not None:
            yield module.bias, 0
    elif isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
        scales = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
        mean = getattr(module, "running_mean", None)
        yield from ((tensor, 0) for tensor in scales or [mean] if tensor is not None)
    else:
        yield from ((getattr(module, name), dim) for name, dim in named)


def _weight(layer: nn.Module) -> Tensor:
    """The tensor that makes a layer's output zero, parametrised or not."""
    if "weight" not in getattr(layer, "parametrizations", ()):
        return layer.weight
    inside = layer.parametrizations.weight
    # The magnitudes of a weight norm: directions of zero would have no length to divide by.
    return inside.original0 if hasattr(inside, "original0") else inside.original


@torch.no_grad()
def same(small: nn.Module, big: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The largest difference of any output in evaluation mode, relative to the largest number of
    that output; infinite where shapes differ or something is not a number.

    Both models are put in evaluation mode and float64.
    """
    return difference(outputs(small, inputs), outputs(big, inputs))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors a model returns, in evaluation mode and float64."""
    # Copies, because a model may write on what it is given.
    copies = tree_map_only(Tensor, lambda x: x.double().clone(), tuple(inputs))
    return [x.double() for x in tree_leaves(model.double().eval()(*copies)) if torch.is_tensor(x)]


def difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """As `same`, of two lists of outputs."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return math.inf
    return max((_apart(a, b) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _apart(found: Tensor, wanted: Tensor) -> float:
    largest = wanted.abs().max().clamp(min=1e-30)
    return float(((found - wanted).abs().max() / largest).nan_to_num(nan=math.inf))
