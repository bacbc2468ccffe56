"""Between the ring of a batch of slots and the conv state of a cache.

Letters: R rows, C convolved channels, W conv taps. A ring is `[R, W, C]`, and the input of position
p stands at place `p % W`; a conv state is `[R, C, W]`, newest last. Both hold the last W inputs
before activation, so each is the other in another order.
"""

import torch
from torch import Tensor


def ring_of(conv: Tensor, positions: Tensor) -> Tensor:
    """The ring `[R, W, C]`, contiguous, of a conv state `[R, C, W]`.

    Args:
        positions: int64 `[R]`, the tokens that each row holds.
    """
    W = conv.shape[2]
    # At place i stands the input of the last position that is i modulo W.
    return _take(conv.transpose(1, 2), (_places(conv, W) - positions[:, None]) % W)


def conv_of(ring: Tensor, positions: Tensor) -> Tensor:
    """The conv state `[R, C, W]` of a ring `[R, W, C]`; `positions` as in `ring_of`."""
    W = ring.shape[1]
    return _take(ring, (_places(ring, W) + positions[:, None]) % W).transpose(1, 2)


def _places(like: Tensor, W: int) -> Tensor:
    return torch.arange(W, device=like.device)


def _take(columns: Tensor, places: Tensor) -> Tensor:
    """`columns[r, places[r]]` for each row r: `[R, W, C]`."""
    return columns.gather(1, places[..., None].expand(-1, -1, columns.shape[2]))
