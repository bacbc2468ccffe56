"""Shapes that the tests and benchmarks of decode_attention share."""

from dataclasses import dataclass

import torch

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`held` tokens of each slot; a negative number is a slot that is not active, with so many."""

    name: str
    held: tuple[int, ...]
    places: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float | None = None
    strided: bool = False


CASES = (
    Case("first-token", (0,), 64, 4, 2, 16),
    Case("one-part", (5, -3, 63), 64, 6, 2, 24, strided=True),
    Case("borders", (127, 128, 129, 0, 255), 256, 4, 1, 16),
    Case("idle", (-1, 200, -299), 300, 16, 1, 32, scale=0.3),
    Case("no-groups", (140, 7), 150, 3, 3, 64),
    Case("many-queries", (131,), 140, 17, 1, 16),
    Case("none-active", (-1, -150), 160, 2, 1, 16),
)


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    rows, J, P = len(case.held), case.kv_heads, case.head_dim
    buffers = [draw.normal(rows, J, case.places, P) for _ in range(2)]
    for row, held in enumerate(case.held):
        for buffer in buffers:
            buffer[row, :, abs(held) :] = 0  # nothing stands behind a slot's tokens
    tensors = {
        "qkv": draw.activation(rows, (case.heads + 2 * J) * P),
        "keys": buffers[0],
        "values": buffers[1],
    }
    options = {
        "positions": torch.tensor([abs(n) for n in case.held], device=device),
        "active": torch.tensor([n >= 0 for n in case.held], device=device),
        "num_heads": case.heads,
        "num_kv_heads": J,
        "scale": case.scale,
    }
    return Inputs(tensors, options)
