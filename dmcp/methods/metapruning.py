"""MetaPruning (Liu et al., ICCV 2019): small networks generate the weights of convolutions from the
structure that these are to have; evolution then looks for the structure whose generated weights
classify best, which is trained from scratch.

What differs from the published code:

- A generator sees the shares that its layer keeps of its inputs and of its outputs; a share that is
  always 1, like that of images, merely adds to a bias. The published one sees those of its block.
- Generators start where their outputs are the fresh weights of the network, varied by a hidden
  layer: so networks without norms start at the scale that they need. Those weights are the last
  layer's bias, so that they do not decay.
- Norms have no private statistics for each width. In training, a batch is normalised by its own
  statistics, and before a structure is judged its statistics are measured anew, by an exact mean
  over some batches: there is nothing that private ones would be used for.
- The generators are trained as networks are retrained, in the time of a search.
- Random structures share out the budget in random proportions, where the code draws until a
  structure happens to cost less. All structures that are judged lie inside the budget, and what
  leaves more than a tolerance of it grows, the unit first whose share is furthest behind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from dmcp.errors import CheckpointError, ConfigError
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.graph.units import AxisMap
from dmcp.methods.growth import even_worth
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.methods.random_search import random_structures
from dmcp.search import MarkovNet, Targets
from dmcp.search.growth import grow
from dmcp.train import Training, TrainOptions

_T = TypeVar("_T")

_ATTEMPTS = 20
"""Structures made for each one that is wanted, before the generation does without it."""

_LEAST_SHARE = 0.1
"""Of a unit in a random structure, before all shares are scaled alike."""

Structure = tuple[int, ...]
"""The widths of all units, in their order."""


@dataclass(frozen=True)
class MetaPruning:
    """Generators once, then evolution for every budget. The defaults are for short runs.

    Attributes:
        hidden: units of the hidden layer of every generator.
        population: structures that are judged in a generation.
        generations: how many; the first one is random.
        parents: the best structures so far, from which half of a generation descends by mutation
            and half by crossover.
        mutation: probability that a unit of a mutant takes another width.
        tolerance: share of the budget that a structure may leave before it is made to grow.
        batches: training batches that statistics are measured on before a structure is judged.

    Raises:
        ConfigError: an option is out of range.
    """

    hidden: int = 8
    population: int = 12
    generations: int = 5
    parents: int = 4
    mutation: float = 0.1
    tolerance: float = 0.01
    batches: int = 4

    uses_pretrained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("hidden", "population", "generations", "parents", "batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("mutation", "tolerance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must lie in [0, 1], got {getattr(self, name)!r}")

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        net = PruningNet(lab.net(lab.fresh()), self.hidden, lab.generator())
        steps = lab.steps(lab.recipe.search_epochs)
        training = RandomWidths(net, lab.recipe.retrain, steps, lab.generator())
        lab.train(training, "pruning-net")

        def judge(widths: Mapping[str, int]) -> float:
            small = lab.extract(net.plain(widths), widths)
            lab.calibrate(small, self.batches)
            return lab.accuracy(small)

        found = {}
        for label, targets in lab.targets.items():
            evolution = Evolution(self, lab.graph, targets, judge, lab.generator())
            lab.run(evolution, "evolution", budget=label)
            widths, accuracy = evolution.best()
            found[label] = Pruned(widths, details={"accuracy": accuracy})
        return found


PAPER = MetaPruning(hidden=64, population=50, generations=20, parents=10, batches=100)
"""The published values; the published generators of ResNet-50 have 32 hidden units."""


class PruningNet(nn.Module):
    """A network whose convolutions use generated weights, cropped to the structure it has now.

    All other parameters are the network's own, and are trained; but the affine of batch norms is
    fixed at 1 and 0.

    Args:
        net: its weights are where the generators start.
        hidden: see `MetaPruning`.
        generator: of the first weights of the generators.

    Attributes:
        widths: the structure it has now.
    """

    constant: Tensor
    slope: Tensor

    def __init__(self, net: MarkovNet, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = net
        self.widths = net.graph.widths()
        self.generated = tuple(_generated(net.graph))
        if not self.generated:
            raise ConfigError(
                "metapruning generates the weights of nn.Conv2d modules: the network has none"
            )
        model, units = net.graph.model, net.graph.units
        self.generators = nn.ModuleList(
            WeightGenerator(model.get_parameter(f"{name}.weight"), hidden, generator)
            for name in self.generated
        )
        _freeze(net, self.generated)
        axes = [net.graph.modules[name] for name in self.generated]
        ends = [[_share(axis, units) for axis in (a.inputs, a.outputs)] for a in axes]
        device = next(model.parameters()).device
        constant = torch.tensor([[share[0] for share in both] for both in ends], device=device)
        slope = torch.stack([torch.stack([share[1] for share in both]) for both in ends])
        self.register_buffer("constant", constant, persistent=False)
        self.register_buffer("slope", slope.to(device), persistent=False)

    def weights(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Module -> the weight generated for a structure, of the full size."""
        full = [widths[unit.name] for unit in self.net.graph.units]
        encodings = self.constant + self.slope @ self.slope.new_tensor(full)
        makers = zip(self.generated, self.generators, encodings, strict=True)
        return {name: make(encoding) for name, make, encoding in makers}

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to logits, as the sub-network of `widths`."""
        weights = {f"model.{name}.weight": w for name, w in self.weights(self.widths).items()}
        with self.net.at(self.widths):
            logits: Tensor = functional_call(self.net, weights, (images,))
        return logits

    @torch.no_grad()
    def plain(self, widths: Mapping[str, int]) -> nn.Module:
        """The whole network with the weights generated for a structure, to extract this from."""
        model = copy.deepcopy(self.net.graph.model)
        for name, weight in self.weights(widths).items():
            model.get_parameter(f"{name}.weight").copy_(weight)
        return model


class WeightGenerator(nn.Module):
    """Two linear layers that make the weight of a convolution from the shares it keeps of its
    inputs and outputs.

    Args:
        weight: [C_out, C_in, h, w], where it starts.
        hidden: between the layers.
        generator: of its own first weights.
    """

    def __init__(self, weight: Tensor, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = weight.shape
        weight = weight.detach()
        self.encode = nn.utils.skip_init(nn.Linear, 2, hidden)
        self.decode = nn.utils.skip_init(nn.Linear, hidden, weight.numel())
        for parameter in self.encode.parameters():
            nn.init.uniform_(parameter, -(2**-0.5), 2**-0.5, generator)
        nn.init.normal_(self.decode.weight, 0, hidden**-0.5, generator)
        with torch.no_grad():
            self.decode.weight.mul_(weight.square().mean().sqrt().cpu())
            self.decode.bias.copy_(weight.permute(0, 2, 3, 1).flatten())
        self.to(weight.device)

    def forward(self, shares: Tensor) -> Tensor:
        """[2] to [C_out, C_in, h, w], channels last."""
        outputs, inputs, height, width = self.shape
        weight: Tensor = self.decode(F.relu(self.encode(shares)))
        return weight.view(outputs, height, width, inputs).permute(0, 3, 1, 2)


class RandomWidths(Training):
    """Trains a `PruningNet` in another structure in every step, all widths drawn uniformly.

    Args:
        net, options, steps: see `Training`.
        generator: of the structures.
    """

    def __init__(
        self, net: PruningNet, options: TrainOptions, steps: int, generator: torch.Generator
    ) -> None:
        super().__init__(net, options, steps)
        self._net = net
        self._generator = generator

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """See `Training.step`."""
        units = self._net.net.graph.units
        self._net.widths = {u.name: _pick(u.choices, self._generator) for u in units}
        return super().step(images, labels)

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`."""
        return super().state_dict() | {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        super().load_state_dict(state)
        if "generator" not in state:
            raise CheckpointError("this is the state of a Training of one structure")
        self._generator.set_state(state["generator"])


class Evolution:
    """A stage whose step is a generation.

    Args:
        options: see `MetaPruning`.
        graph, targets: whose structures, and what they may cost.
        judge: the accuracy of a structure.
        generator: of all that is random.

    Attributes:
        judged: structure -> its accuracy, in the order in which they were judged.
    """

    def __init__(
        self,
        options: MetaPruning,
        graph: ChannelGraph,
        targets: Targets,
        judge: Callable[[Mapping[str, int]], float],
        generator: torch.Generator,
    ) -> None:
        self.steps = options.generations
        self.step_index = 0
        self.judged: dict[Structure, float] = {}
        self._options = options
        self._graph = graph
        self._targets = targets
        self._judge = judge
        self._generator = generator
        self._even = even_worth(graph)

    def best(self) -> tuple[dict[str, int], float]:
        """The best structure so far, and its accuracy."""
        structure = self._ranked()[0]
        return self._named(structure), self.judged[structure]

    def step(self) -> dict[str, Tensor]:
        """One generation."""
        for structure in self._generation():
            self.judged[structure] = self._judge(self._named(structure))
        self.step_index += 1
        return {"best_accuracy": torch.tensor(self.best()[1])}

    def _generation(self) -> list[Structure]:
        """Mutants and children of the best; random structures where there are not enough."""
        size = self._options.population
        parents = self._ranked()[: self._options.parents]
        new: dict[Structure, None] = {}
        if parents:
            self._collect(
                new, size - size // 2, lambda: self.mutant(_pick(parents, self._generator))
            )
            self._collect(
                new,
                size,
                lambda: self.child(*(_pick(parents, self._generator) for _ in range(2))),
            )
        self._collect(new, size, self.random)
        return list(new)

    def _collect(
        self, new: dict[Structure, None], size: int, make: Callable[[], Structure]
    ) -> None:
        """Add feasible structures that nobody has seen, until there are ``size``."""
        for _ in range(_ATTEMPTS * self._options.population):
            if len(new) >= size:
                return
            structure = self.fitted(make())
            if structure is not None and structure not in self.judged:
                new[structure] = None

    def fitted(self, structure: Structure) -> Structure | None:
        """The structure, grown if it leaves more of the budget than the tolerance; None if it
        exceeds it."""
        widths = torch.tensor([structure], device="cpu")
        if not self._targets.met(widths):
            return None
        if float(self._targets.largest_ratio(widths)) >= 1 - self._options.tolerance:
            return structure
        return tuple(grow(self._graph, self._targets, self._even, self._named(structure)).values())

    def random(self) -> Structure:
        """Shares in random proportions, as much of each as the budget allows."""
        drawn = random_structures(self._graph, self._targets, 1, _LEAST_SHARE, self._generator)
        return tuple(drawn[0].values())

    def mutant(self, parent: Structure) -> Structure:
        """Some units take another of their widths."""
        changes = (
            torch.rand(len(parent), generator=self._generator, device="cpu")
            < self._options.mutation
        )
        return tuple(
            self._other(unit, width) if change else width
            for unit, width, change in zip(self._graph.units, parent, changes.tolist(), strict=True)
        )

    def _other(self, unit: ChannelUnit, width: int) -> int:
        others = [choice for choice in unit.choices if choice != width]
        return _pick(others, self._generator) if others else width

    def child(self, one: Structure, other: Structure) -> Structure:
        """Every width is one parent's or the other's."""
        firsts = torch.rand(len(one), generator=self._generator, device="cpu") < 0.5
        return tuple(
            a if first else b for a, b, first in zip(one, other, firsts.tolist(), strict=True)
        )

    def _ranked(self) -> list[Structure]:
        return sorted(self.judged, key=lambda structure: -self.judged[structure])

    def _named(self, structure: Structure) -> dict[str, int]:
        return {unit.name: w for unit, w in zip(self._graph.units, structure, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next generation depends on."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "structures": torch.tensor(list(self.judged)),
            "accuracies": torch.tensor(list(self.judged.values()), dtype=torch.float64),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: it is of something else.
        """
        try:
            if state["steps"] != self.steps:
                raise CheckpointError(
                    f"this is the state of {state['steps']} generations, not of {self.steps}"
                )
            structures = map(tuple, state["structures"].tolist())
            self.judged = dict(zip(structures, state["accuracies"].tolist(), strict=True))
            self._generator.set_state(state["generator"])
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("this is not the state of an evolution") from error


def _generated(graph: ChannelGraph) -> list[str]:
    """The convolutions whose weights are generated. Of tied weights the graph names one."""
    return [
        name
        for name in graph.modules
        if isinstance(graph.model.get_submodule(name), nn.Conv2d)
        and f"{name}.weight" in graph.tensors
    ]


def _freeze(net: MarkovNet, generated: tuple[str, ...]) -> None:
    """Leave to training what is neither generated nor the affine of a batch norm nor a chain."""
    net.chains.requires_grad_(False)
    for name in generated:
        net.graph.model.get_parameter(f"{name}.weight").requires_grad_(False)
    for module in net.model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.ones_(module.weight.requires_grad_(False))
            nn.init.zeros_(module.bias.requires_grad_(False))


def _share(axis: AxisMap | None, units: tuple[ChannelUnit, ...]) -> tuple[float, Tensor]:
    """The share of an axis that is kept, as a constant and a slope [U] in the widths."""
    slope = torch.zeros(len(units))
    if axis is None:
        return 1.0, slope
    constant, per_unit = axis.counts()
    for number, count in per_unit.items():
        slope[number] = count / units[number].step / len(axis.unit)
    return constant / len(axis.unit), slope


def _pick(options: Sequence[_T], generator: torch.Generator) -> _T:
    return options[int(torch.randint(len(options), (), generator=generator, device="cpu"))]
