"""A linear layer of which the first outputs and inputs take part, and that adds to gradients.

On CPU tensors one node of the autograd graph, in C++: products with the corner of the weight by the
kernels of `dmcp.ops.pointwise`, which need no preparation for a new width and no copy of the weight
in another dtype; the gradients of weight and bias are added to where they belong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmcp.ops.library import has_node


def accumulating_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, widths: tuple[int, ...]
) -> Tensor | None:
    """x weightᵀ + bias, where autograd does not see the gradients of weight and bias.

    Args:
        x: [N, I].
        weight, bias: leaves [outputs or more, I or more] and [outputs or more], float32 (float64
            for a float64 ``x``), which have a ``.grad`` if they want one.
        widths: how many outputs and inputs of ``weight`` take part.

    Returns:
        [N, outputs], of the dtype of ``x``; None where there is no kernel for these tensors.
    """
    if not has_node(x):
        return None
    y: Tensor | None = torch.ops.dmcp.linear_node.default(x, weight, bias, widths)
    return y
