"""The proof, on networks whose code or rules it must not trust."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import randomise, same, zeroed
from torch import nn

import dmcp
from dmcp.errors import TraceError
from dmcp.graph.rules import indexing, registry, shape
from dmcp.graph.values import Axis

IMAGES = torch.zeros(2, 3, 8, 8)


class Between(nn.Module):
    """``function`` of two convolutions' outputs, 8 channels each, and two convolutions."""

    def __init__(self, function, features, **modules):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.free, self.last = nn.Conv2d(features, 6, 1), nn.Conv2d(6, 4, 1)
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        between = self.function(self, F.relu(self.first(x)), F.relu(self.second(x)))
        return self.last(F.relu(self.free(between)))


def reversed_cat(tracer, parts, dim=0):
    return shape.cat(tracer, parts[::-1], dim)


def untied_chunk(tracer, x, count, dim=0):
    return indexing._pieces(tracer, x, dim)


def zero_preserving_sigmoid(tracer, x):
    return tracer.emit("activation", [x], x.axes)


def forgetful_pad(tracer, x, sizes, *_):
    axis = x.axes[1]
    axes = list(x.axes)
    axes[1] = Axis(np.concatenate([axis.slots, axis.slots[: sizes[-1]]]))
    return tracer.emit("linear_map", [x], axes)


def unflipped(tracer, x, dims):
    return tracer.emit("linear_map", [x], x.axes)


def free_mean(tracer, x, dims, keepdim=False, *_):
    return tracer.emit("linear_map", [x], [None if n == 1 else a for n, a in enumerate(x.axes)])


def untied_norm(tracer, x, *tensors):
    return tracer.emit("norm", [x], x.axes)


def ungrouped_norm(tracer, x, groups, *_):
    return tracer.emit("norm", [x], x.axes)


def free_softmax(tracer, x, *_):
    return tracer.emit("join", [x], x.axes)


def tiled_flatten(tracer, x, *_):
    axis = x.axes[1]
    size = tracer.call.shape[1] // x.shape[1]
    return tracer.emit("linear_map", [x], [None, Axis(np.tile(axis.slots, size))])


def zero_preserving_add(tracer, x, *others):
    return tracer.emit("join", [x, *others], x.axes)


def selected_anywhere(tracer, x, dim, index):
    return tracer.emit("linear_map", [x], shape.axes_without(x.axes, dim))


WRONG = {
    "a concatenation in the wrong order": (
        "cat",
        reversed_cat,
        lambda m, a, b: torch.cat([a, b], 1),
        16,
        {},
    ),
    "parts that are not tied": (
        "chunk",
        untied_chunk,
        lambda m, a, b: a.chunk(2, 1)[0],
        4,
        {},
    ),
    "a sigmoid of zero that is zero": (
        "sigmoid",
        zero_preserving_sigmoid,
        lambda m, a, b: a.sigmoid(),
        8,
        {},
    ),
    "a sum with a number that is zero where it is": (
        "add.Tensor",
        zero_preserving_add,
        lambda m, a, b: a + 1,
        8,
        {},
    ),
    "padding that forgets what is new": (
        "pad",
        forgetful_pad,
        lambda m, a, b: F.pad(a, (0, 0, 0, 0, 0, 2)),
        10,
        {},
    ),
    "a flip that does nothing": (
        "flip",
        unflipped,
        lambda m, a, b: torch.cat([a.flip(1), b], 1),
        16,
        {},
    ),
    "a mean over channels that leaves them free": (
        "mean",
        free_mean,
        lambda m, a, b: b * a.mean(1, keepdim=True),
        8,
        {},
    ),
    "a softmax over channels that leaves them free": (
        "softmax",
        free_softmax,
        lambda m, a, b: a * b.softmax(1),
        8,
        {},
    ),
    "a norm without its weights": (
        "batch_norm",
        untied_norm,
        lambda m, a, b: m.norm(a),
        8,
        {"norm": nn.BatchNorm2d(8)},
    ),
    "a group norm whose groups fall apart": (
        "group_norm",
        ungrouped_norm,
        lambda m, a, b: m.norm(a),
        8,
        {"norm": nn.GroupNorm(2, 8, affine=False)},
    ),
    "a flatten in the wrong order": (
        "flatten",
        tiled_flatten,
        lambda m, a, b: F.adaptive_avg_pool2d(a, 2).flatten(1)[:, :, None, None],
        32,
        {},
    ),
    "a place that may move": (
        "select.int",
        selected_anywhere,
        lambda m, a, b: b * a[:, 7].unsqueeze(1),
        8,
        {},
    ),
}


