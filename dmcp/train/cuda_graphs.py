"""Passes that are the same in every step, as CUDA graphs.

A pass over a deep network is thousands of kernels, each of which the host has to launch; on small
images it takes longer for that than the device for computing. A graph holds all of them, with the
addresses of their tensors, and is launched as one.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from dmcp.errors import ConfigError

WARM_UP = 3
"""Calls of a pass before its capture: kernels are chosen and compiled, workspaces made in them."""
MOVES = 3
"""So often a pass may find its network somewhere else in memory, and begins anew."""

Place = tuple[int, torch.dtype, bool, int | None]
"""Address and dtype of a tensor, whether it wants a gradient, and the address of that it has."""

_Result = TypeVar("_Result")
_Layout = tuple[Hashable, ...]


class CudaGraphs:
    """Runs passes of a network, each captured once and replayed from then on.

    A pass is a function of tensors, alone or in lists, tuples and dicts. What it leaves behind
    besides its result it leaves in place: gradients are added to those that are there, statistics
    moved. Its first calls are ordinary ones, the next is captured. A replay launches the same
    kernels on other numbers, and runs no Python. Calls whose inputs have another layout than the
    captured ones, as a last, smaller batch, stay ordinary. The graph of a pass whose network was
    moved or cast is dropped at the next call.

    Args:
        net: its parameters, gradients and buffers are what graphs hold the addresses of.
        device: where it is.

    Raises:
        ConfigError: it is not on a CUDA device.
    """

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        if device.type != "cuda":
            raise ConfigError(f"cuda_graphs needs a network on a CUDA device, this is on {device}")
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = Memory(net)
        self._passes: dict[str, _Pass] = {}

    @property
    def captured(self) -> set[str]:
        """The names of the passes that are replayed now."""
        return {name for name, each in self._passes.items() if each.captured is not None}

    def run(self, name: str, compute: Callable[..., _Result], *inputs: Any) -> _Result:
        """What ``compute(*inputs)`` returns, in new tensors.

        Args:
            name: of the pass.
            compute: the pass.
            inputs: no other values than those in tensors may differ between two calls.

        Raises:
            ConfigError: the pass cannot be captured, or a tensor of its inputs is elsewhere.

        Warns:
            UserWarning: a replay would not do the same as the pass, see `rehearse`, or its network
                is somewhere else in memory again and again; it stays an ordinary one.
        """
        places = self._memory.places()
        this = self._passes.setdefault(name, _Pass(places))
        if this.places != places and not this.stays_ordinary:
            this = self._passes[name] = _Pass(places, moves=this.moves + 1)
            if this.moves > MOVES:
                this.stays_ordinary = True
                _warn(name, "finds parameters, buffers or gradients in other memory each time")
        layout = layout_of(inputs, self._device)
        with torch.cuda.device(self._device):
            if this.captured is None and not this.stays_ordinary:
                this.calls[layout] += 1
                if this.calls[layout] < WARM_UP:
                    with self._aside():
                        return compute(*inputs)
                if this.calls[layout] == WARM_UP:
                    return self._rehearsed(name, compute, inputs)
                this.captured = self._capture(name, compute, inputs, layout)
            if this.captured is None or this.captured.layout != layout:
                return compute(*inputs)
            result: _Result = this.captured.replay(inputs)
            return result

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream of the captures, to which workspaces belong, but in the same order."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), _casts_not_kept():
                yield
        finally:
            current.wait_stream(self._stream)

    def _rehearsed(
        self, name: str, compute: Callable[..., _Result], inputs: Sequence[Any]
    ) -> _Result:
        with self._aside():
            result, obstacles = rehearse(compute, inputs, self._memory, self._device)
        if obstacles:
            self._passes[name].stays_ordinary = True
            _warn(name, ", ".join(obstacles))
        return result

    def _capture(
        self, name: str, compute: Callable[..., Any], inputs: Sequence[Any], layout: _Layout
    ) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        static = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
        others = (each.captured for each in self._passes.values())
        # One after the other, passes can work in the same memory.
        pool = next((other.graph.pool() for other in others if other is not None), None)
        # Other threads may go on with the device: a loader's pins memory.
        capture = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")
        try:
            # A capture that fails does not leave its stream by itself.
            with torch.cuda.stream(self._stream), _casts_not_kept(), capture:
                result = compute(*static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._passes[name].stays_ordinary = True
            raise ConfigError(
                f"cuda_graphs: the {name} pass cannot be captured, leave the option off for this "
                f"network: {error.__context__ or error}"
            ) from error
        return _Captured(layout, graph, static, result)


@dataclass(frozen=True)
class _Captured:
    """A graph, what its inputs looked like, and the memory of its inputs and its result."""

    layout: _Layout
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Any]
    result: Any

    @torch.no_grad()
    def replay(self, inputs: Sequence[Any]) -> Any:
        for static, given in zip(tree_leaves(self.inputs), tree_leaves(inputs), strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
        self.graph.replay()
        # Copies: the next replay, of this or another graph in the same memory, overwrites it.
        return tree_map_only(Tensor, torch.clone, self.result)


@dataclass
class _Pass:
    """What is known of a pass while the memory of the network is at these places.

    Attributes:
        moves: how often it has begun anew.
        calls: how many there were, of every layout, until one was captured.
        stays_ordinary: whether it may not be captured.
    """

    places: list[Place]
    moves: int = 0
    calls: Counter[_Layout] = field(default_factory=Counter)
    captured: _Captured | None = None
    stays_ordinary: bool = False


class Memory:
    """Where the parameters, gradients and buffers of a network are."""

    def __init__(self, net: nn.Module) -> None:
        self._holders = [
            (name, holder)
            for name, module in net.named_modules()
            for holder in (module._parameters, module._buffers)
        ]

    def places(self) -> list[Place]:
        """The addresses of all now; asked for before every pass, so it has to be quick."""
        return [
            (
                tensor.data_ptr(),
                tensor.dtype,
                tensor.requires_grad,
                None if tensor.grad is None else tensor.grad.data_ptr(),
            )
            for _, holder in self._holders
            for tensor in holder.values()
            if tensor is not None
        ]

    def named_places(self) -> dict[str, Place]:
        """The same with names."""
        names = [
            f"{module}.{name}"
            for module, holder in self._holders
            for name, tensor in holder.items()
            if tensor is not None
        ]
        return dict(zip(names, self.places(), strict=True))


def layout_of(inputs: Sequence[Any], device: torch.device) -> _Layout:
    """What the kernels of a pass depend on besides the numbers in its tensors.

    Raises:
        ConfigError: a tensor is not on the device: what a kernel gets from the host is captured.
    """
    leaves, structure = tree_flatten(inputs)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.device.type != device.type:
            raise ConfigError(f"cuda_graphs needs inputs on {device}, one is on {leaf.device}")
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return (
        autocast,
        structure,
        *(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        ),
    )


def rehearse(
    compute: Callable[..., _Result], inputs: Sequence[Any], memory: Memory, device: torch.device
) -> tuple[_Result, list[str]]:
    """Run a pass and see what a graph would miss of it.

    Returns:
        Its result, and what it does that a replay would not: wait for numbers, copy between the
        host and the device, draw random numbers on the host, or replace a parameter, a buffer or a
        gradient by a new tensor, as it is for gradients that are not part of a buffer.
    """
    before = memory.named_places()
    with _Watch(device) as watch:
        result = compute(*inputs)
    obstacles = [f"{does} ({operator})" for operator, does in watch.found.items()]
    after = memory.named_places()
    moved = [name for name, place in after.items() if place != before.get(name)]
    if moved:
        obstacles.append(f"replaces the tensors or the gradients of {', '.join(moved)}")
    return result, obstacles


_READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "masked_select",
        "nonzero",
        "repeat_interleave",
    )
)
_INDEXING = frozenset(("aten::index", "aten::index_put", "aten::index_put_"))
_COPIES = frozenset(("aten::_to_copy", "aten::copy_"))


def _has_masks(args: tuple[Any, ...]) -> bool:
    """Whether something is indexed by a mask, whose elements have to be counted."""
    indices = tree_leaves(args[1])
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


class _Watch(TorchDispatchMode):
    """Notes the operators with which host and device meet.

    Attributes:
        found: operator -> what it does.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.found: dict[str, str] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that compiled code runs as such."""
        return True

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        name, here = func._schema.name, self._device in devices
        if here and (name in _READS or (name in _INDEXING and _has_masks(args))):
            self.found[name] = "waits for numbers"
        elif here and name in _COPIES and len(devices) > 1:
            self.found[name] = "copies between host and device"
        elif not here and torch.Tag.nondeterministic_seeded in func.tags:
            self.found[name] = "draws random numbers on the host"
        return result


def _warn(name: str, obstacles: str) -> None:
    message = f"cuda_graphs: the {name} pass is not replayed: it {obstacles}"
    warnings.warn(message, stacklevel=3)


@contextmanager
def _casts_not_kept() -> Iterator[None]:
    """Autocast keeps what it has cast of the weights: the next pass would read memory of this one,
    and a replay stale weights."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
