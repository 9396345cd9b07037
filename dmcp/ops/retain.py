"""Retain probabilities of all Markov chains of a network, in one call.

Chain u has the architecture parameters ``alpha[offsets[u]:offsets[u + 1]]``. Its transition
probabilities are p_k = sigmoid(alpha_k), its retain probabilities q_k = p_1 * ... * p_k: the
marginals of the Markov process of DMCP (Guo et al., CVPR 2020, section 3.2). In the backward,
d alpha_k = (1 - p_k) * sum over j >= k of q_j * d q_j, because dq_j/dp_k = q_j / p_k for j >= k and
dp_k/dalpha_k = p_k (1 - p_k): no division, so nothing breaks where a p underflows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmcp.backends import native_cuda, native_module, triton_installed
from dmcp.ops.library import Kernel, register


def retain(alpha: Tensor, offsets: Tensor) -> Tensor:
    """Retain probabilities of concatenated Markov chains.

    Differentiable in ``alpha``, once. Deterministic.

    Args:
        alpha: architecture parameters of all chains, [T], float32 or float64.
        offsets: where each chain begins, then T: [U + 1], int32, ascending from 0, on the device
            of ``alpha``. Equal neighbours make an empty chain. The values are checked on the CPU
            only: on another device that would stop the host.

    Returns:
        q, [T], of the dtype of ``alpha``.

    Raises:
        TypeError: a dtype is not the accepted one.
        ValueError: a shape, the device or the values of ``offsets`` do not fit.
    """
    _check(alpha, offsets)
    return _Retain.apply(alpha, offsets)


def retain_reference(alpha: Tensor, offsets: Tensor) -> Tensor:
    """What `retain` computes, in plain PyTorch operations that autograd can differentiate.

    A scan by doubling: after the step of distance d, position k holds the product of the up to 2d
    positions that end in k, none of them outside its chain.
    """
    if alpha.is_cpu:
        _check_ascending(offsets, alpha.numel())
    position, begin, _ = chain_bounds(alpha, offsets)
    q = alpha.sigmoid()
    distance = 1
    while distance < q.numel():
        earlier = torch.nn.functional.pad(q[:-distance], (distance, 0), value=1.0)
        q = torch.where(position - distance >= begin, q * earlier, q)
        distance *= 2
    return q


def _backward_reference(grad: Tensor, alpha: Tensor, q: Tensor, offsets: Tensor) -> Tensor:
    if alpha.is_cpu:
        _check_ascending(offsets, alpha.numel())
    position, _, end = chain_bounds(alpha, offsets)
    return torch.sigmoid(-alpha) * suffix_sum(q * grad, position, end)


def suffix_sum(values: Tensor, position: Tensor, end: Tensor) -> Tensor:
    """Sums from every position to the end of its segment, by doubling: [..., T]."""
    distance = 1
    while distance < values.shape[-1]:
        later = torch.nn.functional.pad(values[..., distance:], (0, distance))
        values = torch.where(position + distance < end, values + later, values)
        distance *= 2
    return values


def chain_bounds(alpha: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every position, and the begin and the end of its chain: three int32 [T]."""
    position = torch.arange(alpha.numel(), dtype=torch.int32, device=alpha.device)
    following = torch.searchsorted(offsets.contiguous(), position, right=True)
    return position, offsets[following - 1], offsets[following]


def _check(alpha: Tensor, offsets: Tensor) -> None:
    if alpha.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"alpha must be float32 or float64, got {alpha.dtype}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if alpha.dim() != 1:
        raise ValueError(f"alpha must have one dimension, got the shape {list(alpha.shape)}")
    if offsets.dim() != 1 or offsets.numel() == 0:
        raise ValueError(f"offsets must be [chains + 1], got the shape {list(offsets.shape)}")
    if offsets.device != alpha.device:
        raise ValueError(f"offsets must be on {alpha.device} like alpha, got {offsets.device}")


def _check_ascending(offsets: Tensor, total: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total or values != sorted(values):
        raise ValueError(f"offsets must ascend from 0 to the length of alpha, {total}")


class _Retain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, offsets: Tensor) -> Tensor:
        q: Tensor = torch.ops.dmcp.retain(alpha, offsets)
        ctx.save_for_backward(alpha, q, offsets)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        alpha, q, offsets = ctx.saved_tensors
        return torch.ops.dmcp.retain_backward(grad, alpha, q, offsets), None


