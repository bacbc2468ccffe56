"""Compiles the kernels of linear cross entropy for a Hopper GPU, without one: `compiled.py`.

Shapes: the 131 072 words of Nemotron-3 in bf16.
"""

import json
from importlib import import_module

from triton.compiler import ASTSource

from tests.kernels.compiled import needs

kernels = import_module("nemotron_v3.ops.linear_cross_entropy.kernels")
BLOCK, WARPS = kernels._blocks(131072)
ALIGNED = ("V", "stride_logits", "stride_gradient")


def softmax(logits: str, weighted: bool, gradient: bool) -> dict:
    kernel = kernels.softmax_kernel
    constants = {
        "GRADIENT": gradient,
        "WEIGHTED": weighted,
        "NARROWER": gradient and logits == "fp32",
        "BLOCK_V": BLOCK,
    }
    absent = ("log_p", "log_z", "count") if weighted else ("dlog_p", "dlog_z")
    constants |= dict.fromkeys(absent if gradient else (*absent, "gradient", "count"))
    kinds = {"logits": f"*{logits}", "gradient": "*bf16", "targets": "*i64", "z_loss": "fp32"}
    kinds |= dict.fromkeys((*ALIGNED, "ignore_index"), "i32")
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else kinds.get(name, "*fp32")
        if name in ALIGNED or signature[name].startswith("*"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return needs(ASTSource(kernel, signature, places, attributes), WARPS)


def main() -> None:
    found = {
        "loss": softmax("bf16", weighted=False, gradient=True),
        "loss without gradient": softmax("bf16", weighted=False, gradient=False),
        "log-probabilities": softmax("fp32", weighted=False, gradient=False),
        "log-probabilities backward": softmax("fp32", weighted=True, gradient=True),
    }
    print(json.dumps({name: needed | {"warps": WARPS} for name, needed in found.items()}))


if __name__ == "__main__":
    main()
