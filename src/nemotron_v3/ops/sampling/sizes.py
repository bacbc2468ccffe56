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


def parts_of(rows: int, vocabulary: int, draws: bool = True, cuts: bool = True) -> dict[str, int]:
    """The arrays of a workspace by name, in elements of fp64.

    Args:
        draws: whether any slot may draw: the likeliest token needs `stats` alone.
        cuts: whether any slot may be cut by top-k or top-p, which needs searches.
    """
    blocks = rows * blocks_of(vocabulary)
    searched = draws and cuts
    return {
        "stats": blocks * STATS,
        "floors": blocks if draws else 0,
        "tables": LEVELS * blocks * BINS * 2 if searched else 0,
        "records": QUERIES * LEVELS * rows * RECORD if searched else 0,
        "kept": QUERIES * rows if searched else 0,
        "below": (rows * vocabulary + 1) // 2 if draws else 0,  # of fp32
    }


def workspace_size(rows: int, vocabulary: int, *, draws: bool = True, cuts: bool = True) -> int:
    """Elements, in fp64, of the workspace of `sample` for these logits.

    Args:
        draws: whether `temperature` is given.
        cuts: whether `top_k` or `top_p` is.
    """
    return sum(parts_of(rows, vocabulary, draws, cuts).values())
