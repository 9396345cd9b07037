"""MACs counted by running the network: the check on the polynomial."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmcp.train.evaluate import modes_kept


def measured_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiply–accumulates per image of convolutions, linear layers and matrix products, as
    PyTorch's own counter sees them in a forward pass on ``inputs``, the first one [N, …]."""
    # Imported here because it imports Triton, which `import dmcp` must not.
    from torch.utils.flop_counter import FlopCounterMode

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of the flags below, about hardware that is not there
        stack.enter_context(modes_kept(model))
        # The counter does not see into fused attention and recurrent layers, which PyTorch uses
        # without gradients and with oneDNN.
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        counter = stack.enter_context(FlopCounterMode(display=False))
        model.eval()(*inputs)
    return int(counter.get_total_flops()) // (2 * len(inputs[0]))
