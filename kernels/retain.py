"""Triton kernels of ``dmcp.ops.retain``: one program per chain, one launch per direction.

The arithmetic is in float64, as in ``csrc``. Offsets are clamped to the arrays, not checked:
reading them would stop the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 32  # positions a program scans at once; chains have about ten


@triton.jit
def _chain(offsets, total):
    u = tl.program_id(0)
    begin = tl.maximum(tl.load(offsets + u), 0)
    end = tl.minimum(tl.load(offsets + u + 1), total)
    return begin, end


@triton.jit
def retain_kernel(alpha, offsets, q, total, block: tl.constexpr):
    begin, end = _chain(offsets, total)
    lane = tl.arange(0, block)
    before = tl.full([], 1.0, tl.float64)  # the product of all earlier tiles
    tile = begin
    while tile < end:  # not range(): the interpreter of Triton 3.6 cannot run it with numpy 2.4
        k = tile + lane
        a = tl.load(alpha + k, mask=k < end, other=0.0).to(tl.float64)
        p = tl.where(k < end, 1.0 / (1.0 + tl.exp(-a)), 1.0)
        product = before * tl.cumprod(p, axis=0)
        tl.store(q + k, product.to(q.dtype.element_ty), mask=k < end)
        before = tl.sum(tl.where(lane == block - 1, product, 0.0), axis=0)
        tile += block


@triton.jit
def retain_backward_kernel(grad_q, alpha, q, offsets, grad_alpha, total, block: tl.constexpr):
    begin, end = _chain(offsets, total)
    lane = tl.arange(0, block)
    after = tl.full([], 0.0, tl.float64)  # the sum of all later tiles
    tile = end
    while tile > begin:
        tile -= block
        k = tile + lane
        inside = k >= begin
        weight = tl.load(q + k, mask=inside, other=0.0).to(tl.float64)
        weight *= tl.load(grad_q + k, mask=inside, other=0.0).to(tl.float64)
        a = tl.load(alpha + k, mask=inside, other=0.0).to(tl.float64)
        tail = after + tl.cumsum(weight, axis=0, reverse=True)
        stop = 1.0 / (1.0 + tl.exp(a))
        tl.store(grad_alpha + k, (stop * tail).to(grad_alpha.dtype.element_ty), mask=inside)
        after = tl.sum(tl.where(lane == 0, tail, 0.0), axis=0)


def retain(alpha: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Launches the forward: ``alpha`` [T], ``offsets`` [U + 1] int32; returns q [T]."""
    alpha, offsets = alpha.contiguous(), offsets.contiguous()
    q = torch.empty_like(alpha)
    chains = offsets.numel() - 1
    if chains:
        retain_kernel[(chains,)](alpha, offsets, q, alpha.numel(), block=BLOCK, num_warps=1)
    return q


def retain_backward(
    grad: torch.Tensor, alpha: torch.Tensor, q: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Launches the backward: ``grad``, ``alpha`` and ``q`` [T]; returns the gradient of alpha."""
    grad, alpha, q, offsets = (t.contiguous() for t in (grad, alpha, q, offsets))
    grad_alpha = torch.empty_like(alpha)
    chains = offsets.numel() - 1
    if chains:
        retain_backward_kernel[(chains,)](
            grad, alpha, q, offsets, grad_alpha, alpha.numel(), block=BLOCK, num_warps=1
        )
    return grad_alpha
