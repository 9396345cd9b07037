"""What nvcc made of the CUDA kernels, read from the module that was built; no device is needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from dmcp.backends import native_cuda, native_module

pytestmark = pytest.mark.skipif(
    not native_cuda(), reason="dmcp._native is not there or was built without CUDA"
)

ARCHITECTURES = {"sm_80", "sm_90"}
KERNELS = ("retain", "expected_cost", "norm_act")


def dump(option):
    """What cuobjdump, which comes with Triton, says of the native module."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("cuobjdump comes with Triton, which is not there")
    program = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [program, option, native_module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_kernel_stays_in_registers_on_every_architecture():
    usage = dump("--dump-resource-usage")
    parts = re.split(r"^arch = (\w+)$", usage, flags=re.MULTILINE)[1:]
    seen = dict.fromkeys(ARCHITECTURES, "")
    for architecture, listing in zip(parts[::2], parts[1::2], strict=True):
        seen[architecture] += listing
    assert seen.keys() == ARCHITECTURES
    for listing in seen.values():
        assert all(f"{source}_cu" in listing for source in KERNELS)
        used = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", listing)
        assert len(used) == listing.count(" Function ") > 250
        assert set(used) == {("0", "0")}


def test_vectors_are_read_and_written_at_once():
    kernels = dump("-ptx").split(".entry ")[1:]
    wide = [kernel for kernel in kernels if re.match(r"\w+(Rows|Planes)ILi[248]E", kernel)]
    assert len(wide) > 150
    for kernel in wide:
        assert "ld.global.nc.v4.u32" in kernel
        writes = not re.match(r"\w+(stats_kernel|sums_kernelILb0E)", kernel)
        assert writes == ("st.global.wb.v4.u32" in kernel)
