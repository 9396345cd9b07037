import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dmcp
from dmcp.errors import BudgetError, CheckpointError, ConfigError
from dmcp.search import Budget, MarkovNet, Search, SearchOptions
from dmcp.search.subnets import narrowest, random_subnets
from dmcp.train.distributed import World
from dmcp.train.optim import Schedule
from dmcp.train.parts import split_batch


@pytest.fixture
def make(example):
    """A search in a small network, and its batches."""

    def build(steps=6, budget=None, seed=0, name="Residual", **options):
        case = example(name)
        net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
        return Search(net, budget or Budget(macs="50%"), steps, SearchOptions(**options), seed=seed)

    return build


def batch(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(5, (8,), generator=generator)


def run(search, steps=None):
    metrics = {}
    for _ in range(search.steps - search.step_index if steps is None else steps):
        metrics = search.step(*batch(search.step_index))
    return metrics


def alphas(search):
    return torch.cat([alpha.detach().clone() for alpha in search.net.architecture_parameters()])


def assert_same_bits(first, second):
    for wanted, got in zip(
        first.net.state_dict().values(), second.net.state_dict().values(), strict=True
    ):
        assert torch.equal(wanted, got)


def test_the_warm_up_trains_weights_alone(make):
    search = make(steps=4, warmup=0.5)
    assert search.warmup_steps == 2
    start = alphas(search)
    weight = search.net.model.stem[0].weight.detach().clone()
    for _ in range(2):
        metrics = search.step(*batch(search.step_index))
        assert set(metrics) == {"loss", "accuracy", "subnet_loss", "expected_macs"}
        assert torch.equal(alphas(search), start)
    assert not torch.equal(search.net.model.stem[0].weight, weight)
    metrics = search.step(*batch(2))
    assert {"masked_loss", "budget_loss"} <= set(metrics)
    assert (alphas(search) != start).all()
    for value in metrics.values():
        assert value.ndim == 0
        assert not value.requires_grad
        assert torch.isfinite(value)


def test_a_warm_up_never_eats_the_whole_search(make):
    search = make(steps=2, warmup=0.99)
    assert search.warmup_steps == 1
    assert "masked_loss" in run(search)


class ConvolutionBackwards(TorchDispatchMode):
    """Notes which gradients every convolution's backward computes."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        return func(*args, **(kwargs or {}))


def test_the_architecture_step_computes_no_weight_gradient(make):
    search = make(steps=2, warmup=0.5)
    run(search, 1)
    before = {name: buffer.clone() for name, buffer in search.net.model.named_buffers()}
    weights = [p.detach().clone() for p in search.net.weight_parameters()]
    grads = [p.grad.clone() for p in search.net.weight_parameters()]
    search.net.train()
    with ConvolutionBackwards() as seen:
        search._architecture_step(split_batch(*batch(1), 1), [torch.randn(8, 5)])
    assert seen.masks
    assert all(not weight and not bias for _, weight, bias in seen.masks)
    for name, buffer in search.net.model.named_buffers():
        assert torch.equal(buffer, before[name])
    for parameter, weight, grad in zip(search.net.weight_parameters(), weights, grads, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.grad, grad)
        assert parameter.requires_grad


class Calls(TorchDispatchMode):
    """Notes the project's own ops that touch the chains."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dmcp" and func.__name__.startswith(("retain", "expected_cost")):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_the_architecture_step_calls_one_op_each_way_for_all_chains(make):
    search = make(steps=1, warmup=0.0, budget=Budget(macs="50%", params="60%"))
    search.net.train()
    with Calls() as seen:
        search._architecture_step(split_batch(*batch(1), 1), [torch.randn(8, 5)])
    assert seen.names == ["expected_cost.default", "expected_cost_backward.default"]


def test_a_step_updates_the_running_statistics_once(make):
    search = make(steps=2, warmup=0.0)
    norm = search.net.model.stem[1]
    plain = copy.deepcopy(search.net.graph.model).train()
    plain(batch(0)[0])
    search.step(*batch(0))
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, plain.stem[1].running_mean)
    torch.testing.assert_close(norm.running_var, plain.stem[1].running_var)


