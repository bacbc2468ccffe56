"""How many tokens share a chunk, and in what their gradients of the weight are added up.

Letters: T packed tokens, V vocabulary.
"""

import torch

ROWS = 128  # chunks of several are whole multiples of so many tokens
# Of the logits of a chunk. On a GPU enough rows for products at full speed, and few additions to
# the gradient of the weight, each of which reads and writes it once; a CPU is as fast with less.
CPU_BYTES, BYTES = 1 << 24, 1 << 30
# Sums of so many chunks may be rounded to 16 bits in between (README.md, Precision).
ROUNDED_SUMS = 8


def chunk_rows(T: int, V: int, logits: torch.dtype, device: torch.device) -> int:
    """Tokens a chunk: as few chunks as the limit allows, of equal size."""
    limit = CPU_BYTES if device.type == "cpu" else BYTES
    chunks = max(1, -(-T * V * logits.itemsize // limit))
    rows = -(-T // chunks)
    return max(1, T if rows >= T else min(T, -(-rows // ROWS) * ROWS))


def sum_dtype(weight: torch.Tensor, chunks: int) -> torch.dtype:
    """What the gradient of the weight is added up in."""
    if chunks <= ROUNDED_SUMS:
        return weight.dtype
    return torch.promote_types(weight.dtype, torch.float32)