def _cpu_kernels() -> tuple[Kernel | None, Kernel | None]:
    native = native_module()
    if native is None:
        return None, None

    def forward(alpha: Tensor, offsets: Tensor) -> Tensor:
        alpha, offsets = alpha.contiguous(), offsets.contiguous()
        q = torch.empty_like(alpha)
        native.retain_cpu(
            alpha.data_ptr(),
            offsets.data_ptr(),
            q.data_ptr(),
            offsets.numel() - 1,
            alpha.numel(),
            alpha.element_size(),
        )
        return q

    def backward(grad: Tensor, alpha: Tensor, q: Tensor, offsets: Tensor) -> Tensor:
        grad, alpha, q, offsets = (t.contiguous() for t in (grad, alpha, q, offsets))
        grad_alpha = torch.empty_like(alpha)
        native.retain_backward_cpu(
            grad.data_ptr(),
            alpha.data_ptr(),
            q.data_ptr(),
            offsets.data_ptr(),
            grad_alpha.data_ptr(),
            offsets.numel() - 1,
            alpha.numel(),
            alpha.element_size(),
        )
        return grad_alpha

    return forward, backward


def _cuda_kernels() -> tuple[Kernel | None, Kernel | None]:
    if native_cuda():
        return _native_cuda_kernels()
    if triton_installed():
        return _triton_forward, _triton_backward
    return None, None


def _native_cuda_kernels() -> tuple[Kernel, Kernel]:
    native = native_module()
    assert native is not None

    def forward(alpha: Tensor, offsets: Tensor) -> Tensor:
        alpha, offsets = alpha.contiguous(), offsets.contiguous()
        q = torch.empty_like(alpha)
        with torch.cuda.device(alpha.device):
            native.retain_cuda(
                alpha.data_ptr(),
                offsets.data_ptr(),
                q.data_ptr(),
                offsets.numel() - 1,
                alpha.numel(),
                alpha.element_size(),
                torch.cuda.current_stream().cuda_stream,
            )
        return q

    def backward(grad: Tensor, alpha: Tensor, q: Tensor, offsets: Tensor) -> Tensor:
        grad, alpha, q, offsets = (t.contiguous() for t in (grad, alpha, q, offsets))
        grad_alpha = torch.empty_like(alpha)
        with torch.cuda.device(alpha.device):
            native.retain_backward_cuda(
                grad.data_ptr(),
                alpha.data_ptr(),
                q.data_ptr(),
                offsets.data_ptr(),
                grad_alpha.data_ptr(),
                offsets.numel() - 1,
                alpha.numel(),
                alpha.element_size(),
                torch.cuda.current_stream().cuda_stream,
            )
        return grad_alpha

    return forward, backward


def _triton_forward(alpha: Tensor, offsets: Tensor) -> Tensor:
    from dmcp.kernels.retain import retain as launch

    with torch.cuda.device(alpha.device):
        return launch(alpha, offsets)


def _triton_backward(grad: Tensor, alpha: Tensor, q: Tensor, offsets: Tensor) -> Tensor:
    from dmcp.kernels.retain import retain_backward as launch

    with torch.cuda.device(alpha.device):
        return launch(grad, alpha, q, offsets)


def _register() -> None:
    cpu_forward, cpu_backward = _cpu_kernels()
    cuda_forward, cuda_backward = _cuda_kernels()
    register(
        "retain(Tensor alpha, Tensor offsets) -> Tensor",
        eager=retain_reference,
        fake=lambda alpha, offsets: torch.empty_like(alpha),
        cpu=cpu_forward,
        cuda=cuda_forward,
    )
    register(
        "retain_backward(Tensor grad, Tensor alpha, Tensor q, Tensor offsets) -> Tensor",
        eager=_backward_reference,
        fake=lambda grad, alpha, q, offsets: torch.empty_like(alpha),
        cpu=cpu_backward,
        cuda=cuda_backward,
    )


_register()