def test_the_weight_gradients_are_those_of_the_sandwich(make):
    """Widest on the labels, narrowest on the widest one's outputs: gradients add up."""
    search = make(steps=2, warmup=0.5, random_subnets=0, momentum=0.0, weight_decay=0.0)
    reference = make(steps=2)
    net = reference.net.train()
    images, labels = batch(0)
    logits = net(images)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    with net.at(narrowest(net)):
        student = net(images).log_softmax(1)
    target = logits.detach().softmax(1)
    (target * (target.log() - student)).sum(1).mean().backward()
    search.step(images, labels)
    for got, wanted in zip(search.net.weight_parameters(), net.weight_parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("match_scale", [True, False])
def test_the_alpha_gradient_is_that_of_task_and_budget(make, match_scale):
    options = {"warmup": 0.0, "start": 0.7, "anneal": 0.0, "match_scale": match_scale}
    search = make(steps=1, budget_loss="l2", budget_weight=3.0, **options)
    images, labels = batch(0)
    net = search.net.train()
    teacher = 7 * net(images).detach()
    with net.masked():
        logits = net(images)
    if match_scale:
        logits = logits * teacher.std() / logits.std()
    task = torch.nn.functional.cross_entropy(logits, labels)
    cost = dmcp.cost(net.graph)
    ratio = cost.mean(net.width_moments()) / (cost.of({}) // 2)
    gradients = torch.autograd.grad(task + 3 * (ratio - 1) ** 2, net.architecture_parameters())
    search._architecture_step(split_batch(images, labels, 1), [teacher])
    for alpha, wanted in zip(net.architecture_parameters(), gradients, strict=True):
        torch.testing.assert_close(alpha.grad, wanted, rtol=1e-4, atol=1e-6)


def test_without_distillation_every_sub_network_learns_the_labels(make):
    search = make(steps=1, distil=False, random_subnets=0)
    net, (images, labels) = search.net, batch(0)
    net.train()
    with net.at(narrowest(net)), torch.no_grad():
        expected = torch.nn.functional.cross_entropy(net(images), labels)
    torch.testing.assert_close(search.step(images, labels)["subnet_loss"], expected)


def test_the_share_of_uniform_sub_networks_depends_on_progress_alone(make):
    shares = {}
    for steps in (10, 100):
        search = make(steps=steps, warmup=0.5, uniform_share=0.1)
        for progress in (0.0, 0.3, 0.5, 0.7, 1.0):
            search.step_index = round(progress * steps)
            shares[steps, progress] = search._uniform_share()
    for steps in (10, 100):
        expected = [1, 1, 1, 0.1**0.4, 0.1]
        got = [shares[steps, progress] for progress in (0.0, 0.3, 0.5, 0.7, 1.0)]
        assert got == pytest.approx(expected)


def test_random_sub_networks_are_uniform_or_drawn_from_the_chains(make):
    net = make().net
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.fill_(-80)
    generator = torch.Generator().manual_seed(0)
    least = narrowest(net)
    assert all(widths == least for widths in random_subnets(net, 20, 1e-9, generator))
    uniform = list(random_subnets(net, 2000, 1.0, generator))
    for unit in net.graph.units:
        counts = [sum(w[unit.name] == width for w in uniform) for width in unit.choices]
        expected = 2000 / len(unit.choices)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts)
    mixed = [widths == least for widths in random_subnets(net, 2000, 0.3, generator)]
    by_chance = 0.3 / len(net.graph.units[0].choices) ** len(net.graph.searchable)
    assert sum(mixed) / 2000 == pytest.approx(0.7 + by_chance, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


def test_the_same_seed_gives_the_same_bits(make):
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    for search in (first, second, other):
        run(search)
    assert_same_bits(first, second)
    assert not torch.equal(first.net.model.stem[0].weight, other.net.model.stem[0].weight)


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("arch_optimizer", ["adam", "sgd"])
def test_an_interrupted_search_gives_the_same_bits(make, stop, arch_optimizer):
    straight = make(steps=6, warmup=0.5, arch_optimizer=arch_optimizer)
    run(straight)
    first = make(steps=6, warmup=0.5, arch_optimizer=arch_optimizer)
    run(first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(steps=6, warmup=0.5, arch_optimizer=arch_optimizer, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.step_index == stop
    run(second)
    assert_same_bits(straight, second)
    assert torch.equal(straight.budget_loss.multipliers, second.budget_loss.multipliers)
    assert straight.expected_widths() == second.expected_widths()


def test_multipliers_of_a_state_stay_what_they_were(make):
    search = make(steps=4, warmup=0.0, anneal=0.0)
    run(search, 1)
    kept = search.budget_loss.state_dict()["multipliers"]
    before = kept.clone()
    run(search, 1)
    assert torch.equal(kept, before)
    assert not torch.equal(search.budget_loss.multipliers, before)


def test_a_foreign_checkpoint_is_refused(make):
    state = make(steps=6).state_dict()
    with pytest.raises(CheckpointError, match="not of a search with 7 steps"):
        make(steps=7).load_state_dict(state)
    with pytest.raises(CheckpointError, match="stage 'training'"):
        make(steps=6).load_state_dict({**state, "stage": "training"})


@pytest.mark.parametrize(
    ("budget_loss", "weight", "tolerance"),
    [
        ("l1", 3.0, 0.0),
        ("l2", 30.0, 0.0),
        ("log_l1", 0.3, 0.05),
        ("augmented_lagrangian", 10.0, 0.0),
    ],
)
@pytest.mark.parametrize("start", [0.5, 0.99])
def test_the_expected_cost_moves_to_the_budget(make, budget_loss, weight, tolerance, start):
    search = make(
        steps=120,
        warmup=0.0,
        random_subnets=0,
        start=start,
        arch_lr=Schedule(peak=0.2, final=0.01),
        budget_loss=budget_loss,
        budget_weight=weight,
        tolerance=tolerance,
    )
    (target,) = search.targets.bounds
    metrics = run(search)
    assert 0.9 * target <= metrics["expected_macs"].item() <= 1.05 * target
    widths = search.expected_widths()
    assert dmcp.cost(search.net.graph).of(widths) <= target


@pytest.mark.parametrize("start", [0.5, 0.9, 0.99])
def test_the_augmented_lagrangian_keeps_the_expected_cost_below_every_bound(make, start):
    search = make(
        budget=Budget(macs="50%", params="60%"),
        steps=120,
        warmup=0.0,
        random_subnets=0,
        start=start,
        arch_lr=Schedule(peak=0.2, final=0.01),
    )
    metrics = run(search)
    for metric, bound in zip(("macs", "params"), search.targets.bounds, strict=True):
        assert metrics[f"expected_{metric}"].item() <= 1.01 * bound


def test_bounds_fall_geometrically_from_the_cost_at_the_start(make):
    search = make(budget=Budget(macs="60%", params="30%"), steps=10, anneal=0.5, start=0.99)
    first = search.targets.ratios(search.expected_cost().cost).detach()
    assert (first > 1).all()
    for done, power in ((0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)):
        torch.testing.assert_close(search._slack(done), first**power)
    below = make(start=0.01, anneal=0.5)
    assert below._slack(0.0).tolist() == [1.0]


def test_without_annealing_the_budget_holds_from_the_first_step(make):
    relaxed = make(steps=4, warmup=0.0, start=0.99)
    strict = make(steps=4, warmup=0.0, start=0.99, anneal=0.0)
    assert relaxed.step(*batch(0))["budget_loss"].item() == pytest.approx(0, abs=1e-9)
    assert strict.step(*batch(0))["budget_loss"].item() > 0.1


def test_samples_follow_the_chains(make):
    search = make(start=0.7)
    generator = torch.Generator().manual_seed(0)
    assert len(search.sample_widths(9, generator)) == 9
    near = search.sample_widths(4, generator, tolerance=0.05)
    assert ((search.targets.largest_ratio(near.widths) - 1).abs() <= 0.05).all()


def test_bad_arguments_are_named(make):
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ConfigError, match="steps must be an int of at least 1"):
            make(steps=steps)
    with pytest.raises(BudgetError, match="above the full network"):
        make(budget=Budget(macs="1G"))
    search = make(steps=1)
    run(search)
    with pytest.raises(ConfigError, match="all 1 steps are done"):
        search.step(*batch(1))


@pytest.mark.parametrize(
    ("world", "message"),
    [(None, "needs .* on cpu"), (World(0, 2, torch.device("cpu")), "in one process")],
)
def test_graphs_without_a_gpu_or_in_several_processes_are_refused(example, world, message):
    case = example("Residual")
    net = MarkovNet(case.model, case.inputs, groups=4, divisor=1)
    options = SearchOptions(cuda_graphs=True)
    with pytest.raises(ConfigError, match=f"cuda_graphs.*{message}"):
        Search(net, Budget(macs="50%"), 4, options, world=world)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("random_subnets", -1),
        ("uniform_share", 0.0),
        ("uniform_share", 1.1),
        ("start", 1.0),
        ("start", "middle"),
        ("arch_optimizer", "lamb"),
    ],
)
def test_bad_options_are_named(option, value):
    with pytest.raises(ConfigError, match=option):
        SearchOptions(**{option: value})
