"""Training on several processes: the collectives, and batch normalisation over the global batch.

One process drives one device. With equal shards and per-process mean losses, averaged gradients
and synchronised batch normalisation give the update of one process on the whole batch. Everything
here does nothing, and needs no process group, in a `World` of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dmcp.errors import ConfigError
from dmcp.ops import norm_act


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: this process, in [0, size).
        size: number of processes.
        device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def single(cls, device: str | torch.device = "cpu") -> World:
        """The world of a run in one process."""
        return cls(0, 1, torch.device(device))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0


def init_from_env(device: str | None = None) -> World:
    """Join the processes that ``torchrun`` started; without it, the world of one process.

    Reads RANK, WORLD_SIZE and LOCAL_RANK. CPU processes talk through gloo; CUDA ones through NCCL,
    each on the GPU of its local rank.

    Args:
        device: ``"cpu"`` or ``"cuda"`` (in one process also ``"cuda:1"`` and the like); ``None``
            is CUDA where there is a GPU.

    Raises:
        ConfigError: a variable is missing or no number, or there is no GPU for this process.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(wanted)!r}, but torch finds no CUDA GPU")
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World.single(wanted)
    rank, size = _integer_from_env("RANK"), _integer_from_env("WORLD_SIZE")
    if not 0 <= rank < size:
        raise ConfigError(f"RANK must be in [0, WORLD_SIZE), got {rank} of {size}")
    if wanted.type != "cuda":
        dist.init_process_group("gloo", rank=rank, world_size=size)
        return World(rank, size, wanted)
    local_rank = _integer_from_env("LOCAL_RANK")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but there are {torch.cuda.device_count()} GPUs"
        )
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=own)
    return World(rank, size, own)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier(world: World) -> None:
    """Wait until every process is here."""
    if world.size > 1:
        dist.barrier()


def broadcast_parameters(model: nn.Module, world: World) -> None:
    """Give every process the parameters and buffers of rank 0."""
    if world.size == 1:
        return
    for tensors in _by_dtype([*model.parameters(), *model.buffers()]):
        flat = _flatten(tensors)
        dist.broadcast(flat, src=0)
        _unflatten(flat, tensors)


def average_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Average ``.grad`` over the processes: one all-reduce of one flat buffer per dtype.

    Parameters without a gradient are left out; every process must leave out the same ones.
    """
    if world.size == 1:
        return
    for gradients in _by_dtype([p.grad for p in parameters if p.grad is not None]):
        flat = _flatten(gradients)
        dist.all_reduce(flat)
        flat /= world.size
        _unflatten(flat, gradients)


def all_reduce_sum(tensor: Tensor, world: World) -> Tensor:
    """The sum of ``tensor`` over the processes, as a new tensor in each.

    Differentiable: the gradient is that of the sum of all the processes' losses, which is what
    `average_gradients` divides by their number.
    """
    if world.size == 1:
        return tensor
    return _AllReduceSum.apply(tensor)


def all_gather(tensor: Tensor, world: World) -> Tensor:
    """``tensor`` of every process, [size, *shape], in the order of the ranks; no gradient."""
    if world.size == 1:
        return tensor.detach()[None]
    own = tensor.detach().contiguous()
    shards = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(shards, own)
    return torch.stack(shards)


def synchronised_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    world: World,
) -> Tensor:
    """`torch.nn.functional.batch_norm` with the batch statistics of all processes.

    `dmcp.ops.norm_act` without an activation: means and centred sums of squares are joined exactly,
    so that a large mean costs no digits and shards may differ in size.

    Args:
        x: [N, C, ...], the shard of this process.
        weight: [C], or ``None``.
        bias: [C], or ``None``.
        running_mean: [C], updated in place when ``training``; ``None`` to keep none.
        running_var: [C], likewise.
        training: normalise by the batch rather than by the running statistics.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        world: the processes that share the batch.

    Raises:
        TypeError: ``weight`` or a running statistic is in half precision.
    """
    if not training or world.size == 1:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return norm_act(
        x,
        weight,
        bias,
        running_mean=running_mean,
        running_var=running_var,
        training=True,
        momentum=momentum,
        eps=eps,
        synchronised=True,
    )


class _SynchronisedForward(_BatchNorm):
    """The forward of a batch normalisation whose statistics are those of ``world``."""

    world: World

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return synchronised_forward(self, input, self.world)


def synchronised_forward(norm: _BatchNorm, x: Tensor, world: World) -> Tensor:
    """What ``norm(x)`` computes, running statistics included, with the batch statistics of all
    processes."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    tracks = norm.track_running_stats
    if norm.training and tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / int(norm.num_batches_tracked)
    return synchronised_batch_norm(
        x,
        norm.weight,
        norm.bias,
        norm.running_mean if tracks or not norm.training else None,
        norm.running_var if tracks or not norm.training else None,
        norm.training or norm.running_mean is None,
        momentum,
        norm.eps,
        world,
    )


class SyncBatchNorm1d(_SynchronisedForward, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the global batch; made by `synchronise_batch_norm`."""


class SyncBatchNorm2d(_SynchronisedForward, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the global batch; made by `synchronise_batch_norm`."""


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
}
_PLAIN = {synchronised: plain for plain, synchronised in _SYNCHRONISED.items()}


def synchronise_batch_norm(model: nn.Module, world: World) -> None:
    """Make the batch normalisations of ``model`` use the statistics of the global batch, in place.

    Parameters, buffers and their names stay. A subclass that can do this itself shows it by an
    attribute ``sync_world``, which is set. `restore_batch_norm` undoes it.

    Raises:
        ConfigError: the model holds a batch normalisation of another kind; it is then unchanged.
    """
    if world.size == 1:
        return
    own: list[Any] = []
    swapped: list[Any] = []
    for name, module in model.named_modules():
        if hasattr(module, "sync_world"):
            own.append(module)
        elif type(module) in _SYNCHRONISED or type(module) in _PLAIN:
            swapped.append(module)
        elif isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"cannot synchronise {name or 'the model'}, a {type(module).__name__}: "
                "accepted are nn.BatchNorm1d, nn.BatchNorm2d and nn.SyncBatchNorm"
            )
    for module in own:
        module.sync_world = world
    for module in swapped:
        module.__class__ = _SYNCHRONISED.get(type(module), type(module))
        module.world = world


def restore_batch_norm(model: nn.Module) -> None:
    """Undo `synchronise_batch_norm`: every module has its own class again."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "sync_world"):
            module.sync_world = None
        elif type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
            del module.world


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def _by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _unflatten(flat: Tensor, tensors: list[Tensor]) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.detach().copy_(piece.view(tensor.shape))


def _integer_from_env(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdecimal():
        raise ConfigError(f"{name} must be a number in the environment of torchrun, got {value!r}")
    return int(value)
