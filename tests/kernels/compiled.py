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
from nemotron_v3.ops.ssd.kernels import edges, pairs, scan, scan_backward, states
from nemotron_v3.ops.ssd.kernels.tables import Blocks

taps = import_module("nemotron_v3.ops.causal_conv1d.kernels.taps")
norm = import_module("nemotron_v3.ops.gated_rms_norm.kernels")

INT64 = {
    *("chunk_start", "chunk_end", "cu_seqlens", "document_chunks"),
    *("tile_document", "tile_first"),
}
INT32 = {"position", "seq_idx"}
FP32 = {
    *("D", "steps", "first", "last", "through", "partial", "dweight", "dskip"),
    *("rows", "columns", "across", "from_state", "to_state", "skip", "own"),
    *("log_sums", "deltas", "dk", "dv"),
}
NUMBERS = {"T", "H", "tiles", "sweeps", "places", "places_out", "size"}


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
    tile = {"P": 64, "N": 128, "HEADS_OF_GROUP": 8, "TILE": b.tile, "BLOCK_P": b.p, "BLOCK_N": b.n}
    tile |= {"PRECISION": b.precision, "HEADS": b.heads, "Q": b.chunk}
    tile |= dict.fromkeys(("stride_x", "stride_B", "stride_C"), wide)
    tile |= {"stride_y": inner, "stride_dy": packed}
    tile |= dict.fromkeys(("stride_dx", "stride_dB", "stride_dC"), wide)
    tile |= {"SLICE": b.back_sweep.slice, "STAGES_sweep": b.back_sweep.stages}
    sweep = tile | {"SLICE": b.sweep.slice, "STAGES": b.sweep.stages}
    sweep |= dict.fromkeys(("first", "last"))
    back = tile | {"STAGES": b.pairs.stages} | dict.fromkeys(("dfinal", "dinitial"))
    conv = {"W": 4, "SILU": True, "BIASED": True, "CONTINUED": False, "CONTINUES": False}
    conv |= {"stride_x": packed, "stride_dy": wide, "stride_dx": packed}
    forward = conv | {"BLOCK_T": 32, "BLOCK_C": 128, "BLOCK_W": 4}
    backward = conv | {"SEGMENT": 256, "UNROLL": 4, "BLOCK_C": 64}
    group = {"GROUPS": 8, "SIZE": 512, "BLOCK_T": 2, "BLOCK_D": 512, "GATED": True}
    group |= {"stride_y": inner, "stride_z": packed, "stride_dout": inner, "STAGES": 3}
    group |= {"stride_dy": packed, "stride_dz": packed}
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
        "conv forward": (taps.forward_kernel, forward, 4),
        "conv backward": (taps.backward_kernel, backward, 1),
        "norm forward": (norm.forward_kernel, group, 2),
        "norm backward": (norm.backward_kernel, group, 2),
        "sweep": (states.sweep_kernel, sweep, b.sweep.warps),
        "scan": (scan.forward_kernel, tile | {"STAGES": b.scan.stages}, b.scan.warps),
        "pairs": (pairs.pairs_kernel, back, b.pairs.warps),
        "edges": (edges.edges_kernel, tile, 8),
        "gradients": (
            scan_backward.gradients_kernel,
            tile | {"STAGES_dx": b.dx.stages, "STAGES_dB": b.dB.stages, "STAGES_dC": b.dC.stages},
            b.dx.warps,
        ),
    }
    found = {}
    for name, (kernel, constants, warps) in work.items():
        used = {k: v for k, v in constants.items() if k in kernel.arg_names}
        found[name] = resources(kernel, used, warps)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
