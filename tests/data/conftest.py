from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """An image folder: 2 classes of 12 training and 3 test images, 16x12 noise, several formats."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 3)):
        for name in ("dog", "cat"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                suffix = (".png", ".jpg", ".JPEG")[index % 3]
                Image.fromarray(pixels).save(folder / f"{index:02}{suffix}")
    return tmp_path
