"""Compiles the kernels for a Hopper GPU, without one, and prints what they need as JSON.

Run as a program: the process must not have chosen Triton's interpreter. Shapes: Nemotron-3 Nano.
"""

import json
import re
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nemotron_v3.ops.ssd.kernels import scan, scan_backward, states
from nemotron_v3.ops.ssd.kernels.tables import Blocks

taps = import_module("nemotron_v3.ops.causal_conv1d.kernels.taps")
norm = import_module("nemotron_v3.ops.gated_rms_norm.kernels")

INT64 = {"chunk_start", "chunk_end", "cu_seqlens", "document_chunks"}
INT32 = {"position", "seq_idx"}
FP32 = {
    *("D", "steps", "first", "last", "through", "partial", "dweight", "dskip"),
    *("direct", "diagonal", "across", "from_state", "to_state"),
}
NUMBERS = {"T", "H", "tiles"}


def resources(kernel, constants: dict, warps: int) -> dict[str, int]:
    # C is the channels of the convolution, and a matrix of the scan.
    numbers = NUMBERS | ({"C"} if "position" in kernel.arg_names else set())
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name == "eps":
            signature[name] = "fp32"
        elif name in numbers or name.startswith("stride_"):
            signature[name] = "i32"
        else:
            kind = "i64" if name in INT64 else "i32" if name in INT32 else "fp32"
            signature[name] = "*" + (kind if name in INT64 | INT32 | FP32 else "bf16")
        attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled": int(stack),
        "shared": made.metadata.shared,
        "wide_loads": len(re.findall(r"LD(?:G|GSTS)\.[^;]*128", code)),
        "tensor_cores": len(re.findall("HGMMA", code)),
    }


def main() -> None:
    b = Blocks.of(torch.bfloat16, 64, 128, 8)
    tile = {"P": 64, "N": 128, "HEADS_OF_GROUP": 8, "TILE": b.tile, "BLOCK_P": b.p, "BLOCK_N": b.n}
    tile |= {"STAGES": b.stages, "PRECISION": b.precision, "HEADS": b.heads, "SKIP": True}
    sweep = tile | {"Q": b.chunk, "SLICE": b.slice, "SLICES": 128 // b.slice, "STARTED": False}
    sweep["STAGES"] = b.sweep_stages
    conv = {"W": 4, "SILU": True, "BIASED": True, "CONTINUED": False, "CONTINUES": False}
    forward = conv | {"BLOCK_T": 32, "BLOCK_C": 128, "BLOCK_W": 4}
    backward = conv | {"SEGMENT": 128, "UNROLL": 4, "BLOCK_C": 64}
    group = {"GROUPS": 8, "SIZE": 512, "BLOCK_T": 2, "BLOCK_D": 512, "GATED": True}
    work = {
        "conv forward": (taps.forward_kernel, forward, 4),
        "conv backward": (taps.backward_kernel, backward, 1),
        "norm forward": (norm.forward_kernel, group, 2),
        "norm backward": (norm.backward_kernel, group, 2),
        "sweep": (states.sweep_kernel, sweep | {"REVERSE": False}, b.sweep_warps),
        "sweep back": (states.sweep_kernel, sweep | {"REVERSE": True}, 4),
        "scan": (scan.forward_kernel, tile | {"STAGES": b.scan_stages}, b.warps),
        "dC": (scan_backward.dC_kernel, tile, b.warps),
        "dB": (scan_backward.dB_kernel, tile, b.warps),
        "dx": (scan_backward.dx_kernel, tile, b.warps),
    }
    found = {}
    for name, (kernel, constants, warps) in work.items():
        used = {k: v for k, v in constants.items() if k in kernel.arg_names}
        found[name] = resources(kernel, used, warps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
