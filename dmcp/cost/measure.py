"""MACs counted by running the network: the check on the polynomial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmcp.train.evaluate import modes_kept


@torch.no_grad()
def measured_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply–accumulates per image of convolutions, linear layers and matrix products, as
    PyTorch's own counter sees them in a forward pass on ``images`` [N, C, H, W]."""
    # Imported here because it imports Triton, which `import dmcp` must not.
    from torch.utils.flop_counter import FlopCounterMode

    with modes_kept(model), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    return int(counter.get_total_flops()) // (2 * len(images))
