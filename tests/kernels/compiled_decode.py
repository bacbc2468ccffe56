"""Compiles the kernels of decoding for GPUs that are not here: `compiled.py`.

Shapes: Nemotron-3 Nano in bf16, states in fp32. Every architecture that the package is used on must
compile; what is held is Hopper's.
"""

import json
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from tests.kernels.compiled import needs

attention = import_module("nemotron_v3.ops.decode_attention.kernels")
mamba2 = import_module("nemotron_v3.ops.decode_mamba2.kernels")
sampling = import_module("nemotron_v3.ops.sampling.kernels.launch")

OTHERS = {"positions": "*i64", "active": "*i1"}
OTHERS |= dict.fromkeys(("R", "V", "n", "stride", "blocks", "parts", "places", "level"), "i32")
OTHERS |= dict.fromkeys(("drawn", "top_k"), "*i64") | {"seen": "*u8"}
OTHERS |= dict.fromkeys(
    ("uniform", "stats", "floors", "table", "tables", "records", "kept"), "*fp64"
)
OTHERS |= dict.fromkeys(("low", "high", "scale"), "fp32")
ALIGNED = {("V", "i32"), ("stride", "i32")}
OLDER = (80, 89)
HEADS = {"H": 32, "J": 2, "P": 128, "BLOCK_P": 128}


def compiled(
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    fp32: set[str],
    others: dict[str, str] | None = None,
) -> dict[str, int]:
    kinds = dict.fromkeys(fp32, "*fp32") | OTHERS | (others or {})
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        kind = kinds.get(name, "*bf16")
        signature[name] = "constexpr" if name in constants else kind
        if signature[name].startswith("*") or (name, signature[name]) in ALIGNED:
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, places, attributes)
    for architecture in OLDER:
        target = GPUTarget("cuda", architecture, 32)
        compile(source, target=target, options={"num_warps": warps})
    return needs(source, warps) | {"warps": warps}


def step(heads: int) -> dict[str, int]:
    cut = mamba2.blocks(heads, 64, 128)
    sizes = {"stride": 10304, "H": 64, "P": 64, "G": 8, "N": 128, "W": 4, "BIASED": True}
    sizes |= {"PDL": False}
    constants = sizes | {"BLOCK_P": cut.p, "BLOCK_N": 128, "BLOCK_W": 4}
    fp32 = {"ssm", "dt_bias", "A_log", "D", "out"}
    return compiled(mamba2.step_kernel, constants, cut.warps, fp32)


def parts() -> dict[str, int]:
    cut = attention.tile(torch.bfloat16, 128)
    constants = HEADS | {"stride": 4608, "M": 16, "N": cut.n, "SPLIT": 1024, "STAGES": cut.stages}
    constants |= {"PDL": False}
    constants |= {"WIDE": False, "WHOLE": False}
    return compiled(attention.parts_kernel, constants, cut.warps, {"partial", "log_sums"})


def combine() -> dict[str, int]:
    constants = HEADS | {"BLOCK": attention.COMBINED, "SPLIT": 1024}
    constants |= {"STAGES": attention.COMBINE_STAGES, "PDL": False}
    fp32 = {"partial", "log_sums"}
    return compiled(attention.combine_kernel, constants, attention.COMBINE_WARPS, fp32)


def sample(kernel: Any, **constants: Any) -> dict[str, int]:
    """With everything asked for, over the 131 072 words of Nemotron-3."""
    asked = ("PENALIZED", "FLOORED", "CUT", "SAMPLED", "BY_K", "BY_P", "LOGGED", "COUNTED", "FIRST")
    constants |= dict.fromkeys(asked, True)
    constants |= {"SIZE": 8192, "ROWS": 8, "COLUMNS": 1024, "BLOCK_C": 16}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    fp32 = {"below", "temperature", "top_p", "min_p", "penalty", "logprobs", "logits"}
    others = {"out": "*i64"}
    return compiled(kernel, constants, sampling.WARPS, fp32, others)


def main() -> None:
    found = {
        "attention, parts": parts(),
        "attention, combined": combine(),
        "mamba2, one slot": step(64),
        "mamba2, many slots": step(64 * 64),
        "sampling, largest": sample(sampling.passes.stats_kernel),
        "sampling, scaled": sample(sampling.passes.scale_kernel),
        "sampling, searched": sample(sampling.passes.descend_kernel, QUERY=2, PREVIOUS=1),
        "sampling, finished": sample(sampling.finish.finish_kernel),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
