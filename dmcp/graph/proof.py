"""Checking a traced graph on the model itself, before anything is searched or extracted."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dmcp.errors import TraceError
from dmcp.graph.channel_graph import ChannelGraph, Proof
from dmcp.graph.extract import extract_steps
from dmcp.graph.tensors import tensor_of

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-9, 1e-8)}
"""Relative differences of outputs and of gradients up to which two networks are the same."""

TRAINING_TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-6}
"""The same of the outputs in training mode."""

Steps = dict[int, Tensor]
"""Unit number -> BoolTensor of the steps that stay."""


def prove(graph: ChannelGraph, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> ChannelGraph:
    """The graph with its proof; units that cannot be shrunk without changing what the rest
    computes are unsearchable in it. Nothing else changes, the random numbers included.

    Raises:
        TraceError: the model cannot be copied, or its copy cannot be run with random numbers.
    """
    started = time.perf_counter()
    # What the model's own code makes without naming a device meets the copy on the CPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        refuted, count, worst, dtype = _examine(graph, inputs, keywords)
    reasons = {graph.units[number].name: reason for number, reason in refuted.items()}
    units = tuple(
        replace(unit, searchable=False, choices=(unit.channels,), reason=reasons[unit.name])
        if unit.name in reasons
        else unit
        for unit in graph.units
    )
    seconds = time.perf_counter() - started
    name = str(dtype).removeprefix("torch.")
    proof = Proof(count, worst.forward, worst.gradient, name, reasons, seconds)
    return replace(graph, units=units, proof=proof)


def _examine(
    graph: ChannelGraph, inputs: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[dict[int, str], int, _Error, torch.dtype]:
    """What is refuted, how many structures of the rest were compared, their worst error, and the
    precision that decided."""
    refuted: dict[int, str] = {}
    check = _check(graph, inputs, keywords, torch.float32)
    while True:
        count, worst, failing = check.compare_all(_free(graph, refuted))
        if failing is None:
            return refuted, count, worst, check.dtype
        if check.dtype == torch.float32:
            # Single precision only says that there may be a difference; it must do for a model
            # whose code asks for it.
            with suppress(TraceError):
                check = _check(graph, inputs, keywords, torch.float64)
            if check.dtype == torch.float64 and check.harmless(check.compare(failing)):
                continue
        found = check.blame(failing)
        # A difference that comes and goes is one all the same.
        refuted |= found or dict.fromkeys(failing, "the network without it is not always the same")


def _check(
    graph: ChannelGraph, inputs: Sequence[Any], keywords: Mapping[str, Any], dtype: torch.dtype
) -> _Check:
    try:
        return _Check(graph, inputs, keywords, dtype)
    except Exception as error:  # whatever the model's own code raises
        raise TraceError(
            f"{type(graph.model).__name__} cannot be checked in {dtype}, as a copy on the CPU with "
            f"random numbers: {_first_line(error)}"
        ) from error


def _free(graph: ChannelGraph, refuted: Mapping[int, str]) -> list[int]:
    return [n for n, unit in enumerate(graph.units) if unit.searchable and n not in refuted]


@dataclass(frozen=True)
class _Error:
    """How far two networks are apart, and why one does not run."""

    forward: float = 0.0
    gradient: float = 0.0
    failure: str = ""

    def joined(self, other: _Error) -> _Error:
        gradient = max(self.gradient, other.gradient)
        if math.isnan(self.gradient + other.gradient):
            gradient = math.nan
        return _Error(max(self.forward, other.forward), gradient)

    def __str__(self) -> str:
        if self.failure:
            return f"the network fails without some of its channels: {self.failure}"
        return (
            "the network without some of its channels differs from the one with zeros there "
            f"(outputs by {self.forward:.1e}, gradients by {self.gradient:.1e})"
        )


class _Check:
    """Compares extracted with zeroed networks, with random weights: those of a fresh network (norms
    that do nothing yet, scales of zero) would hide differences."""

    def __init__(
        self,
        graph: ChannelGraph,
        inputs: Sequence[Any],
        keywords: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.random = torch.Generator().manual_seed(0)
        self.inputs, self.keywords = tree_map_only(
            Tensor, self._input, (tuple(inputs), dict(keywords))
        )
        plain = copy.deepcopy(graph.model)
        if {id(t) for t in plain.parameters()} & {id(t) for t in graph.model.parameters()}:
            raise ValueError("a copy of it shares its parameters")
        plain = plain.to("cpu", dtype).eval()
        random = copy.deepcopy(plain)
        self._randomise(random)
        with torch.no_grad():
            outputs = self._run(random)
        finite = all(bool(output.isfinite().all()) for output in outputs)
        self.graph = replace(graph, model=random if finite else plain)
        # The example may not suit training: one value per channel is no statistic, say.
        try:
            self._train(copy.deepcopy(plain), seed=0)
            self.trains = True
        except Exception:  # whatever the model's own code raises
            self.trains = False

    def _input(self, example: Tensor) -> Tensor:
        if example.dtype in (torch.bool, torch.uint8):
            high = 2 if example.dtype == torch.bool else 256
            drawn = torch.randint(high, example.shape, generator=self.random)
            return drawn.to(example.dtype)
        if not example.is_floating_point():  # which numbers it takes, the example alone tells
            order = torch.randperm(example.numel(), generator=self.random)
            return example.detach().cpu().reshape(-1)[order].reshape(example.shape)
        return torch.randn(example.shape, generator=self.random, dtype=self.dtype)

    @torch.no_grad()
    def _randomise(self, model: nn.Module) -> None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                # As large as rectifiers need, so that early layers are seen through many.
                limit = math.sqrt(6 * tensor.shape[0] / max(tensor.numel(), 1))
                tensor.uniform_(-limit, limit, generator=self.random)
            elif name.endswith(("bias", "mean")):
                tensor.uniform_(-0.05, 0.05, generator=self.random)
            else:
                tensor.uniform_(0.5, 1.5, generator=self.random)

    def structures(self, free: Sequence[int]) -> Iterator[Steps]:
        """Random kept channels, random widths, the narrowest network."""
        if not free:
            return
        units = self.graph.units
        counts = {n: units[n].channels // units[n].step for n in free}
        yield {
            n: torch.randperm(size, generator=self.random) < self._below(size)
            for n, size in counts.items()
        }
        yield {n: torch.arange(size) < self._below(size) for n, size in counts.items()}
        yield {n: torch.arange(size) < 1 for n, size in counts.items()}

    def _below(self, size: int) -> int:
        return int(torch.randint(1, size, (), generator=self.random))

    def compare_all(self, free: Sequence[int]) -> tuple[int, _Error, Steps | None]:
        """How many structures were compared, the worst error, and the first one that differs."""
        worst = _Error()
        count = 0
        for steps in self.structures(free):
            # Gradients and training follow where the forward pass does: once is enough.
            error = self.compare(steps, thorough=count == 0)
            if not self.harmless(error):
                return count, error, steps
            worst = worst.joined(error)
            count += 1
        return count, worst, None

    def harmless(self, error: _Error) -> bool:
        forward, gradient = TOLERANCES[self.dtype]
        return not error.failure and error.forward <= forward and not error.gradient > gradient

    def compare(self, steps: Steps, *, thorough: bool = True) -> _Error:
        zeroed = _zeroed(self.graph, steps)
        with torch.set_grad_enabled(thorough):
            try:
                expected = self._run(zeroed)
                small = extract_steps(self.graph, steps)
                found = self._run(small)
            except Exception as error:  # whatever the model's own code raises
                return _Error(failure=_first_line(error))
        if [output.shape for output in found] != [output.shape for output in expected]:
            return _Error(failure="the shapes of its outputs change")
        forward = _difference(found, expected)
        if not (thorough and forward <= TOLERANCES[self.dtype][0]):
            return _Error(forward)
        gradient = self._gradients(small, found, zeroed, expected, steps)
        return _Error(forward, gradient, self._difference_in_training(small, zeroed))

    def _run(self, model: nn.Module, seed: int = 0) -> list[Tensor]:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        inputs, keywords = tree_map_only(Tensor, torch.clone, (self.inputs, self.keywords))
        outputs = model(*inputs, **keywords)
        return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]

    def _difference_in_training(self, small: nn.Module, zeroed: nn.Module) -> str:
        """What is wrong with its training pass, which may run other code."""
        if not self.trains:
            return ""
        try:
            expected = self._train(zeroed, seed=0)
            found = self._train(small, seed=0)
        except Exception as error:  # whatever the model's own code raises
            return f"in training, {_first_line(error)}"
        if [output.shape for output in found] != [output.shape for output in expected]:
            return "in training, the shapes of its outputs change"
        apart = _difference(found, expected)
        # Statistics of few numbers magnify rounding; what is random cannot be compared.
        if apart <= TRAINING_TOLERANCES[self.dtype]:
            return ""
        is_random = _difference(self._train(zeroed, seed=1), expected) > apart / 2
        return "" if is_random else f"in training, its outputs differ by {apart:.1e}"

    @torch.no_grad()
    def _train(self, model: nn.Module, seed: int) -> list[Tensor]:
        """A training pass without dropout; it changes the model's buffers."""
        for module in model.train().modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return self._run(model, seed)

    def _gradients(
        self,
        small: nn.Module,
        found: Sequence[Tensor],
        zeroed: nn.Module,
        expected: Sequence[Tensor],
        steps: Steps,
    ) -> float:
        directions = [
            torch.randn(output.shape, generator=self.random, dtype=output.dtype)
            for output in expected
            if output.requires_grad
        ]
        names = [name for name in self.graph.tensors if tensor_of(small, name).requires_grad]
        try:
            theirs = _pull(zeroed, names, expected, directions)
        except RuntimeError:  # the model writes over what its gradient needs: it has none
            return math.nan
        try:
            mine = _pull(small, names, found, directions)
        except RuntimeError:  # it has none where the whole network has one
            return math.inf
        pairs = [
            (a, _cut(b, self.graph, name, steps))
            for name, a, b in zip(names, mine, theirs, strict=True)
            if a is not None and b is not None
        ]
        return _difference([a for a, _ in pairs], [b for _, b in pairs])

    def blame(self, steps: Steps) -> dict[int, str]:
        """The units that make a structure differ, each with what goes wrong."""
        found = self._halve(steps, list(steps))
        rest = [unit for unit in steps if unit not in found]
        # What is left may still fail together.
        while not self.harmless(self._error(steps, rest)):
            place = self._first_failing(steps, rest)
            found[rest[place]] = str(self._error(steps, rest[: place + 1]))
            del rest[place]
        return found

    def _halve(self, steps: Steps, units: Sequence[int]) -> dict[int, str]:
        error = self._error(steps, units)
        if self.harmless(error):
            return {}
        if len(units) == 1:
            return {units[0]: str(error)}
        middle = len(units) // 2
        return self._halve(steps, units[:middle]) | self._halve(steps, units[middle:])

    def _first_failing(self, steps: Steps, units: Sequence[int]) -> int:
        """The unit that makes the ones before it, which pass, fail."""
        passing, failing = 0, len(units)
        while failing - passing > 1:
            middle = (passing + failing) // 2
            if self.harmless(self._error(steps, units[:middle])):
                passing = middle
            else:
                failing = middle
        return failing - 1

    def _error(self, steps: Steps, units: Sequence[int]) -> _Error:
        return self.compare({unit: steps[unit] for unit in units}) if units else _Error()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _zeroed(graph: ChannelGraph, steps: Steps) -> nn.Module:
    """The whole network with the dropped channels' producing and scaling weights at zero; all other
    tensors are shared."""
    tensors: dict[int, object] = {}
    for name, axes in graph.tensors.items():
        tensor = tensor_of(graph.model, name)
        zeroed = tensor.detach().clone()
        for dim, axis in enumerate(axes):
            if axis is None or (name, dim) in graph.consumed:
                continue
            dropped = torch.ones(len(axis.unit), dtype=torch.bool)
            dropped[axis.kept(steps)] = False
            zeroed.index_fill_(dim, dropped.nonzero().flatten(), 0)
        parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(zeroed, tensor.requires_grad) if parameter else zeroed
    return copy.deepcopy(graph.model, tensors)


