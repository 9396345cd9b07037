"""The user's network with one Markov chain per channel unit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from math import lcm
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmcp.cost import Cost
from dmcp.errors import ConfigError, TraceError
from dmcp.graph import ChannelGraph, ChannelUnit, check_widths, trace
from dmcp.graph.tensors import tensor_of
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
from dmcp.nn.axis import length, scale_channels, select
from dmcp.nn.batchnorm import ACTIVATIONS, FusedActivation, HandoverError
from dmcp.nn.chain import PassState, scaled
from dmcp.nn.conv import share_tensors
from dmcp.ops import CostTable, ExpectedCost, expected_cost, retain
from dmcp.search.mask_sites import MaskSites, fusable, mask_sites
from dmcp.search.net_costs import NetCosts, net_costs


class MarkovNet(nn.Module):
    """A traced network whose units follow Markov chains.

    Its weights *are* the user's: parameters and buffers are shared with ``model``, whose modules
    stay untouched, so that ``dmcp.extract(net.graph, widths)`` inherits what was trained. Unless
    told otherwise, it computes what ``model`` computes (with the eager ops bit for bit); inside
    ``net.at(widths)`` it is the sub-network of these widths, inside ``net.masked()`` the full-width
    network with every channel scaled by its retain probability.

    Args:
        model: the network, already on its device.
        example_inputs: as for `dmcp.trace`.
        groups, divisor, min_width: the widths of every unit, see `dmcp.nn.width_choices`; with
            ``groups=None`` they are the choices of the graph.
        graph: what `dmcp.trace` returned for this model, instead of ``example_inputs``: to exclude
            or tie units.

    Attributes:
        chain_class: what chains are made of; a subclass may choose another process.
        graph: the `ChannelGraph`, each unit's ``choices`` restricted to its grid.
        chains: unit name (with ``/`` for ``.``) -> `MarkovChain`, searchable units only.

    Raises:
        TraceError: see `dmcp.trace`; also if no unit is left to search.
        ConfigError: both or neither of ``example_inputs`` and ``graph``, or another model's graph.
    """

    chain_class: ClassVar[type[MarkovChain]] = MarkovChain

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
        groups: int | None = 10,
        divisor: int = 8,
        min_width: int = 1,
        *,
        graph: ChannelGraph | None = None,
    ) -> None:
        super().__init__()
        _leave_to_itself()
        if example_inputs is not None and graph is None:
            graph = trace(model, example_inputs)
        elif example_inputs is not None or graph is None:
            raise ConfigError("MarkovNet: give either example_inputs or graph")
        if graph.model is not model:
            raise ConfigError("graph: it is of another model")
        sites = mask_sites(graph.nodes)
        unmasked = {u for n in sites.missing for _, a in graph.nodes[n].axes for u in a.units}
        units = tuple(
            _without_site(unit)
            if number in unmasked
            else _on_grid(unit, groups, divisor, min_width)
            for number, unit in enumerate(graph.units)
        )
        self.graph: ChannelGraph = replace(graph, units=units)
        if not self.graph.searchable:
            raise TraceError(f"{type(model).__name__} has no unit whose width could be searched")
        device = next(model.parameters()).device
        self.chains = nn.ModuleDict(
            {
                _key(unit.name): self.chain_class(
                    unit.channels, choices=unit.choices, device=device
                )
                for unit in self.graph.searchable
            }
        )
        self._state = PassState()
        self._leads: dict[MarkovBatchNorm2d, MarkovConv2d] = {}
        self._handing: list[MarkovBatchNorm2d | FusedActivation] = []
        self._handed_over = False
        self._table = CostTable.of([unit.choices for unit in units], device=device)
        self._install(sites)
        for module in self.model.modules():
            if isinstance(module, MarkovBatchNorm2d | MarkovConv2d | MarkovLinear):
                module.state = self._state
            if isinstance(module, MarkovBatchNorm2d | FusedActivation):
                self._handing.append(module)
        self._set_tracking()

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """As the user's model. ``torch.compile`` leaves it as it is.

        Raises:
            HandoverError: the model's code does something else between a convolution and its norm
                in this pass of training than it did in the first one.
        """
        if self._handed_over or not self.training:
            return self._pass(*inputs, **keywords)
        # The trace is of an evaluation; what the code does in training only shows now.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        generators = _generators()
        while not self._handed_over:
            try:
                result = self._pass(*inputs, **keywords)
                self._handed_over = True
            except HandoverError as error:
                self._part(error.norm)
                _set_generators(generators)
                with torch.no_grad():
                    for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                        buffer.copy_(before)
        return result

    def _pass(self, *inputs: Any, **keywords: Any) -> Any:
        for module in self._handing:
            module.handed.give(None)
        if self._state.tracks or not self._loose:
            result = self.model(*inputs, **keywords)
        else:
            tensors = {name: loose.now(self.model) for name, loose in self._loose.items()}
            result = functional_call(self.model, tensors, inputs, keywords)
        for module in self._handing:
            if module.handed.take() is not None:
                raise HandoverError(module)
        return result

    def _part(self, norm: nn.Module) -> None:
        """Let a norm, and the modules around it, compute themselves from now on."""
        if isinstance(norm, FusedActivation):
            norm.part()
            return
        assert isinstance(norm, MarkovBatchNorm2d)
        if norm in self._leads:
            self._leads.pop(norm).lead(None)
        (follower,) = norm._followers
        if follower is not None:
            follower.part()

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

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those of the user's parameters that the traced computation reads."""
        names = {name for node in self.graph.nodes for name in node.parameters}
        return [p for name, p in self.model.named_parameters() if name in names]

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
    def masked(self, table: CostTable | NetCosts | None = None) -> Iterator[ExpectedCost]:
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

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """While this context is open, forward passes decide that their backward adds the gradients
        of weights straight to the ``.grad`` that these have, in a sub-network to a part of it,
        where autograd would make one of the full size, mostly zeros, for each.

        The gradients are the same, if ``.grad`` stays until the backward. Autograd does not see
        them: ``torch.autograd.grad``, hooks of parameters and ``DistributedDataParallel`` need
        passes outside.
        """
        before = self._state.accumulates
        try:
            self._state.accumulates = True
            yield
        finally:
            self._state.accumulates = before

    def cost_table(self, costs: Sequence[Cost]) -> CostTable | NetCosts:
        """What `expected_cost` needs to know about costs of ``graph``. Build it once."""
        choices = [unit.choices for unit in self.graph.units]
        return net_costs(choices, costs, self.architecture_parameters()[0].device)

    def expected_cost(self, table: CostTable | NetCosts | None = None) -> ExpectedCost:
        """Everything about the chains as they are now, by one operator: retain probabilities, the
        scale of every channel, the moments of the widths and, with a table of `cost_table`, mean
        and variance of its costs. Differentiable. Measured costs take a few more operations."""
        alpha = torch.cat([*self.architecture_parameters()])
        if isinstance(table, NetCosts):
            return table.complete(expected_cost(alpha, table.polynomials))
        return expected_cost(alpha, table or self._table)

    def transitions(self) -> Tensor:
        """p of all chains, concatenated in the order of the units: [T], without gradient."""
        with torch.no_grad():
            return torch.cat([*self.architecture_parameters()]).sigmoid()

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
        for unit, chain in zip(self.graph.searchable, self.chains.values(), strict=True):
            assert isinstance(chain, MarkovChain)
            yield unit.name, chain

    def _set_widths(self, widths: Mapping[str, int]) -> None:
        for name, chain in self._named_chains():
            chain.width = widths[name]
        self._set_tracking()

    def _set_tracking(self) -> None:
        """Running statistics are the widest, unmasked network's, also of norms without a chain."""
        chains = [chain for _, chain in self._named_chains()]
        self._state.tracks = all(chain.keep() is None and chain.mask is None for chain in chains)
        for size, axis in self._sizes:
            kept = axis.keep()
            whole = len(size.axis.unit)
            size.set(self.model.get_submodule(size.module), whole if kept is None else length(kept))

    def _install(self, sites: MaskSites) -> None:
        """Replace the modules that stand for one operator by ones that follow chains; scale the
        outputs of other modules at the sites; remember the tensors that are left."""
        graph, original = self.graph, self.graph.model
        followed = {name for name in graph.modules if _can_follow(original.get_submodule(name))}
        # In the memo of the copy, so that they stand wherever the model holds the module.
        copies: dict[int, Any] = {id(t): t for t in [*original.parameters(), *original.buffers()]}
        followers = {}
        for name in followed:
            axes, module = graph.modules[name], original.get_submodule(name)
            inputs = self._axis(axes.inputs) if axes.inputs is not None else None
            masks = name in sites.modules
            follower = _follower(module, inputs, self._axis(axes.outputs), masks=masks)
            copies[id(module)] = followers[name] = follower
        placed = dict(sites.modules)
        joined = fusable(graph.nodes)
        for norm, site in joined.activations.items():
            fused, module = followers.get(norm), original.get_submodule(site)
            if isinstance(fused, MarkovBatchNorm2d) and _fuse(fused, module):
                copies[id(module)] = FusedActivation(fused, module).train(module.training)
                fused.masks = placed.pop(site, None) is not None or fused.masks
        for conv, norm in joined.norms.items():
            leading, following = followers.get(conv), followers.get(norm)
            if conv not in placed and _can_lead(leading, following):
                leading.lead(following)  # type: ignore[union-attr, operator]
                self._leads[following] = leading  # type: ignore[index, assignment]
        self.model = copy.deepcopy(original, copies)
        for site, number in placed.items():
            ((dim, channels),) = graph.nodes[number].axes
            axis = self._axis(channels)
            if site not in followed and axis is not None:
                self.model.get_submodule(site).register_forward_hook(_Scale(axis, dim))
        self._loose = self._loose_tensors(followed, sites)
        sizes = [size for size in graph.sizes if size.module not in followed]
        axes_of = [(size, self._axis(size.axis)) for size in sizes]
        self._sizes = [(size, axis) for size, axis in axes_of if axis is not None]

    def _loose_tensors(self, followed: set[str], sites: MaskSites) -> dict[str, _Loose]:
        """The parameters and buffers that no replaced module holds, by their names."""
        held = {
            id(tensor)
            for name in followed
            for tensor in self.graph.model.get_submodule(name).state_dict(keep_vars=True).values()
        }
        kept: dict[str, _Loose] = {}
        for name, maps in self.graph.tensors.items():
            tensor = tensor_of(self.graph.model, name)
            if id(tensor) in held:
                continue
            axes = [self._axis(axis) if axis is not None else None for axis in maps]
            node = sites.parameters.get(name)
            made = [] if node is None else self.graph.nodes[node].axes
            scaled = [
                dim
                for dim, axis in enumerate(axes)
                if axis is not None and made and (name, dim) not in self.graph.consumed
            ]
            is_buffer = not isinstance(tensor, nn.Parameter)
            if is_buffer or any(axis is not None for axis in axes):
                kept[name] = _Loose(name, tuple(axes), tuple(scaled), is_buffer)
        return kept

    def _axis(self, axis: AxisMap) -> Axis | None:
        parts = []
        for number, positions in axis.units.items():
            unit = self.graph.units[number]
            if _key(unit.name) in self.chains:
                index = axis.index[positions] * unit.step
                parts.append((self.chain(unit.name), positions.nonzero().flatten(), index))
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


