"""The choice of one token a slot, as the definition says (README.md)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NO_TOKEN = -1  # of a slot whose logits are not finite


def sample(
    logits: Tensor,
    uniform: Tensor,
    drawn: Tensor,
    active: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    logprobs: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The reference: one slot after another, by lists, in `dtype`. Arguments: see `op.py`."""
    for row in active.nonzero()[:, 0].tolist():
        own = logits[row].to(dtype)
        shaped = own
        if penalty is not None and seen is not None:
            factor = penalty[row].to(dtype)
            less = torch.where(own > 0, own / factor, own * factor)
            shaped = torch.where(seen[row], less, own)
        likeliest = shaped.max()
        token = int((shaped == likeliest).nonzero()[0]) if own.max().isfinite() else NO_TOKEN
        if temperature is not None and temperature[row] > 0:
            number = uniform[drawn[row] % len(uniform), row]
            drawn[row] += 1
            if token != NO_TOKEN:
                x = (shaped - likeliest) / temperature[row].to(dtype)
                token = _draw(
                    x.tolist(),
                    float(number),
                    None if top_k is None else int(top_k[row]),
                    None if top_p is None else float(top_p[row]),
                    None if min_p is None else float(min_p[row]),
                )
        out[row] = token
        if seen is not None and token != NO_TOKEN:
            seen[row, token] = True
        if logprobs is not None:
            logprobs[row] = F.log_softmax(own, 0)[token]
    return out


def _draw(
    x: list[float], uniform: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> int:
    """From logits whose largest is 0."""
    is_cut = bool(top_k and top_k < len(x)) or (top_p is not None and top_p < 1)
    kept = list(range(len(x)))
    if is_cut:
        kept.sort(key=lambda token: -x[token])  # of equal ones, the first token first
        kept = kept[: top_k or None]
        total, before = math.fsum(math.exp(x[token]) for token in kept), 0.0
        reached = []
        for token in kept:
            if top_p is None or top_p >= 1 or before < top_p * total:
                reached.append(token)
            before += math.exp(x[token])
        kept = reached
    kept = [token for token in kept if math.exp(x[token]) >= (min_p or 0.0)]
    target = uniform * math.fsum(math.exp(x[token]) for token in kept)
    cumulated = 0.0
    for token in kept:
        cumulated += math.exp(x[token])
        if cumulated > target:
            return token
    return next(token for token in reversed(kept) if x[token] > -math.inf)
