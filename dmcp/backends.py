"""Which implementations of the ops there are on this machine, and why not the others.

``DMCP_BACKEND``, read at the first import, chooses. ``auto``, the default, takes the compiled
module for CPU and CUDA tensors, and Triton for CUDA tensors where it was built without CUDA;
``triton`` takes Triton for CUDA tensors in any case; ``eager`` runs every op in plain PyTorch. The
choice is made once, when an op registers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from types import ModuleType

# torch brings its own OpenMP runtime. Loaded first, it also serves dmcp._native, and
# torch.set_num_threads() acts on both; in the other order the process holds two.
import torch

from dmcp.errors import ConfigError

CHOICES = ("auto", "triton", "eager")


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: ``"eager"`` (plain PyTorch), ``"native"`` (C++), ``"nodes"`` (calls ``native`` without
            Python in between), ``"cuda"`` or ``"triton"``.
        available: whether ops can run through it here.
        reason: what it serves, or what is missing.
    """

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<6}  {'yes' if self.available else 'no':<3}  {self.reason}"


def _choice() -> str:
    choice = os.environ.get("DMCP_BACKEND", "auto")
    if choice not in CHOICES:
        raise ConfigError(f"DMCP_BACKEND must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


def _load_native() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("dmcp._native"), ""
    except ImportError as error:
        return None, str(error)


def _load_nodes(native: ModuleType) -> str:
    """Loads the ops of the autograd nodes; why that cannot be done, or ""."""
    major, minor = torch.__version__.split(".")[:2]
    spec = importlib.util.find_spec(f"dmcp._nodes_torch_{major}_{minor}")
    if spec is None or spec.origin is None:
        return f"not built for PyTorch {major}.{minor}: install that first, then dmcp from source"
    try:
        torch.ops.load_library(spec.origin)
        torch.ops.dmcp.use_kernels(*native.cpu_kernels())
    except (OSError, RuntimeError, AttributeError) as error:
        return str(error)
    return ""


_chosen = _choice()
_accelerated = _chosen != "eager"
_native, _native_error = _load_native()
_nodes_error = _native_error if _native is None else _load_nodes(_native)


def accelerated() -> bool:
    """Whether ops may use other backends than plain PyTorch."""
    return _accelerated


def native_module() -> ModuleType | None:
    """The compiled module ``dmcp._native`` if ops may use it, else None."""
    return _native if _accelerated else None


def native_nodes() -> bool:
    """Whether the autograd nodes of CPU tensors may be C++, without Python in between."""
    return _accelerated and not _nodes_error


def native_cuda() -> bool:
    """Whether ops may use the CUDA kernels of ``dmcp._native``."""
    return _chosen == "auto" and _native is not None and _native.with_cuda


def triton_installed() -> bool:
    """Whether ops may use the Triton kernels; finds the package without importing it."""
    return _accelerated and importlib.util.find_spec("triton") is not None


def backends() -> dict[str, Backend]:
    """Reports every backend by name; printing the values shows a table.

    Asks CUDA for its devices, which ``import dmcp`` never does.
    """
    report = [_eager(), _cpp(), _nodes(), _cuda(), _triton()]
    return {backend.name: backend for backend in report}


def _eager() -> Backend:
    return Backend("eager", True, "plain PyTorch: every device without a backend of its own")


def _cpp() -> Backend:
    isa = f", {_native.cpu_isas()[-1]}" if _native is not None else ""
    return _report("native", _disabled() or _no_native(), f"C++ kernels{isa}: CPU tensors")


def _nodes() -> Backend:
    missing = _disabled() or _no_native() or _nodes_error
    return _report("nodes", missing, "C++ autograd nodes around the C++ kernels: CPU tensors")


def _cuda() -> Backend:
    missing = _disabled() or _no_native() or _no_native_cuda() or _no_device()
    return _report("cuda", missing, "CUDA C++ kernels: CUDA tensors")


def _triton() -> Backend:
    missing = _disabled() or _no_triton() or _no_device()
    serves = "ops without a CUDA C++ kernel" if native_cuda() else "CUDA tensors"
    return _report("triton", missing, f"Triton kernels: {serves}")


def _report(name: str, missing: str, serves: str) -> Backend:
    return Backend(name, not missing, missing or serves)


# What a backend lacks, or "" when it lacks nothing.


def _disabled() -> str:
    return "" if _accelerated else "disabled by DMCP_BACKEND=eager"


def _no_native() -> str:
    if _native is not None:
        return ""
    return f"not built ({_native_error}); `pip install -v .` shows why"


def _no_native_cuda() -> str:
    if native_cuda():
        return ""
    if _chosen == "triton":
        return "not chosen: DMCP_BACKEND=triton"
    return "dmcp._native was built without CUDA (no nvcc then, or DMCP_CUDA=OFF)"


def _no_device() -> str:
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA"
    return "PyTorch finds no CUDA device"


def _no_triton() -> str:
    return "" if triton_installed() else "not installed: pip install 'dmcp[triton]'"
