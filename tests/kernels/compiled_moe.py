"""Compiles the kernels of the mixture of experts for a Hopper GPU, without one: `compiled.py`.

Shapes: Nemotron-3 Nano in bf16; the router also at Super's 22 of 512.
"""

import json

import torch
from triton.compiler import ASTSource

from nemotron_v3.ops.experts.kernels import combine, gradients, products
from nemotron_v3.ops.experts.kernels.launch import FLOOR
from nemotron_v3.ops.experts.kernels.tables import Plan, Tiles
from nemotron_v3.ops.router.kernels import choose
from tests.kernels.compiled import needs

INT32 = {"source", "place", "offsets", "tile_first", "tile_expert"}
FP32 = {"weights", "partial", "logits", "bias", "scores", "dweights"}
NUMBERS = {"E", "R", "N", "K", "M", "T", "X", "D", "column", "rows_b", "rank"}
RANK = 16


def compiled(kernel, constants: dict, warps: int, descriptors: dict | None = None) -> dict:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in (descriptors or {}):
            rows, columns = descriptors[name]
            signature[name] = f"tensordesc<bf16[{rows}, {columns}]>"
        elif name in ("factor", "scale"):
            signature[name] = "fp32"
        else:
            kind = "i32" if name in INT32 else "i64" if name == "indices" else "bf16"
            kind = "*" + ("fp32" if name in FP32 else kind)
            signature[name] = "i32" if name in NUMBERS or name.startswith("stride_") else kind
            attributes[(place,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return needs(ASTSource(kernel, signature, places, attributes), warps)


def rows(
    tiles: Tiles, epilogue: int, gather: bool, transposed: bool, last: int, low: bool = False
) -> dict:
    mode = products.Mode(
        EPILOGUE=epilogue,
        FLOOR=FLOOR,
        GATHER=gather,
        TRANSPOSED=transposed,
        DESCRIPTOR=tiles.descriptor,
        LAST_N=last,
        EVEN_K=True,
        LOW=RANK if low else 0,
    )
    constants = {"TILES": tiles, "MODE": mode}
    if not low:
        constants |= {"low_a": None, "low_b": None}
    if epilogue != products.DOWN_BACKWARD.value:
        constants |= {"hidden": None, "partial": None}
    widths = {"b_desc": tiles.n, "last_desc": last}
    descriptors = {k: (tiles.k, n) if transposed else (n, tiles.k) for k, n in widths.items()}
    if not tiles.descriptor:
        constants |= dict.fromkeys(descriptors)
    return compiled(products.rows_kernel, constants, tiles.warps, descriptors)


def weights(tiles: Tiles, gather_a: bool, gather_b: bool, last: int) -> dict:
    mode = gradients.Mode(
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        LIVE=not gather_b,
        DESCRIPTOR=tiles.descriptor,
        LAST_N=last,
    )
    constants = {"TILES": tiles, "MODE": mode}
    descriptors = {"dense_desc": (tiles.k, tiles.n if gather_a else tiles.m)}
    descriptors["last_desc"] = (tiles.k, last if gather_a else tiles.m)
    if not last:
        constants["last_desc"] = None
    if not tiles.descriptor:
        constants |= dict.fromkeys(descriptors)
    return compiled(gradients.weights_kernel, constants, tiles.warps, descriptors)


def choice(E: int, K: int, block_t: int) -> dict:
    constants = {"SIZES": choose.Sizes(E, K, 1, 1, True, block_t, E, 32, 1)}
    return compiled(choose.choose_kernel, constants, 4)


def main() -> None:
    plan = Plan.of(torch.bfloat16)
    logits = {"BLOCK_T": 64, "BLOCK_E": 128, "BLOCK_D": 64, "STAGES": 3}
    joined = {"CHOICES": 6, "FLOOR": FLOOR, "BLOCK_T": 4, "BLOCK_X": 512, "LIVE": True}
    back = products.DOWN_BACKWARD.value
    found = {
        "up": rows(plan.up, products.UP.value, True, False, 64),
        "down": rows(plan.down, products.PLAIN.value, False, False, 128),
        "down backward": rows(plan.down_backward, back, True, True, 64),
        "up backward": rows(plan.up_backward, products.PLAIN.value, False, True, 128),
        "gradient of up": weights(plan.weights, False, True, 0),
        "gradient of down": weights(plan.weights, True, False, 64),
        "thin": rows(plan.thin(RANK), products.SCALED.value, True, False, 0),
        "updated up": rows(plan.up, products.UP.value, True, False, 64, low=True),
        "updated down": rows(plan.down, products.PLAIN.value, False, False, 128, low=True),
        "updated down backward": rows(plan.down_backward, back, True, True, 64, low=True),
        "gradient of A": weights(plan.thin_weights(RANK, tall=False), False, True, 0),
        "gradient of B": weights(plan.thin_weights(RANK, tall=True), True, False, 0),
        "gradient of A of down": weights(plan.thin_weights(RANK, tall=False), False, False, 64),
        "combine": compiled(combine.combine_kernel, joined, 4),
        "logits": compiled(choose.logits_kernel, logits, 4),
        "choose 6 of 128": choice(128, 6, 16),
        "choose 22 of 512": choice(512, 22, 4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
