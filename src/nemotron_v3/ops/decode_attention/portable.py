"""Attention of one token a slot to a cache of fixed size, in plain PyTorch. Letters: see `op.py`.

Nothing here depends on a value on the host, so a CUDA graph can hold it. It reads all places.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.ops.common.long_attention import without_plans

COLUMNS, PLACES = 32, 128  # that a product in fp32 sums in one go


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    active: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    R, J, L, P = keys.shape
    q, k, v = qkv.unflatten(1, (-1, P)).split([num_heads, J, J], dim=1)
    on, inside = active != 0, (positions >= 0) & (positions < L)
    place = torch.where(on & inside, positions, 0)
    _put(keys, k, place, on & inside)
    _put(values, v, place, on & inside)
    seen = torch.arange(L, device=keys.device) <= place[:, None]
    if q.dtype in (torch.float32, torch.float64):
        y = _in_short_sums(q.unflatten(1, (J, -1)), keys, values, seen, scale)
    else:
        with without_plans(q):
            y = F.scaled_dot_product_attention(
                q[:, :, None],
                keys.to(q.dtype),
                values.to(q.dtype),
                attn_mask=seen[:, None, None],
                scale=scale,
                enable_gqa=num_heads != num_kv_heads,
            )
    y = y.reshape(R, num_heads * P)
    y = y.masked_fill(~inside[:, None], math.nan).masked_fill(~on[:, None], 0)
    return out.copy_(y)


def _in_short_sums(
    q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float | None
) -> Tensor:
    """Attention of `[R, J, H / J, P]` in fp32 or wider.

    A GPU's products in fp32 add up one after another, and over a long context the rounding of such
    a sum is all the error there is. So each is the sum of shorter ones.
    """
    P, L = keys.shape[3], keys.shape[2]
    factor: float = P**-0.5 if scale is None else scale
    scores = q.new_zeros(*q.shape[:3], L)
    for q_part, k_part in zip(q.split(COLUMNS, 3), keys.split(COLUMNS, 3), strict=True):
        scores += q_part @ k_part.to(q.dtype).transpose(2, 3)
    scores = (scores * factor).masked_fill(~seen[:, None, None], -math.inf)
    more = -L % PLACES
    weights = F.pad(torch.softmax(scores, 3), (0, more)).unflatten(3, (-1, PLACES))
    values = values.to(q.dtype)
    values = (F.pad(values, (0, 0, 0, more)) if more else values).unflatten(2, (-1, PLACES))
    return (weights.transpose(2, 3) @ values).sum(2)  # of [R, J, parts, H / J, P]


def _put(buffer: Tensor, new: Tensor, place: Tensor, on: Tensor) -> None:
    """Write `new` `[R, J, P]` to each row's place where that is `on`."""
    index = place[:, None, None, None].expand(-1, buffer.shape[1], 1, buffer.shape[3])
    newest = new[:, :, None].to(buffer.dtype)
    buffer.scatter_(2, index, torch.where(on[:, None, None, None], newest, buffer.gather(2, index)))
