from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dmcp
from dmcp import recipes
from dmcp.data import open_data
from dmcp.errors import CheckpointError, ConfigError
from dmcp.methods import Lab
from dmcp.methods.amc import (
    AMC,
    Agent,
    Compressor,
    Episodes,
    decision_order,
    fitting,
    least_widths,
    reconstruct,
    truncated_normal,
)
from dmcp.search import Targets
from dmcp.train import Schedule

SHORT = AMC(episodes=5, warm_up=2, batches=2)


class Pointwise(nn.Sequential):
    """Three units of 8; on 8x8 images 576 u0 + 64 u0 u1 + 64 u1 u2 + 10 u2 MACs."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


class Flattened(nn.Sequential):
    """The linear layer reads four positions of every channel."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


class ReadLate(nn.Module):
    """What is made first is read last."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 3)
        self.read_b, self.read_a = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = self.read_b(b)
        return self.head((y * self.read_a(a)).mean((2, 3)))


def make_graph(model):
    return dmcp.trace(model, torch.zeros(2, 1, 8, 8))


def make_lab(model, *, trains=True, budgets=("40%",), **options):
    """Digits, four widths for each unit: 2, 4, 6 and 8 of 8 channels."""
    retrain = recipes.get("digits").retrain
    if not trains:  # so little that no float32 changes
        retrain = replace(retrain, lr=Schedule(peak=1e-30), weight_decay=0)
    recipe = replace(recipes.get("digits"), groups=4, divisor=2, retrain_epochs=1, retrain=retrain)
    data = open_data("digits", None, 0.1, 0)
    shares = {share: dmcp.Budget(macs=share) for share in budgets}
    return Lab(make_graph(model), data, shares, recipe, checkpoint_every=1, **options)


def test_an_action_is_bound_by_what_later_units_need_at_least():
    lab = make_lab(Pointwise())
    targets = lab.targets["40%"]
    assert targets.bounds == (5152,)  # 0.4 of 4608 + 4096 + 4096 + 80
    units = lab.graph.units
    # 704 u0 + 276 with two channels in the others: 4500 at 6, 5908 at 8.
    assert fitting(targets, units[0], 0, torch.tensor([2, 2, 2, 10])) == [2, 4, 6]
    # 3456 + 512 u1 + 20: 5012 at 3.
    assert fitting(targets, units[1], 1, torch.tensor([6, 2, 2, 10])) == [2]
    # 3456 + 768 + 138 u2: 5052 at 6.
    assert fitting(targets, units[2], 2, torch.tensor([6, 2, 2, 10])) == [2, 4, 6]


class AlwaysAll(Agent):
    def act(self, state, noise):
        return 1.0


def test_a_greedy_agent_meets_the_budget():
    lab = make_lab(Pointwise())
    episodes = Episodes(SHORT, Compressor(lab, 1, 4), lab.targets["40%"])
    episodes.agent = AlwaysAll(lab.generator())
    episodes.step()
    assert list(episodes.best_widths.values()) == [6, 2, 6, 10]
    # The reward of the episode is that of every action; the last one ends it.
    _state, action, reward, _next, last = episodes.state_dict()["replay"].split(
        (10, 1, 1, 10, 1), dim=1
    )
    assert action.flatten().tolist() == [1.0, 1.0, 1.0]
    assert reward.flatten().tolist() == pytest.approx([episodes.best_accuracy] * 3)
    assert last.flatten().tolist() == [0.0, 0.0, 1.0]


def test_what_the_agent_sees():
    lab = make_lab(Pointwise())
    episodes = Episodes(SHORT, Compressor(lab, 1, 4), lab.targets["40%"])
    episodes.agent = AlwaysAll(lab.generator())
    episodes.step()
    rows = episodes.state_dict()["replay"]
    # Units are read by the two convolutions and the linear layer: number, is it a convolution,
    # inputs (8 all), outputs (8, 8, 10), stride and kernel (1 all), weights (64, 64, 80).
    assert rows[:, :7].tolist() == [
        [0, 1, 0, 0, 0, 0, 0],
        [0.5, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 1],
    ]
    # Saved so far, what the units to come can save, and the last share: of full 12880.
    # Full, then (6, 8, 8) at 10704, then (6, 2, 8) at 5328; with two channels in all units to come
    # (8, 2, 2) is at 5908, (6, 2, 2) at 4500.
    full = 12880
    expected = [
        [0, (full - 5908) / full, 1],
        [1 - 10704 / full, (10704 - (3456 + 64 * 48 + 64 * 16 + 20)) / full, 6 / 8],
        [1 - 5328 / full, 0, 2 / 8],
    ]
    torch.testing.assert_close(rows[:, 7:10], torch.tensor(expected))


def test_least_widths_give_way_to_the_budget():
    lab = make_lab(Pointwise())
    cost = lab.targets["40%"].costs[0]
    least = least_widths(lab.graph, Targets((cost,), (12880,)), 0.3)
    assert least.tolist() == [4, 4, 4, 10]
    least = least_widths(lab.graph, Targets((cost,), (1700,)), 0.3)
    assert least.tolist() == [2, 2, 2, 10]


def test_units_are_decided_where_they_are_read():
    graph = make_graph(ReadLate())
    names = [graph.units[number].name for number in decision_order(graph)]
    assert names == ["b", "a", "read_b"]


def test_a_residual_stream_is_decided_once(traced):
    graph = traced("Residual").graph
    order = decision_order(graph)
    assert sorted(order) == [n for n, unit in enumerate(graph.units) if unit.searchable]
    assert [graph.units[number].name for number in order] == ["stem.0", "first.0", "down.0"]


def test_reconstruction_is_the_least_squares_solution():
    torch.manual_seed(0)
    inputs = torch.randn(500, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weight, kept = torch.randn(4, 6), torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(inputs[:, kept], inputs @ weight.double().T).solution.T
    fitted = reconstruct(weight, inputs.T @ inputs, kept)
    assert fitted.dtype == torch.float32
    torch.testing.assert_close(fitted.double(), expected, rtol=1e-3, atol=1e-4)
    assert (fitted - weight[:, kept]).abs().max() > 0.1


def test_reconstruction_is_exact_where_kept_inputs_span_the_dropped():
    torch.manual_seed(0)
    kept_inputs = torch.randn(200, 3)
    inputs = torch.cat([kept_inputs, kept_inputs @ torch.randn(3, 2)], 1)
    weight = torch.randn(4, 5)
    fitted = reconstruct(weight, inputs.double().T @ inputs.double(), torch.arange(3))
    torch.testing.assert_close(kept_inputs @ fitted.T, inputs @ weight.T, rtol=1e-4, atol=1e-4)


def test_reconstruction_survives_inputs_that_are_zero_or_alike():
    torch.manual_seed(0)
    inputs = torch.randn(50, 1, dtype=torch.float64).repeat(1, 4)  # rank 1
    inputs[:, 1] = 0
    weight = torch.randn(3, 4)
    fitted = reconstruct(weight, inputs.T @ inputs, torch.tensor([0, 1, 2]))
    assert torch.equal(fitted[:, 1], weight[:, 1])
    made = inputs[:, :3].float() @ fitted.T
    torch.testing.assert_close(made, inputs.float() @ weight.T, rtol=1e-4, atol=1e-4)
    nothing = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(reconstruct(weight, nothing, torch.tensor([0, 3])), weight[:, [0, 3]])


@pytest.mark.parametrize(("kind", "reader"), [(Pointwise, 2), (Flattened, 4)])
def test_dropped_twins_cost_nothing(kind, reader):
    """Channels 1, 2, 4 and 7 are twice the others, and have the smaller weights where read."""
    torch.manual_seed(0)
    model = kind()
    twins, originals = torch.tensor([1, 2, 4, 7]), torch.tensor([0, 3, 5, 6])
    with torch.no_grad():
        for tensor in model[0].parameters():
            tensor[twins] = 2 * tensor[originals]
        by_channel = model[reader].weight.unflatten(1, (8, -1))
        by_channel[:, twins] *= 0.1
    lab = make_lab(model, trains=False)
    compressor = Compressor(lab, 2, 10)
    kept = compressor.kept(lab.graph.widths() | {"0": 4})
    assert torch.equal(kept["0"], originals)
    small = compressor.network(kept)
    assert small[0].out_channels == 4
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(small(images), model(images), rtol=1e-4, atol=1e-4)


def test_spatial_readers_keep_their_weights():
    torch.manual_seed(0)
    model = Pointwise()
    model[2] = nn.Conv2d(8, 8, 3, padding=1)
    lab = make_lab(model, trains=False)
    compressor = Compressor(lab, 1, 4)
    kept = compressor.kept(lab.graph.widths() | {"0": 4})
    # By what reads them: Σ|W| over filters and kernel.
    norms = model[2].weight.abs().sum((0, 2, 3))
    assert torch.equal(kept["0"], norms.topk(4).indices.sort().values)
    small = compressor.network(kept)
    assert torch.equal(small[2].weight, model[2].weight[:, kept["0"]])
    assert torch.equal(small[4].weight, model[4].weight)


def test_noise_is_a_normal_restricted_to_shares():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([truncated_normal(0.2, 0.5, generator) for _ in range(2000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1

    def below(x):
        return (1 + math.erf((x - 0.2) / 0.5 / 2**0.5)) / 2

    expected = (below(0.5) - below(0)) / (below(1) - below(0))
    assert (drawn < 0.5).float().mean() == pytest.approx(expected, abs=0.04)
    assert truncated_normal(1.0, 1e-9, generator) == pytest.approx(1.0)


def test_the_default_device_of_new_tensors_does_not_matter():
    lab = make_lab(Pointwise())
    targets = lab.targets["40%"]

    def drawn():
        generator = torch.Generator().manual_seed(0)
        least = least_widths(lab.graph, targets, 0.3)
        return (
            truncated_normal(0.2, 0.5, generator),
            Agent(generator).act(least, None),
            fitting(targets, lab.graph.units[0], 0, least),
        )

    found = drawn()
    with torch.device("meta"):
        assert drawn() == found


def test_the_agent_learns_what_is_rewarded():
    generator = torch.Generator().manual_seed(0)
    agent = Agent(generator)
    state, actions = torch.rand(10, generator=generator), torch.rand(100, 1, generator=generator)
    states = state.expand(100, 10)
    rewards = -((actions - 0.9) ** 2)
    transitions = torch.cat([states, actions, rewards, states, torch.ones(100, 1)], 1)
    with torch.no_grad():
        before = float(agent.actor(state))
    agent.learn(transitions[:1])
    assert agent.baseline == pytest.approx(float(rewards[0]))
    agent.learn(transitions[1:2])
    assert agent.baseline == pytest.approx(float(rewards[:2].mean()))
    for _ in range(60):
        agent.learn(transitions)
    with torch.no_grad():
        assert before + 0.1 < float(agent.actor(state)) < 1


def search(lab):
    return SHORT.find(lab)


def test_meets_every_budget():
    lab = make_lab(Pointwise(), budgets=("40%", "70%"))
    found = search(lab)
    assert set(found) == {"40%", "70%"}
    for label, pruned in found.items():
        widths = torch.tensor([[pruned.widths[unit.name] for unit in lab.graph.units]])
        assert lab.targets[label].met(widths)
        wider = widths + 2 * torch.eye(4, dtype=torch.int64)[:3]
        fits = lab.targets[label].met(wider) & (wider <= 8)[:, :3].all(1)
        assert not fits.any(), "a group still fits"
        sizes = [m.out_channels for m in pruned.network if isinstance(m, nn.Conv2d)]
        assert sizes == widths[0, :3].tolist()
        assert sizes == [len(pruned.kept[unit.name]) for unit in lab.graph.searchable]
    images = len(lab.data.holdout) * SHORT.episodes
    assert lab.spent["40%"].forward == lab.spent["70%"].forward == images


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Pointwise()
    expected = search(make_lab(model))["40%"]

    judge = Lab.accuracy
    calls = []

    def fail_once(lab, network):
        calls.append(network)
        if len(calls) == 4:  # in the first episode that the agent learns from but one
            raise KeyboardInterrupt
        return judge(lab, network)

    monkeypatch.setattr(Lab, "accuracy", fail_once)
    with pytest.raises(KeyboardInterrupt):
        search(make_lab(model, folder=tmp_path))
    resumed = search(make_lab(model, folder=tmp_path))["40%"]
    assert len(calls) == SHORT.episodes + 1
    assert resumed.widths == expected.widths
    assert resumed.details == expected.details
    for name, tensor in expected.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], tensor)


def test_the_resumed_stage_is_the_same_to_the_last_bit():
    torch.manual_seed(0)
    lab = make_lab(Pointwise())
    compressor, targets = Compressor(lab, 1, 4), lab.targets["40%"]
    one, other = (Episodes(SHORT, compressor, targets) for _ in range(2))
    for _ in range(3):
        one.step()
    other.load_state_dict(one.state_dict())
    for stage in (one, other):
        stage.step()
    assert torch.equal(one.state_dict()["replay"], other.state_dict()["replay"])
    for mine, its in zip(
        one.agent.critic.parameters(), other.agent.critic.parameters(), strict=True
    ):
        assert torch.equal(mine, its)
    with pytest.raises(CheckpointError, match="5 episodes, not of 6"):
        Episodes(replace(SHORT, episodes=6), compressor, targets).load_state_dict(one.state_dict())
    with pytest.raises(CheckpointError, match="not the state"):
        one.load_state_dict({"steps": 5})


@pytest.mark.parametrize(
    "wrong",
    [
        {"episodes": 0},
        {"warm_up": -1},
        {"least": 0.0},
        {"noise": 0.0},
        {"noise_decay": 1.5},
    ],
)
def test_refuses_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AMC(**wrong)
