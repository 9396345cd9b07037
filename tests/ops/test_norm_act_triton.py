"""The Triton kernels of `norm_act` as machine code, which needs no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A process of its own: Triton's cache folder and its choice of interpreter are process-wide.
COMPILED = """
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmcp.kernels import norm_act
from dmcp.ops.layout import place

architecture, name = int(sys.argv[1]), sys.argv[2]
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
tensors = {"x", "y", "grad", "residual", "grad_residual", "grad_x"}
sizes = {"rows", "channels", "pixels", "steps", "groups", "pitch", "grad_pitch", "residual_pitch"}
doubles = {"eps", "momentum", "count"}
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def matrix_of(channels, channels_last, reads):
    x = torch.empty(2, 28, 28, channels, dtype=dtype).movedim(-1, 1)
    x = place(x if channels_last else x.contiguous())
    return norm_act._matrix(*[x] * reads).arguments


def report(kernel, matrix=None, reads=0, writes=0, **constants):
    options, layout = {}, None
    if matrix is not None:
        options = {option: matrix[option] for option in ("num_warps", "maxnreg")}
        layout = constants["layout"] = matrix["layout"]
    signature, aligned = {}, {}
    for index, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in sizes:
            signature[argument] = "i32"
        elif argument in doubles:
            signature[argument] = "fp64"
        elif argument in tensors:
            signature[argument] = f"*{name}"
            aligned[index,] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "*fp32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", architecture, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: value for key, _, value in (word.partition(":") for word in usage.split())}
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "kernel": " ".join(map(str, (kernel.__name__, *constants.values()))),
        "bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "aligned": layout is not None and layout.vec * dtype.itemsize == 16,
        "loads": [ptx.count("ld.global.v4.b32"), layout.loads * reads if layout else 0],
        "stores": [ptx.count("st.global.v4.b32"), layout.loads * writes if layout else 0],
        "loop": ptx.split("Loop Header", 1)[1].split("bra", 1)[0],
    }))


for channels, last in ((144, True), (24, True), (9, True), (24, False)):
    one, two, three = (matrix_of(channels, last, reads) for reads in (1, 2, 3))
    alone = {"residual": None, "before": False, "fold": False}
    report(norm_act.norm_stats_kernel, one, 1)
    report(norm_act.norm_act_kernel, one, 1, 1, act="relu6", **alone)
    alone = {"residual": None, "grad_residual": None}
    report(norm_act.norm_act_sums_kernel, two, 2, act="hardswish", kinds=3, **alone)
    report(norm_act.norm_act_grad_kernel, two, 2, 1, act="silu")
    if channels == 144:
        report(norm_act.norm_act_kernel, two, 2, 1, act="relu", before=True, fold=True)
        report(norm_act.norm_act_sums_kernel, three, 3, 1, act="relu", kinds=2)
        report(norm_act.norm_act_grad_kernel, two, 1, 1, act="identity", sums=None)
report(norm_act.norm_stats_total_kernel)
report(norm_act.norm_act_sums_total_kernel, kinds=3)
"""


def compiled(architecture, dtype, folder):
    """What became of each kernel and variant."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(architecture), dtype],
        cwd=folder,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_no_local_memory(kernels):
    assert [each["kernel"] for each in kernels if each["bytes"]] == []


def check_16_byte_accesses(kernels):
    aligned = [each for each in kernels if each["aligned"]]
    assert len(aligned) == 15
    for each in aligned:
        for kind in ("loads", "stores"):
            counted, wanted = each[kind]
            assert counted == wanted, f"{kind} of {each['kernel']}"


def check_no_communication_in_the_loop(kernels):
    sums = ("norm_stats_kernel", "norm_act_sums_kernel")
    found = [each for each in kernels if each["kernel"].startswith(sums)]
    assert len(found) == 9
    for each in found:
        assert "shfl" not in each["loop"], each["kernel"]
        assert "bar.sync" not in each["loop"], each["kernel"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_ahead_of_time(architecture, dtype, tmp_path):
    kernels = compiled(architecture, dtype, tmp_path)
    assert len(kernels) == 21
    check_no_local_memory(kernels)
    check_16_byte_accesses(kernels)
    check_no_communication_in_the_loop(kernels)
