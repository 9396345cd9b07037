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


def layout_of(channels, channels_last, reads):
    x = torch.empty(2, 28, 28, channels, dtype=dtype).movedim(-1, 1)
    x = place(x if channels_last else x.contiguous())
    return norm_act._matrix(*[x] * reads).arguments["layout"]


def report(kernel, warps, reads=0, writes=0, layout=None, **constants):
    if layout is not None:
        constants["layout"] = layout
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
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = {key: value for key, _, value in (word.partition(":") for word in usage.split())}
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "kernel": " ".join(map(str, (kernel.__name__, *constants.values()))),
        "warps": warps,
        "registers": int(values["REG"]),
        "stack": int(values["STACK"]) + int(values["LOCAL"]),
        "vec": layout.vec if layout else 0,
        "loads": [ptx.count("ld.global.v4.b32"), layout.loads * reads if layout else 0],
        "stores": [ptx.count("st.global.v4.b32"), layout.loads * writes if layout else 0],
        "loop": ptx.split("Loop Header", 1)[1].split("bra", 1)[0],
    }))


whole = norm_act.WARPS
none = dict.fromkeys(("residual", "grad_residual"))
for channels, last in ((144, True), (24, True), (9, True), (24, False)):
    one, two, three = (layout_of(channels, last, reads) for reads in (1, 2, 3))
    if channels != 24 or last:
        report(norm_act.norm_stats_kernel, whole, 1, 0, one)
    forward = {"before": False, "fold": False}
    report(norm_act.norm_act_kernel, whole, 1, 1, one, act="relu6", residual=None, **forward)
    report(norm_act.norm_act_sums_kernel, whole, 2, 0, two, act="hardswish", kinds=3, **none)
    report(norm_act.norm_act_grad_kernel, whole, 2, 1, two, act="silu")
    if channels == 144:
        forward = {"before": True, "fold": True}
        report(norm_act.norm_act_kernel, whole, 2, 1, two, act="relu", **forward)
        report(norm_act.norm_act_sums_kernel, whole, 3, 1, three, act="relu", kinds=2)
        report(norm_act.norm_act_grad_kernel, whole, 1, 1, two, act="identity", sums=None)
report(norm_act.norm_stats_total_kernel, 4)
report(norm_act.norm_act_sums_total_kernel, 4, kinds=3)
"""


@pytest.fixture(scope="module", params=["80 bf16", "80 fp32", "90 bf16", "90 fp16", "90 fp32"])
def kernels(request, tmp_path_factory):
    """What became of each kernel and variant for one architecture and dtype."""
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *request.param.split()],
        cwd=folder,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 20
    return found


def test_kernels_use_no_local_memory(kernels):
    assert [each["kernel"] for each in kernels if each["stack"]] == []


def test_programs_are_resident_together(kernels):
    from dmcp.kernels.norm_act import PROGRAMS_PER_SM

    allowed = 65536 // (32 * PROGRAMS_PER_SM)
    exceeding = [each for each in kernels if each["registers"] * each["warps"] > allowed]
    assert [each["kernel"] for each in exceeding] == []


def test_tiles_move_in_16_byte_accesses(kernels):
    aligned = [each for each in kernels if each["vec"] > 1]
    assert len(aligned) == 14
    for each in aligned:
        for kind in ("loads", "stores"):
            counted, wanted = each[kind]
            assert counted == wanted, f"{kind} of {each['kernel']}"


def test_sums_need_no_communication_in_the_loop(kernels):
    sums = [
        each for each in kernels if "sums_kernel" in each["kernel"] or "stats" in each["kernel"]
    ]
    assert len(sums) == 10
    for each in sums:
        assert "shfl" not in each["loop"], each["kernel"]
        assert "bar.sync" not in each["loop"], each["kernel"]
