"""What makes a structure of one network meaningless in another, as a hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dmcp.graph import ChannelGraph
from dmcp.graph.tensors import tensor_of, unwrapped
from dmcp.graph.units import FIXED, AxisMap


def graph_hash(graph: ChannelGraph) -> str:
    """``"sha256:…"`` of the units and of the tensor axes they decide.

    It covers every unit's name, channels and step, every parameter and buffer's name and shape, and
    which channel of which unit each position of its dimensions carries. It does not depend on
    weights, devices, dtypes or Python objects, on the widths that a search may choose from, on
    where the model's code lies, on ``torch.compile`` around the model or parts of it, or on the
    order in which modules are registered; but a parameter that several modules share is known by
    the name that is registered first, and a network that is one bare layer, which has no name, is
    another one once it is compiled.

    Any other wrapper whose module is called otherwise gives another hash: trace the model itself.
    """
    names = [unit.name for unit in graph.units]
    # By the rank of its name, so that the order in which units were found does not matter.
    ranks = np.empty(len(names) + 1, dtype=np.int64)
    ranks[np.argsort(names)] = np.arange(len(names))
    ranks[FIXED] = FIXED
    tensors = [
        [
            unwrapped(name),
            list(tensor_of(graph.model, name).shape),
            [None if axis is None else _axis(axis, ranks) for axis in axes],
            [dim for dim in range(len(axes)) if (name, dim) in graph.consumed],
        ]
        for name, axes in sorted(graph.tensors.items(), key=lambda item: unwrapped(item[0]))
    ]
    units = sorted((unit.name, unit.channels, unit.step) for unit in graph.units)
    text = json.dumps({"units": units, "tensors": tensors}, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _axis(axis: AxisMap, ranks: NDArray[np.int64]) -> Sequence[str]:
    """Hashes of each position's unit and of its step inside that."""
    units, index = ranks[axis.unit.cpu().numpy()], axis.index.cpu().numpy()
    return [hashlib.sha256(part.astype("<i8").tobytes()).hexdigest() for part in (units, index)]