def _cut(gradient: Tensor, graph: ChannelGraph, name: str, steps: Steps) -> Tensor:
    for dim, axis in enumerate(graph.tensors[name]):
        if axis is not None:
            gradient = gradient.index_select(dim, axis.kept(steps))
    return gradient


def _pull(
    model: nn.Module, names: Sequence[str], outputs: Sequence[Tensor], directions: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    tensors = [tensor_of(model, name) for name in names]
    ends = [output for output in outputs if output.requires_grad]
    if not ends or not tensors:
        return [None] * len(names)
    return torch.autograd.grad(ends, tensors, list(directions), allow_unused=True)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference, relative to the largest number of the same tensor, or a thousandth of
    the largest of all if that is more; infinite where only one of them is a number."""
    largest = [float(b.detach().abs().max()) if b.numel() else 0.0 for b in expected]
    least = 1e-3 * max(largest, default=0.0) or 1.0
    worst = 0.0
    for a, b, scale in zip(found, expected, largest, strict=True):
        apart = 0.0
        if not b.is_floating_point():
            apart = 0.0 if torch.equal(a, b) else math.inf
        elif b.numel():
            apart = float((a.detach() - b.detach()).abs().max()) / max(scale, least)
        worst = max(worst, math.inf if math.isnan(apart) else apart)
    return worst
