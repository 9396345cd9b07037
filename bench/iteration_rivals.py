"""Who runs an iteration of a search in `iteration.py`, all with the same mathematics.

* ``ours``: `dmcp.Search.step`;
* ``graphs``: the same with ``cuda_graphs``, on CUDA alone;
* ``float32``: the same without autocast, beside ``ours`` in half precision;
* ``published``: the way of the paper's released code: NCHW; the mask moves the channels to the
  front and back; the architecture pass computes the gradients of the weights too; expected MACs
  layer by layer and Markov sampling group by group on the host; losses and accuracies are read
  after every pass;
* ``eager``: what PyTorch alone allows: channels last, masks folded into γ and β or one multiply,
  frozen weights, expected MACs in closed form, fused optimisers, nothing read by the host;
* ``compile``: ``eager`` with its fixed-width passes (widest, narrowest, architecture) under
  ``torch.compile``. Random widths stay eager, as each of them would be compiled anew.

``graphs`` and ``float32`` draw their own random widths, from the same seed but from chains that may
have gone another way; all others take those of ``ours``.

Where the released code does other mathematics, ``published`` does it our way: a mask stands in
front of every dense layer, once (there, both expansion and depthwise convolution of MobileNetV2 are
masked, 52 masks for 35); a depthwise layer's MACs have their true gradient, not twice that; groups
may differ in size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import dmcp
from dmcp.cost import cost
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.graph.units import AxisMap
from dmcp.search.budget_loss import BudgetLoss
from dmcp.search.mask_sites import mask_sites
from dmcp.train.cuda_graphs import WARM_UP
from dmcp.train.loss import cross_entropy, distillation
from dmcp.train.optim import set_lr, sgd

PASSES = ("widest", "narrowest", "architecture")
STEPS, START = 1_000_000, 500_000
"""Every turn starts in the middle of a search that no turn ends."""
BUDGET = dmcp.Budget(macs="50%")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-2}
"""Largest ‖result - reference‖ / ‖reference‖ of a rival that may be timed.

