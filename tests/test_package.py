import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmcp
from dmcp.backends import backends

native_only = pytest.mark.skipif(
    not backends()["native"].available, reason="there is no dmcp._native"
)


def run_python(code, folder):
    """Runs the code in a process of its own, outside the checkout; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_is_tested():
    distribution = importlib.metadata.distribution("dmcp")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install is the checkout itself")
    assert Path(dmcp.__file__).parent == Path(str(distribution.locate_file("dmcp")))


def test_version_is_that_of_the_distribution():
    assert dmcp.__version__ == importlib.metadata.version("dmcp")


def test_kernels_and_type_information_are_installed():
    spec = importlib.util.find_spec("dmcp.kernels.retain")
    assert spec is not None
    package = Path(dmcp.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "_native.pyi").is_file()


LEAN = """
import subprocess
started = []
original = subprocess.Popen.__init__
subprocess.Popen.__init__ = lambda self, *a, **k: (started.append(a), original(self, *a, **k))[1]
import sys
import torch
before = set(sys.modules)
import {module}
assert not torch.cuda.is_initialized(), "CUDA was initialised"
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert "triton" not in loaded, "Triton was imported"
assert "torch._inductor" not in sys.modules and "torch._dynamo" not in sys.modules
assert not started, f"a process was started: {{started}}"
extras = {{
    *("click", "rich", "tensorboard", "sklearn", "PIL", "kornia", "safetensors", "matplotlib"),
    *("jinja2", "lightning", "onnx", "onnxruntime", "onnxscript", "timm", "torchvision"),
}}
heavy = loaded & extras
assert not heavy, f"optional packages were imported: {{heavy}}"
"""


@pytest.mark.parametrize("module", ["dmcp", "dmcp.ops", "dmcp.backends"])
def test_import_is_lean(module, tmp_path):
    run_python(LEAN.format(module=module), tmp_path)


OPENMP = """
import re
import dmcp.ops, torch
offsets = torch.arange(0, 100_001, 10, dtype=torch.int32)
dmcp.ops.retain(torch.zeros(100_000), offsets)  # long enough for a parallel region
torch.zeros(1_000_000).exp()
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)[^/\\s]*\\.so\\S*", maps))), sep="\\n")
"""


@native_only
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="PyTorch without OpenMP")
def test_one_openmp_runtime(tmp_path):
    runtimes = run_python(OPENMP, tmp_path).split()
    assert len(runtimes) == 1, runtimes


@native_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs ldd")
def test_native_module_needs_no_driver_and_no_torch():
    from dmcp import _native

    listing = subprocess.run(
        ["ldd", _native.__file__], check=True, capture_output=True, text=True
    ).stdout
    libraries = re.findall(r"^\s*(\S+?)\.so", listing, flags=re.MULTILINE)
    assert "libc" in libraries
    assert not {"libcuda", "libcudart", "libtorch", "libc10", "libtorch_cpu"} & set(libraries)
