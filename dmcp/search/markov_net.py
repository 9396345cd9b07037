"""The user's network with one Markov chain per channel unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dmcp.cost import Cost
from dmcp.errors import ConfigError, TraceError
from dmcp.graph import ChannelGraph, ChannelUnit, check_widths, trace
from dmcp.graph.units import AxisMap
from dmcp.nn import (
    Axis,
    ComposedAxis,
    MarkovBatchNorm2d,
    MarkovChain,
    MarkovConv2d,
    MarkovLinear,
    width_choices,
)
from dmcp.nn.axis import scale_channels
from dmcp.nn.batchnorm import ACTIVATIONS
from dmcp.nn.chain import scaled
from dmcp.nn.conv import share_tensors
from dmcp.ops import CostTable, ExpectedCost, expected_cost, retain
from dmcp.search.mask_sites import fusable_activations, mask_sites


class MarkovNet(nn.Module):
    """A traced network whose units follow Markov chains.

    Its weights *are* the user's: parameters and buffers are shared with ``model``, whose modules
    stay untouched, so that ``dmcp.extract(net.graph, widths)`` inherits what was trained. Unless
    told otherwise, it computes what ``model`` computes, bit for bit; inside ``net.at(widths)`` it
    is the sub-network of these widths, inside ``net.masked()`` the full-width network with every
    channel scaled by its retain probability.

    Args:
        model: the network, already on its device.
        example_inputs: as for `dmcp.trace`.
        groups, divisor, min_width: the widths of every unit, see `dmcp.nn.width_choices`.

    Attributes:
        graph: the `ChannelGraph`, each unit's ``choices`` restricted to its grid.
        chains: unit name (with ``/`` for ``.``) -> `MarkovChain`, searchable units only.

    Raises:
        TraceError: see `dmcp.trace`; also if no unit is left to search.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Tensor, ...],
        groups: int = 10,
        divisor: int = 8,
        min_width: int = 1,
    ) -> None:
        super().__init__()
        graph = trace(model, example_inputs)
        units = tuple(_on_grid(unit, groups, divisor, min_width) for unit in graph.units)
        self.graph: ChannelGraph = replace(graph, units=units)
        first = next(model.parameters())
        self.chains = nn.ModuleDict(
            {
                _key(unit.name): MarkovChain(
                    unit.channels, choices=unit.choices, device=first.device
                )
                for unit in self.graph.searchable
            }
        )
        if not len(self.chains):
            raise TraceError(f"{type(model).__name__} has no unit whose width could be searched")
        self._table = self.cost_table(())
        shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared)
        self._install()
        modules = self.model.modules()
        self._norms = [module for module in modules if isinstance(module, MarkovBatchNorm2d)]

    def forward(self, *inputs: Tensor) -> Any:
        """As the user's model."""
        return self.model(*inputs)

    def chain(self, unit: str) -> MarkovChain:
        """The chain of a unit, by its name.

        Raises:
            KeyError: no searchable unit has this name.
        """
        chain = self.chains[_key(unit)]
        assert isinstance(chain, MarkovChain)
        return chain

    def weight_parameters(self) -> list[nn.Parameter]:
        """The user's parameters."""
        return list(self.model.parameters())

    def architecture_parameters(self) -> list[nn.Parameter]:
        """α of every chain, in the order of the units."""
        return [chain.alpha for chain in self.chains.values()]  # type: ignore[misc]

    @contextmanager
    def at(self, widths: Mapping[str, int] | None = None) -> Iterator[None]:
        """Be the sub-network of ``widths`` (None: the widest) while the context is open.

        Raises:
            ConfigError: see `dmcp.graph.check_widths`.
        """
        full = check_widths(self.graph.units, widths or {})
        before = {name: chain.width for name, chain in self._named_chains()}
        try:
            self._set_widths(full)
            yield
        finally:
            self._set_widths(before)

    @contextmanager
    def masked(self, table: CostTable | None = None) -> Iterator[ExpectedCost]:
        """Scale every channel by its retain probability while the context is open.

        Args:
            table: as for `expected_cost`, whose result this yields: the masks are parts of it, so
                that one backward goes through both.
        """
        expected = self.expected_cost(table)
        masks = expected.scale.split([unit.channels for unit in self.graph.units])
        of_unit = {unit.name: mask for unit, mask in zip(self.graph.units, masks, strict=True)}
        try:
            with scaled([(chain, of_unit[name]) for name, chain in self._named_chains()]):
                self._set_tracking()
                yield expected
        finally:
            self._set_tracking()

    def cost_table(self, costs: Sequence[Cost]) -> CostTable:
        """What `expected_cost` needs to know about costs of ``graph``. Build it once."""
        return CostTable.of(
            [unit.choices for unit in self.graph.units],
            [cost.coefficients() for cost in costs],
            self.architecture_parameters()[0].device,
        )

    def expected_cost(self, table: CostTable | None = None) -> ExpectedCost:
        """Everything about the chains as they are now, by one operator: retain probabilities, the
        scale of every channel, the moments of the widths and, with a table of `cost_table`, mean
        and variance of its costs. Differentiable."""
        return expected_cost(torch.cat([*self.architecture_parameters()]), table or self._table)

    def retain(self) -> Tensor:
        """q of all chains, concatenated in the order of the units: [T], differentiable."""
        return retain(torch.cat([*self.architecture_parameters()]), self._table.offsets)

    def width_moments(self, orders: int = 2) -> Tensor:
        """E[c], E[c²], … of every unit of ``graph.units``: float64 [U, orders], differentiable.

        Raises:
            ConfigError: ``orders`` is not 1, 2, 3 or 4.
        """
        if orders not in range(1, 5):
            raise ConfigError(f"orders must be 1, 2, 3 or 4, got {orders!r}")
        return self.expected_cost().moments[:orders].T

    def expected_widths(self) -> dict[str, float]:
        """E[c] of every unit."""
        means = self.expected_cost().widths.tolist()
        return {unit.name: mean for unit, mean in zip(self.graph.units, means, strict=True)}

    def _named_chains(self) -> Iterator[tuple[str, MarkovChain]]:
        for unit in self.graph.units:
            if _key(unit.name) in self.chains:
                yield unit.name, self.chain(unit.name)

    def _set_widths(self, widths: Mapping[str, int]) -> None:
        for name, chain in self._named_chains():
            chain.width = widths[name]
        self._set_tracking()

    def _set_tracking(self) -> None:
        """Running statistics are the widest, unmasked network's, also of norms without a chain."""
        chains = [chain for _, chain in self._named_chains()]
        whole = all(chain.keep() is None and chain.mask is None for chain in chains)
        for norm in self._norms:
            norm.tracks = whole

    def _install(self) -> None:
        """Replace the modules that units reach by ones that follow chains."""
        sites = mask_sites(self.graph.nodes)
        for name, axes in self.graph.modules.items():
            module = self.model.get_submodule(name)
            inputs, outputs = self._axis(axes.inputs), self._axis(axes.outputs)
            follower = _follower(name, module, inputs, outputs, masks=name in sites)
            self.model.set_submodule(name, follower)
        for norm, site in fusable_activations(self.graph.nodes).items():
            self._fuse(norm, site, sites)
        for site, owner in sites.items():
            axis = self._axis(self.graph.modules[owner].outputs)
            if site not in self.graph.modules and axis is not None:
                masked_site = nn.Sequential(self.model.get_submodule(site), _Mask(axis))
                self.model.set_submodule(site, masked_site)

    def _fuse(self, norm: str, site: str, sites: dict[str, str]) -> None:
        """Let a norm compute the activation at ``site``, and apply the mask that sits there."""
        follower, module = self.model.get_submodule(norm), self.model.get_submodule(site)
        act = ACTIVATIONS.get(type(module))
        watched = any(vars(m)[key] for m in (follower, module) for key in vars(m) if "hooks" in key)
        if not isinstance(follower, MarkovBatchNorm2d) or act is None or watched:
            return
        follower.act = act
        if sites.pop(site, None) is not None:
            follower.masks = True
        self.model.set_submodule(site, nn.Identity())

    def _axis(self, axis: AxisMap) -> Axis | None:
        parts = []
        for number, unit in enumerate(self.graph.units):
            positions = (axis.unit == number).nonzero().flatten()
            if len(positions) and _key(unit.name) in self.chains:
                parts.append((self.chain(unit.name), positions, axis.index[positions]))
        if not parts:
            return None
        chain, positions, index = parts[0]
        size = len(axis.unit)
        if len(positions) == size == chain.channels and torch.equal(index, positions):
            return chain
        return ComposedAxis(size, parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MarkovNet:
        """Moving or casting the net replaces buffers: hand the new ones to the user's model too."""
        super()._apply(fn, recurse)
        buffers = dict(self.model.named_buffers())
        for name, module in self.graph.model.named_modules():
            for key in list(module._buffers):
                moved = buffers.get(f"{name}.{key}" if name else key)
                if moved is not None:
                    module._buffers[key] = moved
        alpha = self.architecture_parameters()[0]
        if alpha.device != self._table.offsets.device:
            self._table = self._table.to(alpha.device)
        return self


class _Mask(nn.Module):
    """Scales its input by the mask of an axis."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self._axes: tuple[Axis] = (axis,)

    def forward(self, x: Tensor) -> Tensor:
        return scale_channels(x, self._axes[0].mask, self._axes[0].keep(), 1)


def _key(unit: str) -> str:
    """A unit's key in a ModuleDict, whose keys may not hold dots."""
    return unit.replace(".", "/")


def _on_grid(unit: ChannelUnit, groups: int, divisor: int, min_width: int) -> ChannelUnit:
    grid = set(width_choices(unit.channels, groups, divisor, min_width))
    choices = tuple(width for width in unit.choices if width in grid)
    if unit.searchable and len(choices) == 1:
        reason = "no narrower width lies on its grid"
        return replace(unit, choices=choices, searchable=False, reason=reason)
    return replace(unit, choices=choices)


_REPLACED = (nn.BatchNorm2d, nn.Conv2d, nn.Linear)


def _follower(
    name: str, module: nn.Module, inputs: Axis | None, outputs: Axis | None, *, masks: bool
) -> nn.Module:
    """The module that computes what ``module`` does, on the same tensors, and follows the axes.

    Raises:
        TraceError: its class has a forward of its own, which would be lost.
    """
    if not any(type(module).forward is kind.forward for kind in _REPLACED):
        raise TraceError(
            f"{name} ({type(module).__name__}) cannot follow a Markov chain: "
            "its class has a forward of its own"
        )
    follower: MarkovBatchNorm2d | MarkovConv2d | MarkovLinear
    if isinstance(module, nn.BatchNorm2d):
        follower = MarkovBatchNorm2d(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            device="meta",
        )
        follower._axes = (outputs,)
    elif isinstance(module, nn.Conv2d):
        follower = MarkovConv2d(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
            chain=None,
        )
        follower._axes = (inputs, outputs)
    else:
        assert isinstance(module, nn.Linear)
        follower = MarkovLinear(
            module.in_features,
            module.out_features,
            module.bias is not None,
            device="meta",
            chain=None,
        )
        follower._axes = (inputs, outputs)
    follower.masks = masks
    share_tensors(module, follower)
    vars(follower).update({key: value for key, value in vars(module).items() if "hooks" in key})
    return follower.train(module.training)
