"""What networks are run by, and on, when they are timed."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmcp.errors import ConfigError, require
from dmcp.graph.capture import capture

RUNTIMES = ("eager", "compiled", "onnxruntime")


@dataclass(frozen=True)
class Runtime:
    """Where and by what a network is run.

    Attributes:
        name: ``"eager"``, PyTorch as it is; ``"compiled"``, ``torch.compile``;
            ``"onnxruntime"``, exported to ONNX.
        device: ``"cpu"`` or ``"cuda"``, with a number perhaps.
        threads: of the CPU.

    Raises:
        ConfigError: an unknown runtime, a device that is not there, or one that the runtime does
            not serve.
    """

    name: Literal["eager", "compiled", "onnxruntime"] = "eager"
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.name not in RUNTIMES:
            raise ConfigError(f"runtime must be one of {', '.join(RUNTIMES)}, got {self.name!r}")
        kind = self.device.partition(":")[0]
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device must be cpu, cuda or cuda:<number>, got {self.device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {self.device!r}, but torch finds no CUDA GPU")
        if kind == "cuda" and self.name == "onnxruntime":
            raise ConfigError("runtime onnxruntime is measured on device cpu, got 'cuda'")
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}")

    def describe(self) -> dict[str, Any]:
        """Everything that latency depends on beside the network and its input."""
        versions = {"torch": torch.__version__}
        if self.name == "onnxruntime":
            ort = require("onnxruntime", "export", "measuring with ONNX Runtime")
            versions["onnxruntime"] = ort.__version__
        return {
            "runtime": self.name,
            "device": self.device,
            "hardware": _hardware(self.device),
            "threads": self.threads,
            **versions,
        }

    def prepare(self, module: nn.Module, inputs: Sequence[Tensor]) -> Callable[[], object]:
        """The call that is timed: one forward pass of a module on these inputs."""
        if self.name == "eager":
            return lambda: module(*inputs)
        if self.name == "compiled":
            # The captured program: compiled networks of one class would share one list of guards.
            program = capture(module, tuple(inputs), {}, training=False).module()
            compiled = torch.compile(program, dynamic=False)
            compiled(*inputs)
            return lambda: compiled(*inputs)
        onnx = require("dmcp.export.onnx", "export", "measuring with ONNX Runtime")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            onnx.to_onnx(module, tuple(inputs), path)
            network = onnx.OnnxNetwork(path)
        # It would copy others in every call, and inside of a network it does not.
        contiguous = [each.contiguous() for each in inputs]
        return lambda: network(*contiguous)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure with so many threads, and without gradients, while the context is open."""
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(self.threads)
            with torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)


def _hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