@cache
def _leave_to_itself() -> None:
    """Keep ``torch.compile`` out of every net. Compiled, each structure would be a program of its
    own, half a minute each; what a compiler would fuse is fused. Code around a net compiles,
    without a look at the widths. Not at import, as it loads the compiler."""
    MarkovNet.forward = torch.compiler.disable(MarkovNet.forward)  # type: ignore[method-assign]


def _generators() -> list[Tensor]:
    """The states of torch's global generators, of the CPU and of every GPU in use."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]


def _set_generators(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


@dataclass(frozen=True)
class _Scale:
    """A forward hook that scales a module's output by the mask of an axis."""

    axis: Axis
    dim: int

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return scale_channels(output, self.axis.mask, self.axis.keep(), self.dim)


@dataclass(frozen=True)
class _Loose:
    """A parameter or buffer that the model's own code uses as it likes.

    Attributes:
        axes: what each dimension follows.
        scaled: the dimensions along which the mask is folded into it.
        is_buffer: sub-networks and masked networks change a copy.
    """

    name: str
    axes: tuple[Axis | None, ...]
    scaled: tuple[int, ...]
    is_buffer: bool

    def now(self, model: nn.Module) -> Tensor:
        """What the present widths and masks make of it."""
        tensor = tensor_of(model, self.name)
        tensor = tensor.clone() if self.is_buffer else tensor
        for dim, axis in enumerate(self.axes):
            if axis is None:
                continue
            keep = axis.keep()
            tensor = select(tensor, dim, keep)
            if dim in self.scaled:
                tensor = scale_channels(tensor, axis.mask, keep, dim)
        return tensor


