"""Training goes on in the extracted network as it would in the whole one with channels at zero."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

import dmcp
from dmcp.errors import ConfigError
from dmcp.graph import hand_over
from dmcp.graph.extract import cut, kept_steps
from dmcp.graph.tensors import tensor_of

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
ADAM = {"lr": 0.01, "weight_decay": 1e-2}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "nesterov, fused": lambda p: torch.optim.SGD(p, **SGD, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, **ADAM),
    "amsgrad, fused": lambda p: torch.optim.Adam(p, **ADAM, amsgrad=True, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, **ADAM, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, **ADAM),
}


class Tied(nn.Module):
    """Two convolutions share a weight, two norms share everything; one parameter is frozen."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.second.weight = self.first.weight
        self.norm = self.same = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.stem.bias.requires_grad_(False)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.same(self.second(F.relu(self.first(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def double(traced):
    """The graph of an example network in float64, always with the same weights."""

    def make(name="Residual"):
        if name != "Tied":
            return traced(name).to(torch.float64).graph
        torch.manual_seed(0)
        return dmcp.trace(Tied().double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))

    return make


def half(graph):
    return {unit.name: max(unit.step, unit.channels // 2) for unit in graph.searchable}


def batches(first, last):
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        yield images, torch.randint(5, (4,), generator=generator)


def train(model, optimizer, steps, after=lambda: None, scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    model.train()
    for images, labels in batches(*steps):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(images), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        after()


@torch.no_grad()
def drop(graph, widths):
    """The whole network with the dropped channels at zero."""
    steps = kept_steps(graph, widths, None)
    for name, axes in graph.tensors.items():
        tensor = tensor_of(graph.model, name)
        for dim, axis in enumerate(axes):
            if (
                axis is None
                or not isinstance(tensor, nn.Parameter)
                or (name, dim) in graph.consumed
            ):
                continue
            gone = torch.ones(len(axis.unit), dtype=torch.bool)
            gone[axis.kept(steps)] = False
            tensor.index_fill_(dim, gone.nonzero().flatten(), 0)


def assert_continues(graph, widths, small):
    """The small network is what is left of the whole one."""
    steps = kept_steps(graph, widths, None)
    for name, axes in graph.tensors.items():
        wanted = cut(tensor_of(graph.model, name), axes, steps)
        torch.testing.assert_close(tensor_of(small, name), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["Residual", "Depthwise", "Concat", "Tied"])
def test_steps_are_those_of_the_whole_network_with_zeros(double, kind, name):
    graph, whole = double(name), double(name)
    widths = half(graph)
    optimizers = [OPTIMIZERS[kind](each.model.parameters()) for each in (graph, whole)]
    for each, optimizer in zip((graph, whole), optimizers, strict=True):
        train(each.model, optimizer, (0, 4))

    small = hand_over(graph, widths, optimizers=optimizers[0])
    train(small, optimizers[0], (4, 10))
    drop(whole, widths)
    train(whole.model, optimizers[1], (4, 10), after=lambda: drop(whole, widths))
    assert_continues(whole, widths, small)
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in graph.model.parameters()
    )


def test_the_memory_format_is_kept(double):
    """Fused optimizers walk over memory."""
    graph, whole = double(), double()
    widths = half(graph)
    optimizers = []
    for each in (graph, whole):
        each.model.to(memory_format=torch.channels_last)
        optimizers.append(OPTIMIZERS["nesterov, fused"](each.model.parameters()))
        train(each.model, optimizers[-1], (0, 3))
    small = hand_over(graph, widths, optimizers=optimizers[0])
    assert small.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    for parameter, state in optimizers[0].state.items():
        assert state["momentum_buffer"].stride() == parameter.stride()
    train(small, optimizers[0], (3, 6))
    drop(whole, widths)
    train(whole.model, optimizers[1], (3, 6), after=lambda: drop(whole, widths))
    assert_continues(whole, widths, small)


def full_training(graph, handed):
    """Everything a training may hold, before and after the network becomes smaller."""
    model, widths = graph.model, half(graph)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    moving = swa_utils.get_ema_multi_avg_fn(0.7)
    average = swa_utils.AveragedModel(model, multi_avg_fn=moving)
    means = copy.deepcopy(model.state_dict())

    def go_on(model, steps, after=lambda: None):
        def follow():
            after()
            schedule.step()
            average.update_parameters(model)
            for name, tensor in model.state_dict().items():
                means[name] += (0.5 * (tensor - means[name])).to(tensor.dtype)

        train(model, optimizer, steps, follow, scaler)

    go_on(model, (0, 4))
    if handed:
        model = hand_over(graph, widths, optimizers=[optimizer], averages=(average, means))
        go_on(model, (4, 8))
    else:
        drop(graph, widths)
        go_on(model, (4, 8), after=lambda: drop(graph, widths))
    return model, optimizer, schedule, scaler, average, means


def test_what_holds_the_optimizer_goes_on(double):
    """Schedulers, a scaler, averages as a module and as a state dict; groups stay groups."""
    whole, graph = double(), double()
    small, optimizer, schedule, scaler, average, means = full_training(graph, handed=True)
    wanted = full_training(whole, handed=False)

    assert_continues(whole, half(whole), small)
    averages = [(average.module.state_dict(), wanted[4].module.state_dict()), (means, wanted[5])]
    steps = kept_steps(whole, half(whole), None)
    for got, full in averages:
        assert got.keys() == full.keys()
        for name, axes in whole.tensors.items():
            expected = cut(full[name], axes, steps)
            torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-9)
    assert int(average.n_averaged) == 8
    assert scaler.state_dict() == wanted[3].state_dict()
    assert scaler.get_scale() > 8
    assert schedule.state_dict() == wanted[2].state_dict()
    for got, full in zip(optimizer.param_groups, wanted[1].param_groups, strict=True):
        assert len(got["params"]) == len(full["params"])
        assert {**got, "params": ()} == {**full, "params": ()}


def test_after_a_search(example):
    """The optimizer of the search trains what it found."""
    handed = []
    for _ in range(2):
        case = example("Residual").to(torch.float64)
        net = dmcp.MarkovNet(case.model, case.inputs, groups=4, divisor=1)
        search = dmcp.Search(net, dmcp.Budget(macs="50%"), steps=4)
        for images, labels in batches(0, 4):
            search.step(images, labels)
        handed.append((net.graph, search.optimizer, search.expected_widths()))
    (graph, optimizer, widths), (whole, other, same) = handed
    assert widths == same
    small = hand_over(graph, widths, optimizers=optimizer)
    train(small, optimizer, (4, 8))
    drop(whole, widths)
    train(whole.model, other, (4, 8), after=lambda: drop(whole, widths))
    assert_continues(whole, widths, small)


def test_kept_channels_in_the_middle(double):
    graph = double()
    optimizer = OPTIMIZERS["sgd"](graph.model.parameters())
    train(graph.model, optimizer, (0, 2))
    before = optimizer.state[graph.model.first[0].weight]["momentum_buffer"]
    small = hand_over(graph, kept={"first.0": [1, 2, 5]}, optimizers=optimizer)
    after = optimizer.state[small.first[0].weight]["momentum_buffer"]
    assert torch.equal(after, before[[1, 2, 5]])


def test_parameters_that_are_not_the_models_stay(double):
    """And those of the model that no optimizer holds only become smaller."""
    graph = double()
    temperature = nn.Parameter(torch.ones(4, dtype=torch.float64))
    held = [temperature, graph.model.stem[0].weight]
    optimizer = OPTIMIZERS["adamw"](held)
    for images, labels in batches(0, 1):
        F.cross_entropy(graph.model(images) * temperature.sum(), labels).backward()
    optimizer.step()
    moments = optimizer.state[temperature]
    small = hand_over(graph, half(graph), optimizers=optimizer)
    first, second = optimizer.param_groups[0]["params"]
    assert first is temperature
    assert second is small.stem[0].weight
    assert optimizer.state[temperature] is moments
    assert list(optimizer.state) == [temperature, second]
    assert optimizer.state[second]["exp_avg"].shape == second.shape
    assert float(optimizer.state[second]["step"]) == 1


class Blockwise(torch.optim.SGD):
    """Keeps one number for every four weights, as 8-bit optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["absmax"] = torch.ones(parameter.numel() // 4 + 1)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (
            torch.optim.Adafactor,
            r"Adafactor remembers 'row_var' of stem.0.weight, of shape \[8, 3, ",
        ),
        (Blockwise, r"Blockwise remembers 'absmax' of stem.0.weight, of shape \[55\]"),
    ],
)
def test_what_has_no_channels_to_drop_is_refused(double, kind, named):
    graph = double()
    optimizer, other = (
        kind(graph.model.parameters(), lr=0.1),
        OPTIMIZERS["adamw"](graph.model.parameters()),
    )
    train(graph.model, optimizer, (0, 1))
    train(graph.model, other, (0, 1))
    with pytest.raises(ConfigError, match=named):
        hand_over(graph, half(graph), optimizers=(other, optimizer))
    # Nothing has happened.
    assert other.param_groups[0]["params"] == list(graph.model.parameters())
    assert set(other.state) == set(graph.model.parameters())
    # And what stays whole could be handed over.
    hand_over(graph, {}, optimizers=optimizer)


class Gram(torch.optim.SGD):
    """Remembers the second moments of every vector, a matrix that is larger than it."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.ndim == 1):
                self.state[parameter]["gram"] = parameter.grad.outer(parameter.grad)


def test_a_matrix_of_a_vector_that_stays_whole_goes_on(double):
    graph = double()
    held = dict(graph.model.named_parameters())
    optimizer = Gram([held["first.0.weight"], held["head.2.bias"]], lr=0.1)
    train(graph.model, optimizer, (0, 1))
    gram = optimizer.state[held["head.2.bias"]]["gram"]
    small = hand_over(graph, {"first.0": 3}, optimizers=optimizer)
    assert optimizer.state[small.get_parameter("head.2.bias")]["gram"] is gram


@pytest.mark.parametrize("first", ["the model's", "another"])
def test_what_is_remembered_of_all_parameters_at_once_is_refused(double, first):
    """Also where the parameter that it is remembered at stays whole."""
    graph = double()
    others = [nn.Parameter(torch.zeros(3))] if first == "another" else []
    optimizer = torch.optim.LBFGS([*others, *graph.model.parameters()], lr=1e-3, max_iter=2)
    hand_over(graph, {"first.0": 3}, optimizers=optimizer)  # it remembers nothing yet

    graph = double()
    held = [*others, *graph.model.parameters()]
    optimizer = torch.optim.LBFGS(held, lr=1e-3, max_iter=2)
    (images, labels), *_ = batches(0, 1)

    def loss():
        optimizer.zero_grad()
        found = F.cross_entropy(graph.model(images), labels)
        found.backward()
        return found

    optimizer.step(loss)
    with pytest.raises(ConfigError, match=r"LBFGS remembers 'd', of shape \[\d+\], .* handed over"):
        hand_over(graph, {"first.0": 3}, optimizers=optimizer)
    assert optimizer.param_groups[0]["params"] == held  # nothing has happened
    hand_over(graph, {}, optimizers=optimizer)  # where all is whole, there is nothing to drop


def test_strangers_are_refused(double):
    graph = double()
    copied = copy.deepcopy(graph.model)
    with pytest.raises(ConfigError, match="SGD holds no parameter of the traced model"):
        hand_over(graph, {}, optimizers=OPTIMIZERS["sgd"](copied.parameters()))
    with pytest.raises(ConfigError, match="Linear holds no copy of the traced model"):
        hand_over(graph, {}, averages=nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"'stem.0.bias' is not a tensor of the traced model"):
        hand_over(graph, {}, averages={"stem.0.bias": torch.zeros(8)})
    with pytest.raises(ConfigError, match="either widths or kept"):
        hand_over(graph)


def test_what_modules_save_beside_tensors_stays(double):
    class Versioned(Tied):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            assert state == {"version": 1}

    graph = dmcp.trace(Versioned().double(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    average = swa_utils.AveragedModel(graph.model)
    small = hand_over(graph, half(graph), averages=average)
    average.update_parameters(small)
    assert average.module.get_extra_state() == small.get_extra_state()
