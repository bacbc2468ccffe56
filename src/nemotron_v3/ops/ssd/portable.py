"""State-space duality, chunk by chunk, in plain PyTorch (Mamba-2, arXiv 2405.21060, section 6).

Letters: T packed tokens, D documents, H heads, P head width, G groups, R = H / G heads of a group,
N state; C chunks, n tiles of one size, q tokens of a tile.

Within a chunk the recurrence is a masked matrix product; between chunks one state per head passes
on. With `a_i` the sum of `dt A` over the tokens of the chunk up to and including i,

    y_i = sum_{j <= i} exp(a_i - a_j) (C_i . B_j) dt_j x_j  +  exp(a_i) S_in C_i  +  D x_i
    S_out = exp(a_last) S_in + sum_j exp(a_last - a_j) dt_j x_j B_j^T

Heads of a group share B and C: their products run once a group, never on a copy per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops._dispatch import wide
from nemotron_v3.ops.ssd.tiles import Bucket, Tiles, step_starts


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    layout: SequenceLayout,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = wide(x.dtype)
    tiles = Tiles.of(layout, chunk_size)
    dt = step_sizes(dt, dt_bias, dt_limit).to(dtype)
    streams = (x.to(dtype), dt, B.to(dtype), C.to(dtype))
    cut = [_Tile(bucket, *streams, A.to(dtype)) for bucket in tiles.buckets]
    if initial_states is None:
        initial_states = x.new_zeros(
            layout.num_documents, x.shape[1], x.shape[2], B.shape[2], dtype=dtype
        )
    states_in, final_states = _pass_states(cut, tiles, initial_states.to(dtype))
    y = _join(cut, tiles, states_in, like=streams[0])
    if D is not None:
        y = y + D.to(dtype)[:, None] * streams[0]
    return y.to(x.dtype), final_states


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_limit: tuple[float, float]) -> Tensor:
    """`clamp(softplus(dt + dt_bias), *dt_limit)`, fp32 or wider."""
    dt = dt.to(wide(dt.dtype))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    return F.softplus(dt).clamp(*dt_limit)


class _Tile:
    """All chunks of one tile size: what does not need the incoming state, and what does."""

    def __init__(self, bucket: Bucket, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor):
        x, dt, B, C = (_take(stream, bucket) for stream in (x, dt, B, C))
        if bucket.valid is not None:  # no step, no trace: decay 1, contribution 0
            dt = dt.masked_fill(~bucket.valid[..., None], 0)
        self.groups = B.shape[2]
        self.C = C.transpose(1, 2)  # [n, G, q, N]
        B = B.transpose(1, 2)  # [n, G, q, N]
        dtx = (dt[..., None] * x).transpose(1, 2)  # [n, H, q, P]
        self.a = (dt * A).cumsum(1).transpose(1, 2)  # [n, H, q]

        CB = self.C @ B.transpose(-1, -2)  # [n, G, q, q]
        L = _decay_between(self.a)  # [n, H, q, q]
        scores = (CB[:, :, None] * self._by_group(L)).flatten(1, 2)
        self.y = scores @ dtx  # [n, H, q, P]

        last = self.a[..., -1:]
        kept = torch.exp(last - self.a)[..., None] * dtx  # [n, H, q, P]
        kept = self._by_group(kept).transpose(-1, -2).flatten(2, 3)  # [n, G, R*P, q]
        self.states = (kept @ B).view(*dtx.shape[:2], dtx.shape[-1], -1)  # [n, H, P, N]
        self.decay = torch.exp(last)[..., None]  # [n, H, 1, 1]

    def _by_group(self, t: Tensor) -> Tensor:
        return t.unflatten(1, (self.groups, -1))

    def outputs(self, states_in: Tensor) -> Tensor:
        """`[n, H, P, N]` incoming states -> `[n, q, H, P]` outputs."""
        shared = self._by_group(states_in).flatten(2, 3)  # [n, G, R*P, N]
        carried = shared @ self.C.transpose(-1, -2)  # [n, G, R*P, q]
        carried = carried.unflatten(2, (-1, self.y.shape[-1])).flatten(1, 2)  # [n, H, P, q]
        y = self.y + torch.exp(self.a)[..., None] * carried.transpose(-1, -2)
        return y.transpose(1, 2)


def _take(stream: Tensor, bucket: Bucket) -> Tensor:
    """`[T, ...]` -> `[n, q, ...]`."""
    if bucket.index is not None:
        stream = stream.index_select(0, bucket.index.flatten())
    return stream.unflatten(0, (bucket.count, bucket.size))


def _decay_between(a: Tensor) -> Tensor:
    """`exp(a_i - a_j)` for j <= i and 0 elsewhere: `[n, H, q]` -> `[n, H, q, q]`."""
    q = a.shape[-1]
    future = torch.ones(q, q, dtype=torch.bool, device=a.device).triu(1)
    # Masked before the exponential: a_i - a_j is large and positive there, and inf * 0 is not 0.
    return (a[..., :, None] - a[..., None, :]).masked_fill(future, float("-inf")).exp()


def _pass_states(cut: list[_Tile], tiles: Tiles, initial_states: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk `[C, H, P, N]`, and after each document `[D, H, P, N]`."""
    state = initial_states.index_select(0, tiles.rank_order)
    if not cut:
        return initial_states[:0], initial_states
    states = torch.cat([tile.states for tile in cut]).index_select(0, tiles.step_chunks)
    decay = torch.cat([tile.decay for tile in cut]).index_select(0, tiles.step_chunks)
    before, finished = [], []
    for start, count in zip(step_starts(tiles.active), tiles.active, strict=False):
        finished.append(state[count:])
        state = state[:count]
        before.append(state)
        step = slice(start, start + count)
        state = torch.addcmul(states[step], decay[step], state)
    finished.append(state)
    final = torch.cat(finished[::-1]).index_select(0, tiles.document_order)
    return torch.cat(before).index_select(0, tiles.chunk_steps), final


def _join(cut: list[_Tile], tiles: Tiles, states_in: Tensor, like: Tensor) -> Tensor:
    """The tiles' outputs as packed tokens `[T, H, P]`."""
    if not cut:
        return torch.zeros_like(like)
    parts = states_in.split([bucket.count for bucket in tiles.buckets])
    y = torch.cat([tile.outputs(part).flatten(0, 1) for tile, part in zip(cut, parts, strict=True)])
    return y if tiles.token_order is None else y.index_select(0, tiles.token_order)
