"""Options of the benchmarks, and what their JSON says about the machine."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# The modules beside this file, without the checkout, whose package is not the installed one.
sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, keep_freed_memory

MALLOC = keep_freed_memory()
BEGIN = time.monotonic()


@dataclass(frozen=True)
class Settings:
    """The options; None where every suite has a default of its own."""

    device: torch.device
    batch: int | None
    size: int | None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dmcp benchmarks")
    group.addoption("--device", default="cpu", help="cpu (the default) or cuda")
    group.addoption("--batch", type=int, help="images in a batch")
    group.addoption("--size", type=int, help="pixels on a side of an image")
    group.addoption("--threads", type=int, help="of PyTorch; its own choice by default")
    group.addoption("--sweeps", type=int, default=3, help="times that all rivals take turns")
    group.addoption("--largest", type=int, help="only so many layers of a network, the largest")
    group.addoption("--seconds", type=float, help="start no benchmark after so many seconds")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("threads"):
        torch.set_num_threads(config.getoption("threads"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.getoption("seconds")
    if seconds is not None and time.monotonic() - BEGIN > seconds:
        pytest.skip("out of time")


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    option = pytestconfig.getoption
    return Settings(torch.device(option("device")), option("batch"), option("size"))


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    option = config.getoption
    machine_info["dmcp"] = {
        **describe(torch.device(option("device"))),
        "malloc": MALLOC,
        **{name: option(name) for name in ("batch", "size", "sweeps")},
    }
