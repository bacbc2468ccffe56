"""How the keys of a slot are split among programs, and the memory that their parts need."""

from nemotron_v3.ops.common.host import power_of_two

LEAST, PARTS = 128, 128


def split_of(capacity: int) -> int:
    """Places of a part: part i has places `i * split` to `(i + 1) * split - 1` of every slot.

    A hundred parts of a long context occupy a GPU even for one slot. Parts of a short one are short
    too, since it is their length that one waits for. It depends on the capacity alone, so a slot's
    result is the same, bit for bit, whatever the other slots hold, and in any other buffer of the
    same split.
    """
    return max(LEAST, power_of_two(capacity) // PARTS)


def parts_of(capacity: int) -> int:
    return -(-capacity // split_of(capacity))


def workspace_size(slots: int, num_heads: int, head_dim: int, capacity: int) -> int:
    """Elements, in fp32, of the workspace of `decode_attention` for these buffers.

    Each head of each part has its result and the logarithm of its sum.
    """
    return slots * num_heads * parts_of(capacity) * (head_dim + 1)
