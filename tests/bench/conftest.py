"""The benchmarks are scripts beside each other, not part of the package."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of a benchmark in a process of its own: as a worker of this test run it would not measure."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
