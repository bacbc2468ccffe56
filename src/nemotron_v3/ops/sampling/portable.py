"""The choice of one token a slot in plain PyTorch. Letters: see `op.py`.

Nothing here depends on a value on the host, so a CUDA graph can hold it.
"""

import torch
from torch import Tensor

from nemotron_v3.ops.common.precision import WIDE
from nemotron_v3.ops.sampling.reference import NO_TOKEN


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
) -> Tensor:
    logits, on = logits.to(WIDE[logits.dtype]), active != 0
    is_finite = logits.amax(1).isfinite()  # NaN is the largest of all
    shaped = logits
    if seen is not None and penalty is not None:
        shaped = _penalize(logits, seen, penalty)
    tokens = shaped.argmax(1)
    if temperature is not None:
        number = uniform.gather(0, (drawn % len(uniform))[None])[0]
        drawn += on & (temperature > 0)
        x = shaped - shaped.amax(1, keepdim=True)
        x = x / _normal(temperature, x.dtype)[:, None]
        tokens = torch.where(temperature > 0, _draw(x, number, top_k, top_p, min_p), tokens)
    if seen is not None:
        seen.scatter_(
            1, tokens[:, None], seen.gather(1, tokens[:, None]) | (on & is_finite)[:, None]
        )
    if logprobs is not None:
        found = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
        logprobs.copy_(torch.where(on, found, logprobs))
    return out.copy_(torch.where(on, tokens.masked_fill(~is_finite, NO_TOKEN), out))


def _penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """A product out of the dtype's range is the last number in it; a logit of -inf stays."""
    info = torch.finfo(logits.dtype)
    factor = _normal(penalty, logits.dtype)[:, None]
    less = torch.where(logits > 0, logits / factor, logits * factor).clamp(info.min, info.max)
    return torch.where(seen & (logits > -torch.inf), less, logits)


def _normal(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers above 0 as normal ones of `dtype`: a kernel would take a smaller one for 0."""
    info = torch.finfo(dtype)
    return numbers.to(dtype).clamp(info.tiny, info.max)


def _draw(
    x: Tensor, number: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """From logits `[R, V]` whose largest is 0, at one uniform number a slot."""
    V, order = x.shape[1], None
    is_cut = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    if top_k is not None or top_p is not None:
        x, order = x.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        limit = torch.where((top_k > 0) & (top_k < V), top_k, V)[:, None]
        is_cut = is_cut | (limit < V)
        x = x.masked_fill(torch.arange(V, device=x.device) >= limit, -torch.inf)
    probabilities = torch.softmax(x, dim=1)
    if top_p is not None:
        part = top_p.to(x.dtype)[:, None]
        is_cut = is_cut | (part < 1)
        before = probabilities.cumsum(1) - probabilities
        probabilities = probabilities.masked_fill((part < 1) & (before >= part), 0)
    if min_p is not None:
        least = min_p.to(x.dtype)[:, None] * probabilities.amax(1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if order is None:
        return _invert(probabilities, number)
    # A slot that is cut neither way draws along the vocabulary, as where no slot is cut.
    in_order = torch.zeros_like(probabilities).scatter_(1, order, probabilities)
    index = _invert(torch.where(is_cut, probabilities, in_order), number)
    return torch.where(is_cut[:, 0], order.gather(1, index[:, None])[:, 0], index)


def _invert(probabilities: Tensor, number: Tensor) -> Tensor:
    """The first index whose cumulated probability passes a uniform number, never one of 0.

    In fp64: in fp32 over a large vocabulary the sum's rounding is as large as a rare token.
    """
    cumulated = probabilities.to(torch.float64).cumsum(1)
    total = cumulated[:, -1:]
    # The product may round up to the total itself, behind which there is no token.
    target = torch.minimum(number[:, None] * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulated, target, right=True)[:, 0]
    return index.clamp(max=probabilities.shape[1] - 1)  # where probabilities are no numbers
