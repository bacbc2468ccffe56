"""Attention over long documents by PyTorch's own kernel, at a few fixed sizes.

On a Hopper GPU that is cuDNN's, the fastest there is for a long document. It makes a plan for each
shape that it has not seen, in a tenth of a second. So a document is filled up to one of eight sizes
an octave: what stands behind it is seen by nobody, since attention is causal.

Letters: n tokens of one document, H query heads, J key/value heads, P head width.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout

LONG = 8192  # tokens from which on it is worth a plan
SIZES_OF_OCTAVE = 8


class Run(NamedTuple):
    """Documents `first` to `end` of a layout: a long one, or all between two long ones."""

    first: int
    end: int
    is_long: bool
    layout: SequenceLayout


def fixed_size(length: int) -> int:
    """The size that a document of so many tokens is filled up to: at most an eighth more."""
    step = max(1, (1 << (length.bit_length() - 1)) // SIZES_OF_OCTAVE)
    return -(-length // step) * step


def takes(q: Tensor) -> bool:
    """Whether long documents of such queries are left to PyTorch's kernel."""
    narrow = q.dtype in (torch.float16, torch.bfloat16)
    # To a compiler lengths are symbols, which no choice may depend on. And cuDNN's backward adds in
    # another order in each run, which ours does not.
    aside = torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled()
    return q.is_cuda and narrow and not aside


def runs(layout: SequenceLayout) -> tuple[Run, ...] | None:
    """The documents in runs, or None where none is long."""
    return layout.derived("runs by length", _runs) if max(layout.lengths) >= LONG else None


def _runs(layout: SequenceLayout) -> tuple[Run, ...]:
    borders = {0, layout.num_documents}
    for document, length in enumerate(layout.lengths):
        if length >= LONG:
            borders |= {document, document + 1}
    ordered = sorted(borders)
    found = []
    for first, end in zip(ordered[:-1], ordered[1:], strict=True):
        lengths = layout.lengths[first:end]
        offsets = layout.cu_seqlens[first : end + 1] - layout.cu_seqlens[first]
        part = SequenceLayout((sum(lengths),), lengths, offsets, None)
        found.append(Run(first, end, lengths[0] >= LONG, part))
    return tuple(found)


def without_plans(q: Tensor) -> AbstractContextManager:
    """In it PyTorch's attention takes no kernel that makes a plan for each new shape."""
    if not q.is_cuda:
        return nullcontext()
    # Imported here: on a CPU nobody needs it.
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(kinds))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """One document: q `[n, H, P]`, k and v `[n, J, P]` -> `[n, H, P]`."""
    n = q.shape[0]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        # Heads that lie apart, as in a cache, gave wrong gradients on an H200.
        q, k, v = (t.contiguous() for t in (q, k, v))
    more = fixed_size(n) - n
    if more:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, more)) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        is_causal=True,
        scale=scale,
        dropout_p=dropout_p,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)[:n]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    mask: None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`ops.attention` in this form, each document by itself."""
    lengths = list(layout.lengths)
    if len(lengths) == 1:  # nothing to copy
        return attend(q, k, v, scale, dropout_p)
    documents = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*qkv, scale=scale, dropout_p=dropout_p) for qkv in documents])
