"""Small networks, each with one construct, and what the tests of several packages do to them."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dmcp
from dmcp.cost import LatencyTable, TableAxis, TableTerm
from dmcp.models import build

# One thread here and in every process that a test starts: as many as there are cores, in as many
# workers as there are cores, wait for each other most of the time.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some virtual machines advertise AMX and die of it; oneDNN reads this at its first primitive.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# pytest listens to every logger that keeps its records to itself. This one describes each tensor of
# a traced network as soon as somebody listens, a twentieth of all that tracing takes.
logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Halves of the tests for two workers, and the rest of the other's for who is the first to end:
    tests of one module, which share what is expensive to make, mostly run on one worker."""
    if config.getvalue("dist") != "load":
        return None
    scheduler = importlib.import_module("xdist.scheduler")
    return scheduler.WorkStealingScheduling(config, log)


@dataclass
class Example:
    """A network and one batch of its inputs."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]

    def to(self, dtype):
        inputs = tuple(x.to(dtype) for x in self.inputs)
        return Example(copy.deepcopy(self.model).to(dtype), inputs)


@dataclass
class Traced(Example):
    """The same with its graph, whose model it is."""

    graph: dmcp.ChannelGraph

    def to(self, dtype):
        copied = copy.deepcopy(self.graph)
        copied.model.to(dtype)
        return Traced(copied.model, tuple(x.to(dtype) for x in self.inputs), copied)


class Head(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def conv_bn(inputs, outputs, kernel=3, **options):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.first, self.second = conv_bn(8, 6), conv_bn(6, 8)
        self.down, self.skip = conv_bn(8, 12, stride=2), conv_bn(8, 12, 1, stride=2)
        self.head = Head(12)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.down(x) + self.skip(x)))


class Depthwise(nn.Sequential):
    def __init__(self):
        super().__init__(
            conv_bn(3, 8),
            nn.ReLU6(),
            conv_bn(8, 8, groups=8),
            nn.ReLU6(),
            conv_bn(8, 10, 1),
            Head(10),
        )


class DepthwiseMultiplier(nn.Sequential):
    def __init__(self):
        super().__init__(
            conv_bn(3, 6),
            nn.ReLU(),
            conv_bn(6, 18, groups=6),
            nn.ReLU(),
            conv_bn(18, 7, 1),
            Head(7),
        )


class BiasedDepthwise(nn.Module):
    """The depthwise convolution reads values that are scaled already, and adds a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = conv_bn(3, 8), conv_bn(8, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix, self.head = conv_bn(8, 6, 1), Head(6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.branch(x)
        return self.head(self.mix(F.relu(self.depthwise(x))))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 8), conv_bn(8, 6), conv_bn(8, 4)
        self.last, self.head = conv_bn(8 + 6 + 4 + 3, 9), Head(9)

    def forward(self, x):
        stem = F.relu(self.stem(x))
        parts = [F.relu(self.right(stem)), stem, self.left(stem), x]
        return self.head(F.relu(self.last(torch.cat(parts, dim=1))))


class Interleaved(nn.Module):
    """Every channel of the two convolutions carries every second one of their sum."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = conv_bn(3, 8), conv_bn(3, 4), conv_bn(12, 6)
        self.head = Head(6)

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        both = torch.cat([left, right], 1) + torch.cat([right, left], 1)
        return self.head(F.relu(self.last(both)))


class WithoutNorm(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            Head(6),
        )


class FlattenedMap(nn.Sequential):
    def __init__(self):
        super().__init__(
            conv_bn(3, 6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.ReLU(),
            nn.Dropout(0.0),
            nn.Linear(10, 5),
        )


class FunctionalReLU6(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv_bn(3, 8), conv_bn(8, 6), Head(6)

    def forward(self, x):
        x = F.relu6(self.second(F.relu6(self.first(x))), inplace=True)
        return self.head(F.interpolate(x, scale_factor=2))


class SharedActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = conv_bn(3, 8), conv_bn(8, 6), Head(6)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.head(self.act(self.second(self.act(self.first(x)))))


class ReadTwice(nn.Module):
    """A value that is read before and after an activation which does not commute with a scale."""

    def __init__(self):
        super().__init__()
        self.first, self.act = conv_bn(3, 8), nn.SiLU()
        self.left, self.right, self.head = conv_bn(8, 6), conv_bn(8, 6), Head(6)

    def forward(self, x):
        x = self.first(x)
        return self.head(F.relu(self.left(x) + self.right(self.act(x))))


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm3, self.head = nn.BatchNorm2d(8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x)))


class BothEnds(nn.Module):
    """A convolution whose input and output are the same unit."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = conv_bn(3, 8), conv_bn(8, 8), Head(8)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + self.conv(x))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 6)
        self.head = Head(6)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.max_pool2d(F.relu(self.block(x)), 2)
        return self.head(F.relu(self.last(F.relu(self.block(x)))))


class SeveralInputs(nn.Module):
    """Two inputs, and features among the outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv_bn(3, 8), conv_bn(2, 8)
        self.middle, self.last, self.head = conv_bn(8, 6), conv_bn(6, 7), Head(7)

    def forward(self, x, y):
        x = F.relu(self.left(x) + self.right(y))
        features = self.last(F.relu(self.middle(x)))
        return self.head(F.relu(features)), features


SMALL = {
    kind.__name__: kind
    for kind in (
        Residual,
        Depthwise,
        DepthwiseMultiplier,
        BiasedDepthwise,
        Concat,
        Interleaved,
        WithoutNorm,
        FlattenedMap,
        FunctionalReLU6,
        SharedActivation,
        ReadTwice,
        PreActivation,
        BothEnds,
        CalledTwice,
        SeveralInputs,
    )
}


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random biases, affine parameters and running statistics: none is 0 or 1 by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.3, generator=generator)
    return model


def make_example(name: str) -> Example:
    torch.manual_seed(3)
    if name not in SMALL:
        model = build(name, num_classes=5, width=0.25, small_images=True)
        return Example(shake(model), (torch.randn(2, 3, 16, 16),))
    inputs = [torch.randn(2, 3, 8, 8)]
    if name == "SeveralInputs":
        inputs.append(torch.randn(2, 2, 8, 8))
    return Example(shake(SMALL[name]()), tuple(inputs))


@cache
def _trace_once(name: str) -> Traced:
    case = make_example(name)
    return Traced(case.model, case.inputs, dmcp.trace(case.model, case.inputs))


def make_traced(name: str) -> Traced:
    """A traced example network of one's own."""
    case = _trace_once(name)
    graph = copy.deepcopy(case.graph)
    return Traced(graph.model, case.inputs, graph)


@pytest.fixture
def example() -> Callable[[str], Example]:
    """An example network by its name."""
    return make_example


@pytest.fixture
def traced() -> Callable[[str], Traced]:
    """A traced example network by its name."""
    return make_traced


@pytest.fixture(params=list(SMALL))
def small(request) -> Example:
    """Every small network in turn."""
    return make_example(request.param)


@pytest.fixture(params=["mobilenet_v2", "resnet18", "resnet50"])
def large(request) -> Example:
    """Every network of the paper in turn, a quarter as wide."""
    return make_example(request.param)


@pytest.fixture(params=[*SMALL, "mobilenet_v2", "resnet18"])
def network(request) -> Example:
    """Every small network, MobileNetV2 and ResNet-18 in turn."""
    return make_example(request.param)


@pytest.fixture(params=[*SMALL, "mobilenet_v2", "resnet18"])
def traced_network(request) -> Traced:
    """The same, traced."""
    return make_traced(request.param)


@pytest.fixture
def random_widths():
    """A random structure of a graph, on its units' choices."""

    def draw(graph, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {
            unit.name: unit.choices[int(torch.randint(len(unit.choices), (), generator=generator))]
            for unit in graph.units
        }

    return draw


@pytest.fixture
def made_up_table():
    """A latency table that nobody measured: milliseconds that grow with every width, for parts
    that depend on one unit, on two neighbours and, if asked for, on the first ones concatenated."""

    def make(graph, concatenated=0):
        units = graph.searchable
        axes = [({unit.name: 1.0}, unit.choices) for unit in units]
        if concatenated:
            first = units[:concatenated]
            ends = [sum(unit.choices[place] for unit in first) for place in (0, -1)]
            weights = {unit.name: 1.0 + number % 2 for number, unit in enumerate(first)}
            axes.append((weights, (ends[0], 1.5 * ends[1])))
        axes = [TableAxis(w, tuple(sorted({float(c[0]), c[len(c) // 2], c[-1]}))) for w, c in axes]
        generator = torch.Generator().manual_seed(5)

        def term(name, *places):
            values = torch.rand([len(axes[a].nodes) for a in places], generator=generator).double()
            for dim in range(len(places)):
                values = values.cumsum(dim)
            ms = (0.2 * values).tolist()
            return TableTerm(name, ("conv2d",), places, ms, ms, ms)

        terms = [term("fixed"), *(term(unit.name, n) for n, unit in enumerate(units))]
        terms += [term(f"{n}", n, n + 1) for n in range(len(units) - 1)]
        if concatenated:
            terms += [term("cat", len(units)), term("after", len(units), len(units) - 1)]
        return LatencyTable(
            setting={"runtime": "made up"},
            units=graph.widths(),
            searchable=tuple(unit.name for unit in units),
            macs=dmcp.cost(graph).of({}),
            operators=graph.operators,
            axes=tuple(axes),
            terms=tuple(terms),
            scale=1.25,
            offset=0.5,
        )

    return make


@pytest.fixture
def tensors():
    """The tensors of a network's outputs, as a tuple."""
    return lambda outputs: outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.fixture
def reference_ops(monkeypatch):
    """Normalisation by PyTorch's own operations, as with ``DMCP_BACKEND=eager``: what is to be
    PyTorch's result to the last bit can only be so with these."""
    # By their names: dmcp.ops.norm_act is the function.
    for name in ("dmcp.ops.norm_act", "dmcp.nn.conv"):
        monkeypatch.setattr(importlib.import_module(name), "accelerated", lambda: False)
    monkeypatch.setattr("dmcp.ops.library._original", False)


@pytest.fixture(scope="session")
def fork_server() -> ForkServerContext:
    """Processes forked from one that has imported what takes seconds, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    packages = ("torch.export", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets")
    context.set_forkserver_preload(["dmcp.cli.commands", *packages, "kornia"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "1")  # the installed package, not the checkout's folder
        forkserver.ensure_running()
    return context


Launch = Callable[..., ForkServerProcess]


def launching(fork_server: ForkServerContext) -> Iterator[Launch]:
    """Starts ``python -m dmcp …`` or ``python <file> …`` in a process of its own, soon, see
    `fork_server`; what still lives at the end is killed.

    All of them share the hash seed and the addresses of libraries: where nothing may depend on
    these, let a new interpreter take part.
    """
    started: list[ForkServerProcess] = []

    def start(program: str, *arguments: object) -> ForkServerProcess:
        run = runpy.run_path if program.endswith(".py") else runpy.run_module
        process = fork_server.Process(target=run, args=(program, None, "__main__"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *map(str, arguments)])  # the process takes it over
            process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # pytest would wait for it for ever
        process.join()


launch = pytest.fixture(launching, name="launch")
module_launch = pytest.fixture(launching, scope="module", name="module_launch")


@pytest.fixture(scope="module")
def run_ranks(module_launch: Launch) -> Callable[[str, object], None]:
    """Runs ``python <file> <argument> <rank> <port>`` for two ranks, which are to find each other
    at the port."""

    def run(program: str, argument: object) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [module_launch(program, argument, rank, port) for rank in range(2)]
        deadline = time.monotonic() + 120  # of both, as each waits for the other
        for process in ranks:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in ranks] == [0, 0]

    return run


@pytest.fixture
def wait_until() -> Callable[..., None]:
    """Waits for what a process is to bring about."""

    def wait(process: ForkServerProcess, condition: Callable[[], object], poll: float) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.is_alive(), "the process ended before what was waited for"
            assert time.monotonic() < deadline, "what was waited for did not come in 120 s"
            time.sleep(poll)

    return wait


@pytest.fixture(scope="session")
def zoo() -> torch.library.Library:
    """torchvision and timm; where torchvision's own operators are not built for this PyTorch, it
    cannot be imported before two of them are declared."""
    if importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None:
        pytest.skip("there is no torchvision or no timm")
    boxes = "Tensor dets, Tensor scores, float iou_threshold"
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}({boxes}) -> Tensor")
        importlib.import_module("torchvision")
    return library  # what it declares lives as long as it
