"""What a search with chains that were made up says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dmcp
from dmcp.report import Chains


@pytest.fixture(scope="session")
def description() -> dict[str, Any]:
    """`Search.describe` with α drawn at random around a certain value."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dmcp.models.build("mobilenet_v2", num_classes=10, width=0.25, small_images=True)
    net = dmcp.MarkovNet(model, torch.zeros(2, 3, 16, 16), groups=6, divisor=1)
    search = dmcp.Search(net, dmcp.Budget(macs="33%"), steps=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in net.architecture_parameters():
            alpha.copy_(1 + torch.randn(alpha.shape, generator=generator))
    return search.describe()


@pytest.fixture(scope="session")
def chains(description: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Chains:
    path = tmp_path_factory.mktemp("chains") / "search.json"
    path.write_text(json.dumps(description))
    return Chains.read(path)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes JSON into a folder of the test's own."""

    def into(name: str, data: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return path

    return into