In float64 it holds the mathematics; in float32 it leaves room for rounding, which moves values
across the kinks of the activations and which the gradients of a deep network amplify.
"""

Widths = Mapping[str, int]


def options(stage: int) -> dmcp.SearchOptions:
    """The published budget loss and optimisers, chains whose expected cost is near the budget; in
    the second stage every other random sub-network comes from the chains."""
    return dmcp.SearchOptions(
        warmup=0.9 if stage == 1 else 0.0,
        uniform_share=0.25,  # halfway its root
        start=0.9,
        anneal=0.0,
        match_scale=False,
        arch_optimizer="sgd",
        budget_loss="log_l1",
        budget_weight=0.1,
        tolerance=0.05,
    )


class Rival(Protocol):
    """One side of the comparison; it trains the model that it is given.

    Attributes:
        warm_up: iterations that it takes, besides those of every rival, to run as it will.
        in_float32: whatever the case asks for.
    """

    memory_format: torch.memory_format
    warm_up: int
    in_float32: bool
    model: nn.Module
    graph: ChannelGraph

    def begin(self, seed: int, widths: Sequence[Widths] = ()) -> None:
        """Start a turn: the random widths of its iterations follow from the seed; a rival replaces
        those that it has drawn by ``widths``, as long as there are some."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One iteration."""

    def loss(self, name: str, images: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """The forward half of one of `PASSES`, as `step` does it."""

    def architecture_parameters(self) -> list[nn.Parameter]:
        """α of all units."""


class Ours:
    memory_format = torch.channels_last
    warm_up = 0
    in_float32 = False
    cuda_graphs = False

    def __init__(self, model: nn.Module, graph: ChannelGraph, stage: int) -> None:
        self.model = model
        self.net = dmcp.MarkovNet(model, graph=replace(graph, model=model))
        self.graph = self.net.graph
        chosen = replace(options(stage), cuda_graphs=self.cuda_graphs)
        self.search = dmcp.Search(self.net, BUDGET, STEPS, chosen)
        self._budget_loss = _budget_loss(self.search.options)
        self._table = self.net.cost_table(self.search.targets.costs)
        self.drawn: list[Widths] = []
        self._narrowest = _narrowest(graph)
        self._at = self.net.at
        self.net.at = self._record  # type: ignore[method-assign]

    def begin(self, seed: int, widths: Sequence[Widths] = ()) -> None:
        self.search.generator.manual_seed(seed)
        self.search.step_index = START
        self.drawn = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.search.step(images, labels)

    def _record(self, widths: Widths) -> AbstractContextManager[None]:
        """Remember the random widths, for the others to take."""
        if widths != self._narrowest:
            self.drawn.append(widths)
        return self._at(widths)

    def loss(self, name: str, images: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        if name == "widest":
            return cross_entropy(self.net(images), labels)
        if name == "narrowest":
            with self._at(self._narrowest):
                return distillation(self.net(images), teacher)
        with _frozen(self.model), self.net.masked(self._table) as expected:
            ratios = self.search.targets.ratios(expected.cost)
            return cross_entropy(self.net(images), labels) + self._budget_loss(ratios)

    def architecture_parameters(self) -> list[nn.Parameter]:
        return self.net.architecture_parameters()


class Graphs(Ours):
    """Draws its own random widths, as ``ours`` does."""

    warm_up = WARM_UP
    cuda_graphs = True


class Float32(Ours):
    """What half precision is held against, in the same turns. Draws its own random widths, too."""

    in_float32 = True


# --- Sliced networks ------------------------------------------------------------------------------


@dataclass(eq=False)
class Unit:
    """What the layers of a channel unit look at.

    Attributes:
        width: channels they compute now.
        scale: retain probability of each channel while the mask is on.
        alpha: of a chain of its own.
    """

    choices: tuple[int, ...]
    width: int
    scale: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def sizes(self) -> list[int]:
        """Of the groups behind the base."""
        return [b - a for a, b in pairwise(self.choices)]


@dataclass
class Now:
    """Whether this pass updates running statistics; whether masks are on."""

    tracks: bool = True
    masked: bool = False


class SlicedConv2d(nn.Conv2d):
    unit: Unit

    def forward(self, x: Tensor) -> Tensor:
        depthwise = self.groups > 1
        sizes = (x.shape[1],) if depthwise else (self.unit.width, x.shape[1])
        groups = x.shape[1] if depthwise else 1
        weight = _prefix(self.weight, *sizes)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


class SlicedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _prefix(self.weight, self.out_features, x.shape[1]), self.bias)


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """With the unit's scale folded into γ and β if it has the mask."""

    now: Now
    mask: Unit | None

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight, bias = _prefix(self.weight, channels), _prefix(self.bias, channels)
        if self.mask is not None and self.mask.scale is not None:
            weight, bias = weight * self.mask.scale, bias * self.mask.scale
        mean, var = None, None
        if self.now.tracks:
            mean = _prefix(self.running_mean, channels)
            var = _prefix(self.running_var, channels)
        return F.batch_norm(x, mean, var, weight, bias, True, self.momentum, self.eps)


def _prefix(tensor: Tensor, *sizes: int) -> Tensor:
    """The first so many along each dimension; the tensor itself where that is all of it."""
    if tensor.shape[: len(sizes)] == sizes:
        return tensor
    return tensor[tuple(slice(size) for size in sizes)]


_SLICED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: SlicedConv2d,
    nn.Linear: SlicedLinear,
    nn.BatchNorm2d: SlicedBatchNorm2d,
}


