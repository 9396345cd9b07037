from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

WITHOUT_DMCP = """
import sys
sys.modules["dmcp"] = None  # importing it raises
import torch
torch.set_num_threads(1)
folder, name, given = sys.argv[1:]
sys.path.insert(0, folder)
network = __import__(name).load()
inputs, state = torch.load(given)
assert list(network.state_dict()) == state, "the names of the state dict"
outputs = network(*inputs)
torch.save(outputs, given)
"""


@pytest.fixture
def elsewhere(tmp_path: Path):
    """Run a generated file in a process of its own that cannot import dmcp."""

    def run(path: Path, model: nn.Module, inputs: tuple[torch.Tensor, ...]):
        given = tmp_path / "given.pt"
        torch.save((inputs, list(model.state_dict())), given)
        command = [sys.executable, "-c", WITHOUT_DMCP, str(path.parent), path.stem, str(given)]
        subprocess.run(command, check=True, cwd=tmp_path)
        return torch.load(given)

    return run


@pytest.fixture
def written():
    """The names of the files in a folder, hidden ones too."""
    return lambda folder: {each.name for each in folder.rglob("*")} if folder.exists() else set()
