import os
import subprocess
import sys

import pytest
import torch

from dmcp.backends import backends, native_cuda

OPS = """
import torch
from dmcp.backends import backends
from dmcp.ops import retain, retain_reference

alpha = torch.linspace(-3, 3, 23, requires_grad=True)
offsets = torch.tensor([0, 9, 9, 23], dtype=torch.int32)
q = retain(alpha, offsets)
q.sum().backward()
assert torch.equal(q, retain_reference(alpha, offsets))
assert torch._C._dispatch_has_kernel_for_dispatch_key("dmcp::retain", "CPU") is False
print(*backends().values(), sep="\\n")
"""


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_every_backend_is_reported():
    report = backends()
    assert list(report) == ["eager", "native", "nodes", "cuda", "triton"]
    for name, backend in report.items():
        assert backend.name == name
        assert backend.reason
        assert str(backend).split()[:2] == [name, "yes" if backend.available else "no"]
    assert report["eager"].available


def test_gpu_backends_need_a_device():
    has_device = torch.cuda.is_available()
    assert backends()["cuda"].available == (native_cuda() and has_device)
    if not has_device:
        assert not backends()["triton"].available


@pytest.mark.parametrize(
    "op", ["retain", "retain_backward", "expected_cost", "expected_cost_backward"]
)
def test_an_available_backend_is_the_one_that_runs(op):
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"dmcp::{op}", "CPU") == backends()["native"].available
    if native_cuda():
        assert has_kernel(f"dmcp::{op}", "CUDA")


def test_eager_on_request(tmp_path):
    done = python(OPS, tmp_path, DMCP_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    eager, *others = done.stdout.splitlines()
    assert eager.split()[:2] == ["eager", "yes"]
    assert len(others) == 4
    assert all("disabled by DMCP_BACKEND=eager" in line for line in others)


def test_triton_instead_of_cuda_on_request(tmp_path):
    code = (
        "from dmcp.backends import backends, native_cuda\nprint(native_cuda(), backends()['cuda'])"
    )
    done = python(code, tmp_path, DMCP_BACKEND="triton")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False cuda    no")


def test_unknown_backend_is_refused(tmp_path):
    done = python("import dmcp.ops", tmp_path, DMCP_BACKEND="fast")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "dmcp.errors.ConfigError: DMCP_BACKEND must be one of auto, triton, eager"
    )
    assert "'fast'" in last


def test_missing_native_module_leaves_the_eager_ops(tmp_path):
    # What a failed build leaves behind: no such module to import.
    hide = "import sys; sys.modules['dmcp._native'] = None\n"
    done = python(hide + OPS, tmp_path, DMCP_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stdout.splitlines()[1:3], ["native", "nodes"], strict=True):
        assert line.split()[:2] == [name, "no"]
        assert "not built" in line
        assert "pip install -v ." in line


def test_nodes_are_built_with_the_kernels():
    """As PyTorch is installed before the package: see the README."""
    report = backends()
    assert report["nodes"].available == report["native"].available, report["nodes"].reason


def test_nodes_of_another_pytorch_are_left_alone(tmp_path):
    other = "import torch; torch.__version__ = '2.999.0'\n"
    report = "from dmcp.backends import backends\nprint(backends()['nodes'])"
    done = python(other + report, tmp_path, DMCP_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["nodes", "no"]
    assert "not built for PyTorch 2.999" in done.stdout or not backends()["native"].available
