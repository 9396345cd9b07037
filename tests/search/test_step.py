"""A whole step: the same mathematics as over plain PyTorch, in fewer operators, without waiting."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import dmcp
from dmcp import models
from dmcp.errors import ConfigError
from dmcp.search import Budget, MarkovNet, Search, SearchOptions
from dmcp.search.subnets import narrowest, random_uniform
from dmcp.train.cuda_graphs import WARM_UP, Memory, rehearse
from dmcp.train.optim import Schedule
from dmcp.train.parts import split_batch

NETWORKS = {
    "mobilenet_v2-1.5": lambda: models.mobilenet_v2(num_classes=10, width=0.375),
    "mobilenet_v2": lambda: models.mobilenet_v2(num_classes=10, width=0.25),
    "resnet18": lambda: models.resnet18(num_classes=10, width=0.25),
    "resnet50": lambda: models.resnet50(num_classes=10, width=0.125),
}


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(size=4, side=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator, dtype=dtype)
    labels = torch.randint(10, (size,), generator=generator)
    return images.to(memory_format=torch.channels_last), labels


def search_in(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = NETWORKS[name]().to(dtype).to(memory_format=torch.channels_last)
    net = MarkovNet(model, batch(2, dtype=dtype)[0], divisor=1)
    return Search(net, Budget(macs="50%"), 10, SearchOptions(**{"warmup": 0.0, **options}))


def search_on_a_gpu(model, images, **options):
    """With chains that draw every random sub-network from the first architecture step on."""
    model = model.cuda().to(memory_format=torch.channels_last)
    net = MarkovNet(model, images[:2].cuda(), divisor=1)
    options = {"warmup": 0.0, "uniform_share": 1e-9, **options}
    return Search(net, Budget(macs="50%"), 40, SearchOptions(**options))


def reference_ops(patch):
    for name in ("dmcp.ops.norm_act", "dmcp.nn.conv"):
        patch.setattr(importlib.import_module(name), "accelerated", lambda: False)
    patch.setattr("dmcp.ops.library._original", False)


def passes(search, images, labels):
    """Every pass of a step on its own: loss and gradients, of weights and of α."""
    net = search.net.train()
    generator = torch.Generator().manual_seed(1)
    found = []
    for widths in (None, narrowest(net), random_uniform(net, generator)):
        search.gradients.zero()
        with net.accumulating(), net.at(widths):
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
        found.append([loss.detach(), *(flat.clone() for flat in search.gradients.flat)])
    for parameter in net.weight_parameters():
        parameter.requires_grad_(False)
    alphas = net.architecture_parameters()
    with net.masked():
        loss = nn.functional.cross_entropy(net(images), labels)
    found.append([loss.detach(), torch.cat(torch.autograd.grad(loss, alphas))])
    return found


def errors(results, references):
    """‖result - reference‖ / ‖reference‖ of all results of all passes."""
    return [
        float((result.double() - reference).norm() / reference.norm())
        for found, wanted in zip(results, references, strict=True)
        for result, reference in zip(found, wanted, strict=True)
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_pass_is_that_of_plain_pytorch(name):
    """To rounding in float64. In float32 the losses; a gradient jumps where rounding takes a value
    across the kink of an activation, in plain PyTorch as well, by a hundredth here."""
    images, labels = batch()
    with pytest.MonkeyPatch.context() as patch:
        reference_ops(patch)
        exact = passes(search_in(name, torch.float64), images.double(), labels)
    double = passes(search_in(name, torch.float64), images.double(), labels)
    assert max(errors(double, exact)) <= 1e-9
    single = errors(passes(search_in(name), images, labels), exact)
    assert max(single[::2]) <= 1e-4, "losses"
    assert max(single[1::2]) <= 0.1, "gradients"


class Reads(TorchDispatchMode):
    """Operators after which the host waits for numbers; what the host drew itself may be read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.split("::")[1] in (
            "_local_scalar_dense",
            "is_nonzero",
            "equal",
            "nonzero",
            "masked_select",
        ):
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("uniform_share", [1.0, 1e-9])
@pytest.mark.parametrize("arch_optimizer", ["adam", "sgd"])
def test_a_step_does_not_wait_for_numbers(arch_optimizer, uniform_share):
    search = search_in("mobilenet_v2", arch_optimizer=arch_optimizer, uniform_share=uniform_share)
    search.step(*batch())
    search.step_index = 9  # where the share is reached
    with Reads() as reads:
        search.step(*batch())
    assert reads.found == []


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_step_does_not_wait_for_the_gpu(cuda_graphs):
    images, labels = (tensor.cuda() for tensor in batch())
    search = search_on_a_gpu(NETWORKS["mobilenet_v2"](), images, cuda_graphs=cuda_graphs)
    for _ in range(WARM_UP + 1):
        search.step(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        search.step(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class TrainingNoise(nn.Module):
    """In training there is code between a convolution and its norm, or none behind it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        self.second = nn.Conv2d(16, 16, 1, bias=False)
        self.second_bn, self.head = nn.BatchNorm2d(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.conv(x)
        if self.training and self.kind == "clamped":
            x = x.clamp(-0.5, 0.5)
        if not (self.training and self.kind == "skipped"):
            x = self.bn(x)
        if self.training and self.kind == "shifted":
            x = x - 0.3
        if not (self.training and self.kind == "linear"):
            x = self.relu(x)
        x = self.second_bn(self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("kind", ["plain", "clamped", "skipped", "shifted", "linear"])
def test_code_between_a_convolution_and_its_norm_in_training_is_found(kind):
    torch.manual_seed(0)
    model = TrainingNoise(kind).to(memory_format=torch.channels_last)
    images, _ = batch(4, 16)
    net = MarkovNet(model, images, divisor=1).train()
    plain = copy.deepcopy(model).train()
    for _ in range(2):
        torch.testing.assert_close(net(images), plain(images), rtol=1e-4, atol=1e-5)
        for (name, got), wanted in zip(
            model.state_dict().items(), plain.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_hooks_that_come_later_see_what_they_would_in_the_model():
    torch.manual_seed(0)
    model = TrainingNoise("plain").to(memory_format=torch.channels_last)
    images, _ = batch(4, 16)
    net = MarkovNet(model, images, divisor=1).train()
    net(images)
    seen = []
    net.model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    net.model.second_bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(images)
    torch.testing.assert_close(seen[0], model.conv(images), rtol=1e-4, atol=1e-5)
    assert seen[1].mean((0, 2, 3)).abs().max() > 1e-3, "not normalised yet"


def test_parameters_that_take_no_part_are_left_alone():
    torch.manual_seed(0)
    model = NETWORKS["mobilenet_v2"]().to(memory_format=torch.channels_last)
    model.unused = nn.Linear(4, 4)
    images, labels = batch(4)
    search = Search(MarkovNet(model, images, divisor=1), Budget(macs="50%"), 10)
    model.layer1[0].depthwise.weight.requires_grad_(False)
    frozen = [model.unused.weight, model.layer1[0].depthwise.weight]
    before = [parameter.clone() for parameter in frozen]
    search.step(images, labels)
    search.step(images, labels)
    for parameter, wanted in zip(frozen, before, strict=True):
        assert torch.equal(parameter, wanted)


def test_gradients_taken_away_before_the_backward_are_an_error():
    net = search_in("mobilenet_v2").net
    images, labels = batch()
    for parameter in net.weight_parameters():
        parameter.grad = torch.zeros_like(parameter)
    with net.accumulating(), net.at(narrowest(net)):
        loss = nn.functional.cross_entropy(net(images), labels)
    net.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="set to None after the forward pass"):
        loss.backward()


def test_a_loop_around_a_net_compiles_once_for_all_widths():
    net = search_in("mobilenet_v2").net
    images, labels = batch()

    @torch.compile(backend="eager")
    def loss_of(images, labels):
        return nn.functional.cross_entropy(net(images.mul(2)), labels)

    generator = torch.Generator().manual_seed(0)
    loss_of(images, labels).backward()
    before = counters["stats"]["unique_graphs"]
    for _ in range(100):
        with net.at(random_uniform(net, generator)), torch.no_grad():
            loss_of(images, labels)
    loss_of(images, labels).backward()
    assert before > 0
    # Passes without gradients are the only ones that may differ.
    assert counters["stats"]["unique_graphs"] <= before + 2


def saved_bytes(run):
    """Bytes of the tensors that a forward pass keeps for its backward, parameters aside."""
    storages = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_the_architecture_pass_keeps_no_more_than_training_the_network(name):
    search = search_in(name)
    net = search.net.train()
    images, _ = batch(16)
    plain = copy.deepcopy(net.graph.model)
    training = saved_bytes(lambda: plain(images))
    for parameter in net.weight_parameters():
        parameter.requires_grad_(False)
    with net.masked():
        assert saved_bytes(lambda: net(images)) <= training


def step_gradients(search, images, labels):
    search.step(images, labels)
    alphas = [alpha.grad for alpha in search.net.architecture_parameters()]
    return torch.cat([*search.gradients.flat]).clone(), torch.cat(alphas)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_step_in_half_precision_is_near_the_one_in_float32(precision):
    images, labels = batch(8)
    options = {"random_subnets": 0}
    full = search_in("resnet18", **options).step(images, labels)
    search = search_in("resnet18", precision=precision, **options)
    seen = []
    search.net.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    half = search.step(images, labels)
    assert set(seen) == {getattr(torch, precision)}
    assert all(flat.dtype == torch.float32 for flat in search.gradients.flat)
    assert full.keys() == half.keys()
    for name, value in full.items():
        assert float(half[name]) == pytest.approx(float(value), rel=0.05, abs=0.02), name
    assert (precision == "float16") == ("scale" in search.precision.state_dict())


def test_parts_of_a_batch_add_up_to_its_gradients():
    """A batch of two equal halves has the statistics of each, so that nothing may differ."""
    images, labels = batch(4)
    twice = torch.cat([images, images]), torch.cat([labels, labels])
    options = {"random_subnets": 0, "match_scale": False}
    whole = step_gradients(search_in("resnet18", torch.float64, **options), *doubled(twice))
    options["micro_batches"] = 2
    parts = step_gradients(search_in("resnet18", torch.float64, **options), *doubled(twice))
    for got, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def doubled(pair):
    images, labels = pair
    return images.double().contiguous(memory_format=torch.channels_last), labels


@pytest.mark.parametrize(
    ("option", "value"),
    [("precision", "half"), ("micro_batches", 0), ("micro_batches", True), ("micro_batches", 1.5)],
)
def test_options_out_of_range_are_refused(option, value):
    with pytest.raises(ConfigError, match=option):
        SearchOptions(**{option: value})


def test_a_batch_too_small_for_its_parts_is_refused():
    search = search_in("mobilenet_v2", micro_batches=3)
    with pytest.raises(ConfigError, match="micro_batches is 3"):
        search.step(*batch(4))


def test_the_state_of_the_loss_scale_is_kept():
    search = search_in("mobilenet_v2", precision="float16")
    search.step(*batch())
    state = search.state_dict()
    assert state["precision"]["scale"] > 0
    other = search_in("mobilenet_v2", precision="float16")
    other.load_state_dict(state)
    assert other.precision.state_dict() == state["precision"]


def test_users_who_do_not_ask_for_it_get_gradients_by_autograd():
    net = search_in("mobilenet_v2").net
    images, labels = batch()
    parameters = net.weight_parameters()
    widths = dmcp.graph.check_widths(net.graph.units, narrowest(net))
    with net.at(widths):
        loss = nn.functional.cross_entropy(net(images), labels)
    gradients = torch.autograd.grad(loss, parameters)
    net.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with net.accumulating(), net.at(widths):
        nn.functional.cross_entropy(net(images), labels).backward()
    for parameter, wanted in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_lie_as_the_weights_do_after_a_change_of_memory_format():
    search = search_in("resnet18")
    images, labels = batch()
    search.net.to(memory_format=torch.contiguous_format)
    search.gradients.zero()
    for parameter in search.net.weight_parameters():
        assert parameter.grad.stride() == parameter.stride()
    search.step(images.contiguous(), labels)


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("arch_optimizer", ["adam", "sgd"])
def test_steps_leave_tensors_where_they_are(arch_optimizer, micro_batches):
    """Weights, statistics, α, gradients and multipliers: what a graph holds the addresses of."""
    options = {"arch_optimizer": arch_optimizer, "micro_batches": micro_batches, "anneal": 0.0}
    search = search_in("mobilenet_v2", warmup=0.2, **options)
    memory = Memory(search.net)
    search.step(*batch())
    places, multipliers = memory.places(), search.budget_loss.multipliers.data_ptr()
    for _ in range(3):
        search.step(*batch())
    state = copy.deepcopy(search.state_dict())
    assert search.budget_loss.multipliers.any()
    search.step(*batch())
    search.load_state_dict(state)
    search.step(*batch())
    assert memory.places() == places
    assert search.budget_loss.multipliers.data_ptr() == multipliers


def rehearsed(search, images, labels):
    """What keeps each of the passes that are the same in every step from being captured."""
    parts, memory, cpu = split_batch(images, labels, 1), Memory(search.net), torch.device("cpu")
    search.step(images, labels)
    search.gradients.zero()
    found = {}
    with search.net.accumulating():
        (_, teachers), found["widest"] = rehearse(search._widest_loss, [parts], memory, cpu)
        inputs = [narrowest(search.net), parts, teachers]
        _, found["narrowest"] = rehearse(search._subnet_loss, inputs, memory, cpu)
    inputs = [parts, teachers, search._begin_architecture_step()]
    _, found["architecture"] = rehearse(search._chain_losses, inputs, memory, cpu)
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_rehearsal_has_nothing_against_passes_of_fixed_widths(precision):
    found = rehearsed(search_in("resnet18", precision=precision), *batch())
    assert found == {"widest": [], "narrowest": [], "architecture": []}


class Auxiliary(TrainingNoise):
    """Training has one more layer, which the trace does not see."""

    def __init__(self):
        super().__init__("plain")
        self.auxiliary = nn.Linear(3, 10)

    def forward(self, x):
        y = super().forward(x)
        return y + self.auxiliary(x.mean((2, 3))) if self.training else y


def test_parameters_that_the_trace_does_not_read_keep_a_pass_from_being_captured():
    torch.manual_seed(0)
    images, labels = batch(4, 16)
    net = MarkovNet(Auxiliary().to(memory_format=torch.channels_last), images, divisor=1)
    search = Search(net, Budget(macs="50%"), 10, SearchOptions(warmup=0.0))
    (found,) = rehearsed(search, images, labels)["widest"]
    names = "model.auxiliary.weight, model.auxiliary.bias"
    assert found == f"replaces the tensors or the gradients of {names}"


def twins(make, dtype=torch.float64, **options):
    """The same search with and without graphs, and what all steps of both are given. At a learning
    rate at which rounding does not grow from step to step."""
    options = {"lr": Schedule(peak=1e-3), **options}
    images, labels = batch(6, 16 if make is Auxiliary else 64, dtype)
    searches = []
    for cuda_graphs in (True, False):
        torch.manual_seed(0)
        searches.append(
            search_on_a_gpu(make().to(dtype), images, cuda_graphs=cuda_graphs, **options)
        )

    def run(search, sizes):
        metrics = {}
        for step, size in enumerate(sizes):
            shown = images.roll(step, 0)[:size].contiguous(memory_format=torch.channels_last)
            metrics = search.step(shown.cuda(), labels[:size].cuda())
        return metrics

    return *searches, run


def assert_same_search(captured, ordinary):
    """In float64, but for α."""
    for name, wanted in ordinary.net.state_dict().items():
        close = {"rtol": 1e-4, "atol": 1e-5} if "alpha" in name else {"rtol": 1e-6, "atol": 1e-9}
        torch.testing.assert_close(captured.net.state_dict()[name], wanted, **close, msg=name)
    multipliers = (search.budget_loss.multipliers for search in (captured, ordinary))
    torch.testing.assert_close(*multipliers, rtol=1e-4, atol=1e-6)


STAGES = {
    "weights": {"warmup": 0.9},
    "chains": {},
    "paper": {"arch_optimizer": "sgd", "budget_loss": "log_l1", "match_scale": False},
    "parts": {"micro_batches": 2},
}


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(
    ("name", "stage"), [("mobilenet_v2", "chains"), *(("resnet18", stage) for stage in STAGES)]
)
def test_replayed_steps_are_those_of_passes(name, stage):
    """One batch in between is of another size."""
    captured, ordinary, run = twins(NETWORKS[name], **STAGES[stage])
    calls = []
    captured.net.register_forward_hook(lambda *_: calls.append(1))
    metrics = [run(search, [4, 4, 4, 4, 6, 4, 4, 4]) for search in (captured, ordinary)]
    both = {"widest", "narrowest"}
    assert captured.cuda_graphs.captured == (
        both if stage == "weights" else {*both, "architecture"}
    )
    for metric, wanted in metrics[1].items():
        torch.testing.assert_close(metrics[0][metric], wanted, rtol=1e-4, atol=1e-5, msg=metric)
    assert_same_search(captured, ordinary)
    calls.clear()
    run(captured, [4])
    parts = captured.options.micro_batches
    assert len(calls) == parts * captured.options.random_subnets, "no other pass runs Python"


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_replayed_steps_in_half_precision(precision):
    still = Schedule(peak=1e-5)
    options = {"precision": precision, "lr": still, "arch_lr": still}
    captured, ordinary, run = twins(NETWORKS["resnet18"], torch.float32, **options)
    metrics = [run(search, [4] * 8) for search in (captured, ordinary)]
    assert len(captured.cuda_graphs.captured) == 3
    for name, wanted in metrics[1].items():
        assert float(metrics[0][name]) == pytest.approx(float(wanted), rel=0.02, abs=0.01), name
    for buffer in ("gradients", "arch_gradients"):
        got, wanted = (getattr(search, buffer).flat[0] for search in (captured, ordinary))
        # Rounding moves values across the kinks of activations; the direction stays.
        assert torch.cosine_similarity(got, wanted, dim=0) >= 0.8, buffer


@pytest.mark.gpu
@on_a_gpu
def test_graphs_go_on_from_a_checkpoint():
    captured, ordinary, run = twins(NETWORKS["resnet18"])
    run(captured, [4] * 5)
    state = copy.deepcopy(captured.state_dict())
    run(captured, [4] * 3)
    captured.load_state_dict(state)
    assert len(captured.cuda_graphs.captured) == 3
    ordinary.load_state_dict(state)
    for search in (captured, ordinary):
        run(search, [4] * 3)
    assert_same_search(captured, ordinary)


@pytest.mark.gpu
@on_a_gpu
def test_replays_take_no_memory():
    captured, _, run = twins(NETWORKS["resnet18"])
    run(captured, [4] * 6)
    taken = []
    for _ in range(20):
        run(captured, [4])
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_allocated())
    assert len(set(taken)) == 1


@pytest.mark.gpu
@on_a_gpu
def test_passes_that_a_graph_would_change_stay_ordinary():
    captured, ordinary, run = twins(Auxiliary)
    with pytest.warns(
        UserWarning, match=r"the widest pass is not replayed: .*model.auxiliary.bias"
    ):
        run(captured, [4] * 8)
    run(ordinary, [4] * 8)
    assert "widest" not in captured.cuda_graphs.captured
    assert_same_search(captured, ordinary)
