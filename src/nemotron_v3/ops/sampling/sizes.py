"""How the kernels cut a vocabulary, and the memory that they share.

A row's logits are worked on in chunks, a program each. A search for the place where cumulated
probability reaches a number goes down LEVELS levels of BINS bins of equal width in the logit.
"""

from nemotron_v3.ops.common.host import interpreted

BINS, LEVELS = 16, 7  # 16^7 = 2^28 cells
CHUNK = 256 if interpreted() else 8192
QUERIES = 3  # how many searches a draw may need: top-k, top-p, the draw itself
STATS, RECORD = 4, 4  # numbers of a chunk, and of a search after each level


def blocks_of(vocabulary: int) -> int:
    return -(-vocabulary // CHUNK)


def parts_of(rows: int, vocabulary: int) -> dict[str, int]:
    """The arrays of a workspace by name, in elements of fp64."""
    blocks = rows * blocks_of(vocabulary)
    return {
        "stats": blocks * STATS,
        "floors": blocks,
        "tables": LEVELS * blocks * BINS * 2,
        "records": QUERIES * LEVELS * rows * RECORD,
        "kept": QUERIES * rows,
        "below": (rows * vocabulary + 1) // 2,  # of fp32
    }


def workspace_size(rows: int, vocabulary: int) -> int:
    """Elements, in fp64, of the workspace of `sample` for these logits."""
    return sum(parts_of(rows, vocabulary).values())