def wrong_model(name):
    _, _, function, features, modules = WRONG[name]
    return randomise(Between(function, features, **copy.deepcopy(modules)), seed=1)


def errors(graph, seeds=range(2)):
    """Every searchable unit alone, and all together: the extracted against the zeroed network."""
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for unit in graph.searchable:
            order = torch.randperm(unit.channels // unit.step, generator=generator)
            size = int(torch.randint(1, len(order), (), generator=generator))
            rows = order[:size].sort().values[:, None] * unit.step + torch.arange(unit.step)
            kept[unit.name] = rows.flatten().tolist()
        parts = [{name: stay} for name, stay in kept.items()]
        for part in [*parts, kept]:
            dropped = {
                unit.name: sorted(set(range(unit.channels)) - set(part[unit.name]))
                for unit in graph.units
                if unit.name in part
            }
            small, big = dmcp.extract(graph, kept=part), zeroed(graph, dropped)
            try:
                apart = same(small, big, [images])
            except (RuntimeError, IndexError):
                apart = float("inf")
            key = " ".join(part)
            found[key] = max(apart, found.get(key, 0.0))
    return found


@pytest.fixture
def unproved(monkeypatch):
    """What the rules alone say."""

    def trace(model):
        with monkeypatch.context() as patch:
            patch.setattr("dmcp.graph.proof.prove", lambda graph, *_, **__: graph)
            return dmcp.trace(model, IMAGES)

    return trace


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found_and_the_rest_stays(name, monkeypatch, unproved):
    operator, wrong, *_ = WRONG[name]
    monkeypatch.setitem(registry._RULES, operator, wrong)
    model = wrong_model(name)
    believed = unproved(model)
    graph = dmcp.trace(model, IMAGES)
    lost = {u.name for u in believed.searchable} - {u.name for u in graph.searchable}
    assert max(errors(believed).values()) > 1e-6, "the rule is not wrong here"
    assert lost
    assert set(graph.proof.refuted) == lost
    assert lost <= {"first", "first#1", "second"}
    assert {"free"} <= {unit.name for unit in graph.searchable}
    for unit in graph.units:
        if unit.name in lost:
            assert unit.reason == graph.proof.refuted[unit.name]
            assert unit.choices == (unit.channels,)
    assert max(errors(graph).values()) < 1e-10
    assert graph.proof.dtype == "float64"


@pytest.mark.parametrize("name", WRONG)
def test_with_the_right_rule_nothing_is_refuted(name):
    graph = dmcp.trace(wrong_model(name), IMAGES)
    assert graph.proof.refuted == {}
    assert "free" in {unit.name for unit in graph.searchable}
    assert max(errors(graph).values()) < 1e-10


SIZES = {
    "a view": (lambda m, a, b: a.view(2, 8, 64).view(2, 8, 8, 8), "fails without some"),
    "a repeat": (lambda m, a, b: a.mean(1, keepdim=True).repeat(1, 8, 1, 1) * b, "fails without"),
    "a mean by hand": (lambda m, a, b: b * (a.sum(1, keepdim=True) / a.shape[1]), "differs from"),
    "a scale by the width": (lambda m, a, b: a * a.shape[1] ** -0.5, "differs from the one with"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_the_code_are_found(name):
    function, message = SIZES[name]
    graph = dmcp.trace(randomise(Between(function, 8), seed=1), IMAGES)
    assert [message in reason for reason in graph.proof.refuted.values()] == [True]
    assert set(graph.proof.refuted) < {"first", "second"}
    assert "free" in {unit.name for unit in graph.searchable}
    assert max(errors(graph).values()) < 1e-10


def test_the_other_part_of_a_split_shrinks_if_the_code_keeps_the_larger_one():
    """A shuffle of groups of four channels: as many groups as there are."""

    def function(m, a, b):
        return a.view(2, a.shape[1] // 4, 4, 8, 8).transpose(1, 2).flatten(1, 2)

    graph = dmcp.trace(randomise(Between(function, 8), seed=1), IMAGES)
    (unit,) = [unit for unit in graph.units if unit.name == "first"]
    assert (unit.choices, unit.step) == ((4, 8), 4)
    assert graph.proof.refuted == {}
    assert max(errors(graph).values()) < 1e-10


def test_two_units_that_only_fail_together_lose_one():
    def function(m, a, b):
        both = a.shape[1] < 8 and b.shape[1] < 8
        return torch.cat([a, b], 1) * (2.0 if both else 1.0)

    graph = dmcp.trace(randomise(Between(function, 16), seed=1), IMAGES)
    assert len(graph.proof.refuted) == 1
    assert len({"first", "second"} & {unit.name for unit in graph.searchable}) == 1
    assert max(errors(graph).values()) < 1e-10


def test_what_is_not_a_number_is_never_the_same():
    class NoNumbers(Between):
        def forward(self, x):
            return torch.log(-1 - super().forward(x).abs())

    graph = dmcp.trace(NoNumbers(lambda m, a, b: a, 8), IMAGES)
    assert not graph.searchable
    assert {"first", "free"} <= set(graph.proof.refuted)


def test_zeros_that_become_no_numbers_are_found():
    """Zero over zero where a channel is zeroed, nothing where it is gone."""

    def function(m, a, b):
        return a / a.sum((2, 3), keepdim=True)

    graph = dmcp.trace(Between(function, 8), IMAGES)
    assert "first" not in {unit.name for unit in graph.searchable}
    assert "free" in {unit.name for unit in graph.searchable}


def test_weights_that_random_numbers_break_are_left_as_they_are():
    """A logarithm of a parameter: of a random one it may be no number."""

    class Logarithmic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.rate = nn.Parameter(torch.full((1, 1, 1, 8), 0.5))

        def forward(self, x):
            return self.last(self.first(x) * torch.log(self.rate))

    graph = dmcp.trace(Logarithmic(), IMAGES)
    assert graph.proof.refuted == {}
    assert [unit.name for unit in graph.searchable] == ["first"]


def test_double_precision_decides_where_single_is_too_coarse():
    """A chaotic map makes rounding errors 2¹⁶ times larger."""

    class Chaotic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 256), nn.Linear(256, 16)

        def forward(self, x):
            y = self.last(F.relu(self.first(x))).sigmoid()
            for _ in range(16):
                y = 4 * y * (1 - y)
            return y

    graph = dmcp.trace(Chaotic(), torch.zeros(8, 16))
    assert graph.proof.dtype == "float64"
    assert graph.proof.refuted == {}
    assert [unit.name for unit in graph.searchable] == ["first"]
    assert graph.proof.forward_error < 1e-9


class Watched(nn.Module):
    """Norms, dropout, a part that only training runs, and a frozen block."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Conv2d(8, 4, 1)
        self.auxiliary = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.stem(x))))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_numbers_are_left_alone(training):
    model = Watched().train(training)
    model.norm.train(not training)
    model.head.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    tensors = {id(t): t.clone() for t in [*model.parameters(), *model.buffers()]}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    images = torch.full((2, 3, 8, 8), 7.0)
    with torch.enable_grad():
        graph = dmcp.trace(model, images)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert [module.training for module in model.modules()] == modes
    found = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert (model.stem.weight.grad == 1).all()
    assert all(p.grad is None for n, p in model.named_parameters() if n != "stem.weight")
    assert [p.requires_grad for p in model.head.parameters()] == [False, False]
    assert (images == 7).all()
    assert graph.model is model
    assert [unit.name for unit in graph.searchable] == ["stem"]


def test_the_proof_works_without_gradients():
    with torch.no_grad():
        graph = dmcp.trace(Between(lambda m, a, b: a + b, 8), IMAGES)
        assert not torch.is_grad_enabled()
    assert graph.proof.refuted == {}
    assert len(graph.searchable) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precisions_are_proved_in_single(dtype):
    model = Between(lambda m, a, b: a + b, 8).to(dtype)
    graph = dmcp.trace(model, IMAGES.to(dtype))
    assert graph.proof.dtype == "float32"
    assert len(graph.searchable) == 2
    assert next(model.parameters()).dtype == dtype


def test_a_network_with_nothing_to_search_has_nothing_to_prove():
    proof = dmcp.trace(nn.Conv2d(3, 4, 1), IMAGES).proof
    assert (proof.structures, proof.refuted, proof.forward_error) == (0, {}, 0.0)


def test_the_proof_says_what_it_did(traced):
    proof = traced("resnet18").graph.proof
    assert proof.structures == 3
    assert 0 < proof.forward_error <= 1e-5
    assert 0 < proof.gradient_error <= 1e-4
    assert proof.dtype == "float32"
    assert proof.seconds > 0


def test_whole_numbers_must_be_the_same():
    """The place of the largest channel is an output of its own."""

    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = F.relu(self.first(x))
            y = self.last(x)
            return y, y.argmax(1), torch.full((1,), x.shape[1])

    graph = dmcp.trace(Places(), IMAGES)
    assert "differs" in graph.proof.refuted["first"]


def test_gradients_are_compared_too():
    """An output that is right, and a gradient that is not."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            y = self.last(F.relu(self.first(x)))
            return y if self.first.out_channels == 8 else (y + y.detach()) / 2

    graph = dmcp.trace(Halved(), IMAGES)
    assert "differs" in graph.proof.refuted["first"]


class Capricious(nn.Module):
    """Another network at some widths only."""

    def __init__(self, bad):
        super().__init__()
        self.first, self.last, self.bad = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1), bad

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x * 2 if x.shape[1] in self.bad else x)


def test_a_structure_that_differs_is_not_forgotten():
    images = torch.zeros(2, 3, 4, 4)
    refuted = set()
    for width in range(1, 16):
        graph = dmcp.trace(Capricious({width}), images)
        if graph.proof.refuted:
            refuted.add(width)
    # The narrowest network, and two of random widths.
    assert 1 in refuted
    assert 2 <= len(refuted) <= 3


class OtherInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.first(x).relu()
        if self.training:
            x = x / (1 + x.mean(1, keepdim=True))
        return self.last(x)


def test_a_training_pass_that_differs_refutes():
    graph = dmcp.trace(OtherInTraining(), torch.zeros(2, 3, 4, 4))
    assert "in training" in graph.proof.refuted["first"]


class Bytes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        x = self.first(x.float() / 255)
        return self.last(x / x.shape[1])


def test_integer_images_of_zeros_do_not_blind_the_proof():
    graph = dmcp.trace(Bytes(), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert list(graph.proof.refuted) == ["first"]


class Shared(nn.Module):
    """A copy of it would write on the original."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x)

    def __deepcopy__(self, memo):
        return self


def test_a_model_that_cannot_be_copied_is_refused_and_left_alone():
    model = nn.Sequential(Shared(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    before = model[0].conv.weight.clone()
    with pytest.raises(TraceError, match="a copy of it shares its parameters"):
        dmcp.trace(model, torch.zeros(2, 3, 4, 4))
    assert torch.equal(model[0].conv.weight, before)
    assert model[0].conv.weight.dtype == torch.float32
