"""Holding what was exported against the network that it came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dmcp.errors import ExportError

TOLERANCE = 1e-4
"""How far an exported network may be from its origin, relative to each output's largest value."""

Network = Callable[..., object]


def check(form: str, network: Network, exported: Network, inputs: Sequence[Tensor]) -> float:
    """Run both on a single image and on more images than they were captured with.

    Returns:
        The largest difference, relative to the largest value of the output it is in.

    Raises:
        ExportError: it is above `TOLERANCE`, the outputs are of other numbers, types or shapes, or
            one of both does not run.
    """
    rows = len(inputs[0])
    worst = 0.0
    for size in (1, rows + 1):
        batch = [_probe(each)[torch.arange(size, device="cpu") % rows] for each in inputs]
        expected = _run("the network", network, batch)
        got = _run(f"the {form} form", exported, batch)
        shapes = [
            [f"{str(each.dtype).removeprefix('torch.')} {[*each.shape]}" for each in outputs]
            for outputs in (expected, got)
        ]
        if shapes[0] != shapes[1]:
            raise ExportError(
                f"the {form} form gives outputs {', '.join(shapes[1])}, the network "
                f"{', '.join(shapes[0])}: nothing was written"
            )
        for one, other in zip(expected, got, strict=True):
            worst = max(worst, difference(one, other))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the {form} form differs from the network by {worst:.1e} of the largest output, more "
            f"than {TOLERANCE:.0e}: nothing was written"
        )
    return worst


@torch.no_grad()
def _run(which: str, network: Network, batch: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that a network gives, in order."""
    try:
        # A copy of each input, for a network may begin with an operator in place.
        outputs = pytree.tree_leaves(network(*(each.clone() for each in batch)))
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ExportError(
            f"{which} does not run on a batch of {len(batch[0])}: {reason}: nothing was written"
        ) from error
    return [each for each in outputs if isinstance(each, Tensor)]


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest absolute difference over the largest absolute value; infinite where one of them
    is not a number."""
    if not expected.numel():
        return 0.0
    expected, got = expected.double(), got.double()
    apart = (expected - got).abs().max().item()
    if apart == 0.0:
        return 0.0
    relative = apart / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)
    return relative if math.isfinite(relative) else math.inf


def _probe(example: Tensor) -> Tensor:
    """The example, or noise instead of one whose values are all the same: it would show little."""
    if not example.is_floating_point() or bool((example != example.flatten()[0]).any()):
        return example
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return noise.to(example.dtype)