def _key(unit: str) -> str:
    """A unit's key in a ModuleDict, whose keys may not hold dots, nor be names it has itself."""
    key = unit.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


def _without_site(unit: ChannelUnit) -> ChannelUnit:
    reason = unit.reason or "no module or parameter could scale its channels"
    return replace(unit, choices=(unit.channels,), searchable=False, reason=reason)


def _on_grid(unit: ChannelUnit, groups: int | None, divisor: int, min_width: int) -> ChannelUnit:
    """The unit with its choices restricted to a grid, of multiples of both divisor and step where
    there is room for them, else of the step."""
    if not unit.searchable or groups is None:
        return unit
    for multiple in (lcm(divisor, unit.step), unit.step):
        grid = set(width_choices(unit.channels, groups, multiple, min_width))
        choices = tuple(width for width in unit.choices if width in grid)
        if len(choices) > 1:
            return replace(unit, choices=choices)
    reason = "no narrower width lies on its grid"
    return replace(unit, choices=(unit.channels,), searchable=False, reason=reason)


_ATTRIBUTES: dict[type[nn.Module], set[str]] = {
    type(plain): set(vars(plain))
    for plain in (nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1), nn.Linear(1, 1))
}
_REPLACED = tuple(_ATTRIBUTES)


def _fuse(norm: MarkovBatchNorm2d, module: nn.Module) -> bool:
    """Let a norm compute the activation behind it, if it can and nobody watches either."""
    act = ACTIVATIONS.get(type(module))
    if act is None or _are_watched(norm, module):
        return False
    norm.act = act
    return True


def _can_lead(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether a convolution may compute the norm behind it: nobody watches either."""
    if not isinstance(conv, MarkovConv2d) or not isinstance(norm, MarkovBatchNorm2d):
        return False
    return not _are_watched(conv, norm)


def _are_watched(*modules: nn.Module) -> bool:
    return any(vars(module)[key] for module in modules for key in vars(module) if "hooks" in key)


def _can_follow(module: nn.Module) -> bool:
    """Whether one of the package's modules computes what this one does, at every width."""
    # A subclass, or an instance with more on it, may mean something else by the same operator.
    if type(module) not in _REPLACED or not vars(module).keys() <= _ATTRIBUTES[type(module)]:
        return False
    return not isinstance(module, nn.Conv2d) or module.groups in (1, module.in_channels)


def _follower(
    module: nn.Module, inputs: Axis | None, outputs: Axis | None, *, masks: bool
) -> nn.Module:
    """The module that computes what ``module`` does, on the same tensors, and follows the axes."""
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
