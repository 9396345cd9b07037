"""What a measurement was made on; as a command, it prints that as JSON.

python bench/machine.py cuda
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dmcp

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the versions and the backends of `dmcp`."""
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
        "backends": {name: asdict(found) for name, found in dmcp.backends().items()},
    }


def keep_freed_memory() -> str:
    """Make glibc's malloc keep what is freed, for the rest of this process, and say so.

    By default it hands large blocks back to the system, and every temporary tensor is then paid for
    with page faults: several times what an op costs, and nothing that an op can change.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "default"
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)
    return "M_MMAP_MAX=0 M_TRIM_THRESHOLD=-1" if done else "default"


def make_bfloat16_work() -> str:
    """Keep oneDNN off instructions that this machine announces and refuses, and say so.

    To be called before the first convolution of the process.
    """
    for isa in ("", "AVX512_CORE_BF16", "AVX512_CORE"):
        setting = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
        environment = {**os.environ, **setting}
        probe = [sys.executable, "-c", _BFLOAT16_PROBE]
        if subprocess.run(probe, env=environment, capture_output=True).returncode == 0:
            os.environ.update(setting)
            return f"ONEDNN_MAX_CPU_ISA={isa}" if isa else "default"
    raise RuntimeError("no bfloat16 convolution runs on this machine")


_BFLOAT16_PROBE = """
import torch
from torch import nn
layers = [nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 1), nn.Flatten(), nn.Linear(64 * 36, 64)]
network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
with torch.autocast("cpu", torch.bfloat16):
    images = torch.randn(8, 16, 8, 8).to(memory_format=torch.channels_last)
    network(images).float().sum().backward()
"""


def cache_bytes(device: torch.device) -> int:
    """Of the last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().rstrip("K")) << 10 for size in sizes), default=1 << 26)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(describe(torch.device(sys.argv[1])), indent=1))