class Sliced:
    """An iteration over a network whose layers cut their weights; what the rivals share."""

    memory_format = torch.channels_last
    warm_up = 0
    in_float32 = False
    fused = True

    def __init__(self, model: nn.Module, graph: ChannelGraph, stage: int) -> None:
        self.model, self.graph, self.stage = model, graph, stage
        self.options = options(stage)
        self.targets = BUDGET.of(graph)
        self.units = [Unit(unit.choices, unit.channels) for unit in graph.units]
        self.now = Now()
        self.generator = torch.Generator()
        self._narrowest = _narrowest(graph)
        for name, axes in graph.modules.items():
            module: Any = model.get_submodule(name)
            module.__class__ = _SLICED[type(module)]
            module.now, module.mask, module.unit = self.now, None, self._unit(axes.outputs)
        for site, number in mask_sites(graph.nodes).modules.items():
            ((_, channels),) = graph.nodes[number].axes
            unit = self._unit(channels)
            assert unit is not None
            self._place_mask(model.get_submodule(site), unit)
        self.optimizer = self._weight_optimizer()
        self.arch_optimizer = torch.optim.SGD(
            self.architecture_parameters(),
            lr=self.options.arch_lr.at(0.0),
            momentum=0.9,
            nesterov=True,
            fused=self.fused,
        )

    def begin(self, seed: int, widths: Sequence[Widths] = ()) -> None:
        self.generator.manual_seed(seed)
        self._replay = iter(widths)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.model.train()
        set_lr(self.optimizer, self.options.lr.at(START / STEPS))
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self.widest(images, labels)
        loss.backward()
        self._report(loss, logits, labels)
        teacher = logits.detach()
        subnets = [(self.narrowest, self._narrowest)]
        subnets += [(self.subnet, next(self._replay, widths)) for widths in self._draw()]
        for forward, widths in subnets:
            with self._at(widths):
                loss, logits = forward(images, teacher)
            loss.backward()
            self._report(loss, logits, labels)
        self.optimizer.step()
        if self.stage == 2:
            self._architecture_step(images, labels)

    def loss(self, name: str, images: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        if name == "widest":
            return self.widest(images, labels)[0]
        if name == "narrowest":
            with self._at(self._narrowest):
                return self.narrowest(images, teacher)[0]
        task, budget, _ = self._masked(images, labels)
        return task + budget

    def widest(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        return cross_entropy(logits, labels), logits

    def subnet(self, images: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        return distillation(logits, teacher), logits

    narrowest = subnet

    def _architecture_step(self, images: Tensor, labels: Tensor) -> None:
        set_lr(self.arch_optimizer, self.options.arch_lr.at(START / STEPS))
        self.arch_optimizer.zero_grad(set_to_none=True)
        task, budget, logits = self._masked(images, labels)
        (task + budget).backward()
        self._report(task, logits, labels)
        self.arch_optimizer.step()

    @contextmanager
    def _at(self, widths: Widths) -> Iterator[None]:
        try:
            self._set_widths(widths)
            yield
        finally:
            self._set_widths(self.graph.widths())

    def _set_widths(self, widths: Widths) -> None:
        for unit, width in zip(self.units, widths.values(), strict=True):
            unit.width = width

    def _unit(self, axis: AxisMap) -> Unit | None:
        numbers = list(axis.units)
        return self.units[numbers[0]] if numbers else None

    def _weight_optimizer(self) -> torch.optim.SGD:
        options = self.options
        groups = sgd(self.model, options.lr, options.momentum, options.weight_decay).param_groups
        kept = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        return torch.optim.SGD(
            kept, lr=options.lr.at(0), momentum=options.momentum, nesterov=True, fused=self.fused
        )

    def architecture_parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def _place_mask(self, module: nn.Module, unit: Unit) -> None:
        raise NotImplementedError

    def _masked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Task loss, budget loss and logits of the masked network."""
        raise NotImplementedError

    def _draw(self) -> Iterator[Widths]:
        """Each uniform or, in the second stage, from the chains."""
        share = 1.0 if self.stage == 1 else self.options.uniform_share ** (START / STEPS)
        for uniform in (torch.rand(2, generator=self.generator) < share).tolist():
            yield self._uniform() if uniform else self._chain()

    def _uniform(self) -> Widths:
        drawn = torch.rand(len(self.units), generator=self.generator).tolist()
        return {
            unit.name: unit.choices[int(u * len(unit.choices))]
            for unit, u in zip(self.graph.units, drawn, strict=True)
        }

    def _chain(self) -> Widths:
        raise NotImplementedError

    def _report(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        raise NotImplementedError


class Published(Sliced):
    memory_format = torch.contiguous_format
    fused = False

    def architecture_parameters(self) -> list[nn.Parameter]:
        if self.units[0].alpha is None:
            device = next(self.model.parameters()).device
            logit = torch.tensor(self.options.start).logit().item()
            for unit in self.units:
                unit.alpha = nn.Parameter(torch.full((len(unit.sizes),), logit, device=device))
        return [unit.alpha for unit in self.units]

    def _place_mask(self, module: nn.Module, unit: Unit) -> None:
        def mask(_module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
            return _published_mask(y, unit) if self.now.masked else y

        module.register_forward_hook(mask)

    def _masked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        budget = self._budget_loss(self._expected_macs())
        self.now.masked = True
        try:
            logits = self.model(images)
        finally:
            self.now.masked = False
        return cross_entropy(logits, labels), budget, logits

    def _expected_macs(self) -> Tensor:
        total: Tensor | float = 0.0
        for layer in self.graph.layers:
            macs: Tensor | float = float(layer.factor)
            depthwise = self.graph.modules[layer.module].kind == "depthwise"
            for axis in layer.axes:
                unit = self._unit(axis)
                width = len(axis.unit) if unit is None else _expected_width(unit)
                if depthwise:
                    # The channels over the groups, which are as many.
                    macs = macs * (width.detach() / width.item())
                macs = macs * width
            total = total + macs / 1e6
        assert isinstance(total, Tensor)
        return total

    def _budget_loss(self, macs: Tensor) -> Tensor:
        target = self.targets.bounds[0] / 1e6
        low = (1 - self.options.tolerance) * target
        if macs < low:
            distance = target - macs
        elif macs < target:
            return 0 * macs
        else:
            distance = macs - low
        return self.options.budget_weight * (distance / target).log()

    def _chain(self) -> Widths:
        """Group after group, on the host."""
        widths = {}
        for unit, named in zip(self.units, self.graph.units, strict=True):
            p = unit.alpha.detach().sigmoid().cpu()
            kept = 0
            while kept < len(p) and torch.rand((), generator=self.generator) < p[kept]:
                kept += 1
            widths[named.name] = unit.choices[kept]
        return widths

    def _report(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        best = logits.detach().topk(5)[1].eq(labels[:, None])
        self.metrics = (
            loss.item(),
            best[:, :1].float().sum().mul(100 / len(labels)).item(),
            best.float().sum().mul(100 / len(labels)).item(),
        )


def _expected_width(unit: Unit) -> Tensor:
    q = unit.alpha.sigmoid().cumprod(0)
    return unit.choices[0] + (q * q.new_tensor(unit.sizes)).sum()


def _published_mask(y: Tensor, unit: Unit) -> Tensor:
    base = unit.choices[0]
    if base == y.shape[1]:
        return y
    sizes = torch.tensor(unit.sizes, device=y.device)
    q = unit.alpha.sigmoid().cumprod(0).repeat_interleave(sizes, output_size=y.shape[1] - base)
    front = y.transpose(0, 1).contiguous()
    scaled = front[base:].flatten(1) * q[:, None].to(y.dtype)
    return torch.cat([front[:base], scaled.view_as(front[base:])]).transpose(0, 1).contiguous()


class Eager(Sliced):
    def __init__(self, model: nn.Module, graph: ChannelGraph, stage: int) -> None:
        device = next(model.parameters()).device
        self.chains = Chains.of(graph.units, cost(graph).coefficients(), device)
        start = torch.full((self.chains.groups,), options(stage).start, device=device)
        self.alpha = nn.Parameter(start.logit())
        super().__init__(model, graph, stage)
        self._budget = _budget_loss(self.options)

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.alpha]

    def _place_mask(self, module: nn.Module, unit: Unit) -> None:
        if isinstance(module, SlicedBatchNorm2d):
            module.mask = unit
            return

        def mask(_module: nn.Module, _inputs: Any, y: Tensor) -> Tensor:
            return y if unit.scale is None else y * unit.scale.to(y.dtype).view(-1, 1, 1)

        module.register_forward_hook(mask)

    def _masked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.now.tracks = False
        try:
            with _frozen(self.model):
                return self.masked_losses(images, labels)
        finally:
            self.now.tracks = True

    def masked_losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, macs = self.chains(self.alpha)
        scales = scale.split(self.chains.channels)
        for unit, mine in zip(self.units, scales, strict=True):
            unit.scale = mine
        logits = self.model(images)
        for unit in self.units:
            unit.scale = None
        return cross_entropy(logits, labels), self._budget(self.targets.ratios(macs)), logits

    def _set_widths(self, widths: Widths) -> None:
        super()._set_widths(widths)
        self.now.tracks = widths == self.graph.widths()

    def _chain(self) -> Widths:
        """All units at once, after one copy to the host."""
        p = self.alpha.detach().sigmoid().cpu()
        stays = (torch.rand(len(p), generator=self.generator) < p).tolist()
        widths, first = {}, 0
        for unit in self.graph.units:
            groups = len(unit.choices) - 1
            kept = next((k for k in range(groups) if not stays[first + k]), groups)
            widths[unit.name], first = unit.choices[kept], first + groups
        return widths

    def _report(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.metrics = (loss.detach(), (logits.detach().argmax(1) == labels).float().mean())


class Compiled(Eager):
    def __init__(self, model: nn.Module, graph: ChannelGraph, stage: int) -> None:
        super().__init__(model, graph, stage)
        for name in ("widest", "narrowest", "masked_losses"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))


@dataclass(frozen=True)
class Chains:
    """All chains at once, in plain tensor algebra.

    Attributes:
        groups, channels: how many groups all units have, how many channels each.
        place: number in α of every group, int64 [U, G].
        sizes: channels of every group, 0 where a unit has fewer, [U, G].
        base: channels of every base, [U].
        group: number of every channel's group in [1, q], int64 [ΣC].
        macs: coefficients of the products of 1 and the widths, [1 + U, 1 + U].
    """

    groups: int
    channels: list[int]
    place: Tensor
    sizes: Tensor
    base: Tensor
    group: Tensor = field(repr=False)
    macs: Tensor

    @staticmethod
    def of(units: Sequence[ChannelUnit], macs: Tensor, device: torch.device) -> Chains:
        assert not macs.diagonal()[1:].any(), "a unit at both ends of a layer needs E[c²]"
        sizes = [Unit(unit.choices, unit.channels).sizes for unit in units]
        counts = [len(one) for one in sizes]
        places = torch.arange(sum(counts)).split(counts)
        table = pad_sequence([torch.tensor(one, dtype=torch.float32) for one in sizes], True)
        group = []
        for number, (unit, mine) in enumerate(zip(units, sizes, strict=True)):
            first = 1 + number * table.shape[1]
            group += [0] * unit.choices[0]
            group += [first + k for k, size in enumerate(mine) for _ in range(size)]
        return Chains(
            sum(counts),
            [unit.channels for unit in units],
            pad_sequence(list(places), True).to(device),
            table.to(device),
            torch.tensor([float(unit.choices[0]) for unit in units], device=device),
            torch.tensor(group, device=device),
            macs.triu().float().to(device),
        )

    def __call__(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of every channel [ΣC] and expected MACs [1]."""
        q = F.logsigmoid(alpha)[self.place].cumsum(1).exp()
        widths = self.base + (q * self.sizes).sum(1)
        one = q.new_ones(1)
        scale = torch.cat([one, q.flatten()])[self.group]
        factors = torch.cat([one, widths])
        return scale, (factors @ self.macs.to(alpha.dtype) @ factors).view(1)


RIVALS: dict[str, Callable[[nn.Module, ChannelGraph, int], Rival]] = {
    "ours": Ours,
    "graphs": Graphs,
    "float32": Float32,
    "published": Published,
    "eager": Eager,
    "compile": Compiled,
}


def _narrowest(graph: ChannelGraph) -> Widths:
    return {unit.name: unit.choices[0] for unit in graph.units}


def _budget_loss(options: dmcp.SearchOptions) -> BudgetLoss:
    return BudgetLoss(options.budget_loss, options.budget_weight, options.tolerance)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    try:
        model.requires_grad_(False)
        yield
    finally:
        model.requires_grad_(True)


# --- The same mathematics -------------------------------------------------------------------------


class Gate:
    """What ``ours`` computes in float64, for others to be held against.

    Args:
        model: the weights.
        graph: of the same network.
        images, labels: the batch.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, images: Tensor, labels: Tensor
    ) -> None:
        self.model, self.graph, self.images, self.labels = model, graph, images, labels
        exact = self._twin("ours")
        with torch.no_grad():
            self._teacher = exact.model(images.double())
        self._expected = {part: self._results(exact, part, torch.float64) for part in PASSES}

    def check(self, name: str, rival: Rival) -> dict[str, dict[str, float]]:
        """Compare a rival that has these weights and is to be timed, in float32.

        Its mathematics is checked on a float64 twin; that of ``compile`` is that of ``eager``, that
        of ``graphs`` that of ``ours``: its passes are run ordinarily here, not replayed.

        Returns:
            By dtype and pass: the error of the loss and the gradients of the weights, in the
            architecture pass of the gradients of α.

        Raises:
            AssertionError: one of them is above `TOLERANCE`.
        """
        checked = {torch.float32: rival}
        if name not in ("ours", "graphs", "compile"):
            checked[torch.float64] = self._twin(name)
        found: dict[str, dict[str, float]] = {}
        for (dtype, one), part in product(checked.items(), PASSES):
            results = self._results(one, part, dtype)
            error = max(map(_error, results, self._expected[part]))
            found.setdefault(str(dtype).removeprefix("torch."), {})[part] = error
            assert error <= TOLERANCE[dtype], (
                f"{name}, {dtype}: the {part} pass is off by {error:.1e}, "
                f"more than {TOLERANCE[dtype]:.0e}"
            )
        return found

    def _twin(self, name: str) -> Rival:
        twin = RIVALS[name](copy.deepcopy(self.model).double(), self.graph, 2)
        start = torch.tensor(options(2).start, dtype=torch.float64).logit().item()
        for alpha in twin.architecture_parameters():
            alpha.data = torch.full_like(alpha.data, start, dtype=torch.float64)
        return twin

    def _results(self, rival: Rival, part: str, dtype: torch.dtype) -> list[Tensor]:
        parameters = rival.architecture_parameters()
        if part != "architecture":
            parameters = [*rival.model.parameters()]
        forget_gradients(rival)
        images = self.images.to(dtype=dtype, memory_format=rival.memory_format)
        loss = rival.loss(part, images, self.labels, self._teacher.to(dtype))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in parameters])
        return [gradients] if part == "architecture" else [loss.detach(), gradients]


def _error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def forget_gradients(rival: Rival) -> None:
    for parameter in (*rival.model.parameters(), *rival.architecture_parameters()):
        parameter.grad = None
