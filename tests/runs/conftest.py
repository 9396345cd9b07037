from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dmcp import recipes
from dmcp.runs import Machine, NetworkConfig, Row, RunFolder, SearchConfig, run_search
from dmcp.search import Budget
from dmcp.train import World

NETWORK = NetworkConfig("resnet18", "digits", 256, {"width": 0.125})
DIGITS = recipes.get("digits")
SEARCH = SearchConfig(
    NETWORK,
    Budget(macs="50%"),
    search_epochs=2,
    retrain_epochs=1,
    search=DIGITS.search,
    train=DIGITS.retrain,
    divisor=1,
)


@dataclass(frozen=True)
class Finished:
    """A search that ran to its end."""

    folder: RunFolder
    config: SearchConfig
    rows: list[Row]


@pytest.fixture(scope="session")
def network() -> NetworkConfig:
    """ResNet-18, an eighth as wide, on the digits; five steps an epoch."""
    return NETWORK


@pytest.fixture(scope="session")
def configure() -> Callable[..., SearchConfig]:
    """The configuration of a search of seconds, with fields replaced."""
    return lambda **fields: replace(SEARCH, **fields)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(World.single(), checkpoint_every=2, log_every=1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, machine: Machine) -> Finished:
    """One whole search; tests only read its folder."""
    folder = RunFolder(tmp_path_factory.mktemp("finished") / "run")
    return Finished(folder, SEARCH, run_search(SEARCH, folder, machine))


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, Any]]:
    """Every file of a folder with its bytes."""
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
