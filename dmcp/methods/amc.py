"""AutoML for model compression (AMC, He et al., ECCV 2018): an agent decides unit after unit what
share of its channels to keep, and is rewarded with the accuracy of the network that results.

Channels are chosen by the weights that read them; the weights of the 1x1 convolutions and linear
layers that read a pruned unit are fitted by least squares to what the pretrained layer made of all
channels. Nothing else is trained or recalibrated during the search.

What differs from the published code:

- An action decides a channel unit, at the first layer that reads it, where the code decides the
  inputs of every layer and copies decisions along residual streams (but for the last of them). The
  weights of all layers that read a unit count for the choice of its channels, not the first one's.
- The reward is top-1 accuracy on the held-out images.
- The state counts costs in what the budget bounds, and "what is left" is what the units to come
  can still save. Image size is not in it: the code has none either, the paper does.
- Widths are those of the grid, rounded up; room that the best structure leaves below the budget is
  filled at the end, the unit first whose share is furthest behind.
- Targets of the least squares carry no bias, as the layers keep theirs. What the dropped channels
  gave is fitted by a change of the kept weights, so a feature that is always zero keeps its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmcp.errors import CheckpointError, ConfigError
from dmcp.graph import ChannelGraph, ChannelUnit
from dmcp.methods.growth import even_worth, kept_channels
from dmcp.methods.importance import consuming_weights
from dmcp.methods.lab import Lab
from dmcp.methods.method import Pruned
from dmcp.search import Targets
from dmcp.search.growth import grow
from dmcp.train.optim import restore

_FEATURES = 10
_TRANSITION = (_FEATURES, 1, 1, _FEATURES, 1)  # state, action, reward, next state, is the last one
_HIDDEN = 300
_ACTOR_LR, _CRITIC_LR = 1e-4, 1e-3
_FOLLOW = 0.01  # of the way, that the target networks follow in an update
_BASELINE = 0.5  # weight of the newest batch in the mean of the rewards
_BATCH = 64
_RIDGE = 1e-6


@dataclass(frozen=True)
class AMC:
    """The search, for every budget on its own. The defaults are for short runs.

    Attributes:
        episodes: structures that are built and judged.
        warm_up: how many of them are random, before the agent learns.
        least: the smallest share of its channels that a unit may keep, where the budget allows it.
        noise: standard deviation of the noise on the first actions after the warm-up.
        noise_decay: what it is multiplied by after each episode.
        replay: the latest episodes, that the agent learns from.
        batches, positions: training batches, and positions in every image, that weights are fitted
            to.

    Raises:
        ConfigError: an option is out of range.
    """

    episodes: int = 40
    warm_up: int = 10
    least: float = 0.2
    noise: float = 0.5
    noise_decay: float = 0.95
    replay: int = 40
    batches: int = 8
    positions: int = 10

    uses_pretrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("episodes", "replay", "batches", "positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 <= self.warm_up < self.episodes:
            raise ConfigError(
                f"warm_up must lie in 0..{self.episodes - 1}, below episodes, got {self.warm_up!r}"
            )
        if not 0 < self.least <= 1:
            raise ConfigError(f"least must lie in (0, 1], got {self.least!r}")
        if self.noise <= 0:
            raise ConfigError(f"noise must be positive, got {self.noise!r}")
        if not 0 < self.noise_decay <= 1:
            raise ConfigError(f"noise_decay must lie in (0, 1], got {self.noise_decay!r}")

    def find(self, lab: Lab) -> dict[str, Pruned]:
        """See `Method`."""
        compressor = Compressor(lab, self.batches, self.positions)
        found = {}
        for label, targets in lab.targets.items():
            episodes = Episodes(self, compressor, targets)
            lab.run(episodes, "episodes", budget=label)
            start = episodes.best_widths
            widths = grow(lab.graph, targets, even_worth(lab.graph), start)
            kept = compressor.kept(widths)
            details = {"judged": dict(start), "accuracy": episodes.best_accuracy}
            found[label] = Pruned(widths, compressor.network(kept), kept, details)
        return found


PAPER = AMC(episodes=800, warm_up=100, replay=100, batches=60)
"""The published values; the published calibration batches hold 50 images."""


class Compressor:
    """Builds pruned networks from the pretrained one.

    Args:
        lab: whose pretrained network.
        batches, positions: of the features that weights are fitted to, see `AMC`.

    Attributes:
        grams: module -> XᵀX of its inputs X [samples, C_in]: float64 [C_in, C_in].
    """

    def __init__(self, lab: Lab, batches: int, positions: int) -> None:
        self.lab = lab
        self.model = lab.pretrained()
        self.norms = _reader_norms(lab.graph, self.model)
        self.grams = self._gather(batches, positions)

    def kept(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """For every searchable unit the channels whose readers have the largest weights."""
        return kept_channels(self.lab.graph, self.norms, widths)

    def network(self, kept: Mapping[str, Tensor]) -> nn.Module:
        """The network of these channels with reconstructed weights."""
        graph, model = self.lab.graph, copy.deepcopy(self.model)
        steps = {
            number: torch.zeros(unit.channels // unit.step, dtype=torch.bool).index_fill_(
                0, kept[unit.name] // unit.step, True
            )
            for number, unit in enumerate(graph.units)
            if unit.name in kept
        }
        for name, gram in self.grams.items():
            axis, weight = graph.modules[name].inputs, _weight(model, name)
            assert axis is not None
            positions = axis.kept(steps).to(weight.device)
            if len(positions) < len(gram):
                fitted = reconstruct(weight.flatten(1), gram, positions)
                weight[:, positions] = fitted.view(-1, len(positions), *weight.shape[2:])
        return self.lab.extract(model, kept=kept)

    @torch.no_grad()
    def _gather(self, batches: int, positions: int) -> dict[str, Tensor]:
        generator, model, grams = self.lab.generator(), self.model.eval(), {}

        def look(name: str, module: nn.Module) -> None:
            size = _weight(model, name).shape[1]
            gram = torch.zeros(size, size, dtype=torch.float64, device=self.lab.device)

            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                (features,) = (*args, *kwargs.values())
                rows = _samples(module, features, positions, generator).double()
                gram.addmm_(rows.T, rows)

            grams[name] = gram
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        hooks: list[torch.utils.hooks.RemovableHandle] = []
        for name, axes in self.lab.graph.modules.items():
            module = model.get_submodule(name)
            if axes.kind == "dense" and axes.inputs is not None and _is_linear(module):
                look(name, module)
        for images, _ in self.lab.batches(batches):
            model(images)
        for hook in hooks:
            hook.remove()
        self.lab.charge(batches * self.lab.recipe.batch_size)
        return grams


def reconstruct(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """The weights of the kept inputs of a linear layer that make of these, in the sense of least
    squares, what the layer makes of all inputs.

    With W the weights and X the inputs, this is W_kept + D for the smallest
    ‖X_kept Dᵀ − X_dropped W_droppedᵀ‖² with a small ridge on D.

    Args:
        weight: [C_out, C_in].
        gram: XᵀX, float64 [C_in, C_in].
        kept: int64 [k].

    Returns:
        [C_out, k].
    """
    is_dropped = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    is_dropped[kept] = False
    left, right = gram[kept][:, kept], gram[kept][:, is_dropped] @ weight[:, is_dropped].T.double()
    # However many inputs are zero or alike, this keeps the system well away from singular.
    mean = left.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    left.diagonal().add_(_RIDGE * mean)
    change = torch.cholesky_solve(right, torch.linalg.cholesky(left))
    return weight[:, kept] + change.T.to(weight.dtype)


def decision_order(graph: ChannelGraph) -> list[int]:
    """The numbers of the searchable units by the first layer that reads each."""
    readers = {n: _reader(graph, unit) for n, unit in enumerate(graph.units) if unit.searchable}
    return sorted(readers, key=readers.__getitem__)


def fitting(targets: Targets, unit: ChannelUnit, number: int, widths: Tensor) -> list[int]:
    """The widths of a unit that stay inside the budget: the bound on an action.

    Args:
        targets: the budget.
        unit, number: which one.
        widths: int64 [U], what the others have; those to be decided later, the least they may.
    """
    candidates = widths.repeat(len(unit.choices), 1)
    candidates[:, number] = torch.tensor(unit.choices, device="cpu")
    fits = targets.met(candidates).tolist()
    return [width for width, fit in zip(unit.choices, fits, strict=True) if fit]


def least_widths(graph: ChannelGraph, targets: Targets, least: float) -> Tensor:
    """The narrowest widths the agent may choose: int64 [U].

    These are the smallest choices of at least a share ``least`` of every unit, or the smallest
    choices at all where even those exceed the budget.
    """
    widths = [
        next(width for width in unit.choices if width >= least * unit.channels)
        for unit in graph.units
    ]
    if targets.met(torch.tensor([widths], device="cpu")):
        return torch.tensor(widths, device="cpu")
    return torch.tensor([unit.choices[0] for unit in graph.units], device="cpu")


class Episodes:
    """A stage whose step is an episode: a structure, its accuracy, and what the agent learns.

    Args:
        options: see `AMC`.
        compressor: builds the networks.
        targets: the budget.

    Attributes:
        best_accuracy, best_widths: the best structure so far.
    """

    def __init__(self, options: AMC, compressor: Compressor, targets: Targets) -> None:
        self.steps = options.episodes
        self.step_index = 0
        self.best_accuracy = -1.0
        self.best_widths: dict[str, int] = {}
        self.agent = Agent(compressor.lab.generator())
        self._options = options
        self._compressor = compressor
        self._targets = targets
        self._graph = graph = compressor.lab.graph
        self._order = decision_order(graph)
        self._features = _layer_features(graph, self._order)
        self._least = least_widths(graph, targets, options.least)
        self._full = torch.tensor([unit.channels for unit in graph.units])
        self._replay = torch.empty(0, sum(_TRANSITION))

    def step(self) -> dict[str, Tensor]:
        """One episode."""
        widths, states, actions = self._decide()
        named = {unit.name: int(w) for unit, w in zip(self._graph.units, widths, strict=True)}
        kept = self._compressor.kept(named)
        accuracy = self._compressor.lab.accuracy(self._compressor.network(kept))
        if accuracy > self.best_accuracy:
            self.best_accuracy, self.best_widths = accuracy, named
        self._remember(states, actions, accuracy)
        if self.step_index >= self._options.warm_up:
            for _ in actions:
                self.agent.learn(self._replay)
        self.step_index += 1
        return {
            "accuracy": torch.tensor(accuracy),
            "best_accuracy": torch.tensor(self.best_accuracy),
        }

    def _decide(self) -> tuple[Tensor, Tensor, Tensor]:
        """A structure [U], the states that led to it [T, features] and the actions [T]."""
        after = self.step_index - self._options.warm_up
        noise = self._options.noise * self._options.noise_decay**after if after >= 0 else None
        widths, states, actions = self._least.clone(), [], []
        last_share = 1.0
        for turn, number in enumerate(self._order):
            unit = self._graph.units[number]
            states.append(self._state(turn, widths, last_share))
            actions.append(self.agent.act(states[-1], noise))
            wanted = max(round(actions[-1] * unit.channels), int(self._least[number]))
            allowed = fitting(self._targets, unit, number, widths)
            width = next((w for w in allowed if w >= wanted), allowed[-1])
            widths[number] = width
            last_share = width / unit.channels
        return widths, torch.stack(states), torch.tensor(actions)

    def _state(self, turn: int, widths: Tensor, last_share: float) -> Tensor:
        """What the agent sees before it decides on a unit; costs as shares of the full one."""
        whole = self._full.clone()
        decided = self._order[:turn]
        whole[decided] = widths[decided]
        later = whole.clone()
        later[self._order[turn + 1 :]] = self._least[self._order[turn + 1 :]]
        costs = self._targets.largest_ratio(torch.stack([self._full, whole, later]))
        full, now, least = costs.tolist()
        seen = [1 - now / full, (now - least) / full, last_share]
        return torch.cat([self._features[turn], torch.tensor(seen)])

    def _remember(self, states: Tensor, actions: Tensor, reward: float) -> None:
        """The reward of the whole episode is that of each of its actions."""
        last = torch.zeros(len(actions), 1)
        last[-1] = 1
        rewards = torch.full((len(actions), 1), reward)
        following = torch.cat([states[1:], states[-1:]])
        episode = torch.cat([states, actions[:, None], rewards, following, last], dim=1)
        size = self._options.replay * len(self._order)
        self._replay = torch.cat([self._replay, episode])[-size:]

    def state_dict(self) -> dict[str, Any]:
        """Everything the next episode depends on."""
        return {
            "steps": self.steps,
            "step_index": self.step_index,
            "best_accuracy": self.best_accuracy,
            "best_widths": self.best_widths,
            "replay": self._replay,
            "agent": self.agent.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: it is of something else.
        """
        try:
            if state["steps"] != self.steps:
                raise CheckpointError(
                    f"this is the state of {state['steps']} episodes, not of {self.steps}"
                )
            self.agent.load_state_dict(state["agent"])
            self._replay = state["replay"]
            self.best_accuracy = state["best_accuracy"]
            self.best_widths = state["best_widths"]
            self.step_index = state["step_index"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError("this is not the state of a search with AMC") from error


class Agent:
    """Deep deterministic policy gradients: an actor proposes a share for a state, a critic says
    what it is worth, and slowly following copies of both give the targets.

    Args:
        generator: of all that is random about it.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.baseline: float | None = None
        self.actor = _perceptron(_FEATURES, generator).append(nn.Sigmoid())
        self.critic = _perceptron(_FEATURES + 1, generator)
        self._learning = nn.ModuleList([self.actor, self.critic])
        self._targets = copy.deepcopy(self._learning).requires_grad_(False)
        self._actor_optimizer = torch.optim.Adam(self.actor.parameters(), _ACTOR_LR)
        self._critic_optimizer = torch.optim.Adam(self.critic.parameters(), _CRITIC_LR)

    @torch.no_grad()
    def act(self, state: Tensor, noise: float | None) -> float:
        """A share in [0, 1].

        Args:
            state: [features].
            noise: standard deviation of the noise on the action; None for a random action.
        """
        if noise is None:
            return float(torch.rand((), generator=self.generator, device="cpu"))
        return truncated_normal(float(self.actor(state)), noise, self.generator)

    def learn(self, transitions: Tensor) -> None:
        """One update on a batch drawn from the transitions."""
        drawn = torch.randperm(len(transitions), generator=self.generator, device="cpu")[:_BATCH]
        state, action, reward, following, last = transitions[drawn].split(_TRANSITION, dim=1)
        mean = float(reward.mean())
        if self.baseline is None:
            self.baseline = mean
        self.baseline += _BASELINE * (mean - self.baseline)

        actor, critic = self._targets
        with torch.no_grad():
            # No discount: the episode ends after as many actions as there are units.
            value = critic(torch.cat([following, actor(following)], dim=1))
            target = reward - self.baseline + (1 - last) * value
        self._critic_optimizer.zero_grad()
        F.mse_loss(self.critic(torch.cat([state, action], dim=1)), target).backward()
        self._critic_optimizer.step()

        self._actor_optimizer.zero_grad()
        (-self.critic(torch.cat([state, self.actor(state)], dim=1)).mean()).backward()
        self._actor_optimizer.step()

        with torch.no_grad():
            pairs = zip(self._targets.parameters(), self._learning.parameters(), strict=True)
            for slow, fast in pairs:
                slow.lerp_(fast, _FOLLOW)

    def state_dict(self) -> dict[str, Any]:
        """Everything it is."""
        return {
            "learning": self._learning.state_dict(),
            "targets": self._targets.state_dict(),
            "actor_optimizer": self._actor_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "baseline": self.baseline,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` told."""
        self._learning.load_state_dict(state["learning"])
        self._targets.load_state_dict(state["targets"])
        restore(self._actor_optimizer, state["actor_optimizer"])
        restore(self._critic_optimizer, state["critic_optimizer"])
        self.baseline = state["baseline"]
        self.generator.set_state(state["generator"])


def truncated_normal(mean: float, deviation: float, generator: torch.Generator) -> float:
    """A draw from the normal distribution restricted to [0, 1].

    Args:
        mean: in [0, 1].
        deviation: positive.
        generator: on the CPU.
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    low, high = torch.special.ndtr((ends - mean) / deviation)
    drawn = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
    # At 0 and 1 the inverse is infinite.
    quantile = torch.special.ndtri((low + (high - low) * drawn).clamp(1e-12, 1 - 1e-12))
    return float((mean + deviation * quantile).clamp(0, 1))


def _perceptron(inputs: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers and one output, drawn as PyTorch draws linear layers."""
    layers: list[nn.Module] = []
    for size, following in ((inputs, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 1)):
        layer = torch.nn.utils.skip_init(nn.Linear, size, following)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(size**-0.5), size**-0.5, generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _reader(graph: ChannelGraph, unit: ChannelUnit) -> int:
    """The number of the first layer that reads a unit; that of layers if none does."""
    readers = {member.module for member in unit.members if member.role == "in"}
    return next(
        (n for n, layer in enumerate(graph.layers) if layer.module in readers), len(graph.layers)
    )


def _layer_features(graph: ChannelGraph, order: list[int]) -> Tensor:
    """What the agent knows of the layer that reads each unit: number, kind, channels in and out,
    stride, kernel, weights; each from 0 to 1 over the units: [T, 7]."""
    rows = []
    for turn, number in enumerate(order):
        unit = graph.units[number]
        reader = _reader(graph, unit)
        module: nn.Module | None = None
        if reader < len(graph.layers):
            module = graph.model.get_submodule(graph.layers[reader].module)
        rows.append([turn, *_describe(module, unit)])
    table = torch.tensor(rows, dtype=torch.float32)
    low, high = table.amin(0), table.amax(0)
    return (table - low) / (high - low).clamp_min(1)


def _describe(module: nn.Module | None, unit: ChannelUnit) -> tuple[int, int, int, int, int, int]:
    if isinstance(module, nn.Conv2d):
        channels = (module.in_channels, module.out_channels)
        return (1, *channels, module.stride[0], module.kernel_size[0], module.weight.numel())
    if isinstance(module, nn.Linear):
        return (0, module.in_features, module.out_features, 1, 1, module.weight.numel())
    return (0, unit.channels, 0, 1, 1, 0)


def _reader_norms(graph: ChannelGraph, model: nn.Module) -> dict[str, Tensor]:
    """Σ|W| over all weights that read each step of each searchable unit: [C // step]."""
    return {
        unit.name: sum(
            (rows.abs().sum(1) for rows in consuming_weights(graph, model, unit)),
            torch.zeros(unit.channels // unit.step),
        )
        for unit in graph.searchable
    }


def _is_linear(module: nn.Module) -> bool:
    """Whether a module's outputs at a position depend on its inputs at that position alone."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _samples(
    module: nn.Module, features: Tensor, positions: int, generator: torch.Generator
) -> Tensor:
    """Inputs of a layer, those of a convolution at random positions: [samples, C_in]."""
    if not isinstance(module, nn.Conv2d):
        return features.flatten(0, -2)
    down, right = module.stride
    maps = features[:, :, ::down, ::right].flatten(2)
    drawn = torch.randint(maps.shape[2], (positions,), generator=generator, device="cpu")
    return maps[:, :, drawn.to(maps.device)].transpose(1, 2).flatten(0, 1)
