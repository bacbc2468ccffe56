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

from nemotron_v3.ops.attention.kernels import backward as attention_backward
from nemotron_v3.ops.attention.kernels import forward as attention_forward
from nemotron_v3.ops.attention.kernels.tables import Blocks as AttentionBlocks
from nemotron_v3.ops.ssd.kernels import (
    chunk_bwd_dcb,
    chunk_scan_bwd,
    chunk_scan_fwd,
    dA_boundary,
    state_passing,
)
from nemotron_v3.ops.ssd.kernels.tables import Blocks, Strides

taps = import_module("nemotron_v3.ops.causal_conv1d.kernels.taps")
conv = import_module("nemotron_v3.ops.causal_conv1d.kernels.launch")
norm = import_module("nemotron_v3.ops.gated_rms_norm.kernels")

INT64 = {
    *("chunk_start", "chunk_end", "cu_seqlens", "document_chunks"),
    *("tile_document", "tile_first"),
}
INT32 = {"position", "seq_idx"}
FP32 = {
    *("D", "dA_cumsum", "ddA_through", "initial_states", "dfinal_states"),
    *("ddA_rows", "ddA_columns", "ddA_across", "ddA_from_states", "ddA_to_states", "x_dot_dy"),
    *("CB_diagonal", "partial", "dweight", "log_sums", "deltas", "dk", "dv"),
}
NUMBERS = {"T", "H", "tiles", "passing_programs", "places", "places_out", "size"}


def resources(kernel, constants: dict, warps: int) -> dict[str, int]:
    # C is the channels of the convolution, and a matrix of the scan.
    numbers = NUMBERS | ({"C"} if "position" in kernel.arg_names else set())
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ("eps", "scale", "scale_of_scores"):
            signature[name] = "fp32"
        elif name in numbers or name.startswith("stride_"):
            signature[name] = "i32"
        else:
            kind = "i64" if name in INT64 else "i32" if name in INT32 else "fp32"
            signature[name] = "*" + (kind if name in INT64 | INT32 | FP32 else "bf16")
        if kernel.params[place].do_not_specialize or signature[name] == "fp32":
            continue  # nothing is known of it
        attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    return needs(source, warps)


def needs(source: ASTSource, warps: int) -> dict[str, int]:
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
    wide, inner, packed = 6144, 4096, 10304  # columns of x B C, of y, and of the projection
    strides = Strides(wide, wide, wide, inner, packed, wide, wide, wide)
    scan = {"STRIDES": strides, "SIZES": b.sizes, "STAGES": b.scan.stages}
    passing = scan | {"PASSING": b.passing} | dict.fromkeys(("initial_states", "final_states"))
    dcb = scan | {"PASSING": b.back_passing, "STAGES": b.dcb.stages}
    dcb |= dict.fromkeys(("dfinal_states", "dinitial_states"))
    absent = dict.fromkeys(("initial_states", "dfinal_states"))
    strides = {"STRIDES": conv.Strides(packed, wide, packed)}
    forward = absent | strides | {"SIZES": conv.ForwardSizes(4, 32, 128, 4, True)}
    backward = absent | strides | {"SIZES": conv.BackwardSizes(4, 256, 4, 64, True)}
    group = {"STRIDES": norm.Strides(inner, packed, inner, packed, packed)}
    group |= {"SIZES": norm.Sizes(8, 512, 2, 512), "STAGES": 3}
    a = AttentionBlocks.of(torch.bfloat16, 128, 16)
    heads = {"H": 32, "J": 2, "P": 128, "BLOCK_P": a.p, "HEADS": a.heads, "CACHED": False}
    heads |= {"STRIDE_q": 4096, "HEAD_q": 128, "STRIDE_dout": 4096, "HEAD_dout": 128}
    heads |= dict.fromkeys(("STRIDE_k", "STRIDE_v"), 256) | dict.fromkeys(("HEAD_k", "HEAD_v"), 128)
    heads |= {"PRECISION": a.precision, "EXACT": False, "held": None}

    def attention(kernel, tile):
        sizes = {"M": tile.m, "N": tile.n, "STAGES": tile.stages}
        return kernel, heads | sizes, tile.warps

    work = {
        "attention forward": attention(attention_forward.forward_kernel, a.forward),
        "attention dq": attention(attention_backward.dq_kernel, a.dq),
        "attention dkv": attention(attention_backward.dkv_kernel, a.dkv),
        "conv forward": (taps.causal_conv1d_fwd_kernel, forward, 4),
        "conv backward": (taps.causal_conv1d_bwd_kernel, backward, 1),
        "norm forward": (norm.gated_rms_norm_fwd_kernel, group, 2),
        "norm backward": (norm.gated_rms_norm_bwd_kernel, group, 2),
        "state passing": (state_passing.state_passing_kernel, passing, b.passing.warps),
        "chunk scan": (chunk_scan_fwd.chunk_scan_fwd_kernel, scan, b.scan.warps),
        "dcb": (chunk_bwd_dcb.chunk_bwd_dcb_kernel, dcb, b.dcb.warps),
        "dA boundary": (dA_boundary.dA_boundary_kernel, scan, 8),
        "chunk scan backward": (
            chunk_scan_bwd.chunk_scan_bwd_kernel,
            scan | {"STAGES": b.gradients},
            b.gradient_warps,
        ),
    }
    found = {}
    for name, (kernel, constants, warps) in work.items():
        used = {k: v for k, v in constants.items() if k in kernel.arg_names}
        found[name] = resources(kernel, used, warps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
